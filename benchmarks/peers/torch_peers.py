"""Runs the libraries for PyTorch. Their step ends with the clipped sum: no noise, no update."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from benchmarks.peers.common import Inputs, Steps
from benchmarks.peers.torch_models import batch_tensors, build_model, sample_losses
from benchmarks.peers.weights import from_torch, torch_name


def build(peer: str, inputs: Inputs, with_plain: bool) -> Steps:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    hooked = build_model(inputs.model, inputs.params)
    clipped, summed = PEERS[peer](hooked, inputs)
    steps = Steps(None, clipped, float, lambda _: gradients(summed(), inputs))
    if not with_plain:
        return steps
    bare = build_model(inputs.model, inputs.params)
    plain = plain_step(bare, inputs)
    return steps._replace(plain=plain, clear=lambda: clear(bare, hooked))


def clear(*models: Any) -> None:
    for param in (param for model in models for param in model.parameters()):
        for name in ("grad", "grad_sample", "summed_grad", "private_grad"):
            if getattr(param, name, None) is not None:
                setattr(param, name, None)


def plain_step(model: Any, inputs: Inputs) -> Callable[[], Any]:
    x, targets = batch_tensors(inputs.model, inputs.batch)

    def step() -> Any:
        model.zero_grad(set_to_none=True)
        loss = sample_losses(model(x), targets).mean()
        loss.backward()
        return loss.detach()

    return step


def gradients(summed: dict[str, Any], inputs: Inputs) -> dict[str, np.ndarray]:
    return {
        name: from_torch(name, (summed[torch_name(name)] / inputs.num_samples).numpy(), array.shape)
        for name, array in inputs.params.items()
    }


# A peer returns its step, and a function that reads the sums of clipped gradients after it.
Built = tuple[Callable[[], Any], Callable[[], dict[str, Any]]]


def opacus_ghost(model: Any, inputs: Inputs) -> Built:
    from opacus.grad_sample import (  # pyright: ignore[reportMissingImports]
        GradSampleModuleFastGradientClipping,
    )
    from opacus.optimizers import (  # pyright: ignore[reportMissingImports]
        DPOptimizerFastGradientClipping,
    )
    from opacus.utils.fast_gradient_clipping_utils import (  # pyright: ignore[reportMissingImports]
        DPTensorFastGradientClipping,
    )

    x, targets = batch_tensors(inputs.model, inputs.batch)
    wrapped = GradSampleModuleFastGradientClipping(model, max_grad_norm=inputs.threshold)
    optimizer = DPOptimizerFastGradientClipping(**_optimizer_arguments(model, inputs))

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        losses = sample_losses(wrapped(x), targets)
        DPTensorFastGradientClipping(wrapped, optimizer, losses, "mean").backward()
        return losses.detach().mean()

    return step, lambda: {name: param.grad for name, param in model.named_parameters()}


def opacus_hooks(model: Any, inputs: Inputs) -> Built:
    from opacus.grad_sample import GradSampleModule  # pyright: ignore[reportMissingImports]
    from opacus.optimizers import DPOptimizer  # pyright: ignore[reportMissingImports]

    x, targets = batch_tensors(inputs.model, inputs.batch)
    wrapped = GradSampleModule(model)
    optimizer = DPOptimizer(**_optimizer_arguments(model, inputs))

    def step() -> Any:
        optimizer.zero_grad(set_to_none=True)
        loss = sample_losses(wrapped(x), targets).mean()
        loss.backward()
        optimizer.clip_and_accumulate()
        return loss.detach()

    return step, lambda: {name: param.summed_grad for name, param in model.named_parameters()}


def _optimizer_arguments(model: Any, inputs: Inputs) -> dict[str, Any]:
    return {
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "noise_multiplier": 0.0,
        "max_grad_norm": inputs.threshold,
        "expected_batch_size": inputs.num_samples,
    }


def fastdp(model: Any, inputs: Inputs) -> Built:
    import fastDP  # pyright: ignore[reportMissingImports]
    from fastDP import autograd_grad_sample  # pyright: ignore[reportMissingImports]

    def keep(param: Any, summed: Any) -> None:
        param.private_grad = summed.detach()

    # The library's version draws noise for every parameter, even if its scale is 0.
    autograd_grad_sample._create_or_extend_private_grad = keep
    fastDP.PrivacyEngine(
        model,
        batch_size=inputs.num_samples,
        sample_size=1000 * inputs.num_samples,
        epochs=1,
        noise_multiplier=0.0,
        max_grad_norm=inputs.threshold,
        clipping_fn="Abadi",
        clipping_mode="MixOpt",
        # Only these need gradients, so that autograd computes no plain gradient of others.
        origin_params={"alexnet": ["Conv_0.bias"], "gpt": ["Embed_0", "position"]}[inputs.model],
    )
    x, targets = batch_tensors(inputs.model, inputs.batch)

    def step() -> Any:
        model.zero_grad(set_to_none=True)
        loss = sample_losses(model(x), targets).mean()
        loss.backward()
        return loss.detach()

    return step, lambda: {name: param.private_grad for name, param in model.named_parameters()}


PEERS: dict[str, Callable[[Any, Inputs], Built]] = {
    "opacus_ghost": opacus_ghost,
    "opacus_hooks": opacus_hooks,
    "fastdp": fastdp,
}
