"""``optim.supported``: what there is, against what torch has."""

from __future__ import annotations

import inspect
from typing import Any

import torch

import innerloop


def test_every_optimizer_of_torch_is_in_the_list():
    theirs = {
        cls for cls in vars(torch.optim).values() if isinstance(cls, type) and issubclass(cls, torch.optim.Optimizer)
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
    assert lines[0].split() == "innerloop.optim. torch class hyper-parameters that may be tensors".split()
    assert any(line.startswith("sgd ") and "momentum" in line for line in lines)
    assert any(line.startswith("sparse_adam ") and line.endswith("not compiled;") for line in lines)
