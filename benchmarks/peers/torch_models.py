"""Builds AlexNet and GPT in PyTorch, like those of the package and benchmarks/zoo/models.py.

Modules have Flax's names and take their sizes from Flax's parameters, so weights are copied by
name.
"""

# PyTorch is not installed where types are checked.
# pyright: reportUntypedBaseClass=false

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import torch.nn.functional as F  # pyright: ignore[reportMissingImports]
from torch import nn  # pyright: ignore[reportMissingImports]

from benchmarks.peers.weights import count_blocks, to_torch, torch_name, torch_shape

Params = dict[str, np.ndarray]


def linear(params: Params, name: str) -> Any:
    outputs, inputs = torch_shape(f"{name}/kernel", params[f"{name}/kernel"].shape)
    return nn.Linear(inputs, outputs, bias=f"{name}/bias" in params)


def embedding(table: np.ndarray) -> Any:
    return nn.Embedding(*table.shape)


def layer_norm(params: Params, name: str) -> Any:
    return nn.LayerNorm(len(params[f"{name}/scale"]), eps=1e-6)  # Flax's ε


class AlexNet(nn.Module):
    """AlexNet, from images [n, channels, 32, 32] to logits."""

    def __init__(self, params: Params):
        super().__init__()
        for i, stride in enumerate((2, 1, 1, 1, 1)):
            outputs, inputs, *_ = torch_shape("/kernel", params[f"Conv_{i}/kernel"].shape)
            # At stride 2, "SAME" pads an even image only below and to the right; see `forward`.
            conv = nn.Conv2d(inputs, outputs, 3, stride, padding=0 if stride == 2 else 1)
            self.add_module(f"Conv_{i}", conv)
        for i in range(3):
            self.add_module(f"Dense_{i}", linear(params, f"Dense_{i}"))

    def forward(self, x: Any) -> Any:
        x = F.pad(x, (0, 1, 0, 1))
        for i in range(5):
            x = F.relu(self.get_submodule(f"Conv_{i}")(x))
            x = F.max_pool2d(x, 2) if i in (0, 1, 4) else x
        x = x.permute(0, 2, 3, 1).flatten(1)  # Flax flattens with the channels last
        for i in range(2):
            x = F.relu(self.get_submodule(f"Dense_{i}")(x))
        return self.get_submodule("Dense_2")(x)


class Attention(nn.Module):
    """Causal self-attention made of products, which hooks and ghost norms support."""

    def __init__(self, params: Params, name: str):
        super().__init__()
        self.heads = params[f"{name}/query/kernel"].shape[1]
        for part in ("query", "key", "value", "out"):
            self.add_module(part, linear(params, f"{name}/{part}"))

    def forward(self, x: Any) -> Any:
        parts = (self.get_submodule(part)(x) for part in ("query", "key", "value"))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -math.inf).softmax(-1)
        return self.get_submodule("out")((weights @ v).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    def __init__(self, params: Params, name: str):
        super().__init__()
        attention = "MultiHeadDotProductAttention_0"
        self.attention_name = attention
        self.add_module("LayerNorm_0", layer_norm(params, f"{name}/LayerNorm_0"))
        self.add_module(attention, Attention(params, f"{name}/{attention}"))
        self.add_module("LayerNorm_1", layer_norm(params, f"{name}/LayerNorm_1"))
        for i in range(2):
            self.add_module(f"Dense_{i}", linear(params, f"{name}/Dense_{i}"))

    def forward(self, x: Any) -> Any:
        x = x + self.get_submodule(self.attention_name)(self.get_submodule("LayerNorm_0")(x))
        hidden = self.get_submodule("Dense_0")(self.get_submodule("LayerNorm_1")(x))
        hidden = F.gelu(hidden, approximate="tanh")  # Flax's default
        return x + self.get_submodule("Dense_1")(hidden)


class GPT(nn.Module):
    """GPT, from tokens [n, T] to logits [n, T, vocabulary], with an untied output matrix."""

    def __init__(self, params: Params):
        super().__init__()
        self.blocks = count_blocks(params)
        self.add_module("Embed_0", embedding(params["Embed_0/embedding"]))
        self.add_module("position", embedding(params["position"]))
        for i in range(self.blocks):
            self.add_module(f"Block_{i}", Block(params, f"Block_{i}"))
        self.add_module("LayerNorm_0", layer_norm(params, "LayerNorm_0"))
        self.add_module("Dense_0", linear(params, "Dense_0"))

    def forward(self, tokens: Any) -> Any:
        # One row of positions for each sample, materialised: hooks treat the first axis as samples,
        # and ghost norms take a view of the input.
        positions = torch.arange(tokens.shape[1]).repeat(len(tokens), 1)
        x = self.get_submodule("Embed_0")(tokens) + self.get_submodule("position")(positions)
        for i in range(self.blocks):
            x = self.get_submodule(f"Block_{i}")(x)
        return self.get_submodule("Dense_0")(self.get_submodule("LayerNorm_0")(x))


MODELS = {"alexnet": AlexNet, "gpt": GPT}


def build_model(name: str, params: Params) -> Any:
    """Builds the model with Flax's parameters, in their dtype."""
    model = MODELS[name](params).to(torch.from_numpy(next(iter(params.values()))).dtype)
    state = {torch_name(key): to_torch(key, array) for key, array in params.items()}
    model.load_state_dict({key: torch.from_numpy(array) for key, array in state.items()})
    return model


def batch_tensors(name: str, batch: tuple[np.ndarray, ...]) -> tuple[Any, Any]:
    """Splits a batch into the model's inputs and the targets of the loss."""
    if name == "gpt":
        tokens = torch.from_numpy(batch[0]).long()
        return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    images, labels = batch
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels)


def sample_losses(logits: Any, targets: Any) -> Any:
    """Computes the cross-entropy of each sample, averaged over its positions, [n]."""
    classes = logits.flatten(0, -2)
    losses = F.cross_entropy(classes, targets.flatten().long(), reduction="none")
    return losses.unflatten(0, (len(targets), -1)).mean(1)
