"""Define the interface of routes: the sites they take, norms, sums, and costs."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax.engine.analysis.sites import Site, of_parameter
from psclip_optax.engine.analysis.views import Path, aval, run_equation
from psclip_optax.engine.parts import Parts, in_parts

# By site, its inputs and the cotangents of its output, both [scans…, n, …].
Entered = dict[Path, tuple[jax.Array, ...]]
Cotangents = dict[Path, jax.Array]

# How many entries of inputs and cotangents are taken at a time on a CPU.
_MOST_READ_ON_CPU = 2**22
# The entries that may be made at a time on other devices, and the most parts.
_BYTES_AT_ONCE = 2**26
_MOST_PARTS = 16


class Route(abc.ABC):
    """A way to the norms and the weighted sum of per-sample gradients at sites of one weight.

    Attributes:
      name: as `explain` prints it.
      may_be_small: whether gradients made by automatic differentiation cost no more, where together
        they are as small as what leaves.
      is_slow_in_loops: whether XLA's CPU backend runs the operation far slower inside a loop.
    """

    name: str
    may_be_small = False
    is_slow_in_loops = False

    @abc.abstractmethod
    def takes(self, eqn: core.JaxprEqn, operand: int) -> bool:
        """Tell whether an equation is a site, the weight being its operand of that index."""

    @abc.abstractmethod
    def joins(self, sites: Sequence[Site]) -> bool:
        """Tell whether the route has the norm of the sum of the gradients at sites in one frame."""

    def operation(self, site: Site) -> Callable[..., Any]:
        """Return the operation (W, *entering) -> y, for one step of the scans around it."""

        def run(w: Any, *entered: Any) -> Any:
            (y,) = run_equation(site.eqn, [*entered[: site.operand], w, *entered[site.operand :]])
            return y

        return run

    def leaving_axes(self, site: Site) -> dict[int, int] | None:
        """Return, for each axis of W that y has too, the axis of y.

        An operation scaled along such an axis of W is scaled along that axis of y. None if the
        gradient is not the operation's transpose.
        """
        del site
        return {}

    def squared_norms(
        self, sites: Sequence[Site], entered: Entered, cotangents: Cotangents, dtype: Any
    ) -> jax.Array:
        """Return ‖G_k‖² of the sum of the sites' gradients for each sample, [n]."""
        axes = {site.path: site.sample_axis for site in sites}
        axes_of_entered = {path: (axis,) * len(entered[path]) for path, axis in axes.items()}
        num_samples = cotangents[sites[0].path].shape[sites[0].sample_axis]
        return in_parts(
            lambda sides: self.squared_norms_of_part(sites, sides[0], sides[1], dtype),
            ({path: entered[path] for path in axes}, {path: cotangents[path] for path in axes}),
            (axes_of_entered, axes),
            num_samples,
            self.least_parts(sites, num_samples, dtype),
        )

    @abc.abstractmethod
    def squared_norms_of_part(
        self, sites: Sequence[Site], entered: Entered, cotangents: Cotangents, dtype: Any
    ) -> jax.Array:
        """Return `squared_norms` of so few samples that intermediate arrays fit in memory."""

    def weighted_sum(
        self, site: Site, entered: tuple[jax.Array, ...], weighted: jax.Array
    ) -> tuple[Callable[[Any], Any], jax.Array]:
        """Return a function linear in the parameter, and the cotangent of its output.

        The gradient is the function's transpose of the cotangent. Here the function is the
        operation over all samples, which is what a plain backward pass transposes.

        Args:
          site: the site where the parameter enters.
          entered: what enters beside it, [scans…, n, …].
          weighted: the cotangents of what leaves, each times its sample's weight.
        """
        return lambda parameter: over_samples(site)(parameter, *entered), weighted

    def least_parts(self, sites: Sequence[Site], num_samples: int, dtype: Any) -> Parts:
        """Return the least number of parts of the samples for which arrays fit in memory."""
        made = (self.entries_made(sites), self.entries_made_on_tpu(sites))
        num_bytes, on_tpu = (num_samples * one * jnp.dtype(dtype).itemsize for one in made)
        return Parts(
            self.least_parts_on_cpu(sites, num_samples, num_bytes),
            *(min(one / _BYTES_AT_ONCE, _MOST_PARTS) for one in (on_tpu, num_bytes)),
        )

    def least_parts_on_cpu(self, sites: Sequence[Site], num_samples: int, num_bytes: int) -> float:
        """Return the same for a CPU, given the bytes of intermediate arrays for all samples."""
        del num_bytes
        return num_samples * entries_read(sites) / _MOST_READ_ON_CPU

    def entries_made(self, sites: Sequence[Site]) -> int:
        """Count the entries that are made on the way to the norm of one sample's gradient."""
        return entries_read(sites)

    def entries_made_on_tpu(self, sites: Sequence[Site]) -> int:
        """Count the same for a TPU, where products that are squared and summed are not made."""
        return self.entries_made(sites)


def entries_read(sites: Sequence[Site]) -> int:
    """Count the entries of inputs and cotangents of sites, for one sample."""
    sides = [(s, aval(atom)) for s in sites for atom in (*s.entering, s.leaving)]
    return sum(math.prod(site.scans) * side.size for site, side in sides)


def of_one_sample(sites: Sequence[Site]) -> tuple[Any, Any]:
    """Return the shapes of sites' inputs and cotangents, for a batch of one sample."""

    def batched(site: Site, atom: Any) -> jax.ShapeDtypeStruct:
        shaped = aval(atom)
        return jax.ShapeDtypeStruct((*site.scans, 1, *shaped.shape), shaped.dtype)

    entered = {s.path: tuple(batched(s, atom) for atom in s.entering) for s in sites}
    return entered, {s.path: batched(s, s.leaving) for s in sites}


def over_samples(site: Site) -> Callable[..., jax.Array]:
    """Return a function from the parameter and the inputs, [scans…, n, …], to the output."""
    axis = site.sample_axis
    axes = (axis,) * len(site.entering)
    return jax.vmap(
        of_parameter(site, site.route.operation(site)), in_axes=(None, *axes), out_axes=axis
    )


def samples_first(site: Site, array: jax.Array) -> jax.Array:
    return jnp.moveaxis(array, site.sample_axis, 0)
