"""Takes models of Penzai, by their named axes."""

from __future__ import annotations

from typing import Any

import jax
from penzai import pz
from penzai.models import simple_mlp
from penzai.models.transformer.variants import llamalike_common

from benchmarks.third_party.building import KEY, next_token, normal, squared, tokens
from benchmarks.third_party.common import Case, Model


def of_penzai(model: Any, call: Any, *batch: Any) -> Case:
    """Makes a case of a model's parameter values, without their names, which jit cannot hash."""
    unbound, parameters = pz.unbind_params(model)
    values, names = jax.tree.flatten([parameter.value for parameter in parameters])

    def loss(values: Any, *example: Any) -> jax.Array:
        frozen = [
            pz.ParameterValue(value=value, label=parameter.label, metadata=parameter.metadata)
            for value, parameter in zip(names.unflatten(values), parameters, strict=True)
        ]
        return call(pz.bind_variables(unbound, frozen), *example)

    return Case(loss, values, batch)


def mlp() -> Case:
    model = simple_mlp.MLP.from_config(KEY, [4, 6, 2])

    def call(model, x):
        return squared(model(pz.nx.wrap(x).tag("features")).unwrap("features"))

    return of_penzai(model, call, normal(4))


def transformer() -> Case:
    config = llamalike_common.LlamalikeTransformerConfig(
        num_kv_heads=1,
        query_head_multiplier=2,
        embedding_dim=8,
        projection_dim=4,
        mlp_hidden_dim=12,
        num_decoder_blocks=2,
        vocab_size=11,
        mlp_variant="geglu_approx",
        tie_embedder_and_logits=True,
    )
    model = llamalike_common.build_llamalike_transformer(config, KEY)

    def call(model: Any, words: jax.Array) -> jax.Array:
        named = pz.nx.wrap(words).tag("seq")
        positions = pz.nx.arange("seq", len(words))
        logits = model(named, token_positions=positions).unwrap("seq", "vocabulary")
        return next_token(logits, words)

    return of_penzai(model, call, tokens(6, 11))


# Penzai's parameters and activations are in float32.
MODELS = {"MLP": Model(mlp, "float32"), "Gemma-like transformer": Model(transformer, "float32")}
