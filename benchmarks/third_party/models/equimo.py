"""Takes vision models of Equimo."""

from __future__ import annotations

from typing import Any

from equimo import models

from benchmarks.third_party.building import KEY, normal, of_equinox, squared
from benchmarks.third_party.common import Case, Model


def seen(module: Any, size: int) -> Case:
    call = lambda module, image: squared(module(image, KEY, inference=True))
    return of_equinox(module, normal(3, size, size), call=call)


def transformer() -> Case:
    module = models.VisionTransformer(
        img_size=8,
        in_channels=3,
        dim=8,
        patch_size=4,
        num_heads=2,
        depths=[1],
        num_classes=3,
        reg_tokens=1,
        key=KEY,
    )
    return seen(module, 8)


def convolutional() -> Case:
    module = models.ConvNeXt(
        3, depths=[1, 1], dims=[4, 8], layer_scale_init_value=0.5, num_classes=3, key=KEY
    )
    return seen(module, 16)


MODELS = {
    "vision transformer": Model(transformer, "float32"),
    "ConvNeXt": Model(convolutional, "float32"),
}
