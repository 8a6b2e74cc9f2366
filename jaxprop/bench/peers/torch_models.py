"""The networks as PyTorch modules."""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jax import Array
from torch import Tensor, nn
from torch.nn import functional

from jaxprop.bench.peers import ours
from jaxprop.core.types import Params


class Block(nn.Module):
    """A pre-norm block with causal attention."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(features), nn.LayerNorm(features)
        self.qkv, self.out = nn.Linear(features, 3 * features), nn.Linear(features, features)
        self.up, self.down = nn.Linear(features, 4 * features), nn.Linear(4 * features, features)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        packed = self.qkv(self.norm_1(x)).view(n, t, 3, ours.HEADS, d // ours.HEADS)
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(n, t, d))
        return x + self.down(functional.gelu(self.up(self.norm_2(x)), approximate="tanh"))


class Gpt(nn.Module):
    """A GPT with learned positions, whose table also computes the logits."""

    def __init__(self, vocab: int, length: int, features: int, blocks: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, features)
        self.positions = nn.Embedding(length, features)
        self.blocks = nn.Sequential(*(Block(features) for _ in range(blocks)))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, vocab, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return self.head(self.norm(self.blocks(self.embedding(tokens) + self.positions(positions))))


class Lstm(nn.Module):
    """An LSTM with logits at every step.

    PyTorch's LSTM adds two biases; the second is fixed at 0.
    """

    def __init__(self, lstm: nn.Module, second: str, head: nn.Linear) -> None:
        super().__init__()
        self.lstm, self.head = lstm, head
        bias = lstm.get_parameter(second)
        nn.init.zeros_(bias)
        bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0])


Arrays = Callable[[Params], list[Array]]


def _mlp(params: Params) -> tuple[nn.Module, Arrays]:
    modules: list[nn.Module] = []
    for w, _ in ours.layers(params):
        modules += [nn.Linear(*w.shape), nn.ReLU()]
    net = nn.Sequential(*modules[:-1])
    return net, lambda params: [a for w, b in ours.layers(params) for a in (w.T, b)]


def _three_c3d(params: Params) -> tuple[nn.Module, Arrays]:
    modules: list[nn.Module] = []
    before = 3
    for channels, size, padding in ((64, 5, 0), (96, 3, 0), (128, 3, 1)):
        conv = nn.Conv2d(before, channels, size, padding=padding)
        pad = nn.ConstantPad2d((0, 1, 0, 1), -torch.inf)  # one element at the end only
        modules += [conv, nn.ReLU(), pad, nn.MaxPool2d(3, 2)]
        before = channels
    modules += [nn.Flatten(), nn.Linear(1152, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU()]
    net = nn.Sequential(*modules, nn.Linear(256, 10))
    return net, lambda params: [a for pair in ours.images_first(params) for a in pair]


def _lstm(params: Params) -> tuple[nn.Module, Arrays]:
    cell, head = params
    lstm = nn.LSTM(cell.w.shape[0], cell.u.shape[0], batch_first=True)
    return Lstm(lstm, "bias_hh_l0", nn.Linear(*head.w.shape)), of_lstm


def of_lstm(params: Params) -> list[Array]:
    """Return the params of the LSTM in the order of ``nn.LSTM``."""
    cell, head = params
    return [cell.w.T, cell.u.T, cell.b, head.w.T, head.b]


def _gpt(params: Params) -> tuple[nn.Module, Arrays]:
    net = ours.gpt(params)
    length, features = net.positions.shape
    return Gpt(len(net.table), length, features, len(net.blocks)), of_gpt


def of_gpt(params: Params) -> list[Array]:
    """Return the params of the GPT in the order of its module."""
    net = ours.gpt(params)
    blocks = [array for block in net.blocks for array in _of_block(block)]
    return [net.table, net.positions, *blocks, *net.norm]


def _of_block(block: ours.Block) -> list[Array]:
    w, b = (np.concatenate(parts, axis=-1) for parts in zip(*block.qkv, strict=True))
    dense = (ours.Linear(w, b), block.out, block.up, block.down)  # pyright: ignore[reportArgumentType]
    return [*block.norm_1, *block.norm_2, *(a for w, b in dense for a in (w.T, b))]


MODELS: dict[str, Callable[[Any], tuple[nn.Module, Arrays]]] = {
    "mlp": _mlp,
    "gpt": _gpt,
    "lstm": _lstm,
    "3c3d": _three_c3d,
}
