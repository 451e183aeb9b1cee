"""Re-exports the names of `run.checkpoints`, at the path of version 0.1."""

from psclip_optax.training.run.checkpoints import Restored as Restored
from psclip_optax.training.run.checkpoints import open_checkpoints as open_checkpoints
from psclip_optax.training.run.checkpoints import restore_newest as restore_newest
from psclip_optax.training.run.checkpoints import save_checkpoint as save_checkpoint
from psclip_optax.training.run.checkpoints import saved_norms as saved_norms
