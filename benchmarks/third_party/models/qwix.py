"""Takes a model trained in the precision of integers, by Qwix."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import qwix

from benchmarks.third_party.building import normal, of_linen
from benchmarks.third_party.common import Case, Model


class Net(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Dense(6)(x))
        return nn.Dense(2)(x)


def quantised(**options: Any) -> Case:
    rules = [qwix.QtRule(module_path=".*", **options)]
    return of_linen(qwix.quantize_model(Net(), qwix.QtProvider(rules)), normal(5, 4))


def low_rank() -> Case:
    rules = [qwix.LoraRule(module_path=".*", rank=2, alpha=1.0)]
    return of_linen(qwix.apply_lora_to_model(Net(), qwix.LoraProvider(rules)), normal(5, 4))


MODELS = {
    "int8 weights and activations": Model(
        lambda: quantised(weight_qtype="int8", act_qtype="int8"), "float32"
    ),
    "int4 weights": Model(lambda: quantised(weight_qtype="int4"), "float32"),
    "low rank": Model(low_rank, "float32"),
}
