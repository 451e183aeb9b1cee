"""Takes the T5 family of transformers, which calls JAX as it was before 0.8."""

from __future__ import annotations

from benchmarks.third_party.models.transformers import T5, of, translated

MODELS = {
    "T5": of(translated, "T5ForConditionalGeneration", "T5Config", T5),
    "LongT5": of(
        translated,
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        T5 | {"local_radius": 2, "encoder_attention_type": "transient-global"},
    ),
}
