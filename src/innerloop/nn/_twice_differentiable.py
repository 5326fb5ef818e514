r"""Functions whose first two derivatives are written by hand, and whose higher ones come from plain operations.

For :math:`y = f(x)` with several tensors :math:`x`, a cotangent :math:`\bar y` and a tangent
:math:`\dot x`, a `Kernel` knows

.. math::
    y = f(x), \qquad
    \mathrm{pull} = \bar y^\top f'(x), \qquad
    \mathrm{push} = f'(x)\,\dot x, \qquad
    \mathrm{second} = \nabla_x \bigl\langle \bar y,\ f'(x)\,\dot x \bigr\rangle .

That is enough for all first and second derivatives, because the two halves are each other's
derivatives: the backward of *pull* along
:math:`u` is *second* with :math:`\dot x = u` (and *push* for :math:`\bar y`), the tangent of *pull* is *second* plus another *pull*, and
the backward of *push* is *second* and *pull*. A third derivative is taken of the kernel's plain
form, by autograd.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from innerloop._utils import torch_private
from innerloop.errors import NotDifferentiableError

Tensors = tuple[Tensor, ...]
Constants = tuple[Tensor | None, ...]
_vjp: Any = torch.func.vjp
_jvp: Any = torch.func.jvp


class Kernel(abc.ABC):
    """A function of tensors, with static settings.

    ``inputs`` are differentiated, ``constants`` are not. All tensors may have further dimensions in
    front, the same number for all (that is how ``vmap`` is done), unless `draws` says that the
    kernel draws random numbers by position. The methods run without a graph, on plain tensors, all
    but `plain`.
    """

    draws: bool = False

    @abc.abstractmethod
    def value(self, inputs: Tensors, constants: Constants) -> Tensors:
        """f(x)."""

    @abc.abstractmethod
    def pull(
        self, inputs: Tensors, constants: Constants, value: Constants, cotangents: Tensors
    ) -> Tensors:
        """The cotangent of each input; ``value`` is f(x), or holds None where that is not at hand."""

    @abc.abstractmethod
    def push(self, inputs: Tensors, constants: Constants, tangents: Tensors) -> Tensors:
        """The tangent of each output."""

    @abc.abstractmethod
    def second(
        self,
        inputs: Tensors,
        constants: Constants,
        value: Constants,
        cotangents: Tensors,
        tangents: Tensors,
    ) -> tuple[Tensors, Tensors]:
        """The gradient of ⟨cotangents, push(tangents)⟩ with respect to the inputs, and push(tangents)."""

    @abc.abstractmethod
    def plain(self, inputs: Tensors, constants: Constants) -> Tensors:
        """f(x) by operations of torch that have derivatives of any order."""


def evaluate(kernel: Kernel, inputs: Tensors, constants: Constants = ()) -> Tensors:
    """f(x), differentiable as often as one likes, in forward mode once."""
    out: Tensors = _Value.apply(kernel, (len(inputs), len(constants)), *inputs, *constants)
    return out


def wanted(*tensors: Tensor | None) -> bool:
    """Whether a derivative with respect to one of them may be asked for, of whatever order: that cannot be seen here."""
    if torch.compiler.is_compiling():
        return True
    if not torch.is_grad_enabled() and not torch_private.inside_transform():
        return False
    return any(x is not None and torch_private.has_derivative(x) for x in tensors)


class _Derivative(torch.autograd.Function):
    """``apply(kernel, sizes, *tensors)``: groups of tensors, of these sizes, in the order of the kernel's method."""

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.kernel, ctx.sizes, *args = inputs
        ctx.save_for_backward(*args)
        ctx.save_for_forward(*args)

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, kernel: Kernel, sizes: Any, *args: Tensor | None) -> Any:
        moved = [
            _in_front(x, dim, info.batch_size) for x, dim in zip(args, in_dims[2:], strict=True)
        ]
        if kernel.draws:  # by position: each must see the numbers of its own forward pass
            rows = [
                cls.apply(kernel, sizes, *(None if x is None else x[i] for x in moved))
                for i in range(info.batch_size)
            ]
            out = tuple(map(torch.stack, zip(*rows, strict=True)))
        else:
            out = cls.apply(kernel, sizes, *moved)
        return out, (0,) * len(out)


class _Value(_Derivative):
    """(inputs, constants) -> outputs."""

    @staticmethod
    def forward(kernel: Kernel, sizes: tuple[int, ...], *args: Tensor | None) -> Tensors:
        return _own(kernel.value(*_split(args, *sizes)))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.kernel, ctx.sizes, *args = inputs
        ctx.save_for_backward(*args, *output)
        ctx.save_for_forward(*args)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        inputs, constants, value = _split(ctx.saved_tensors, *ctx.sizes, len(cotangents))
        pulled = _apply(_Pull, ctx.kernel, inputs, constants, value, cotangents)
        return (None, None, *pulled, *_nothing(constants))

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Tensor | None) -> Any:
        inputs, constants = _split(ctx.saved_tensors, *ctx.sizes)
        return _apply(_Push, ctx.kernel, inputs, constants, tangents[: len(inputs)])


