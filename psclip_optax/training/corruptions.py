"""Re-exports the names of `data.corruptions`, at the path of version 0.1."""

from psclip_optax.training.data.corruptions import corrupt as corrupt
from psclip_optax.training.data.corruptions import with_label_noise as with_label_noise
from psclip_optax.training.data.corruptions import with_student_t_pixels as with_student_t_pixels
