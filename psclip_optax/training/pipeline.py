"""Re-exports the names of `data.pipeline`, at the path of version 0.1."""

from psclip_optax.training.data.pipeline import Batch as Batch
from psclip_optax.training.data.pipeline import evaluation_batches as evaluation_batches
from psclip_optax.training.data.pipeline import iterate as iterate
from psclip_optax.training.data.pipeline import train_batches as train_batches
