"""How accurate are norms at an accelerator's default matmul precision?

    python -m benchmarks.engine.norm_precision

A TPU rounds the operands of products to bfloat16, an NVIDIA GPU to TF32. Here a CPU emulates this
rounding, for the norms only, on the models of the zoo at their small size. Errors are the relative
errors of a sample's norm, compared with operands that are not rounded.
"""

from __future__ import annotations

import pathlib
from typing import Annotated, Any
from unittest import mock

import jax
import numpy as np
import tyro
from jax import lax

import psclip_optax as psc
from benchmarks.common.machine import describe_machine
from benchmarks.common.publishing import RESULTS, markdown_table
from benchmarks.zoo.models import ZOO
from psclip_optax.engine.routes import dense
from psclip_optax.training.output.files import to_json

# Bits of the exponent and of the mantissa.
FORMATS = {"bfloat16": (8, 7), "TF32": (8, 10)}


def norms_of(model: Any, batch: tuple[Any, ...], bits: tuple[int, int] | None) -> np.ndarray:
    """Returns the norms of a batch, with the operands of products rounded to `bits`."""
    product = dense.product

    def rounded(one: jax.Array, other: jax.Array, axis: int, dtype: Any) -> jax.Array:
        if bits is not None:
            one, other = (lax.reduce_precision(side, *bits) for side in (one, other))
        return product(one, other, axis, dtype)

    f = psc.clipped_value_and_grad(model.loss, 1.0, mode="one_pass", return_stats=True)
    with mock.patch.object(dense, "product", rounded):
        return np.asarray(jax.jit(f)(model.params, *batch)[-1].norms, np.float64)


def measure(name: str, samples: int) -> dict[str, Any]:
    """Returns the median and the largest relative error of one model's norms in each format."""
    model = ZOO[name]("small")
    batch = model.batch(samples)
    exact = norms_of(model, batch, None)
    errors = {
        form: np.abs(norms_of(model, batch, bits) - exact) / exact for form, bits in FORMATS.items()
    }
    found = {form: [float(np.median(e)), float(np.max(e))] for form, e in errors.items()}
    return {"model": name, "samples": samples, "errors": found}


def to_markdown(rows: list[dict[str, Any]]) -> str:
    header = ["model", *(f"{form}: median, largest" for form in FORMATS)]
    body = [
        [row["model"], *(", ".join(f"{e:.1e}" for e in row["errors"][form]) for form in FORMATS)]
        for row in rows
    ]
    return markdown_table([header, *body])


def main(
    out: Annotated[pathlib.Path, tyro.conf.arg(metavar="DIR")] = RESULTS,
    models: tuple[str, ...] = tuple(ZOO),
    samples: int = 16,
) -> None:
    """Measures the errors of norms at the default precision of accelerators.

    Args:
      out: where norm_precision.json is written.
      models: models of the zoo.
      samples: the batch size.
    """
    rows = [measure(name, samples) for name in models]
    out.mkdir(parents=True, exist_ok=True)
    result = {"machine": describe_machine(), "rows": rows}
    (out / "norm_precision.json").write_text(to_json(result, indent=2) + "\n")
    print(to_markdown(rows))


if __name__ == "__main__":
    tyro.cli(main)
