"""Takes the language model of mamba2-jax."""

from __future__ import annotations

from flax import nnx
from mamba2_jax import modeling

from benchmarks.third_party.building import next_token, of_nnx, tokens
from benchmarks.third_party.common import Case, Model


def language() -> Case:
    config = modeling.Mamba2Config(
        vocab_size=11, hidden_size=8, state_size=4, head_dim=4, chunk_size=4, num_hidden_layers=2
    )
    module = modeling.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))

    def call(module, words):
        return next_token(module(words[None])["logits"][0], words)

    return of_nnx(module, tokens(8, 11), call=call)


MODELS = {"language model": Model(language, "float32")}  # it normalises in float32
