"""Compare the clipped gradient of a program with `vmap(grad)`, in one compilation for all modes."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import psclip_optax as psc
from tests.fuzz.command import NO_REFERENCE, Outcome, Source, shower
from tests.fuzz.groups import clipped_by_group, errors_by_group, norms_of, taus_of
from tests.fuzz.programs import Program, draw_program, every_equation
from tests.numerics import clipped_mean, enable_x64
from tests.passes import two_passes
from tests.random_programs.checks import NoReferenceError, compiled, reduced, relative_error
from tests.random_programs.program import MODES, NUM_SAMPLES, Run

TOLERANCE = 1e-8
BY_GROUP = "by group"
# The number of roundings allowed for programs with a dtype narrower than float64.
ROUNDINGS, MOST = 16, 0.4
# The relative change of an input for measuring how much the reference changes.
NUDGE = 1e-13
LARGEST = 1e6
# Compiled programs are kept until then: they are small, and share traces.
CLEAR_EVERY = 200


def tolerance_of(closed: Any) -> float:
    """Return the error that rounding may cause, from the narrowest dtype in a loss's jaxpr."""
    variables, widths = list(closed.jaxpr.invars), [2.0**-52]
    for eqn in every_equation(closed.jaxpr):
        variables += eqn.outvars
        if eqn.primitive.name == "reduce_precision":
            widths.append(2.0 ** -eqn.params["mantissa_bits"])
    dtypes = {v.aval.dtype for v in variables if hasattr(v.aval, "dtype")}
    widths += [float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.floating)]
    return min(max(TOLERANCE, ROUNDINGS * max(widths)), MOST)


def stacked_of(program: Program) -> Run:
    return jax.vmap(jax.value_and_grad(program.loss), in_axes=(None, 0))


def _norms(stacked: Any) -> Any:
    return jnp.sqrt(sum(jnp.sum(g.reshape(NUM_SAMPLES, -1) ** 2, 1) for g in stacked.values()))


def _all_in_one(program: Program, clip: Run, raised: dict[str, str], by_group: bool) -> Run:
    """Run the reference and all modes; a mode's exception is written into `raised`."""

    def run(params: Any, batch: Any) -> Any:
        try:
            losses, stacked = stacked_of(program)(params, batch)
        except Exception as error:
            raise NoReferenceError(f"{type(error).__name__}: {error}") from error
        tau = jnp.median(_norms(stacked))
        # "drop" compiles the backward pass twice, so it is drawn less often.
        options: dict[str, Any] = {"on_nonfinite": "propagate" if program.seed % 3 else "drop"}
        results = {}

        def note(how: str, run: Callable[[], Any]) -> None:
            try:
                results[how] = run()
            except Exception as error:
                raised[how] = f"{type(error).__name__}: {error}"[:500]

        for mode in MODES:
            f = clip(program.loss, 1.0, mode=mode, return_stats=True, **options)
            note(mode, lambda f=f: f(params, batch, threshold=tau))
        if by_group:
            f = clipped_by_group(program, clip, **options)
            note(BY_GROUP, lambda: f(params, batch, taus_of(norms_of(program, stacked))))
        return losses, stacked, tau, results

    return run


def _is_usable(losses: Any, stacked: Any) -> bool:
    arrays = [losses, *stacked.values()]
    return all(np.isfinite(a).all() and np.abs(a).max(initial=0) < LARGEST for a in arrays)


def _errors(result: Any, losses: Any, stacked: Any, tau: float) -> dict[str, float]:
    value, grads, stats = result
    if any(grads[name].dtype != leaf.dtype for name, leaf in stacked.items()):
        return {"dtype": math.inf}
    taus = np.full(NUM_SAMPLES, tau)
    sizes = {name: np.abs(leaf) for name, leaf in stacked.items()}
    norms = np.sqrt(sum(np.sum(g.reshape(NUM_SAMPLES, -1) ** 2, 1) for g in stacked.values()))
    return {
        "gradient": relative_error(grads, clipped_mean(stacked, taus), clipped_mean(sizes, taus)),
        "norms": relative_error(stats.norms, norms),
        "loss": relative_error(np.append(losses, value), np.append(losses, losses.mean())),
    }


