"""Save and restore checkpoints with Orbax, with digests of their files.

Damage is detected before a checkpoint is loaded. Orbax itself restores a checkpoint with a flipped
bit as wrong parameters, without an error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState

from psclip_optax.training.config.commands import UsageError
from psclip_optax.training.output.files import to_json, to_npy, write_atomically
from psclip_optax.training.run.distributed import (
    is_first_process,
    told_by_first_process,
    wait_for_all,
)

_DIGESTS, _NORMS = "digests.json", "norms.npy"
_NUM_KEPT = 3
_MIB = 2**20


class Restored(NamedTuple):
    """The result of searching for an intact checkpoint.

    Attributes:
      state: the newest state whose checkpoint is intact; the given state if there is none.
      damaged_steps: steps of newer checkpoints, which were damaged and have been removed.
    """

    state: TrainState
    damaged_steps: list[int]


def open_checkpoints(folder: pathlib.Path) -> ocp.CheckpointManager:
    """Opens a folder of checkpoints, of which the last three are kept.

    Args:
      folder: an absolute path; created if missing.

    Returns:
      Orbax's manager; close it, e.g. by `with`.

    Examples:
      >>> import tempfile
      >>> with open_checkpoints(pathlib.Path(tempfile.mkdtemp())) as manager:
      ...     manager.latest_step()
    """
    # Not in the background: the digests need complete files.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=_NUM_KEPT, create=True, enable_async_checkpointing=False
    )
    # Orbax reads all metadata and logs damage at length; the digests report it in one line.
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return ocp.CheckpointManager(folder, options=options)
    finally:
        logger.setLevel(level)


def save_checkpoint(
    manager: ocp.CheckpointManager, state: TrainState, norms: np.ndarray | None = None
) -> None:
    """Saves parameters, optimizer state and step, and the digests of the files.

    Args:
      manager: what `open_checkpoints` returned.
      state: the state, named by its step.
      norms: the window of gradient norms `[N]` for further records, if there is one.

    Raises:
      OSError: the disk is full; nothing was written.

    Examples:
      >>> import tempfile, jax.numpy as jnp, optax
      >>> state = TrainState.create(apply_fn=None, params=jnp.ones(2), tx=optax.sgd(0.1))
      >>> with open_checkpoints(pathlib.Path(tempfile.mkdtemp())) as manager:
      ...     save_checkpoint(manager, state)
      ...     restore_newest(manager, state).state.params
      Array([1., 1.], dtype=float32)
    """
    step = int(state.step)
    _check_room(manager, state)
    manager.save(step, args=ocp.args.StandardSave(_saved_part(state)))
    wait_for_all(f"checkpoint {step}")
    if is_first_process():
        folder = _folder(manager, step)
        if norms is not None:
            write_atomically(folder / _NORMS, to_npy(norms))
        write_atomically(folder / _DIGESTS, to_json(_digests(folder), indent=1).encode())


def restore_newest(manager: ocp.CheckpointManager, state: TrainState) -> Restored:
    """Restores the newest checkpoint that is intact.

    Args:
      manager: what `open_checkpoints` returned.
      state: any state with the same structure, shapes and dtypes; the restored state is on its
          devices.

    Returns:
      The state, and the damaged checkpoints.

    Raises:
      UsageError: there are checkpoints, but none is intact; none is removed.

    Example: see `save_checkpoint`.
    """
    steps = sorted(manager.all_steps(), reverse=True)
    intact = _newest_intact(manager, steps)
    if intact is None:
        if steps:
            raise UsageError(
                f"--resume: no checkpoint in {manager.directory} is intact (steps "
                f"{', '.join(map(str, steps))}); start again in another folder"
            )
        return Restored(state, [])
    # Restored before anything is removed, so that no failure can lose more.
    like = ocp.args.StandardRestore(_saved_part(state))
    restored = state.replace(**manager.restore(intact, args=like))
    damaged = [step for step in steps if step > intact]
    for step in damaged:
        manager.delete(step)
    return Restored(restored, damaged)


def saved_norms(manager: ocp.CheckpointManager, step: int) -> np.ndarray:
    """Reads the window of gradient norms saved with a checkpoint.

    Args:
      manager: what `open_checkpoints` returned.
      step: the checkpoint's step; it may be missing.

    Returns:
      The norms `[N]`; empty if none were saved.

    Examples:
      >>> import tempfile
      >>> with open_checkpoints(pathlib.Path(tempfile.mkdtemp())) as manager:
      ...     saved_norms(manager, 0)
      array([], dtype=float32)
    """
    path = _folder(manager, step) / _NORMS
    return np.load(path) if path.exists() else np.empty(0, np.float32)


def _check_room(manager: ocp.CheckpointManager, state: TrainState) -> None:
    # Before Orbax starts, because each of its tasks would report the failure.
    free = shutil.disk_usage(manager.directory).free if is_first_process() else 0
    leaves = jax.tree.leaves(_saved_part(state))
    needed = sum(jnp.size(leaf) * jnp.result_type(leaf).itemsize for leaf in leaves)
    if told_by_first_process(free // _MIB) < needed // _MIB + 1:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(manager.directory))


def _newest_intact(manager: ocp.CheckpointManager, steps: list[int]) -> int | None:
    """Finds the newest intact checkpoint in the first process, and tells the others."""
    none = -1
    found = none
    if is_first_process():
        found = next((step for step in steps if _is_intact(_folder(manager, step))), none)
    found = told_by_first_process(found)
    return None if found == none else found


def _saved_part(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step}


def _folder(manager: ocp.CheckpointManager, step: int) -> pathlib.Path:
    return pathlib.Path(manager.directory) / str(step)


def _digests(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): _digest(p) for p in files if p.name != _DIGESTS}


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_intact(folder: pathlib.Path) -> bool:
    try:
        expected = json.loads((folder / _DIGESTS).read_bytes())
    except (FileNotFoundError, ValueError):
        return False
    return expected == _digests(folder)
