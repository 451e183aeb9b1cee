"""Takes Kolmogorov–Arnold networks of jaxKAN."""

from __future__ import annotations

from jaxkan.models.KAN import KAN

from benchmarks.third_party.building import normal, of_nnx, squared
from benchmarks.third_party.common import Case, Model


def network(kind: str) -> Case:
    module = KAN([3, 4, 2], kind, {"k": 3, "G": 3} if kind == "base" else {"D": 3})
    return of_nnx(module, normal(3), call=lambda module, x: squared(module(x[None])))


MODELS = {
    "splines": Model(lambda: network("base")),
    "Chebyshev": Model(lambda: network("chebyshev")),
    "Fourier": Model(lambda: network("fourier")),
}
