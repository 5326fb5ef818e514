"""``optim.supported``: what there is, against what torch has."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import innerloop


def test_every_optimizer_of_torch_is_in_the_list():
    theirs = {
        cls
        for cls in vars(torch.optim).values()
        if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
    } - {torch.optim.Optimizer}
    listed = {entry.torch_class for entry in innerloop.optim.supported()}
    assert theirs - listed == set()


def test_what_is_listed_can_be_written_as_listed():
    for entry in innerloop.optim.supported():
        if entry.write.startswith("adapt("):
            continue
        made = getattr(innerloop.optim, entry.write)()
        assert repr(made).startswith(entry.write)
        assert entry.needs_closure == made.needs_closure
        assert entry.compiles == made.compiles
        for flag in entry.flags:
            if flag not in ("eps_root", "ns_dtype"):  # ours alone
                assert flag in inspect.signature(entry.torch_class).parameters, (entry.write, flag)


def test_a_foreign_class_appears_once_it_is_verified():
    class Listed(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])

    def entries() -> list[Any]:
        return [entry for entry in innerloop.optim.supported() if entry.torch_class is Listed]

    assert not entries()
    optimizer = innerloop.optim.adapt(Listed, lr=0.2)
    assert [(entry.write, entry.hyper) for entry in entries()] == [("adapt(Listed, lr=0.2)", ())]
    params = {"w": torch.ones(2)}
    optimizer.update(params, optimizer.init(params), params, {"lr": torch.tensor(0.1)})
    assert entries()[0].hyper == ("lr",)
    assert "adapt(Listed, lr=0.2)" in repr(innerloop.optim.supported())


def test_it_prints_as_a_table():
    lines = repr(innerloop.optim.supported()).splitlines()
    assert (
        lines[0].split()
        == "innerloop.optim. torch class hyper-parameters that may be tensors".split()
    )
    assert any(line.startswith("sgd ") and "momentum" in line for line in lines)
    assert any(line.startswith("sparse_adam ") and line.endswith("not compiled;") for line in lines)


def test_one_class_is_answered_by_its_rule():
    answer = innerloop.optim.supported(torch.optim.AdamW)
    assert answer
    assert (answer.how, answer.write) == ("rule", "innerloop.optim.adamw(...)")
    assert (
        innerloop.optim.supported(torch.optim.SparseAdam).write
        == "innerloop.optim.sparse_adam(...)"
    )

    class Renamed(torch.optim.SGD):
        """Takes its parent's steps."""

    warm = Renamed([torch.ones(2, requires_grad=True)], lr=0.1, momentum=0.9)
    assert innerloop.optim.supported(warm).write == "innerloop.optim.from_torch(optimizer)"


def test_a_subclass_with_steps_of_its_own_is_verified_with_the_settings_of_the_optimizer():
    class Halved(torch.optim.SGD):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, lr=lr)

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"] / 2)

    answer = innerloop.optim.supported(Halved([torch.ones(2, requires_grad=True)], lr=0.3))
    assert answer
    assert (answer.how, answer.write) == ("adapt", "innerloop.optim.adapt(Halved, lr=0.3)")
    assert Halved in {entry.torch_class for entry in innerloop.optim.supported()}


def test_one_that_needs_a_closure_is_answered_with_how_to_write_it():
    class Insists(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            with torch.enable_grad():
                loss = closure()
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
            return loss

    answer = innerloop.optim.supported(Insists)
    assert (answer.how, answer.write) == ("adapt", "innerloop.optim.adapt(Insists, closure=True)")


def test_one_that_has_no_derivative_is_refused_with_the_reason_and_counts_as_false():
    class Counts(torch.optim.Optimizer):
        def __init__(self, params: Any, lr: float = 0.1) -> None:
            super().__init__(params, {"lr": lr})

        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.sub_(p.grad, alpha=self.param_groups[0]["lr"] * int(10 * p.grad.norm()))

    answer = innerloop.optim.supported(Counts)
    assert not answer
    assert (answer.how, answer.write) == ("refused", "")
    assert "Counts" in answer.why
    assert Counts not in {entry.torch_class for entry in innerloop.optim.supported()}


@pytest.mark.usefixtures("types_unchecked")
def test_what_is_no_optimizer_raises():
    with pytest.raises(innerloop.InnerLoopError, match=r"supported\(torch.optim.Adam\)"):
        innerloop.optim.supported(torch.nn.Linear(1, 1))  # type: ignore[call-overload]
