"""Takes models of Keras on its JAX backend, by `stateless_call`."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "jax"  # read when Keras is imported

from typing import Any

import jax
import jax.numpy as jnp
import keras
from keras import layers

from benchmarks.third_party.building import normal, tokens
from benchmarks.third_party.common import Case, Model


def set_dtype() -> None:
    keras.config.set_floatx(str(jnp.zeros(()).dtype))
    keras.config.set_dtype_policy(keras.config.floatx())


def of_keras(inputs: Any, outputs: Any, batch: jax.Array) -> Case:
    model = keras.Model(inputs, outputs)
    held = [variable.value for variable in model.non_trainable_variables]

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y, _ = model.stateless_call(params, held, x[None], training=False)
        return jnp.square(y - 1).sum()

    return Case(loss, [variable.value for variable in model.trainable_variables], (batch,))


def convolutional() -> Case:
    set_dtype()
    inputs = keras.Input((8, 8, 2))
    x = layers.Conv2D(4, 3, padding="same", activation="relu")(inputs)
    x = layers.BatchNormalization()(x)
    x = layers.MaxPooling2D()(layers.SeparableConv2D(6, 3, padding="same")(x))
    x = layers.DepthwiseConv2D(3)(layers.Conv2DTranspose(4, 2, 2)(x))
    x = layers.GroupNormalization(2)(x)
    return of_keras(inputs, layers.Dense(3)(layers.GlobalAveragePooling2D()(x)), normal(8, 8, 2))


def recurrent() -> Case:
    set_dtype()
    inputs = keras.Input((6,), dtype="int32")
    x = layers.Embedding(11, 4)(inputs)
    x = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(x)
    return of_keras(inputs, layers.Dense(2)(layers.GRU(4)(x)), tokens(6, 11))


def attention() -> Case:
    set_dtype()
    inputs = keras.Input((5, 8))
    x = layers.MultiHeadAttention(2, 4)(*[layers.LayerNormalization()(inputs)] * 2) + inputs
    x = x + layers.GroupQueryAttention(4, 4, 2)(x, x)
    x = layers.EinsumDense("abc,cd->abd", output_shape=(5, 6), bias_axes="d")(x)
    return of_keras(inputs, layers.Dense(2)(layers.Flatten()(x)), normal(5, 8))


MODELS = {
    # Keras normalises and averages over a batch's axes in float32, whatever its floatx.
    "convolutions": Model(convolutional, "float32"),
    "LSTM and GRU": Model(recurrent),
    "attention": Model(attention),
}
