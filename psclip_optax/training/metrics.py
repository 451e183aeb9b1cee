"""Re-exports the names of `run.metrics`, at the path of version 0.1."""

from psclip_optax.training.run.metrics import append_record as append_record
from psclip_optax.training.run.metrics import commit as commit
from psclip_optax.training.run.metrics import cut_back as cut_back
from psclip_optax.training.run.metrics import read_intact_records as read_intact_records
from psclip_optax.training.run.metrics import read_records as read_records
