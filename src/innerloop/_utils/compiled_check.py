"""Compare the results of compiled code with those of eager code."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from innerloop._utils import tree
from innerloop._utils.compiling import Compiled
from innerloop.errors import MetaGradientError

T = TypeVar("T")


def check_compiled(
    found: Mapping[str, object],
    eager: Mapping[str, object],
    what: str,
    before: Mapping[str, object] | None = None,
    perturbed: Callable[[], Mapping[str, object]] | None = None,
) -> None:
    """Raise if a compiled result differs from the eager one by more than rounding.

    Each tensor has an error of its own relative precision, 3 √ε of its largest entry. A sum that
    cancels keeps the rounding of its terms, which are larger than itself: 100 ε of the largest
    entry in its group are granted for that. Groups are of one kind (the parameters, one field of
    the optimizer's state, a gradient), so that a large loss does not excuse a wrong parameter.

    Args:
        found: pytrees of compiled results, by the name of the group.
        eager: the same groups, evaluated by eager code. None stands for zeros, here and in
            ``found``.
        what: names what was compiled, for the error.
        before: what some of the groups were computed from, by their names: its entries count among
            the largest of the group, since a step that ends at 0 leaves the rounding of its start.
        perturbed: evaluates the eager code on inputs that are moved by rounding. It is asked only
            where the results differ: ten times what that rounding changes is accepted, since a
            derivative that is a difference of large terms has no better precision in any order of
            evaluation.

    Raises:
        MetaGradientError: naming the group, the path in it, and the difference. (Up to torch 2.13
            the compiler has cases of wrong numbers without an error.)
    """
    moved: Mapping[str, object] | None = None
    # A float64 loss of float32 parameters is no more precise than these.
    coarsest = max(
        (
            torch.finfo(x.dtype).eps
            for group in ("params", "gradient of params")
            for x in tree.tensors(eager.get(group))
            if tree.differentiable(x)
        ),
        default=0.0,
    )
    for group, expected in eager.items():
        pairs = list(_pairs(found[group], expected))
        started = tree.tensors((before or {}).get(group))
        sizes = [_scale(x) for x in started if tree.differentiable(x) and x.numel()]
        largest = max((*sizes, *(_scale(theirs) for _, _, theirs in pairs)), default=0.0)
        for place, ours, theirs in pairs:
            eps = torch.finfo(theirs.dtype).eps
            slack = 100 * max(eps, coarsest) * largest
            if coarsest > eps:
                slack += 3 * coarsest**0.5 * _scale(theirs)
            difference = difference_beyond_rounding(ours, theirs, slack)
            if difference is not None and perturbed is not None:
                moved = perturbed() if moved is None else moved
                again = {i: x for i, x, _ in _pairs(moved[group], expected)}
                noise = (again[place] - theirs).detach().abs().nan_to_num(0.0, 0.0, 0.0).max()
                slack += 10 * float(noise)
                difference = difference_beyond_rounding(ours, theirs, slack)
            if difference is not None:
                error, scale = difference
                path = _named(group, expected, place)
                raise MetaGradientError(
                    f"{what}, compiled, differs from the eager one in {path} by "
                    f"{error:.3e}, where values are up to {scale:.3e}: PyTorch's compiler gives "
                    "wrong numbers here, or the loss is not a function of its arguments (numbers "
                    "of NumPy or of a generator are drawn, say). Write compile=False"
                )


def moved_by_rounding(inputs: T, precision: float = 0.0) -> T:
    """Return a pytree whose tensors are moved by about one unit of rounding, at random.

    Args:
        inputs: the pytree.
        precision: the relative precision of the computation where it is coarser than that of a
            tensor, as under autocast.
    """
    generator = torch.Generator().manual_seed(16)

    def move(x: Tensor) -> Tensor:
        if not tree.differentiable(x):
            return x
        signs = torch.rand(x.shape, generator=generator).to(x.device) - 0.5
        unit = max(torch.finfo(x.dtype).eps, precision)
        moved = x.detach() * (1 + 4 * unit * signs.to(x.dtype))
        return moved.requires_grad_(x.requires_grad)

    return tree.map_tensors(move, inputs)


class Trust:
    """Remembers whether every path of compiled code has been compared with eager code.

    After an error nothing is trusted any more: which path it came from is not known, so each call
    is compared.
    """

    def __init__(self) -> None:
        self._compilations = -1
        self._lost = False

    def covers(self, compilations: int) -> bool:
        """True if all that was compiled, ``compilations`` times, has been found right."""
        return not self._lost and self._compilations == compilations

    @contextmanager
    def at_stake(self, compiled: Compiled | None = None) -> Iterator[None]:
        """Lose the trust if the block, a call or a comparison, raises.

        Args:
            compiled: what the block calls. If nothing was compiled in it, an error (of the user,
                in code that could not be compiled) says nothing about what was compiled before.
        """
        before = None if compiled is None else compiled.compilations
        try:
            yield
        except BaseException:
            if compiled is None or compiled.compilations != before:
                self._lost = True
            raise

    def gained(self, compilations: int) -> None:
        """Note that the path compiled last has been found right."""
        self._compilations = compilations


class LaterChecks:
    """Chooses later calls of compiled code at which it is compared with eager code once more.

    They come at random, as rarely as it takes to spend at most a ``share`` of the time on them.

    Args:
        share: the part of the time of the calls that checks may take.
    """

    def __init__(self, share: float = 0.015) -> None:
        self._share = share
        self._random = random.Random(15)
        self._spent = self._earned = 0.0
        self._factor = 1.0

    def due(self) -> bool:
        """True if the present call should be checked."""
        return self._spent > 0 and self._share * self._earned >= self._factor * self._spent

    def called(self, seconds: float) -> None:
        """Note how long a call took."""
        self._earned += seconds

    def checked(self, seconds: float) -> None:
        """Note how long a check takes, and choose when the next one is due."""
        self._spent, self._earned = seconds, 0.0
        self._factor = self._random.uniform(1.0, 3.0)


def difference_beyond_rounding(
    ours: Tensor, theirs: Tensor, slack: float
) -> tuple[float, float] | None:
    """Return ``(error, scale)`` if ``ours`` and ``theirs`` differ by more than rounding, else None.

    Args:
        ours: the compiled numbers.
        theirs: the eager numbers; ``scale`` is the largest of them.
        slack: what is granted besides 3 √ε of the scale.
    """
    scale = _scale(theirs)
    # Infinity beside the same infinity, and nan beside nan, is no difference.
    same = (ours == theirs) | (ours.isnan() & theirs.isnan())
    error = float(torch.where(same, torch.zeros_like(theirs), ours - theirs).detach().abs().max())
    if error <= 3 * torch.finfo(theirs.dtype).eps ** 0.5 * scale + slack:
        return None
    return error, scale


def fields_of(state: object, name: str) -> dict[str, object]:
    """Return the groups of an optimizer's state: each field of each named tuple is one.

    Example:
        >>> fields_of((1, ({"w": 2.0}, None)), "state")
        {'state[0]': 1, 'state[1][0]': {'w': 2.0}, 'state[1][1]': None}
    """
    if not isinstance(state, tuple):
        return {name: state}
    names = getattr(state, "_fields", None)
    groups: dict[str, object] = {}
    for i, value in enumerate(state):
        groups.update(fields_of(value, f"{name}[{i}]" if names is None else f"{name}.{names[i]}"))
    return groups


def _pairs(found: object, expected: object) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield ``(place, ours, theirs)`` for the leaves that have a derivative."""
    leaves = zip(tree.leaves(found), tree.leaves(expected), strict=True)
    for place, (ours, theirs) in enumerate(leaves):
        like = ours if theirs is None else theirs
        if tree.differentiable(like) and like.numel():
            zeros = torch.zeros_like(like)
            yield place, zeros if ours is None else ours, zeros if theirs is None else theirs


def _scale(x: Tensor) -> float:
    """Return the largest absolute value in ``x`` that is finite."""
    return float(x.detach().abs().nan_to_num(0.0, 0.0, 0.0).max())


def _named(group: str, value: object, place: int) -> str:
    """Return the group and the path of its leaf number ``place``."""
    # A tensor in every place: named_tensors passes over None and numbers.
    filled = tree.with_leaves(value, [torch.empty(0) for _ in tree.leaves(value)])
    return list(tree.named_tensors(filled, group))[place][0]
