"""Re-exports the names of `data.datasets`, at the path of version 0.1."""

from psclip_optax.training.data.datasets import dataset_shape as dataset_shape
from psclip_optax.training.data.datasets import load_dataset as load_dataset
from psclip_optax.training.data.splits import Dataset as Dataset
from psclip_optax.training.data.splits import DatasetShape as DatasetShape
from psclip_optax.training.data.splits import Split as Split
from psclip_optax.training.data.splits import check_images as check_images
from psclip_optax.training.data.splits import check_split as check_split
from psclip_optax.training.data.splits import random_generator as random_generator
from psclip_optax.training.data.splits import to_unit_scale as to_unit_scale
from psclip_optax.training.data.splits import train_validation_split as train_validation_split
