"""Takes the Flax models of Hugging Face's transformers, from tiny configurations."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import transformers

from benchmarks.third_party.common import NUM_SAMPLES, Case, Model

WORDS, WIDTH, LENGTH, LABELS = 29, 8, 7, 3
BERT = {
    "vocab_size": WORDS,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "num_labels": LABELS,
}
SEQUENCE = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12,
    "decoder_ffn_dim": 12,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5 = {
    "vocab_size": WORDS,
    "d_model": WIDTH,
    "d_kv": 4,
    "d_ff": 12,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
IMAGE = {
    "image_size": 8,
    "patch_size": 4,
    "hidden_size": WIDTH,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "num_labels": LABELS,
}
STAGES = {
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
    "num_labels": LABELS,
}
GPT2 = {"vocab_size": WORDS, "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "n_positions": 16}
LLAMA = BERT | {"num_key_value_heads": 1}


def tokens(seed: int = 1, length: int = LENGTH) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (NUM_SAMPLES, length), 2, WORDS)


def images(size: int = 8, channels: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(2), (NUM_SAMPLES, channels, size, size))


def labels() -> jax.Array:
    return jnp.arange(NUM_SAMPLES) % LABELS


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def made(name: str, config: str, options: dict[str, Any], **others: Any) -> Any:
    """Builds a model with random weights, and its class's call."""
    settings = getattr(transformers, config)(**options)
    return getattr(transformers, name)(settings, seed=0, dtype=jnp.float64, **others)


def language(name: str, config: str, options: dict[str, Any]) -> Case:
    """Predicts the next word."""
    model = made(name, config, options)

    def loss(params: Any, words: jax.Array) -> jax.Array:
        logits = model(words[None, :-1], params=params).logits
        return cross_entropy(logits[0], words[1:])

    return Case(loss, model.params, (tokens(),))


def masked_language(name: str, config: str, options: dict[str, Any]) -> Case:
    """Predicts every word of a text with masked words and padding at the end."""
    model = made(name, config, options)

    def loss(params: Any, words: jax.Array, length: jax.Array) -> jax.Array:
        hidden = jnp.where(jnp.arange(LENGTH) % 3 == 0, 1, words)
        mask = jnp.arange(LENGTH) < length
        logits = model(hidden[None], attention_mask=mask[None], params=params, train=False).logits
        return (optax.softmax_cross_entropy_with_integer_labels(logits[0], words) * mask).sum()

    return Case(loss, model.params, (tokens(), jnp.array([7, 4, 6, 5])))


def dropped_out(name: str, config: str, options: dict[str, Any]) -> Case:
    """Trains with dropout, whose key is the same for all samples."""
    model = made(name, config, options)

    def loss(params: Any, words: jax.Array, label: jax.Array, key: jax.Array) -> jax.Array:
        logits = model(words[None], params=params, dropout_rng=key, train=True).logits
        return cross_entropy(logits[0], label)

    return Case(loss, model.params, (tokens(), labels(), jax.random.key(5)), (0, 0, None))


def answered(name: str, config: str, options: dict[str, Any]) -> Case:
    """Predicts where an answer starts and ends."""
    model = made(name, config, options)

    def loss(params: Any, words: jax.Array, label: jax.Array) -> jax.Array:
        out = model(words[None], params=params, train=False)
        return cross_entropy(out.start_logits[0], label) + cross_entropy(
            out.end_logits[0], label + 1
        )

    return Case(loss, model.params, (tokens(), labels()))


def translated(name: str, config: str, options: dict[str, Any]) -> Case:
    model = made(name, config, options)

    def loss(params: Any, words: jax.Array, target: jax.Array) -> jax.Array:
        logits = model(
            words[None], decoder_input_ids=target[None, :-1], params=params, train=False
        ).logits
        return cross_entropy(logits[0], target[1:])

    return Case(loss, model.params, (tokens(), tokens(3, 5)))


