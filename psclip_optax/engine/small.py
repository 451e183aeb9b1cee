"""Decide for which weights automatic differentiation may stack all samples' gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from psclip_optax.engine.analysis.sites import Site
from psclip_optax.engine.analysis.views import aval


def is_small(parameter: Any, sites: Sequence[Site], are_shared: bool) -> bool:
    """Tell whether all samples' gradients take no more memory than what the sites would store.

    Inside a scan they would be accumulated step by step, which is slower than one product. For
    convolutions, automatic differentiation makes grouped convolutions, which are slow.
    """
    if not all(site.route.may_be_small and all(site.layered) for site in sites):
        return False
    leaving = sum(math.prod(site.scans) * aval(site.leaving).size for site in sites)
    larger = sum(math.prod(site.scans) * _size_of_larger_side(site) for site in sites)
    # With one sample on each of 256 devices, stacks as large as the inputs took more memory.
    is_tie_small = parameter.size == larger and not are_shared
    return parameter.size <= leaving or parameter.size < larger or is_tie_small


def _size_of_larger_side(site: Site) -> int:
    """Count the entries of the largest array that is stored for one step at a site."""
    # Steps that are rematerialised would store no inputs otherwise; several sites can share one.
    inputs = site.entering if site.scans else []
    return max(aval(atom).size for atom in [*inputs, site.leaving])
