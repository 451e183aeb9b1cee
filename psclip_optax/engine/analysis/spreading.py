"""Find convolutions through which one sample's NaN may reach the gradients of others.

If a convolution's filter or that filter's gradient differs between samples, `vmap` makes it one
convolution in groups. XLA's CPU backend multiplies other groups' entries by zeros there.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.extend import core

from psclip_optax.engine.analysis.equations import CALLS, inner_jaxpr, inner_jaxprs, scan_counts
from psclip_optax.engine.analysis.views import Path
from psclip_optax.engine.analysis.walk import walk

_CONVOLUTION = "conv_general_dilated"


def has_convolution(jaxpr: core.Jaxpr) -> bool:
    """Tell whether any equation is a convolution, also within others."""
    return any(
        eqn.primitive.name == _CONVOLUTION or any(map(has_convolution, inner_jaxprs(eqn)))
        for eqn in jaxpr.eqns
    )


def is_filter(jaxpr: core.Jaxpr, inputs: Sequence[bool]) -> bool:
    """Tell whether a convolution's filter may depend on any of these inputs."""
    found: list[bool] = []

    def depends(jaxpr: core.Jaxpr, flags: Sequence[bool]) -> list[bool]:
        consts = [False] * len(jaxpr.constvars)
        return walk(jaxpr, consts, flags, lambda _: False, equation)

    def equation(eqn: core.JaxprEqn, flags: list[bool], _: Path) -> Sequence[bool]:
        name, bodies = eqn.primitive.name, list(inner_jaxprs(eqn))
        if not any(flags):
            return [False] * len(eqn.outvars)
        if name in CALLS:
            return depends(inner_jaxpr(eqn)[0], flags)
        if name == "scan":
            consts, carry = scan_counts(eqn)
            inner = [*flags[:consts], *[True] * carry, *flags[consts + carry :]]
            return depends(inner_jaxpr(eqn)[0], inner)
        if name == "cond":
            outs = [depends(body, flags[1:]) for body in bodies]
            return [flags[0] or any(own) for own in zip(*outs, strict=True)]
        found.append(flags[1] if name == _CONVOLUTION else any(map(has_convolution, bodies)))
        return [True] * len(eqn.outvars)

    depends(jaxpr, inputs)
    return any(found)
