"""What can be differentiated, listed."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from innerloop.optim.adapted.rule import verified
from innerloop.optim.base import Rule


class Supported(NamedTuple):
    """One optimizer.

    Attributes:
        write: how to make it, ``innerloop.optim.<write>``.
        torch_class: the class whose steps it takes.
        hyper: what may be a tensor, and then has a gradient; for an adapted class, the tensors with which it was verified.
        flags: what else its constructor takes.
        needs_closure: whether it evaluates the loss itself.
        compiles: whether ``torch.compile`` can follow it.
    """

    write: str
    torch_class: type
    hyper: tuple[str, ...]
    flags: tuple[str, ...]
    needs_closure: bool
    compiles: bool


class SupportedList(tuple[Supported, ...]):
    """What `supported` returns: a tuple that prints as a table."""

    __slots__ = ()

    def __repr__(self) -> str:
        lines = [("innerloop.optim.", "torch class", "hyper-parameters that may be tensors", "")]
        lines += [(s.write, s.torch_class.__name__, ", ".join(s.hyper), " ".join(_remarks(s))) for s in self]
        widths = [max(len(line[i]) for line in lines) for i in range(3)]
        return "\n".join(
            "  ".join([*(c.ljust(w) for c, w in zip(line, widths, strict=False)), line[3]]).rstrip() for line in lines
        )


def supported() -> SupportedList:
    """The rules of ``torch.optim``, and the foreign classes that `adapt` has verified in this process.

    The tests compare every rule, with every flag, with ``torch.optim`` and with finite differences of it; the table that the same
    comparison gives for other libraries is on the page "Which optimizers are right". A foreign class is in the list from its
    verification on.

    Returns:
        A tuple of `Supported`, which prints as a table.

    Example:
        >>> import innerloop
        >>> rules = {s.torch_class.__name__: s for s in innerloop.optim.supported()}
        >>> rules["SGD"].hyper
        ('lr', 'momentum', 'dampening', 'weight_decay')
        >>> rules["SGD"].flags
        ('nesterov', 'maximize')
    """
    return SupportedList([*_rules(), *_adapted()])


def _rules() -> Iterator[Supported]:
    for torch_class, rule in sorted(Rule.by_torch_class.items(), key=lambda item: item[0].__name__):
        fields = [f for f in dataclasses.fields(rule) if f.repr and f.name not in rule.hyper_names]  # type: ignore[arg-type]
        made = rule()
        yield Supported(
            rule.called or rule.__name__.lower(),
            torch_class,
            rule.hyper_names,
            tuple(f.name for f in fields),
            made.needs_closure,
            made.compiles,
        )


def _adapted() -> Iterator[Supported]:
    for cls, shown, needs_closure, hyper in verified():
        yield Supported(f"adapt({shown})", cls, hyper, (), needs_closure, False)


def _remarks(entry: Supported) -> Iterator[str]:
    if entry.needs_closure:
        yield "needs a closure;"
    if not entry.compiles:
        yield "not compiled;"
