"""The data of a loop: a list, stacked tensors, a function of time, or an iterator."""

from __future__ import annotations

import abc
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from innerloop._types import HyperTree, Params
from innerloop._utils import torch_private, tree
from innerloop._utils.execution import Mode, mode
from innerloop._utils.fingerprint import Fingerprint
from innerloop._utils.random_state import RandomState
from innerloop.errors import InvalidInputError


class Batches(abc.ABC):
    """The data that the steps of a loop see.

    Attributes:
        data: a pytree; its tensors are inputs of the derivative's node (constants, but visible to
            ``vmap``).
        steps: T, or None: it shows when the data end.
        single_pass: True if each batch can be had once only, as from an iterator.
        calls_back: True if a function of the user's makes them.
        keeping: True if steps will be replayed: data that come only once are then kept, and data
            that are made anew are compared.
        kept: what is kept for that, by step; shared by the copies of this object.
    """

    data: object = None
    steps: int | None
    single_pass: bool = False
    calls_back: bool = False
    keeping: bool = False

    def __init__(self, steps: int | None) -> None:
        self.steps = steps
        self.kept: MutableMapping[int, Any] = {}

    @abc.abstractmethod
    def at(self, params: Params, hyper: HyperTree, t: int, time: int) -> object:
        """Return the data of one step.

        Args:
            params: the parameters before the step.
            hyper: as given to the loop.
            t: the number of steps before it in this loop: the position in the data.
            time: the number of all steps before it, those of earlier loops among them.
        """

    def first(self, params: Params, hyper: HyperTree, time: int = 0) -> object:
        """Return the data of the first step without using them up."""
        return self.at(params, hyper, 0, time)

    def times(self) -> Iterable[int]:
        """Return the steps: 0 to T - 1, or as long as there are data."""
        assert self.steps is not None, "only an iterator does not know its length"
        return range(self.steps)

    def holding(self, data: object) -> Batches:
        """Return the same with other tensors in ``data``."""
        new = copy.copy(self)
        new.data = data
        return new

    def ending(self, steps: int) -> Batches:
        """Return the same with a known number of steps."""
        new = copy.copy(self)
        new.steps = steps
        return new

    def part(self, begin: int, end: int) -> Batches:
        """Return the data of the steps ``begin`` to ``end - 1`` of a loop that has been run."""
        return PartOfBatches(self, begin, end)

    def source(self) -> object:
        """Return what the data are or come from, to tell them from others."""
        return type(self).__name__, self.data

    def fingerprints(self) -> MutableMapping[int, Fingerprint]:
        """Return the fingerprints of data that are made anew for a replay, by time."""
        return {}


class NoBatches(Batches):
    """Steps without data."""

    def at(self, params: Params, hyper: HyperTree, t: int, time: int) -> None:
        return None


class PartOfBatches(Batches):
    """The data of some steps of a longer loop.

    Args:
        whole: the data of the whole loop.
        begin: the first step of the part.
        end: the step behind the last.
    """

    def __init__(self, whole: Batches, begin: int, end: int) -> None:
        super().__init__(end - begin)
        self.whole = whole
        self.data = whole.data
        self.begin = begin

    def at(self, params: Params, hyper: HyperTree, t: int, time: int) -> object:
        return self.whole.at(params, hyper, self.begin + t, time)

    def source(self) -> object:
        return self.whole.source(), self.begin

    def fingerprints(self) -> MutableMapping[int, Fingerprint]:
        return self.whole.fingerprints()

    def holding(self, data: object) -> Batches:
        new = copy.copy(self)
        new.data, new.whole = data, self.whole.holding(data)
        return new


class BatchList(Batches):
    """One entry per step."""

    def __init__(self, entries: list[object], steps: int) -> None:
        super().__init__(steps)
        self.data: list[object] = entries[:steps]

    def at(self, params: Params, hyper: HyperTree, t: int, time: int) -> object:
        return self.data[t]


class StackedBatches(Batches):
    """A pytree of tensors whose first dimension is time."""

    def __init__(self, stacked: object, steps: int) -> None:
        super().__init__(steps)
        self.data = stacked

    def at(self, params: Params, hyper: HyperTree, t: int, time: int) -> object:
        return tree.map_tensors(lambda x: x[t], self.data)


class BatchFunction(Batches):
    """A pure function of its arguments, whose results are constants of the derivative."""

    calls_back = True

    def __init__(self, function: Callable[..., object], steps: int) -> None:
        super().__init__(steps)
        self.function = function
        self._own = _OwnMemory()

    def source(self) -> object:
        return self.function

    def fingerprints(self) -> MutableMapping[int, Fingerprint]:
        return self.kept

    def at(self, params: Params, hyper: HyperTree, t: int, time: int) -> object:
        batch = tree.map_tensors(Tensor.detach, self._own.of(self.function(params, hyper, time)))
        if self.keeping:
            found = Fingerprint.of(batch)
            if time not in self.kept:
                self.kept[time] = found
            elif not found.agrees(self.kept[time]):
                raise InvalidInputError(
                    f"batches(params, hyper, t) gave other data at t={time} when it was called "
                    "again for the replay: it must be a pure function of its arguments. Random "
                    "choices come from a generator seeded by t, torch.Generator().manual_seed(t), "
                    "or from torch's own (which is rewound); otherwise pass the data as a list"
                )
        return batch


