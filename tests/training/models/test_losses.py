"""Compare classification_loss with NumPy, and check its dropout keys."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from psclip_optax.training.models.classifiers import build_model
from psclip_optax.training.models.losses import classification_loss


@pytest.fixture
def images():
    return jax.random.normal(jax.random.key(0), [6, 8, 8, 1])


@pytest.fixture
def labels():
    return jnp.array([0, 1, 2, 3, 0, 1])


def init(model, images):
    return model.init(jax.random.key(1), images[:1])["params"]


def test_value_and_correct_against_numpy(images, labels):
    model = build_model("mlp", 4, width=0.1)
    params = init(model, images)
    losses, correct = jax.vmap(classification_loss(model), in_axes=(None, 0, 0))(
        params, images, labels
    )
    logits = np.asarray(model.apply({"params": params}, images), np.float64)
    log_normalizers = np.log(np.exp(logits).sum(axis=1))
    np.testing.assert_allclose(losses, log_normalizers - logits[np.arange(6), labels], rtol=1e-5)
    np.testing.assert_array_equal(correct, logits.argmax(axis=1) == labels)
    assert correct.dtype == jnp.float32
    assert 0 < correct.sum() < 6


def test_each_sample_drops_its_own_units(images, labels):
    model = build_model("mlp", 4, width=0.1, dropout_rate=0.5)
    params = init(model, images)
    loss = jax.vmap(classification_loss(model, dropout=True), in_axes=(None, 0, 0, 0))
    same_images, same_labels = jnp.repeat(images[:1], 6, axis=0), jnp.repeat(labels[:1], 6)
    keys = jax.random.split(jax.random.key(2), 6)
    differing, _ = loss(params, same_images, same_labels, keys)
    equal, _ = loss(params, same_images, same_labels, jnp.repeat(keys[:1], 6))
    assert np.unique(differing).size > 1
    np.testing.assert_allclose(equal, jnp.full(6, differing[0]), rtol=1e-6)


def test_a_key_is_taken_exactly_where_there_is_dropout(images, labels):
    model = build_model("mlp", 4, width=0.1, dropout_rate=0.5)
    params = init(model, images)
    with pytest.raises(TypeError, match="key"):
        classification_loss(model, dropout=True)(params, images[0], labels[0])
    with pytest.raises(TypeError, match="positional arguments"):
        classification_loss(model)(params, images[0], labels[0], jax.random.key(0))
