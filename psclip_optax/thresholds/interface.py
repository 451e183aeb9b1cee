"""Types of thresholds: a callable, and one that follows norms in a state."""

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
        """Give the state after a batch with these norms."""
        ...


class AdaptiveThreshold(NamedTuple, Generic[StateT]):
    """A threshold that follows the norms it has seen: three pure functions, as Optax has two.

    Between a batch and the next its state is the caller's to keep: it is a pytree of arrays, to be
    checkpointed, replicated over devices and carried through `jax.lax.scan`.

    Attributes:
      init: `init() -> state`, before any norm was seen.
      threshold: `threshold(state) -> threshold`, from the norms seen up to now; a pytree, and a
        callable from positions [n] to norms τ [n].
      update: `update(state, norms, sample_mask=None, *, axis_name=None) -> state`, after a batch
        with these norms, float [n]. Those that are masked (bool [n], False for padding) or not
        finite have no say; a batch without any that has leaves the state as it is. Under
        `jax.shard_map` `axis_name` is the mesh axis (or axes) over which the norms are
        sharded; the state is then that of the whole batch, the same on all devices.
      is_new: `is_new(state) -> bool []`, whether too little was seen for a threshold, so that the
        next batch is to be clipped by its own norms: at `threshold(update(state, norms))`. None,
        the default, where `threshold(state)` is right from the start.
    """

    init: Callable[[], StateT]
    threshold: Callable[[StateT], Threshold]
    update: Update[StateT]
    is_new: Callable[[StateT], jax.Array] | None = None