class _OwnMemory:
    """Copies of data in the memory of another library, which may fill it again for the next step.

    A loader that yields views of one NumPy buffer does so, and autograd does not see it: the graph
    of an earlier step would hold the data of the last.
    """

    def __init__(self) -> None:
        self._copies: dict[object, object] = {}

    def of(self, entry: object) -> object:
        """Return ``entry`` with copies in place of such data; of unchanged data the last copy."""
        if mode() is not Mode.EAGER:
            return entry
        leaves = tree.leaves(entry)
        copies: dict[object, object] = {}
        changed = False
        for i, x in enumerate(leaves):
            key: object
            if isinstance(x, Tensor):
                if (
                    x.layout is not torch.strided
                    or x.device.type != "cpu"
                    or x.untyped_storage().resizable()
                ):
                    continue
                key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype)
                last = self._copies.get(key)
                copy = last if isinstance(last, Tensor) and torch.equal(last, x) else x.clone()
            elif isinstance(x, np.ndarray):
                key, copy = i, x.copy()
            else:
                continue
            copies[key] = leaves[i] = copy
            changed = True
        self._copies = copies
        return tree.with_leaves(entry, leaves) if changed else entry


class BatchIterator(Batches):
    """An iterator, drawn from once; if wanted, each entry is kept from then on."""

    single_pass = True

    def __init__(self, source: Iterable[object], steps: int | None) -> None:
        super().__init__(steps)
        self._source: Iterator[object] = iter(source)
        # Shared by the copies of this object, as the iterator is.
        self.position = [0]
        self._ahead: list[tuple[object, bool]] = []
        self._own = _OwnMemory()

    def times(self) -> Iterable[int]:
        return (
            super().times()
            if self.steps is not None
            else itertools.takewhile(self._has, itertools.count())
        )

    def first(self, params: Params, hyper: HyperTree, time: int = 0) -> object:
        """Return the next entry, which `at` will return as well."""
        if not self._has(self.position[0]):
            raise InvalidInputError(
                "the iterator of batches has no entry (any more): make a new one for each loop"
            )
        return self._ahead[0][0]

    def part(self, begin: int, end: int) -> Batches:
        if not all(t in self.kept for t in range(begin, end)):
            raise InvalidInputError(
                "batches was an iterator, whose data are not there any more to run the loop "
                "again: pass a list, a function batches(params, hyper, t) with steps=T, or use "
                "Checkpointed(), which keeps them"
            )
        return super().part(begin, end)

    def _has(self, t: int) -> bool:
        if t >= self.position[0] and not self._ahead:
            try:
                self._ahead.append(self._draw())
            except StopIteration:
                return False
        return True

    def _draw(self) -> tuple[object, bool]:
        """Return the next entry, and True if the iterator drew random numbers for it."""
        before = RandomState.now()
        entry = next(self._source)
        after = RandomState.now()
        return entry, before is not None and after is not None and not after.equals(before)

    def at(self, params: Params, hyper: HyperTree, t: int, time: int) -> object:
        if t != self.position[0]:
            entry, random_state = self.kept[t]
            if random_state is not None:
                # The iterator itself drew random numbers, and it is not asked again.
                random_state.restore()
            return entry
        try:
            entry, drew = self._ahead.pop() if self._ahead else self._draw()
        except StopIteration:
            raise InvalidInputError(
                f"steps={self.steps}, but the iterator of batches ended after {t}"
            ) from None
        check_constant(entry, f"batch {t}")
        entry = self._own.of(entry)
        self.position[0] += 1
        if self.keeping:
            self.kept[t] = entry, RandomState.now() if drew else None
        return entry


def batches_of(given: object, steps: int | None) -> Batches:
    """Return what the user gave, as the kind of `Batches` that it is.

    Raises:
        InvalidInputError: a tensor requires grad, the number of steps is unknown or too large,
            lengths differ.
    """
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 0):
        raise InvalidInputError(f"steps={steps!r} must be a number of steps, 0 or more")
    if isinstance(given, Batches):
        return given
    if given is None or callable(given):
        if steps is None:
            raise InvalidInputError("the number of steps is not known: write steps=T")
        return NoBatches(steps) if given is None else BatchFunction(given, steps)
    if hasattr(given, "__iter__") and not isinstance(given, (list, tuple, dict, str, Tensor)):
        return BatchIterator(given, steps)
    check_constant(given)
    if isinstance(given, list):
        available = len(given)
    else:
        lengths = {t.shape[0] if t.ndim else None for t in tree.tensors(given)}
        if len(lengths) != 1 or None in lengths:
            raise InvalidInputError(
                "batches must be a list with one entry per step, tensors stacked over steps "
                "(first dimension T), or a function; "
                f"got {type(given).__name__} with first dimensions {sorted(map(str, lengths))}"
            )
        available = int(lengths.pop() or 0)
    if steps is not None and steps > available:
        raise InvalidInputError(f"steps={steps}, but batches holds only {available}")
    if steps is not None and steps < available and not isinstance(given, list):
        raise InvalidInputError(
            f"steps={steps}, but the tensors in batches are stacked over {available} steps: each "
            "step takes one entry of their first dimension. For steps on all of the data write "
            "batches=lambda params, hyper, t: data; for the first entries only, cut the tensors: "
            f"data[:{steps}]"
        )
    total = available if steps is None else steps
    return BatchList(given, total) if isinstance(given, list) else StackedBatches(given, total)


def check_constant(batches: object, name: str = "batches", outside: bool = False) -> None:
    """Raise if a tensor requires grad, with ``outside`` also where a transform hides it."""
    for path, t in tree.named_tensors(batches, name):
        if torch_private.has_derivative(t) if outside else t.requires_grad:
            raise InvalidInputError(
                f"{path} requires grad, but batches are constants of the derivative: put that "
                "tensor into hyper, let batches be indices into it, or detach it"
            )
