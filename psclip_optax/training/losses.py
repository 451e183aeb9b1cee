"""Re-exports the names of `models.losses`, at the path of version 0.1."""

from psclip_optax.training.models.losses import classification_loss as classification_loss