def seen(name: str, config: str, options: dict[str, Any], size: int = 8) -> Case:
    model = made(name, config, options, input_shape=(1, size, size, 3))

    def loss(params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        return cross_entropy(model(image[None], params=params, train=False).logits[0], label)

    params = model.params
    if "batch_stats" in params:  # statistics do not change
        return normalised(model, params)
    return Case(loss, params, (images(size), labels()))


def normalised(model: Any, variables: Any) -> Case:
    """Classifies images with running statistics."""
    statistics = variables["batch_stats"]

    def loss(params: Any, image: jax.Array, label: jax.Array) -> jax.Array:
        both = {"params": params, "batch_stats": statistics}
        return cross_entropy(model(image[None], params=both, train=False).logits[0], label)

    return Case(loss, variables["params"], (images(32), labels()))


def clip() -> Case:
    options = {
        "text_config": BERT | {"eos_token_id": WORDS - 1},
        "vision_config": IMAGE,
        "projection_dim": 6,
    }
    model = made("FlaxCLIPModel", "CLIPConfig", options)

    def loss(params: Any, words: jax.Array, image: jax.Array) -> jax.Array:
        out = model(words[None], image[None], params=params, train=False)
        return jnp.square(out.logits_per_image).sum() + out.text_embeds[0, 0]

    return Case(loss, model.params, (tokens(), images()))


def heard() -> Case:
    """Maps sound to letters, by CTC."""
    options = BERT | {
        "conv_dim": (4, 4),
        "conv_kernel": (4, 3),
        "conv_stride": (2, 2),
        "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4,
        "num_conv_pos_embedding_groups": 2,
        "do_stable_layer_norm": True,
        "feat_extract_norm": "layer",
    }
    model = made("FlaxWav2Vec2ForCTC", "Wav2Vec2Config", options, input_shape=(1, 64))

    def loss(params: Any, sound: jax.Array, words: jax.Array) -> jax.Array:
        logits = model(sound[None], params=params, train=False).logits
        zeros = jnp.zeros
        return optax.ctc_loss(logits, zeros(logits.shape[:2]), words[None], zeros((1, 3))).sum()

    return Case(loss, model.params, (images(8, 1).reshape(NUM_SAMPLES, 64), tokens(3, 3)))


def whisper() -> Case:
    options = SEQUENCE | {"num_mel_bins": 5, "max_source_positions": 6, "max_target_positions": 8}
    config = transformers.WhisperConfig(
        **options, bos_token_id=1, eos_token_id=2, suppress_tokens=None
    )
    model = transformers.FlaxWhisperForConditionalGeneration(
        config, input_shape=(1, 5, 12), seed=0, dtype=jnp.float64
    )

    def loss(params: Any, sound: jax.Array, words: jax.Array) -> jax.Array:
        logits = model(sound[None], words[None, :-1], params=params, train=False).logits
        return cross_entropy(logits[0], words[1:])

    sound = jax.random.normal(jax.random.key(2), (NUM_SAMPLES, 5, 12))
    return Case(loss, model.params, (sound, tokens()))


def of(build: Callable[..., Case], name: str, config: str, options: Any, **others: Any) -> Model:
    return Model(functools.partial(build, f"Flax{name}", config, options, **others))


MODELS = {
    "BERT, masked words": of(masked_language, "BertForMaskedLM", "BertConfig", BERT),
    "BERT, dropout": of(dropped_out, "BertForSequenceClassification", "BertConfig", BERT),
    "RoBERTa": of(
        masked_language,
        "RobertaForMaskedLM",
        "RobertaConfig",
        BERT | {"max_position_embeddings": 20, "pad_token_id": 1},
    ),
    "DistilBERT": of(
        answered,
        "DistilBertForQuestionAnswering",
        "DistilBertConfig",
        {"vocab_size": WORDS, "dim": WIDTH, "n_layers": 1, "n_heads": 2, "hidden_dim": 12},
    ),
    "ALBERT": of(
        masked_language, "AlbertForMaskedLM", "AlbertConfig", BERT | {"embedding_size": 6}
    ),
    "RoFormer": of(masked_language, "RoFormerForMaskedLM", "RoFormerConfig", BERT),
    "BigBird": of(
        answered,
        "BigBirdForQuestionAnswering",
        "BigBirdConfig",
        BERT | {"attention_type": "original_full"},
    ),
    "GPT-2": of(language, "GPT2LMHeadModel", "GPT2Config", GPT2),
    "GPT-Neo": of(
        language,
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "vocab_size": WORDS,
            "hidden_size": WIDTH,
            "num_layers": 2,
            "num_heads": 2,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 3,
            "max_position_embeddings": 16,
        },
    ),
    "GPT-J": of(language, "GPTJForCausalLM", "GPTJConfig", GPT2 | {"rotary_dim": 2}),
    "OPT": of(
        language,
        "OPTForCausalLM",
        "OPTConfig",
        BERT | {"ffn_dim": 12, "word_embed_proj_dim": WIDTH},
    ),
    "BLOOM": of(
        language,
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": WORDS, "hidden_size": WIDTH, "n_layer": 1, "n_head": 2},
    ),
    "XGLM": of(
        language,
        "XGLMForCausalLM",
        "XGLMConfig",
        {
            "vocab_size": WORDS,
            "d_model": WIDTH,
            "num_layers": 2,
            "attention_heads": 2,
            "ffn_dim": 12,
            "max_position_embeddings": 16,
        },
    ),
    "Llama": of(language, "LlamaForCausalLM", "LlamaConfig", LLAMA),
    "Mistral": of(language, "MistralForCausalLM", "MistralConfig", LLAMA | {"sliding_window": 3}),
    "Gemma": of(language, "GemmaForCausalLM", "GemmaConfig", LLAMA | {"head_dim": 4}),
    "BART": of(translated, "BartForConditionalGeneration", "BartConfig", SEQUENCE),
    "ViT": of(seen, "ViTForImageClassification", "ViTConfig", IMAGE),
    "BEiT": of(
        seen,
        "BeitForImageClassification",
        "BeitConfig",
        IMAGE | {"use_relative_position_bias": True, "drop_path_rate": 0.0},
    ),
    "DINOv2": of(seen, "Dinov2ForImageClassification", "Dinov2Config", IMAGE),
    "ResNet": of(
        seen,
        "ResNetForImageClassification",
        "ResNetConfig",
        STAGES | {"layer_type": "basic"},
        size=32,
    ),
    "RegNet": of(
        seen,
        "RegNetForImageClassification",
        "RegNetConfig",
        STAGES | {"groups_width": 2, "layer_type": "y"},
        size=32,
    ),
    "CLIP": Model(clip),
    "wav2vec 2": Model(heard),
    "Whisper": Model(whisper),
}
