"""Losses whose derivatives can be written down, and functions that lack some of theirs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import innerloop


def half_square(params: Any, hyper: Any, batch: Any) -> Tensor:
    return params["w"].square().sum() / 2


def quadratic_problem(**kwargs: Any) -> innerloop.Problem:
    return innerloop.Problem(
        lambda p, h, b: p["w"].square() / 2, innerloop.optim.sgd(lr=0.5), **kwargs
    )


def one_weight() -> dict[str, Tensor]:
    return {"w": torch.tensor(2.0, requires_grad=True)}


class Square(torch.autograd.Function):
    """Without a forward-mode derivative."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * g * ctx.saved_tensors[0]


class Once(Square):
    """The same, whose backward may not be differentiated."""

    backward = staticmethod(torch.autograd.function.once_differentiable(Square.backward))  # type: ignore[assignment]
