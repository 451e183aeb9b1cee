"""Takes the networks that come with Haiku."""

from __future__ import annotations

import haiku as hk
import jax

from benchmarks.third_party.building import normal, of_haiku
from benchmarks.third_party.common import Model


def resnet(x: jax.Array) -> jax.Array:
    net = hk.nets.ResNet(
        (1, 1, 1, 1), 3, bottleneck=False, channels_per_group=(4, 4, 8, 8), resnet_v2=True
    )
    return net(x[None], is_training=hk.running_init())[0]


def mobilenet(x: jax.Array) -> jax.Array:
    net = hk.nets.MobileNetV1((1, 2), (4, 8), num_classes=3)
    return net(x[None], is_training=hk.running_init())[0]


def vector_quantised(x: jax.Array) -> jax.Array:
    """Looks up the nearest codes, with straight-through gradients."""
    hidden = hk.Linear(4)(x)
    found = hk.nets.VectorQuantizer(4, 5, 0.25)(hidden, is_training=False)
    return hk.Linear(2)(found["quantize"]) + found["loss"]


def convolutional_lstm(x: jax.Array) -> jax.Array:
    core = hk.Conv2DLSTM((4, 4), 3, 3)
    out, _ = hk.dynamic_unroll(core, x[:, None], core.initial_state(1))
    return out[-1]


def dropped_out(x: jax.Array) -> jax.Array:
    layers = hk.nets.MLP((6, 5, 2), activation=jax.nn.gelu)
    return layers(x, dropout_rate=0.3, rng=hk.next_rng_key())


def lifted(x: jax.Array) -> jax.Array:
    """Stacks layers with their own weights in a loop."""
    return hk.experimental.layer_stack(3)(lambda x: jax.nn.tanh(hk.Linear(4)(x)))(x)


MODELS = {
    "ResNet": Model(lambda: of_haiku(resnet, normal(32, 32, 3))),
    "MobileNet": Model(lambda: of_haiku(mobilenet, normal(16, 16, 3))),
    "vector quantiser": Model(lambda: of_haiku(vector_quantised, normal(3, 4))),
    "convolutional LSTM": Model(lambda: of_haiku(convolutional_lstm, normal(3, 4, 4, 2))),
    "MLP with dropout": Model(lambda: of_haiku(dropped_out, normal(4))),
    "layer stack": Model(lambda: of_haiku(lifted, normal(4))),
}
