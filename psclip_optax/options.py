"""Define the options of `clipped_value_and_grad`, and check them."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeAlias, TypedDict, get_args

from jax import lax

from psclip_optax import clipping
from psclip_optax.arrays import is_integer
from psclip_optax.clipping import OnNonfinite
from psclip_optax.engine.units import Unit
from psclip_optax.typing import AxisName, InAxes

Mode: TypeAlias = Literal["auto", "one_pass", "two_pass", "vmap"]
ClipAt: TypeAlias = Literal["sample", "micro-batch"]
Reduction: TypeAlias = Literal["mean", "sum"]


class ClipOptions(TypedDict, total=False):
    """The options of `clipped_value_and_grad`, except those that change what a call returns."""

    in_axes: InAxes
    keep_batch_dim: bool
    microbatch_size: int | None
    mode: Mode
    on_nonfinite: OnNonfinite
    axis_name: AxisName
    spmd_axis_name: AxisName
    memory_limit_bytes: int | None
    clip_at: ClipAt
    reduction: Reduction
    norm_precision: lax.Precision | None


class Options(NamedTuple):
    """The arguments of `clipped_value_and_grad`, except the loss and its threshold."""

    has_aux: bool
    in_axes: InAxes
    keep_batch_dim: bool
    microbatch_size: int | None
    mode: Mode
    on_nonfinite: OnNonfinite
    axis_name: AxisName
    spmd_axis_name: AxisName
    memory_limit_bytes: int | None
    clip_at: ClipAt
    reduction: Reduction
    norm_precision: lax.Precision | None

    def unit(self, num_samples: int) -> Unit:
        """Return the unit that is clipped as a whole, in a batch of `num_samples`."""
        if self.clip_at == "sample":
            return Unit()
        return Unit(max(1, min(self.microbatch_size or 1, num_samples)), is_micro_batch=True)

    def checked(self) -> Options:
        """Refuse options that are out of range."""
        clipping.check_on_nonfinite(self.on_nonfinite)
        _check_mode(self.mode)
        _check_clip_at(self.clip_at, self.microbatch_size)
        _check_reduction(self.reduction)
        _check_norm_precision(self.norm_precision)
        return self._replace(
            microbatch_size=checked_size("microbatch_size", self.microbatch_size),
            memory_limit_bytes=checked_size("memory_limit_bytes", self.memory_limit_bytes),
        )


def checked_size(name: str, size: int | None) -> int | None:
    if size is None:
        return None
    if not is_integer(size) or size < 1:
        raise ValueError(f"{name} is a positive int or None, got {size!r}")
    return int(size)


def _check_mode(mode: str) -> None:
    known = get_args(Mode)
    if mode not in known:
        raise ValueError(f"mode is one of {', '.join(map(repr, known))}, got {mode!r}")


def _check_reduction(reduction: str) -> None:
    if reduction not in ("mean", "sum"):
        raise ValueError(f'reduction is "mean" or "sum", got {reduction!r}')


def _check_norm_precision(precision: object) -> None:
    if precision is not None and not isinstance(precision, lax.Precision):
        raise TypeError(
            "norm_precision is a jax.lax.Precision, such as jax.lax.Precision.HIGHEST, or None for "
            f"JAX's default, got {precision!r}"
        )


def _check_clip_at(clip_at: str, microbatch_size: int | None) -> None:
    if clip_at not in ("sample", "micro-batch"):
        raise ValueError(f'clip_at is "sample" or "micro-batch", got {clip_at!r}')
    if clip_at == "micro-batch" and microbatch_size is None:
        raise ValueError(
            'clip_at="micro-batch" needs microbatch_size, the number of samples in each; that of '
            "the whole batch clips the batch's mean gradient"
        )
