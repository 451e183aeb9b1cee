import jax.numpy as jnp
import numpy as np
import pytest

import psclip_optax as psc
from tests import slow
from tests.fuzz import check as fuzz
from tests.fuzz import record
from tests.random_programs.checks import check, reduced, relative_error, shortened
from tests.random_programs.drawing import draw_program
from tests.random_programs.products import PRODUCTS
from tests.random_programs.program import LEAST_OPERATIONS, MIXTURES
from tests.random_programs.uses import DATA_STEPS, FREE_STEPS, WEIGHTS
from tests.random_programs.wrappers import WRAPPERS

# Without its optimizations XLA's CPU backend aborts on some of the programs.
pytestmark = pytest.mark.optimized

# In chunks, so that pytest-xdist spreads them.
NUM_CHUNKS, PROGRAMS_OF_A_CHUNK = 20, 5


@pytest.mark.parametrize("chunk", slow.but([2], range(NUM_CHUNKS)))
def test_random_programs_have_the_clipped_gradients_of_vmap_of_grad(chunk, running_programs):
    for seed in range(PROGRAMS_OF_A_CHUNK * chunk, PROGRAMS_OF_A_CHUNK * (chunk + 1)):
        program = draw_program(seed)
        with record.noted(running_programs, f"python -m tests.random_programs --show {seed}"):
            outcome = check(program)
        assert outcome.ok or not outcome.has_reference, f"{outcome.message}\n{program}"


@pytest.mark.parametrize("seed", slow.but([0], range(4)))
def test_random_programs_by_group_have_the_clipped_gradients_of_vmap_of_grad(seed):
    programs = (p for p in map(draw_program, range(9 * seed, 900)) if p.mixture == "float64")
    outcome = fuzz.check(next(programs), by_group=True)
    assert outcome.ok, outcome.message


# The programs


def test_a_seed_gives_the_same_program_again():
    one, other = draw_program(3), draw_program(3)
    assert str(one) == str(other)
    assert relative_error(one.params, other.params) == 0
    assert relative_error(one.batch, other.batch) == 0
    assert str(draw_program(4)) != str(one)


def test_programs_have_all_operations_and_dtypes():
    programs = [draw_program(seed) for seed in range(30)]
    assert all(len(program.operations) >= LEAST_OPERATIONS for program in programs)
    assert {program.mixture for program in programs} == set(MIXTURES)
    drawn = " ".join(o.step.name for program in programs for o in program.operations)
    rules = (PRODUCTS, WEIGHTS, DATA_STEPS, FREE_STEPS)
    expected = {rule.__name__ for table in rules for rule in table}
    assert {name for name in expected if name not in drawn} == set()
    for wrapper in ("scan(", "carry(", "map(", "cond(", "grad(", "twice(", "stop(", "jit("):
        assert wrapper in drawn
    assert len(WRAPPERS) == 10


# The check itself


def program_in_float32():
    programs = map(draw_program, range(2, 100, 4))
    return shortened(next(p for p in programs if p.mixture == "float32"), 10)


def altered(change):
    """Return `clipped_value_and_grad` with altered results."""

    def clip(loss, threshold, **options):
        f = psc.clipped_value_and_grad(loss, threshold, **options)

        def changed(*args, **keywords):
            return change(*f(*args, **keywords))

        return changed

    return clip


def of_largest(grads, change):
    name = max(grads, key=lambda name: jnp.max(jnp.abs(grads[name])))
    return {**grads, name: change(grads[name])}


WRONG = {
    "a leaf by a little": lambda value, grads, stats: (value, of_largest(grads, lambda g: g * 1.001), stats),
    "one entry": lambda value, grads, stats: (value, of_largest(grads, lambda g: g.at[..., :1].add(0.1)), stats),
    "NaN": lambda value, grads, stats: (value, of_largest(grads, lambda g: g * jnp.nan), stats),
    "dtype": lambda value, grads, stats: (value, of_largest(grads, lambda g: g.astype(jnp.float16)), stats),
    "norms": lambda value, grads, stats: (value, grads, stats._replace(norms=stats.norms * 1.001)),
    "loss": lambda value, grads, stats: (value * 1.001, grads, stats),
    "raises": lambda value, grads, stats: 1 // 0,
}  # fmt: skip


def test_what_is_right_passes():
    outcome = check(program_in_float32(), clip=altered(lambda *results: results))
    assert outcome.ok
    assert 0 <= outcome.error < 1e-5


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_found(what):
    outcome = check(program_in_float32(), clip=altered(WRONG[what]))
    assert not outcome.ok
    assert outcome.error > 1e-4
    assert outcome.message


def test_nan_is_close_to_nothing():
    one, nan = np.array([0.0, 1.0]), np.array([np.nan, 1.0])
    assert (
        relative_error(nan, nan) == relative_error(one, nan) == relative_error(nan, one) == np.inf
    )
    assert relative_error(one + 0.1, one) == pytest.approx(0.1)


def test_a_leaf_that_vanishes_is_held_against_the_largest():
    assert relative_error({"w": 1.0, "b": 1e-9}, {"w": 1.0, "b": 0.0}) < 1e-6


def test_a_failing_program_is_reduced_to_what_fails():
    program = draw_program(5)
    name = program.read[0]
    smaller = reduced(program, lambda one: name in one.read)
    assert smaller.read == [name]
    assert len(smaller.operations) < len(program.operations)
