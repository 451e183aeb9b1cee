"""The zoo's small models, each built once in a process: to initialise one takes as long as a test."""

from __future__ import annotations

import functools

from benchmarks.zoo.models import ZOO, Model
from tests.numerics import enable_x64


@functools.cache
def small(name: str) -> Model:
    """Build a small model in float32, whose batches are drawn once."""
    with enable_x64(False):
        model = ZOO[name]("small")
    return model._replace(batch=functools.cache(functools.partial(_in_float32, model)))


def _in_float32(model, n):
    with enable_x64(False):
        return model.batch(n)
