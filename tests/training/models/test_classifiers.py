"""Check the models' sizes, and that no sample's logits depend on another's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psclip_optax.training.models.classifiers import build_model
from tests import slow

NAMES = ["mlp", "small_cnn", "alexnet", "resnet18"]


def num_parameters(name, num_classes, image_shape, **options):
    model = build_model(name, num_classes, **options)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros([1, *image_shape]))
    assert set(variables) == {"params"}
    return sum(leaf.size for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize(
    ("name", "num_classes", "image_shape", "expected"),
    [
        ("mlp", 10, (8, 8, 1), 85_002),
        ("small_cnn", 10, (8, 8, 1), 99_178),
        ("small_cnn", 100, (32, 32, 3), 602_884),
        ("alexnet", 100, (32, 32, 3), 23_640_996),
        ("resnet18", 100, (32, 32, 3), 11_220_132),
    ],
)
def test_number_of_parameters(name, num_classes, image_shape, expected):
    assert num_parameters(name, num_classes, image_shape) == expected


def test_width_multiplies_channels_and_hidden_sizes():
    convolutions = 3 * 3 * (3 * 32 + 32 * 96 + 96 * 192 + 192 * 128 + 128 * 128)
    dense = 512 * 2048 + 2048 * 2048 + 2048 * 100
    biases = 32 + 96 + 192 + 128 + 128 + 2048 + 2048 + 100
    expected = convolutions + dense + biases
    assert num_parameters("alexnet", 100, (32, 32, 3), width=0.5) == expected


@pytest.mark.parametrize("name", slow.but(["mlp", "small_cnn", "alexnet"], NAMES))
def test_logits_of_a_sample_do_not_depend_on_the_others(name):
    model = build_model(name, 7, width=0.125)
    images = jax.random.normal(jax.random.key(0), [2, 3, 32, 32, 3])
    variables = jax.jit(model.init)(jax.random.key(1), images[0, :1])
    apply = jax.jit(model.apply)
    together = apply(variables, images)
    alone = [apply(variables, image[None])[0] for image in images.reshape(6, 32, 32, 3)]
    assert together.shape == (2, 3, 7)
    np.testing.assert_allclose(
        together.reshape(6, 7), np.stack(alone), rtol=1e-4, atol=1e-5 * np.abs(together).max()
    )
    assert np.ptp(together.reshape(6, 7), axis=0).min() > 0


@pytest.mark.parametrize("name", slow.but(["mlp", "small_cnn", "alexnet"], NAMES))
def test_dropout_only_in_training(name):
    model = build_model(name, 5, width=0.125, dropout_rate=0.5)
    images = jax.random.normal(jax.random.key(0), [1, 16, 16, 3])
    variables = jax.jit(model.init)(jax.random.key(1), images)

    @jax.jit
    def in_training(key):
        return model.apply(variables, images, train=True, rngs={"dropout": key})

    logits = jax.jit(model.apply)(variables, images)
    first, second = in_training(jax.random.key(2)), in_training(jax.random.key(3))
    assert not np.allclose(first, second)
    assert not np.allclose(first, logits)
    np.testing.assert_array_equal(first, in_training(jax.random.key(2)))


def test_groups_where_32_does_not_divide_the_channels():
    model = build_model("resnet18", 5, width=0.75)
    images = jnp.zeros([1, 32, 32, 3])
    logits, _ = jax.eval_shape(model.init_with_output, jax.random.key(0), images)
    assert logits.shape == (1, 5)


@pytest.mark.parametrize(
    ("name", "size", "expected"),
    [("alexnet", 8, "at least 16, got shape"), ("small_cnn", 3, "at least 4, got shape")],
)
def test_images_that_pooling_would_leave_empty_are_refused(name, size, expected):
    with pytest.raises(ValueError, match=expected):
        jax.eval_shape(build_model(name, 10).init, jax.random.key(0), jnp.zeros([1, size, size, 1]))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("vgg", {}, "'mlp', 'small_cnn', 'alexnet', 'resnet18', got 'vgg'"),
        ("mlp", {"num_classes": 0}, "num_classes is an int of at least 1, got 0"),
        ("mlp", {"width": 0.0}, "expects `width` > 0 and < inf, got 0"),
        ("mlp", {"width": float("nan")}, "expects `width` > 0 and < inf, got nan"),
        ("mlp", {"dropout_rate": 1.0}, "expects `dropout_rate` >= 0 and < 1, got 1"),
    ],
)
def test_what_build_model_refuses(name, options, expected):
    with pytest.raises(ValueError, match=expected):
        build_model(name, **{"num_classes": 10} | options)
