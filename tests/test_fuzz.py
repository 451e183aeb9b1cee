import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import slow
from tests.fuzz import computed_tables, coverage, lax_tables, library_tables, record
from tests.fuzz.check import TOLERANCE, check, tolerance_of
from tests.fuzz.programs import draw_program
from tests.numerics import enable_x64
from tests.random_programs.checks import reduced, relative_error
from tests.test_random_programs import WRONG, altered

# Without its optimizations XLA's CPU backend aborts on some of the programs.
pytestmark = [
    pytest.mark.optimized,
    pytest.mark.skipif(
        jax.__version_info__ < (0, 10), reason="programs name primitives that JAX < 0.10 lacks"
    ),
]

# In chunks, so that pytest-xdist spreads them.
NUM_CHUNKS, PROGRAMS_OF_A_CHUNK = 40, 10
# Some programs are also clipped by group; `python -m tests.fuzz` always does that.
BY_GROUP_EVERY = 10


@pytest.mark.parametrize("chunk", slow.but([20], range(NUM_CHUNKS)))
def test_programs_of_jax_have_the_clipped_gradients_of_vmap_of_grad(chunk, running_programs):
    outcomes = []
    for seed in range(PROGRAMS_OF_A_CHUNK * chunk, PROGRAMS_OF_A_CHUNK * (chunk + 1)):
        with record.noted(running_programs, f"python -m tests.fuzz --show {seed}"):
            program = draw_program(seed)
            outcomes.append(check(program, by_group=seed % BY_GROUP_EVERY == 7))
    failed = [(o.seed, o.message) for o in outcomes if o.has_reference and not o.ok]
    assert not failed
    assert sum(o.has_reference for o in outcomes) > PROGRAMS_OF_A_CHUNK / 2


# The programs


def test_a_seed_gives_the_same_program_again():
    one, other = draw_program(3), draw_program(3)
    assert str(one) == str(other)
    assert relative_error(one.params, other.params) == 0
    assert relative_error(one.batch, other.batch) == 0
    assert str(draw_program(4)) != str(one)


@pytest.mark.slow
def test_programs_have_the_primitives_of_jax():
    every, met = coverage.differentiable_primitives(), coverage.met(range(400))
    assert len(every & met) >= 0.95 * len(every)
    assert every - met <= coverage.LEFT_OUT.keys()
    assert met.isdisjoint(coverage.LEFT_OUT)


def test_programs_have_arrays_without_entries_masks_and_several_dtypes():
    programs = [draw_program(seed) for seed in range(60)]
    arrays = [a for p in programs for a in [*p.params.values(), *p.batch.values()]]
    assert any(0 in a.shape for a in arrays)
    assert {a.dtype.name for a in arrays} >= {"float64", "float32", "bfloat16", "int32", "bool"}
    assert any(0 in a.shape for p in programs for a in p.params.values())


MATRIX = np.random.default_rng(0).normal(size=(3, 3))
TABLES = (
    (lax_tables.ELEMENTWISE, (MATRIX,)),
    (library_tables.ELEMENTWISE, (MATRIX,)),
    (lax_tables.PAIRS, (MATRIX, MATRIX.T)),
    (library_tables.PAIRS, (MATRIX, MATRIX.T)),
    (lax_tables.ALONG, (MATRIX, 1)),
    (library_tables.ALONG, (MATRIX, 1)),
    (lax_tables.INDEXED, (MATRIX, MATRIX.T, np.array([2, 0, 5], np.int32))),
    (library_tables.MATRICES, (MATRIX, MATRIX.T)),
    (computed_tables.REGULARISERS, (MATRIX,)),
    (computed_tables.COMPUTED, (MATRIX,)),
    (computed_tables.DIFFERENCES, (MATRIX, MATRIX.T)),
    (computed_tables.RULES, (MATRIX,)),
    (computed_tables.CASTS, (MATRIX,)),
)


@pytest.mark.parametrize(("table", "operands"), TABLES)
def test_all_that_may_be_drawn_has_a_gradient(table, operands):
    with enable_x64(True):
        for run in table.values():
            loss = lambda x, run=run: jnp.sum(run(x, *operands[1:]))
            shaped = jax.eval_shape(jax.vmap(jax.grad(loss)), operands[0][None])
            assert shaped.shape == (1, 3, 3)


# The check itself


@functools.cache
def exact_program():
    """Return a program with a product that only computes in float64."""
    programs = map(draw_program, itertools.count())
    return next(p for p in programs if " dot(" in str(p) and tolerance_of(p.jaxpr()) == TOLERANCE)


@pytest.mark.parametrize("what", slow.but(["norms", "raises", "one entry"], WRONG))
def test_what_is_wrong_is_found(what):
    outcome = check(exact_program(), clip=altered(WRONG[what]))
    assert outcome.has_reference
    assert not outcome.ok
    assert outcome.message
    assert outcome.error > 1e-6


def test_what_is_right_passes():
    outcome = check(exact_program(), clip=altered(lambda *results: results))
    assert outcome.ok
    assert 0 <= outcome.error < 1e-8


def test_a_failing_program_is_reduced_to_what_fails():
    program = exact_program()
    name = program.read[0]
    smaller = reduced(program, lambda one: name in one.read)
    assert smaller.read == [name]


def test_a_program_whose_process_died_is_named(tmp_path):
    with pytest.raises(KeyboardInterrupt), record.noted(tmp_path, "seed 7"):
        raise KeyboardInterrupt
    assert record.left_behind(tmp_path) == ["seed 7"]
    assert record.left_behind(tmp_path) == []
    with record.noted(tmp_path, "seed 8"):
        pass
    assert record.left_behind(tmp_path) == []
