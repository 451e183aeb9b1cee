"""Define the types of thresholds: a callable, and an adaptive threshold with a state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, Protocol, TypeVar

import jax

from psclip_optax.typing import AxisName, Threshold

__all__ = ["AdaptiveThreshold", "Threshold", "Update"]

StateT = TypeVar("StateT")


class Update(Protocol[StateT]):
    """The `update` of an adaptive threshold."""

    def __call__(
        self,
        state: StateT,
        norms: jax.typing.ArrayLike,
        sample_mask: jax.typing.ArrayLike | None = None,
        *,
        axis_name: AxisName = None,
    ) -> StateT:
        """Return the state after a batch with these norms."""
        ...


class AdaptiveThreshold(NamedTuple, Generic[StateT]):
    """A threshold that follows the norms seen so far, as a few pure functions.

    The caller carries its state between batches, as with an Optax optimizer. The state is a pytree
    of arrays, which can be checkpointed, replicated over devices and carried through
    `jax.lax.scan`.

    Attributes:
      init: `init() -> state`, the state before any norm was seen.
      threshold: `threshold(state) -> threshold`, computed from the norms seen so far. The result is
        a pytree, and a callable from positions [n] to norms τ [n].
      update: `update(state, norms, sample_mask=None, *, axis_name=None) -> state`, the state after
        a batch with these norms, float [n]. Norms that are masked (bool [n], False for padding) or
        not finite are ignored; a batch without other norms does not change the state. Under
        `jax.shard_map` `axis_name` is the mesh axis (or axes) over which the norms are sharded; the
        state is then that of the whole batch, the same on all devices.
      is_new: `is_new(state) -> bool []`, whether too few norms were seen to set a threshold. The
        next batch is then clipped by its own norms, at `threshold(update(state, norms))`. None, the
        default, means that `threshold(state)` is valid from the start.
    """

    init: Callable[[], StateT]
    threshold: Callable[[StateT], Threshold]
    update: Update[StateT]
    is_new: Callable[[StateT], jax.Array] | None = None
