"""Re-exports the image classifiers."""

from psclip_optax.training.models.classifiers import MLP as MLP
from psclip_optax.training.models.classifiers import AlexNet as AlexNet
from psclip_optax.training.models.classifiers import ResNet18 as ResNet18
from psclip_optax.training.models.classifiers import SmallCNN as SmallCNN
from psclip_optax.training.models.classifiers import build_model as build_model