class _Pull(_Derivative):
    """(inputs, constants, value, cotangents) -> cotangents of the inputs. The value follows from the inputs: it has no gradient."""

    @staticmethod
    def forward(kernel: Kernel, sizes: tuple[int, ...], *args: Tensor | None) -> Tensors:
        return _own(kernel.pull(*_split(args, *sizes)))

    @staticmethod
    def backward(ctx: Any, *along: Tensor) -> Any:
        inputs, constants, value, cotangents = _split(ctx.saved_tensors, *ctx.sizes)
        found = _apply(_Second, ctx.kernel, inputs, constants, value, cotangents, along)
        gradients, pushed = _split(found, len(inputs), len(cotangents))
        return (None, None, *gradients, *_nothing(constants), *_nothing(value), *pushed)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *tangents: Tensor | None) -> Any:
        inputs, constants, value, cotangents = _split(ctx.saved_tensors, *ctx.sizes)
        along, _, _, moved = _split(tangents, *ctx.sizes)
        found = _apply(_Second, ctx.kernel, inputs, constants, value, cotangents, along)
        more = _apply(_Pull, ctx.kernel, inputs, constants, value, moved)
        return tuple(a + b for a, b in zip(found, more, strict=False))


class _Push(_Derivative):
    """(inputs, constants, tangents) -> tangents of the outputs."""

    @staticmethod
    def forward(kernel: Kernel, sizes: tuple[int, ...], *args: Tensor | None) -> Tensors:
        return _own(kernel.push(*_split(args, *sizes)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        inputs, constants, tangents = _split(ctx.saved_tensors, *ctx.sizes)
        value = _nothing(cotangents)
        found = _apply(_Second, ctx.kernel, inputs, constants, value, cotangents, tangents)
        pulled = _apply(_Pull, ctx.kernel, inputs, constants, value, cotangents)
        return (None, None, *found[: len(inputs)], *_nothing(constants), *pulled)

    @staticmethod
    def jvp(ctx: Any, *_: Any) -> Any:
        raise NotDifferentiableError(
            f"{type(ctx.kernel).__name__}: a tangent of a tangent was asked for at a place where "
            "torch would drop it without a "
            "word. Take one of the two derivatives in reverse: torch.func.jvp over torch.func.grad."
        )


class _Second(_Derivative):
    """(inputs, constants, value, cotangents, tangents) -> gradients of the inputs, tangents of the outputs."""

    @staticmethod
    def forward(kernel: Kernel, sizes: tuple[int, ...], *args: Tensor | None) -> Tensors:
        gradients, pushed = kernel.second(*_split(args, *sizes))
        return _own((*gradients, *pushed))

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> Any:
        inputs, constants, value, cotangents, tangents = _split(ctx.saved_tensors, *ctx.sizes)
        plain = _plain_second(ctx.kernel, constants)
        x, y, u = _vjp(plain, inputs, cotangents, tangents)[1](given)
        return (None, None, *x, *_nothing(constants), *_nothing(value), *y, *u)

    @staticmethod
    def jvp(ctx: Any, _: Any, __: Any, *given: Tensor | None) -> Any:
        inputs, constants, _, cotangents, tangents = _split(ctx.saved_tensors, *ctx.sizes)
        x, _, _, y, u = _split(given, *ctx.sizes)
        return _jvp(
            _plain_second(ctx.kernel, constants), (inputs, cotangents, tangents), (x, y, u)
        )[1]


def _plain_second(
    kernel: Kernel, constants: Constants
) -> Callable[[Tensors, Tensors, Tensors], Tensors]:
    """`Kernel.second` out of the kernel's plain form: the pullback of its pullback."""

    def second(inputs: Tensors, cotangents: Tensors, tangents: Tensors) -> Tensors:
        def pulled(inputs: Tensors, cotangents: Tensors) -> Tensors:
            return _vjp(lambda *x: kernel.plain(x, constants), *inputs)[1](cotangents)

        gradients, pushed = _vjp(pulled, inputs, cotangents)[1](tangents)
        return (*gradients, *pushed)

    return second


def _own(outputs: Tensors) -> Tensors:
    """The same memory in tensors that are nobody's view: autograd forbids to edit a view that a Function made (``out += residual``)."""
    return tuple(
        x.new_empty(0).set_(x.untyped_storage(), x.storage_offset(), x.shape, x.stride())
        for x in outputs
    )


def _apply(
    function: type[_Derivative], kernel: Kernel, *groups: Sequence[Tensor | None]
) -> Tensors:
    out: Tensors = function.apply(
        kernel, tuple(map(len, groups)), *(x for group in groups for x in group)
    )
    return out


def _split(args: Sequence[Any], *sizes: int) -> list[tuple[Any, ...]]:
    """The groups that `_apply` chained; what is beyond them is left out."""
    rest = iter(args)
    return [tuple(itertools.islice(rest, size)) for size in sizes]


def _nothing(group: Sequence[Any]) -> tuple[None, ...]:
    return (None,) * len(group)


def _in_front(x: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    if x is None:
        return None
    return x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
