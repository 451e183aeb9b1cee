"""Compare a program's clipped gradients with vmap(grad)."""

from __future__ import annotations

import collections
import functools
import math
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import psclip_optax as psc
from tests.fuzz.command import NO_REFERENCE, Outcome
from tests.numerics import clipped_mean, enable_x64, growing
from tests.passes import two_passes
from tests.random_programs.program import (
    BETA,
    FLOOR,
    MIXTURES,
    MODES,
    NUM_SAMPLES,
    NUM_UNJITTED,
    Mode,
    Operation,
    Program,
    Run,
)


class Reference(NamedTuple):
    """Holds vmap(grad)'s losses [n], stacked gradients, and norms [n]."""

    losses: np.ndarray
    stacked: dict[str, np.ndarray]
    norms: np.ndarray


@functools.cache
def _quick_compilation() -> dict[str, Any]:
    """Return options with which XLA compiles a small CPU program in a quarter of the time."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    return {name: value for name, value in options.items() if _is_known(name, value)}


def _is_known(name: str, value: Any) -> bool:
    """Tell whether this version of XLA has an option."""
    try:
        jax.jit(jnp.sin, compiler_options={name: value})(0.0)
    except jax.errors.JaxRuntimeError:
        return False
    return True


def compiled(function: Run) -> Run:
    return jax.jit(function, compiler_options=_quick_compilation())


class NoReferenceError(Exception):
    """There is no reference.

    XLA has no kernel for an operation of the program, such as some products in bfloat16, or the
    plain gradient of the mean loss is wrong, as for column look-ups in JAX 0.7.0.
    """


def reference_of(program: Program) -> Reference:
    stacked_grads = jax.vmap(jax.value_and_grad(program.loss), in_axes=(None, 0))
    try:
        losses, stacked = jax.block_until_ready(
            compiled(stacked_grads)(program.params, program.batch)
        )
    except jax.errors.JaxRuntimeError as error:
        raise NoReferenceError(error) from error
    losses = np.asarray(losses, np.float64)
    stacked = {name: np.asarray(leaf, np.float64) for name, leaf in stacked.items()}
    squares = [np.sum(leaf.reshape(NUM_SAMPLES, -1) ** 2, axis=1) for leaf in stacked.values()]
    return Reference(losses, stacked, np.sqrt(sum(squares, np.zeros(NUM_SAMPLES))))


def check_plain_gradient(program: Program, reference: Reference, tolerance: float) -> None:
    """Raise NoReferenceError if JAX itself disagrees with the mean of the stacked gradients."""

    def mean_loss(params: Any, batch: Any) -> Any:
        return jnp.mean(jax.vmap(program.loss, in_axes=(None, 0))(params, batch))

    if not all(np.isfinite(leaf).all() for leaf in reference.stacked.values()):
        return
    gradient = compiled(jax.grad(mean_loss))(program.params, program.batch)
    means = {name: leaf.mean(axis=0) for name, leaf in reference.stacked.items()}
    sizes = {name: np.abs(leaf).mean(axis=0) for name, leaf in reference.stacked.items()}
    error = relative_error(gradient, means, sizes, MIXTURES[program.mixture].floor)
    if not error <= tolerance:
        raise NoReferenceError(f"the plain gradient of the mean loss is off by {error:.2g}")


def relative_error(actual: Any, expected: Any, sizes: Any = None, floor: float = FLOOR) -> float:
    """Return the largest error of an entry, relative to the largest entry of its leaf.

    Args:
      actual: a tree.
      expected: another one.
      sizes: the sizes of the summands of the expected values, if these may cancel.
      floor: the smallest value used as a leaf's largest entry, as a share of all leaves' largest.
    """
    if jax.tree.structure(actual) != jax.tree.structure(expected):
        return math.inf
    trees = (actual, expected, expected if sizes is None else sizes)
    leaves = [[np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(tree)] for tree in trees]
    largest = [np.abs(size).max(initial=0) for size in leaves[2]]
    smallest = max(floor * max(largest), 1e-30)
    errors = [
        np.abs(got - want).max(initial=0) / max(own, smallest)
        if got.shape == want.shape
        else math.inf
        for got, want, own in zip(leaves[0], leaves[1], largest, strict=True)
    ]
    return float(max(errors)) if np.isfinite(errors).all() else math.inf


class Check(NamedTuple):
    """Says how to run a program: all under jit, or its first operations without, which is slow."""

    mode: Mode
    jitted: bool
    on_nonfinite: Literal["drop", "propagate"]

    def __str__(self) -> str:
        return f"{self.mode}{'' if self.jitted else ', un-jitted'}, {self.on_nonfinite}"


def checks_of(seed: int) -> list[Check]:
    # "drop" compiles the backward pass twice, so it is drawn less often.
    mode, other = MODES[seed % 2], MODES[1 - seed % 2]
    jitted = Check(mode, True, "drop" if seed // 2 % 3 == 0 else "propagate")
    return [jitted, Check(other, False, "drop")] if seed // 2 % 20 == 0 else [jitted]


def errors_of(program: Program, how: Check, reference: Reference, clip: Run) -> dict[str, float]:
    """Return errors with half of the samples clipped, with none clipped, and with one dropped.

    Without clipping the result is the plain mean of the gradients.
    """
    f = clip(program.loss, 1.0, mode=how.mode, on_nonfinite=how.on_nonfinite, return_stats=True)

    def run(params: Any, batch: Any, alpha: Any) -> Any:
        return f(params, batch, threshold=psc.growing_threshold(alpha, BETA))

    run = compiled(run) if how.jitted else run
    alpha = float(np.median(reference.norms / growing(1, BETA, NUM_SAMPLES)))
    finite = np.ones(NUM_SAMPLES, bool)
    errors = {
        "clipped": _error(run, program.batch, program, reference, alpha, finite),
        "plain": _error(run, program.batch, program, reference, math.inf, finite),
    }
    if how.on_nonfinite == "drop" and not _spreads_nan(program):
        finite = np.arange(NUM_SAMPLES) != 1
        batch = {**program.batch, "x0": program.batch["x0"].copy()}
        batch["x0"][~finite] = np.nan
        errors["dropped"] = _error(run, batch, program, reference, alpha, finite)
    return errors


def _spreads_nan(program: Program) -> bool:
    # XLA's CPU backend may compute the convolutions' gradients of all samples at once, so that a
    # NaN in one spreads to the others: with vmap(grad), and with the direct route.
    return any("convolution" in str(operation) for operation in program.operations)


def _error(
    run: Run, batch: Any, program: Program, reference: Reference, alpha: float, finite: np.ndarray
) -> float:
    """Return the largest error of the gradients, the norms and the mean loss."""
    value, grads, stats = run(program.params, batch, alpha)
    if any(grads[name].dtype != array.dtype for name, array in program.params.items()):
        return math.inf
    stacked = {
        name: np.where(finite.reshape(-1, *[1] * (leaf.ndim - 1)), leaf, np.nan)
        for name, leaf in reference.stacked.items()
    }
    losses, taus = reference.losses[finite], growing(alpha, BETA, NUM_SAMPLES)
    sizes = jax.tree.map(np.abs, stacked)
    floor = MIXTURES[program.mixture].floor
    return max(
        relative_error(grads, clipped_mean(stacked, taus), clipped_mean(sizes, taus), floor),
        relative_error(np.asarray(stats.norms)[finite], reference.norms[finite]),
        # The mean may vanish even if the samples' losses do not.
        relative_error(np.append(losses, value), np.append(losses, losses.mean())),
    )


def check(
    program: Program, clip: Run = psc.clipped_value_and_grad, with_routes: bool = False
) -> Outcome:
    """Compare `clip` with the reference."""
    started = time.perf_counter()
    mixture, checks = MIXTURES[program.mixture], checks_of(program.seed)
    errors, routes = {}, {}
    with enable_x64(mixture.has_float64), warnings.catch_warnings(), two_passes():
        # Random operations may look like batch statistics of one sample.
        warnings.filterwarnings("ignore", "the loss of one example takes statistics")
        try:
            for how in checks:
                part = program if how.jitted else shortened(program)
                reference = reference_of(part)
                found = errors_of(part, how, reference, clip)
                if max(found.values()) > mixture.tolerance:
                    check_plain_gradient(part, reference, mixture.tolerance)
                errors |= {f"{how}, {what}": error for what, error in found.items()}
            routes = _routes(program) if with_routes else {}
        except NoReferenceError as error:
            errors[f"{NO_REFERENCE}{error}"[:500]] = math.inf
        except Exception as error:
            errors[f"{type(error).__name__}: {error}"[:500]] = math.inf
    wrong = [f"{what}: {e:.2g}" for what, e in errors.items() if not e <= mixture.tolerance]
    return Outcome(
        program.seed,
        program.mixture,
        len(program.operations),
        tuple(map(str, checks)),
        not wrong,
        max(errors.values()),
        round(time.perf_counter() - started, 3),
        routes,
        "; ".join(wrong),
    )


def shortened(program: Program, length: int = NUM_UNJITTED) -> Program:
    return _only(program, program.operations[:length])


def _only(program: Program, operations: Sequence[Operation]) -> Program:
    """Return the program with these operations, and their parameters."""
    taken = {name for operation in operations for name in operation.step.inputs}
    params = {name: array for name, array in program.params.items() if name in taken}
    return program._replace(params=params or program.params, operations=tuple(operations))


def _routes(program: Program) -> dict[str, int]:
    explain: Any = psc.clipped_value_and_grad(program.loss, 1.0).explain  # pyright: ignore
    rows: list[Any] = []
    # Only traced, not computed.
    jax.eval_shape(lambda *a: rows.extend(explain(*a).rows), program.params, program.batch)
    return dict(collections.Counter(row.route for row in rows))


def reduced(program: Program, fails: Callable[[Program], bool]) -> Program:
    """Remove operations from a program as long as it still fails."""
    for operation in reversed(program.operations):
        smaller = _without(program, operation.output)
        if operation in program.operations and smaller.read and fails(smaller):
            program = smaller
    return program


def _without(program: Program, name: str) -> Program:
    """Remove an operation, and all that depend on it, from a program."""
    gone, operations = {name}, []
    for operation in program.operations:
        if operation.output in gone or not gone.isdisjoint(operation.step.inputs):
            gone.add(operation.output)
        else:
            operations.append(operation)
    return _only(program, operations)
