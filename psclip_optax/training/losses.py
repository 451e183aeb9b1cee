"""Offers the names of `models.losses` where version 0.1 had them."""

from psclip_optax.training.models.losses import classification_loss as classification_loss
