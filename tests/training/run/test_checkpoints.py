"""Check that checkpoints are restored exactly, or that damage is found and an older one is used."""

from __future__ import annotations

import logging
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import psclip_optax as psc
from psclip_optax.training.config.commands import UsageError
from psclip_optax.training.run.checkpoints import (
    open_checkpoints,
    restore_newest,
    save_checkpoint,
    saved_norms,
)


def state_at(step: int) -> TrainState:
    tx = optax.inject_hyperparams(psc.ps_clip_sgd)(0.1, 1.0, 1.5, momentum=0.9)
    params = {"kernel": jax.random.normal(jax.random.key(step), (200, 30)), "bias": jnp.ones(3)}
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    opt_state = jax.tree.map(lambda leaf: leaf + jnp.asarray(step, leaf.dtype), state.opt_state)
    return state.replace(step=jnp.int32(step), opt_state=opt_state)


def save(folder: pathlib.Path, *steps: int):
    with open_checkpoints(folder) as manager:
        for step in steps:
            save_checkpoint(manager, state_at(step))


def restore(folder: pathlib.Path):
    with open_checkpoints(folder) as manager:
        return restore_newest(manager, state_at(0))


def assert_same_bits(actual: TrainState, expected: TrainState):
    parts = [(state.step, state.params, state.opt_state) for state in (actual, expected)]
    chex.assert_trees_all_equal(*parts, strict=True)


def flip_a_bit(folder: pathlib.Path):
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(folder: pathlib.Path):
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])


def lose_a_file(folder: pathlib.Path):
    (folder / "default" / "manifest.ocdbt").unlink()


def lose_the_digests(folder: pathlib.Path):
    (folder / "digests.json").unlink()


def garble_the_digests(folder: pathlib.Path):
    (folder / "digests.json").write_bytes(b'{"default/mani')


DAMAGES = [flip_a_bit, truncate, lose_a_file, lose_the_digests, garble_the_digests]


def test_newest_comes_back_bit_by_bit(tmp_path: pathlib.Path):
    save(tmp_path, 3, 7)
    restored = restore(tmp_path)
    assert_same_bits(restored.state, state_at(7))
    assert restored.damaged_steps == []


def test_last_three_are_kept(tmp_path: pathlib.Path):
    save(tmp_path, 1, 2, 3, 4, 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["3", "4", "5"]


def test_without_checkpoints_the_given_state_is_returned(tmp_path: pathlib.Path):
    assert_same_bits(restore(tmp_path).state, state_at(0))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoint_falls_back_to_the_one_before(damage, tmp_path: pathlib.Path):
    save(tmp_path, 3, 7)
    damage(tmp_path / "7")
    restored = restore(tmp_path)
    assert_same_bits(restored.state, state_at(3))
    assert restored.damaged_steps == [7]
    save(tmp_path, 7)
    assert_same_bits(restore(tmp_path).state, state_at(7))


def test_nothing_is_removed_where_all_are_damaged(tmp_path: pathlib.Path):
    save(tmp_path, 3, 7)
    for step in ("3", "7"):
        flip_a_bit(tmp_path / step)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"no checkpoint in .* is intact \(steps 7, 3\)"):
        restore(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_damage_is_not_told_by_orbax_as_well(tmp_path: pathlib.Path, caplog):
    save(tmp_path, 3, 7)
    for path in (tmp_path / "7").iterdir():
        if path.is_file():
            path.write_text("x")
    with caplog.at_level(logging.ERROR):
        assert restore(tmp_path).damaged_steps == [7]
    assert not caplog.records


def test_norms_are_those_of_the_checkpoint_and_may_be_missing(tmp_path: pathlib.Path):
    norms = np.array([1.0, np.nan, 3.0], np.float32)
    with open_checkpoints(tmp_path) as manager:
        save_checkpoint(manager, state_at(3), norms)
        save_checkpoint(manager, state_at(7), norms + 1)
        save_checkpoint(manager, state_at(8))
        np.testing.assert_array_equal(saved_norms(manager, 3), norms)
        np.testing.assert_array_equal(saved_norms(manager, 7), norms + 1)
        assert saved_norms(manager, 8).size == saved_norms(manager, 9).size == 0


def test_damaged_norms_are_a_damaged_checkpoint(tmp_path: pathlib.Path):
    with open_checkpoints(tmp_path) as manager:
        save_checkpoint(manager, state_at(3), np.ones(5, np.float32))
        save_checkpoint(manager, state_at(7), np.ones(5, np.float32))
    path = tmp_path / "7" / "norms.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert restore(tmp_path).damaged_steps == [7]
