"""Compare the ranking of samples with a loop over them."""

from __future__ import annotations

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from psclip_optax import tails


def or_infinite(value):
    return value if np.isfinite(value) else np.inf


def looped(index, scale, norm, loss, by):
    rows = []
    for sample in sorted(set(index)):
        own = [i for i, other in enumerate(index) if other == sample and not np.isnan(scale[i])]
        if own:
            rows.append(
                {
                    "index": sample,
                    "count": len(own),
                    "mean_scale": statistics.fmean(scale[i] for i in own),
                    "median_norm": statistics.median(or_infinite(norm[i]) for i in own),
                    "mean_loss": np.mean([or_infinite(loss[i]) for i in own]),
                }
            )
    key = {
        "scale": lambda r: r["mean_scale"],
        "norm": lambda r: 0,
        "loss": lambda r: -r["mean_loss"],
    }
    return sorted(rows, key=lambda r: (key[by](r), -r["median_norm"], r["index"]))


# Multiples of 1/16, whose means are exact in any order of summation.
SIXTEENTHS = st.integers(0, 16).map(lambda n: n / 16)
ENTRIES = st.lists(
    st.tuples(
        st.integers(0, 5),
        SIXTEENTHS | st.just(np.nan),
        SIXTEENTHS | st.sampled_from([np.inf, np.nan]),
        SIXTEENTHS | st.sampled_from([np.inf, np.nan]),
    ),
    min_size=1,
    max_size=40,
).filter(lambda entries: not all(np.isnan(entry[1]) for entry in entries))


@pytest.mark.parametrize("by", ["scale", "norm", "loss"])
@given(entries=ENTRIES)
def test_ranks_as_a_loop_over_samples_does(by, entries):
    index, scale, norm, loss = zip(*entries, strict=True)
    found = tails.most_clipped(index, scale, norm, loss, by=by)
    expected = looped(index, scale, norm, loss, by)
    assert len(found) == len(expected)
    for name in expected[0]:
        np.testing.assert_array_equal(getattr(found, name), [row[name] for row in expected])


def test_order_and_shape_of_entries_do_not_matter():
    rng = np.random.default_rng(0)
    index, scale, norm = rng.integers(0, 9, (4, 6)), rng.random((4, 6)), rng.random((4, 6))
    shuffled = rng.permutation(24)
    one = tails.most_clipped(index, scale, norm)
    other = tails.most_clipped(*(values.ravel()[shuffled] for values in (index, scale, norm)))
    assert one.mean_loss is None
    np.testing.assert_array_equal(one.index, other.index)
    np.testing.assert_allclose(one.mean_scale, other.mean_scale, rtol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32, np.float64])
def test_arrays_of_any_dtype_and_library(dtype):
    halves = np.array([0.5, 0.25])
    found = tails.most_clipped(jnp.array([7, 3]), halves.astype(dtype), halves.astype(dtype))
    assert found.index.tolist() == [3, 7]
    assert found.mean_scale.tolist() == [0.25, 0.5]


def test_a_dropped_sample_is_clipped_most():
    found = tails.most_clipped([0, 1], [0.1, 0.0], [1.0, np.nan], [1.0, np.nan])
    assert found.index.tolist() == [1, 0]
    assert (found.median_norm[0], found.mean_loss[0]) == (np.inf, np.inf)


def test_prints_the_first_ten():
    found = tails.most_clipped(np.arange(12), np.full(12, 0.5), np.ones(12), np.ones(12))
    lines = str(found).splitlines()
    assert len(lines) == 13
    assert lines[0].split() == ["index", "seen", "mean", "factor", "median", "norm", "mean", "loss"]
    assert lines[-1] == "10 of 12 samples, those clipped most first"


def test_traced_arrays_are_refused():
    with pytest.raises(TypeError, match=r"index: .* got a traced one"):
        jax.jit(lambda index: tails.most_clipped(index, [1.0], [1.0]))(jnp.array([0]))
