"""Defines what the processes of the comparison share, without JAX and PyTorch."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np


class Peer(NamedTuple):
    """A library's way of clipping per sample.

    Attributes:
      label: the label in tables and figures.
      framework: the framework of its plain step.
      module: the module that must be importable where it is measured.
      epsilon: ε of its clip factor min(1, C / (norm + ε)).
      colour: one of Okabe and Ito's, which colour-blind readers can distinguish.
      hatch: the hatch, for grey prints.
      float32_limit: the largest accepted error of its gradients in float32.
    """

    label: str
    framework: Literal["jax", "torch"]
    module: str
    epsilon: float
    colour: str
    hatch: str
    float32_limit: float = 1e-5


PEERS = {
    "ours": Peer("psclip_optax", "jax", "psclip_optax", 0.0, "#0072B2", ""),
    "jax_privacy": Peer("jax_privacy", "jax", "jax_privacy", 0.0, "#E69F00", ""),
    "jax_privacy_sliced": Peer(
        "jax_privacy, one by one", "jax", "jax_privacy", 0.0, "#E69F00", "///"
    ),
    "optax": Peer("vmap(grad) + optax", "jax", "optax", 0.0, "#D55E00", "..."),
    "opacus_ghost": Peer("Opacus, ghost clipping", "torch", "opacus", 1e-6, "#009E73", ""),
    # PyTorch's float32 norm of the 16.8 M entries of a layer of AlexNet is 2e-4 too small on CPU,
    # and those of whole gradients 7e-5.
    "opacus_hooks": Peer("Opacus, hooks", "torch", "opacus", 1e-6, "#009E73", "///", 2e-4),
    "fastdp": Peer("fastDP, book-keeping", "torch", "fastDP", 1e-6, "#CC79A7", "xx"),
}


class Inputs(NamedTuple):
    """The inputs of a peer.

    Attributes:
      model: "alexnet" or "gpt".
      size: the size of the model, "small" or "full".
      threshold: C, which clips half of the samples.
      params: initial parameters, named as in Flax.
      batch: the arguments of the loss after the parameters, samples on axis 0.
    """

    model: str
    size: Literal["small", "full"]
    threshold: float
    params: dict[str, np.ndarray]
    batch: tuple[np.ndarray, ...]

    @property
    def num_samples(self) -> int:
        return len(self.batch[0])

    def save(self, path: pathlib.Path) -> None:
        arrays: dict[str, Any] = {f"params/{name}": own for name, own in self.params.items()}
        arrays |= {f"batch/{i}": own for i, own in enumerate(self.batch)}
        arrays |= {name: getattr(self, name) for name in ("model", "size", "threshold")}
        with path.open("wb") as file:
            np.savez(file, **arrays)

    @classmethod
    def load(cls, path: pathlib.Path) -> Inputs:
        with np.load(path) as file:
            arrays = dict(file)
        names = [name for name in arrays if name.startswith("params/")]
        num_batch = sum(name.startswith("batch/") for name in arrays)
        return cls(
            str(arrays["model"]),
            str(arrays["size"]),  # pyright: ignore[reportArgumentType]
            float(arrays["threshold"]),
            {name.removeprefix("params/"): arrays[name] for name in names},
            tuple(arrays[f"batch/{i}"] for i in range(num_batch)),
        )


class Steps(NamedTuple):
    """The steps of a peer, ready to run on some inputs.

    Attributes:
      plain: a function that computes loss and gradient of the mean loss, and waits for them; None
        if not requested.
      clipped: a function that computes loss and clipped mean gradient, and waits for them.
      loss: a function from the result of `clipped` to the mean loss.
      gradients: a function from the result of `clipped` to arrays named and shaped as in Flax.
      temp_bytes: temporary memory of `plain` and of `clipped`, if the compiler reports it.
      clear: a function that frees arrays that the last steps left in the model.
    """

    plain: Callable[[], Any] | None
    clipped: Callable[[], Any]
    loss: Callable[[Any], float]
    gradients: Callable[[Any], dict[str, np.ndarray]]
    temp_bytes: tuple[int, int] | None = None
    clear: Callable[[], None] = lambda: None
