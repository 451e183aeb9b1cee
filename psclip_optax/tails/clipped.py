"""Rank samples by how much they were clipped during training."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeAlias, get_args

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from psclip_optax.arrays import described
from psclip_optax.table import table
from psclip_optax.thresholds import concrete

By: TypeAlias = Literal["scale", "norm", "loss"]

_EXPECTED = (
    "most_clipped expects index, scale, norm and loss of one shape, one entry for each time that a "
    "sample was in a batch"
)
_NUM_PRINTED = 10


@dataclasses.dataclass(frozen=True, eq=False)
class MostClipped:
    """Lists samples with statistics of their clipping, most clipped first; `print` shows ten.

    Attributes:
      index: int [m], the index of the sample.
      count: int [m], how often it was seen.
      mean_scale: float [m], the mean of γ_k: 1 if it was never clipped.
      median_norm: float [m], the median of ‖g_k‖ before clipping.
      mean_loss: float [m], the mean of its loss; None if no losses were given.
    """

    index: np.ndarray
    count: np.ndarray
    mean_scale: np.ndarray
    median_norm: np.ndarray
    mean_loss: np.ndarray | None

    def __len__(self) -> int:
        return len(self.index)

    def __str__(self) -> str:
        shown = min(len(self), _NUM_PRINTED)
        head = ["index", "seen", "mean factor", "median norm", "mean loss"]
        losses = [] if self.mean_loss is None else [self.mean_loss]
        columns = [self.mean_scale, self.median_norm, *losses]
        rows = [
            [str(self.index[i]), str(self.count[i]), *(f"{column[i]:.3g}" for column in columns)]
            for i in range(shown)
        ]
        lines = table([head[: 2 + len(columns)], *rows])
        return "\n".join([*lines, f"{shown} of {len(self)} samples, those clipped most first"])


def most_clipped(
    index: npt.ArrayLike,
    scale: npt.ArrayLike,
    norm: npt.ArrayLike,
    loss: npt.ArrayLike | None = None,
    *,
    by: By = "scale",
) -> MostClipped:
    """Ranks samples by how much they were clipped during training.

    Samples with wrong labels or broken inputs have long gradients until the model has memorised
    them, so the most clipped samples are worth a look.

    Args:
      index: int, of any shape, ≥ 0: the sample of each entry, such as its index in the training
        set. A sample may occur any number of times.
      scale: real, of the same shape, in [0, 1]: γ_k, as in `ClipStats.scales`; 0 if the sample was
        dropped. NaN marks padding, as in a train step with `return_samples`, and is ignored.
      norm: real, of the same shape, ≥ 0: ‖g_k‖ before clipping. A norm that is not finite counts as
          ∞.
      loss: real, of the same shape: the loss of the sample in its batch, or None. A loss that is
        not finite counts as ∞.
      by: the criterion: "scale", the smallest mean scale first; "norm", the largest median norm
        first; "loss", the largest mean loss first. Ties are ordered by the median norm, then by the
        index.

    Returns:
      One row for each sample that was seen.

    Raises:
      TypeError: an argument is traced or has the wrong dtype.
      ValueError: the shapes differ, numbers are out of range, no sample counts, `by` is unknown, or
        it is "loss" without losses.

    Examples:
      >>> import numpy as np
      >>> import psclip_optax as psc
      >>> index = np.array([[0, 1, 2], [2, 0, 1]])  # two steps of three samples
      >>> scale = np.array([[1.0, 0.5, 0.1], [0.3, 1.0, 0.9]])
      >>> norm = np.array([[1.0, 2.0, 10.0], [4.0, 1.0, 1.5]])
      >>> found = psc.tails.most_clipped(index, scale, norm)
      >>> print(found)
      index  seen  mean factor  median norm
      -------------------------------------
      2      2     0.2          7
      1      2     0.7          1.75
      0      2     1            1
      3 of 3 samples, those clipped most first

    References:
      Northcutt, Jiang and Chuang, Confident Learning: Estimating Uncertainty in Dataset Labels,
      Journal of Artificial Intelligence Research 70, 2021, on finding wrong labels by training.
    """
    if by not in get_args(By):
        raise ValueError(f'by is "scale", "norm" or "loss", got {by!r}')
    if by == "loss" and loss is None:
        raise ValueError('by="loss" ranks by losses, but none were given; pass loss=…')
    given = {"index": index, "scale": scale, "norm": norm} | (
        {} if loss is None else {"loss": loss}
    )
    arrays = {name: _as_numbers(name, values) for name, values in given.items()}
    _check_shapes(arrays)
    counted = ~np.isnan(arrays["scale"])
    arrays = {name: values[counted] for name, values in arrays.items()}
    _check_ranges(arrays)
    return _ranked(_by_sample(arrays), by)


def _as_numbers(name: str, values: npt.ArrayLike) -> np.ndarray:
    kinds = {"index": ("integers", (jnp.integer,))}
    wanted, dtypes = kinds.get(name, ("real numbers", (jnp.integer, jnp.floating)))
    expected = f"{name}: most_clipped expects an array of {wanted}"
    try:
        known = concrete(values)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{expected}, got {described(values)}") from error
    if known is None:
        raise TypeError(
            f"{expected} that is concrete, on the host, got a traced one; return it from the "
            "jitted function and call most_clipped outside of it"
        )
    if not any(jnp.issubdtype(known.dtype, dtype) for dtype in dtypes):
        raise TypeError(f"{expected}, got {described(known)}")
    return known.astype(np.int64 if name == "index" else np.float64)


def _check_shapes(arrays: dict[str, np.ndarray]) -> None:
    if len({values.shape for values in arrays.values()}) > 1:
        came = ", ".join(f"{name} {list(values.shape)}" for name, values in arrays.items())
        raise ValueError(
            f"{_EXPECTED}, got {came}; by group, ‖g_k‖ is the root of the sum of squares of its "
            "norms, as a train step with return_samples gives it"
        )


def _check_ranges(arrays: dict[str, np.ndarray]) -> None:
    index, scale, norm = (arrays[name] for name in ("index", "scale", "norm"))
    if not index.size:
        raise ValueError(f"{_EXPECTED}, but no sample counts; leave out batches of padding alone")
    if index.min() < 0:
        raise ValueError(f"index: expected 0 or more, got {index.min()}")
    if scale.min() < 0 or scale.max() > 1:
        outside = scale[(scale < 0) | (scale > 1)][0]
        raise ValueError(f"scale: expected factors in [0, 1], as ClipStats.scales, got {outside:g}")
    if np.nanmin(norm, initial=0) < 0:
        raise ValueError(f"norm: expected 0 or more, got {np.nanmin(norm):g}")


def _by_sample(arrays: dict[str, np.ndarray]) -> MostClipped:
    index, place, count = np.unique(arrays["index"], return_inverse=True, return_counts=True)
    norms = _infinite_where_not_finite(arrays["norm"])
    ordered = norms[np.lexsort((norms, place))]
    first = np.cumsum(count) - count
    low, high = ordered[first + (count - 1) // 2], ordered[first + count // 2]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.bincount(place, values, minlength=len(index)) / count

    losses = arrays.get("loss")
    return MostClipped(
        index=index,
        count=count,
        mean_scale=mean(arrays["scale"]),
        median_norm=low / 2 + high / 2,
        mean_loss=None if losses is None else mean(_infinite_where_not_finite(losses)),
    )


def _infinite_where_not_finite(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values), values, np.inf)


def _ranked(samples: MostClipped, by: str) -> MostClipped:
    losses = samples.mean_loss
    keys = {"scale": samples.mean_scale, "norm": -samples.median_norm}
    keys |= {} if losses is None else {"loss": -losses}
    order = np.lexsort((samples.index, -samples.median_norm, keys[by]))
    return MostClipped(
        samples.index[order],
        samples.count[order],
        samples.mean_scale[order],
        samples.median_norm[order],
        None if losses is None else losses[order],
    )