def _nudged(program: Program) -> Program:
    nudge = lambda a: a * (1 + NUDGE) if a.dtype.kind == "f" else a
    return program._replace(
        params={name: nudge(a) for name, a in program.params.items()},
        batch={name: nudge(a) for name, a in program.batch.items()},
    )


def _reference(program: Program) -> tuple[Any, Any]:
    return jax.device_get(compiled(stacked_of(program))(program.params, program.batch))


def check(
    program: Program, clip: Run = psc.clipped_value_and_grad, by_group: bool = False
) -> Outcome:
    """Compare `clip` in all modes, and maybe by group, with the reference."""
    started = time.perf_counter()
    with enable_x64(True), warnings.catch_warnings(), two_passes():
        warnings.filterwarnings("ignore", "the loss of one example takes statistics")
        try:
            errors, tolerance = _checked(program, clip, by_group)
        except NoReferenceError as error:
            errors, tolerance = {f"{NO_REFERENCE}{error}"[:500]: math.inf}, 0.0
    wrong = [f"{what}: {e:.2g}" for what, e in errors.items() if not e <= tolerance]
    return Outcome(
        program.seed,
        program.mixture,
        len(program.operations),
        (*MODES, BY_GROUP) if by_group else MODES,
        not wrong,
        max(errors.values()),
        round(time.perf_counter() - started, 3),
        {},
        "; ".join(wrong),
    )


def _checked(program: Program, clip: Run, by_group: bool) -> tuple[dict[str, float], float]:
    errors, tolerance = _errors_of_all(program, clip, by_group, compiled)
    if max(errors.values()) <= tolerance:
        return errors, tolerance
    # Only compilation with default settings counts: without optimizations XLA computes an input of
    # igamma twice with different rounding, and if both arguments are equal neither of its series
    # runs.
    return _errors_of_all(program, clip, by_group, jax.jit)


def _errors_of_all(
    program: Program, clip: Run, by_group: bool, compile: Run
) -> tuple[dict[str, float], float]:
    raised: dict[str, str] = {}
    run = compile(_all_in_one(program, clip, raised, by_group))
    try:
        losses, stacked, tau, results = jax.device_get(run(program.params, program.batch))
    except NoReferenceError:
        raise
    except Exception as error:
        _raise_if_jax_fails(program)
        return {f"{type(error).__name__}: {error}"[:500]: math.inf}, 0.0
    if not _is_usable(losses, stacked):
        raise NoReferenceError("not finite or too large")
    errors = {f"{mode}, raised {error}": math.inf for mode, error in raised.items()}
    for mode, result in results.items():
        of_groups = mode == BY_GROUP
        found = (
            errors_by_group(program, result, losses, stacked)
            if of_groups
            else _errors(result, losses, stacked, tau)
        )
        errors |= {f"{mode}, {what}": error for what, error in found.items()}
    if max(errors.values()) <= TOLERANCE:
        return errors, TOLERANCE
    tolerance = tolerance_of(program.jaxpr())
    if max(errors.values()) > tolerance and not raised:
        _raise_if_ill_conditioned(program, losses, stacked, tolerance)
    return errors, tolerance


def _raise_if_jax_fails(program: Program) -> None:
    """Raise NoReferenceError if XLA has no plain gradient either, or none for each sample."""

    def mean_loss(params: Any, batch: Any) -> Any:
        return jnp.mean(jax.vmap(program.loss, in_axes=(None, 0))(params, batch))

    try:
        _reference(program)
        jax.block_until_ready(compiled(jax.grad(mean_loss))(program.params, program.batch))
    except Exception as error:
        raise NoReferenceError(f"{type(error).__name__}: {error}") from error


def _raise_if_ill_conditioned(
    program: Program, losses: Any, stacked: Any, tolerance: float
) -> None:
    moved = _reference(_nudged(program))
    error = relative_error(moved, (losses, stacked))
    if not error <= tolerance / 10:
        raise NoReferenceError(f"a nudge of {NUDGE} moves it by {error:.2g}")


def _check_of_seed(seed: int) -> Outcome:
    if seed % CLEAR_EVERY == 0:
        jax.clear_caches()
    return check(draw_program(seed), by_group=True)


def _run_reference(seed: int) -> None:
    with enable_x64(True):
        _reference(draw_program(seed))


SOURCE = Source(draw_program, _check_of_seed, _run_reference, shower(draw_program, check, reduced))
