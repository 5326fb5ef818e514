"""Large float32 products of linear layers by oneDNN, where that is faster on this machine.

PyTorch computes them on a CPU by its BLAS, which is MKL in the usual builds. On processors of AMD
that takes 1.5 to 2.3 times as long as oneDNN, which PyTorch contains as well (110 against 167 to
250 GFLOP/s); on processors of Intel they are equally fast.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from innerloop._utils import caches, torch_private
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InvalidInputError

_log = logging.getLogger("innerloop")

LARGE = 2**22
"""Multiplications of a product from which on oneDNN may compute it."""

_SHAPE = 512, 256, 512


class ProductTimes(NamedTuple):
    """What `onednn_products` has measured on this machine.

    Attributes:
        blas: seconds of a product by PyTorch's BLAS.
        onednn: seconds of the same product by oneDNN; infinite if this PyTorch has none.
        used: True if oneDNN computes the products inside the block.
    """

    blas: float
    onednn: float
    used: bool


_measured: MutableMapping[int, tuple[float, float]] = caches.cache("times of products")


@contextmanager
def onednn_products(gain: float = 1.15) -> Iterator[ProductTimes]:
    r"""Let oneDNN compute large products of linear layers inside this block, if that is faster.

    It is measured once in a process, for each number of threads (about .1 s). Products of
    ``F.linear`` (``nn.Linear``) in float32 on a CPU with at least :data:`LARGE` multiplications
    are computed by oneDNN then, and so are all their derivatives: with
    :math:`P(A, B) = A B^\top`, the gradients of P are :math:`P(G, B^\top)` and
    :math:`P(G^\top, A^\top)`. All others stay as they are: small ones (oneDNN takes up to four
    times as long), other dtypes and devices, autocast, and whatever runs in compiled code or under
    ``torch.func``.

    The two round differently, by some units in the last place. So the block has to hold a loop and
    its backward pass, which may run steps again.

    Args:
        gain: how many times faster oneDNN has to be; 0: use it in any case.

    Yields:
        What was measured, and whether oneDNN is used. It is logged, too, at the level INFO of the
        logger ``"innerloop"``.

    Raises:
        InvalidInputError: ``gain`` is negative or no number.

    Example:
        >>> import torch, innerloop
        >>> layer = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(layer.weight, 3.0)
        >>> with innerloop.nn.onednn_products() as found:
        ...     out = layer(torch.tensor([[2.0]]))  # too small: as ever
        >>> out.item(), found.used == (found.onednn * 1.15 <= found.blas)
        (6.0, True)
    """
    if isinstance(gain, bool) or not isinstance(gain, (int, float)) or not gain >= 0:
        raise InvalidInputError(
            f"gain={gain!r}: write how many times faster oneDNN has to be, 1.15, or 0 to use it in "
            "any case"
        )
    blas, onednn = _times()
    found = ProductTimes(blas, onednn, onednn * gain <= blas and onednn < float("inf"))
    _log.info(
        "a product of %d x %d and %d x %d takes %.2f ms by PyTorch's BLAS and %.2f ms by oneDNN, "
        "which is %s",
        *_SHAPE[:2],
        *_SHAPE[1:],
        1e3 * blas,
        1e3 * onednn,
        "used" if found.used else "not used",
    )
    if not found.used:
        yield found
        return
    with _ByOneDnn():
        yield found


def _times() -> tuple[float, float]:
    """Return the seconds of a large product by BLAS and by oneDNN, the best of several."""
    threads = torch.get_num_threads()
    if threads not in _measured:
        rows, inner, columns = _SHAPE
        x, weight = torch.full((rows, inner), 0.5), torch.full((columns, inner), 0.5)
        with torch.no_grad():
            ways: list[Callable[[Tensor, Tensor], Tensor]] = [F.linear]
            if torch_private.has_onednn():
                ways.append(torch_private.onednn_product)
            best = [float("inf")] * 2
            for _ in range(20):
                for i, way in enumerate(ways):
                    begin = time.perf_counter()
                    way(x, weight)
                    best[i] = min(best[i], time.perf_counter() - begin)
        _measured[threads] = best[0], best[1]
    return _measured[threads]


class _ByOneDnn(TorchFunctionMode):
    """Hands large calls of ``F.linear`` to oneDNN."""

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> object:
        kwargs = kwargs or {}
        if func is F.linear and _takes(*args, **kwargs):
            return _linear(*args, **kwargs)
        return func(*args, **kwargs)


def _takes(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    return (
        all(
            x.dtype == torch.float32 and x.is_cpu and x.layout == torch.strided
            for x in (input, weight)
        )
        and weight.ndim == 2
        and input.shape[-1:] == weight.shape[1:]
        and (bias is None or (bias.dtype == torch.float32 and bias.shape == weight.shape[:1]))
        and input.numel() * len(weight) >= LARGE
        and mode() is Mode.EAGER
        and not torch.is_autocast_enabled("cpu")
        and not torch_private.is_batched(input)
        and not torch_private.is_batched(weight)
    )


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product: Tensor = _Product.apply(input.reshape(-1, input.shape[-1]), weight)
    out = product.view(*input.shape[:-1], len(weight))
    return out if bias is None else out + bias


class _Product(torch.autograd.Function):
    """A Bᵀ by oneDNN, and so are its derivatives of any order."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return torch_private.onednn_product(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        if mode() is not Mode.EAGER or torch_private.is_batched(grad):
            return grad @ b, grad.mT @ a
        needs_a, needs_b = ctx.needs_input_grad
        return (
            _Product.apply(grad, b.mT) if needs_a else None,
            _Product.apply(grad.mT, a.mT) if needs_b else None,
        )
