"""Define the interface of routes: which sites they accept, norms, sums, and costs."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from psclip_optax import meshes
from psclip_optax.engine.analysis.sites import Site, of_parameter
from psclip_optax.engine.analysis.views import Path, aval, run_equation
from psclip_optax.engine.parts import Parts, in_parts

# Maps sites to their inputs, and to the cotangents of their output, both [scans…, n, …].
Entered = dict[Path, tuple[jax.Array, ...]]
Cotangents = dict[Path, jax.Array]

# The number of entries of inputs and cotangents processed at a time on a CPU.
_MOST_READ_ON_CPU = 2**22
# The number of entries that may be made at a time on other devices, and the largest number of
# parts.
_BYTES_AT_ONCE = 2**26
_MOST_PARTS = 16


class Route(abc.ABC):
    """Computes norms and the weighted sum of per-sample gradients at sites of one weight.

    Attributes:
      name: the name that `explain` prints.
      may_be_small: whether automatic differentiation costs no more if all samples' gradients are
        together no larger than what is stored at the sites.
      is_slow_in_loops: whether XLA's CPU backend runs the operation far slower inside a loop.
      may_weigh_input: whether the gradient is linear in the only input, which a TPU may multiply by
        the samples' weights faster than the cotangents.
    """

    name: str
    may_be_small = False
    is_slow_in_loops = False
    may_weigh_input = False

    @abc.abstractmethod
    def takes(self, eqn: core.JaxprEqn, operand: int) -> bool:
        """Tell whether the route accepts an equation whose operand of that index is the weight."""

    @abc.abstractmethod
    def joins(self, sites: Sequence[Site]) -> bool:
        """Tell whether the route has a norm for the sum of the gradients at sites in one frame."""

    def operation(self, site: Site) -> Callable[..., Any]:
        """Return the operation (W, *inputs) -> y, for one step of the scans around it."""

        def run(w: Any, *entered: Any) -> Any:
            (y,) = run_equation(site.eqn, [*entered[: site.operand], w, *entered[site.operand :]])
            return y

        return run

    def leaving_axes(self, site: Site) -> dict[int, int] | None:
        """Return, for each axis of W that is also an axis of y, the axis of y.

        Scaling W along such an axis scales y along the corresponding axis. None if the gradient is
        not the operation's transpose.
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
        """Return `squared_norms` for so few samples that intermediate arrays fit into memory."""

    def weighted_sum(
        self, site: Site, entered: tuple[jax.Array, ...], weighted: jax.Array
    ) -> tuple[Callable[[Any], Any], jax.Array]:
        """Return a function that is linear in the parameter, and the cotangent of its output.

        The gradient is the function's transpose applied to the cotangent. By default the function
        is the operation over all samples, which a plain backward pass transposes.

        Args:
          site: the site where the parameter is used.
          entered: the other inputs, [scans…, n, …].
          weighted: the cotangents of the output, each times its sample's weight; or the inputs are.
        """
        return lambda parameter: over_samples(site)(parameter, *entered), weighted

    def least_parts(self, sites: Sequence[Site], num_samples: int, dtype: Any) -> Parts:
        """Return the least number of parts of the samples for which arrays fit into memory."""
        made = (self.entries_made(sites), self.entries_made_on_tpu(sites))
        num_bytes, on_tpu = (num_samples * one * jnp.dtype(dtype).itemsize for one in made)
        return Parts(
            self.least_parts_on_cpu(sites, num_samples, num_bytes),
            *(min(one / _BYTES_AT_ONCE, _MOST_PARTS) for one in (on_tpu, num_bytes)),
        )

    def least_parts_on_cpu(self, sites: Sequence[Site], num_samples: int, num_bytes: int) -> float:
        """Return this number for a CPU, given the bytes of intermediate arrays for all samples."""
        del num_bytes
        return num_samples * entries_read(sites) / _MOST_READ_ON_CPU

    def entries_made(self, sites: Sequence[Site]) -> int:
        """Count the entries of intermediate arrays for the norm of one sample's gradient."""
        return entries_read(sites)

    def entries_made_on_tpu(self, sites: Sequence[Site]) -> int:
        """Count these entries for a TPU, which fuses products into their squared sums."""
        return self.entries_made(sites)


def entries_read(sites: Sequence[Site]) -> int:
    """Count the entries of inputs and cotangents of sites, for one sample."""
    sides = [(s, aval(atom)) for s in sites for atom in (*s.entering, s.leaving)]
    return sum(math.prod(site.scans) * side.size for site, side in sides)


def of_one_sample(sites: Sequence[Site]) -> tuple[Any, Any]:
    """Return the shapes of sites' inputs and cotangents, for a batch of one sample."""

    def batched(site: Site, atom: Any) -> Any:
        kind = aval(atom)
        return meshes.shape_of_type(kind, (*site.scans, 1, *kind.shape))

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
