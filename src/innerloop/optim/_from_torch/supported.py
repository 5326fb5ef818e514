"""What can be differentiated, listed."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple, overload

import torch

from innerloop._utils.text_table import table
from innerloop.errors import InnerLoopError, InvalidInputError
from innerloop.optim._adapt.rule import adapt, verified
from innerloop.optim._base import Rule
from innerloop.optim._from_torch.from_torch import from_torch, rule_of


class Supported(NamedTuple):
    """One optimizer.

    Attributes:
        write: how to make it, ``innerloop.optim.<write>``.
        torch_class: the class whose steps it takes.
        hyper: what may be a tensor, and then has a gradient; for an adapted class, the tensors with
            which it was verified.
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
        return table(
            (
                (s.write, s.torch_class.__name__, ", ".join(s.hyper), " ".join(_remarks(s)))
                for s in self
            ),
            header=("innerloop.optim.", "torch class", "hyper-parameters that may be tensors", ""),
        )


class Support(NamedTuple):
    """Whether one optimizer can be differentiated; true unless it is refused.

    Attributes:
        how: ``"rule"`` (a rule of `innerloop.optim`), ``"adapt"`` (its own ``step``, verified just
            now) or ``"refused"``.
        write: what to write; empty if it is refused.
        why: how that is known, or why it is refused.
    """

    how: str
    write: str
    why: str

    def __bool__(self) -> bool:
        return self.how != "refused"


@overload
def supported(optimizer: None = None) -> SupportedList: ...


@overload
def supported(optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer) -> Support: ...


def supported(
    optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer | None = None,
) -> SupportedList | Support:
    """List the optimizers that can be differentiated, or look one of them up.

    The list holds the rules of ``torch.optim``, and the foreign classes that `adapt` has verified
    in this process.

    The tests compare every rule, with every flag, with ``torch.optim`` and with finite differences
    of it; the table that the same comparison gives for other libraries is on the page "Which
    optimizers are right". A foreign class is in the list from its verification on.

    Args:
        optimizer: None for the list. A class or an optimizer asks about that one: a class with its
            defaults, an optimizer with the settings that it was constructed with. If there is no
            rule for it, `adapt` verifies it now (about a second).

    Returns:
        A tuple of `Supported`, which prints as a table; for one optimizer a `Support`.

    Raises:
        InvalidInputError: what was passed is not an optimizer.

    Example:
        >>> import torch, innerloop
        >>> rules = {s.write: s for s in innerloop.optim.supported()}
        >>> rules["sgd"].hyper
        ('lr', 'momentum', 'dampening', 'weight_decay')
        >>> rules["sgd"].flags
        ('nesterov', 'maximize')
        >>> innerloop.optim.supported(torch.optim.Adam).write
        'innerloop.optim.adam(...)'
    """
    if optimizer is None:
        return SupportedList([*_rules(), *_adapted()])
    cls = optimizer if isinstance(optimizer, type) else type(optimizer)
    if not issubclass(cls, torch.optim.Optimizer):
        raise InvalidInputError(
            f"supported({optimizer!r}): write a torch.optim.Optimizer or its class, "
            "supported(torch.optim.Adam), or supported() for "
            "the whole list"
        )
    try:
        return _of_rule(optimizer, cls) or _of_adapt(optimizer, cls)
    except InnerLoopError as error:
        return Support("refused", "", str(error))


def _of_rule(
    optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer, cls: type[torch.optim.Optimizer]
) -> Support | None:
    rule = rule_of(cls)
    if rule is None:
        return None
    name = rule.called or rule.__name__.lower()
    why = (
        f"innerloop.optim.{name} is compared with {rule.torch_layout.torch_class.__name__} and its "
        "finite differences by the tests"
    )
    if isinstance(optimizer, type):
        return Support("rule", f"innerloop.optim.{name}(...)", why)
    from_torch(optimizer)  # raises if it cannot take these settings
    return Support("rule", "innerloop.optim.from_torch(optimizer)", why)


def _of_adapt(
    optimizer: type[torch.optim.Optimizer] | torch.optim.Optimizer, cls: type[torch.optim.Optimizer]
) -> Support:
    settings: dict[str, Any] = {}
    if not isinstance(optimizer, type):
        known = inspect.signature(cls).parameters
        settings = {name: value for name, value in optimizer.defaults.items() if name in known}
    try:
        made = adapt(cls, **settings)
    except InnerLoopError as error:
        try:
            made = adapt(cls, closure=True, **settings)
        except InnerLoopError:
            raise error from None
    written = f"innerloop.optim.{made!r}"
    why = (
        "its values equal those of the class itself, its gradient finite differences of the class, "
        "on a small smooth problem"
    )
    return Support(
        "adapt", f"{written[:-1]}, closure=True)" if made.needs_closure else written, why
    )


def _rules() -> Iterator[Supported]:
    for torch_class, rule in sorted(Rule.by_torch_class.items(), key=lambda item: item[0].__name__):
        fields = [f for f in dataclasses.fields(rule) if f.repr and f.name not in rule.hyper_names]  # type: ignore[arg-type]
        # PyTorch may have the setting in a newer version only.
        known = inspect.signature(torch_class).parameters
        made = rule()
        yield Supported(
            rule.called or rule.__name__.lower(),
            torch_class,
            rule.hyper_names,
            tuple(f.name for f in fields if f.name in known),
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
