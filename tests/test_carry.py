"""A carry, saved and loaded."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import innerloop
from innerloop import Carry, InvalidInputError
from innerloop._utils import tree
from tests.oracles import smooth_noise

optim = innerloop.optim
OPTIMIZERS: dict[str, Callable[[], optim.Optimizer]] = {
    "sgd": optim.sgd,
    "momentum": lambda: optim.sgd(lr=0.1, momentum=0.9),
    "adam": optim.adam,
    "amsgrad": lambda: optim.adam(amsgrad=True),
    "adafactor": optim.adafactor,
    "muon": optim.muon,
    "rprop": optim.rprop,
    "lbfgs": lambda: optim.lbfgs(lr=0.1, max_iter=2),
    "chain": lambda: optim.chain(optim.clip_by_global_norm(1.0), optim.adam()),
    "groups": lambda: optim.groups({"body.*": optim.sgd(momentum=0.5), "*": optim.adam()}),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4, affine=False)
        self.head = nn.Linear(4, 2, bias=False)
        with torch.no_grad():
            for i, p in enumerate(self.parameters()):
                p.copy_(smooth_noise(*p.shape, phase=float(i)))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.dropout(self.norm(self.body(x)).tanh(), 0.2, self.training))


def loss(model: nn.Module, hyper: Any, batch: Any) -> Tensor:
    return model(smooth_noise(5, 3).float()).square().mean()


def problem_of(optimizer: str) -> innerloop.Problem:
    return innerloop.Problem.from_module(Net(), loss, OPTIMIZERS[optimizer]())


def assert_same(ours: Carry, theirs: Carry) -> None:
    assert ours.time == theirs.time
    pairs = list(zip(tree.leaves(ours), tree.leaves(theirs), strict=True))
    assert len(pairs) > 4
    for a, b in pairs:
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
        assert type(a) is type(b)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("how", ["state_dict", "carry"])
def test_a_loop_continues_from_a_file(optimizer: str, how: str, tmp_path: Path):
    problem = problem_of(optimizer)
    start = problem.init(None)

    def steps(start: Carry, count: int) -> Carry:
        return innerloop.unroll(problem, start, None, steps=count).at(-1).detach()

    carry = steps(start, 3)
    path = tmp_path / "carry.pt"
    torch.save(carry.state_dict() if how == "state_dict" else carry, path)
    loaded = torch.load(path, weights_only=True)
    if how == "state_dict":
        assert torch.serialization.get_unsafe_globals_in_checkpoint(path) == []
        loaded = start.load_state_dict(loaded)
    assert_same(loaded, carry)
    assert_same(steps(loaded, 2), steps(start, 5))


def test_what_a_state_dict_holds():
    carry = problem_of("adam").init(None)._replace(time=7)
    found = carry.state_dict()
    assert list(found) == ["params", "optimizer_state", "buffers", "random_state", "time"]
    assert list(found["params"]) == ["body.weight", "head.weight"]
    assert list(found["optimizer_state"]) == ["count", "mu", "nu", "nu_max"]
    assert found["time"] == 7
    assert not any(x.requires_grad for x in tree.tensors(found))


def changed(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(state: dict[str, Any]) -> dict[str, Any]:
        state = copy.deepcopy(state)
        inside: Any = state
        for key in path[:-1]:
            inside = inside[key]
        inside[path[-1]] = value
        return state

    return change


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda state: {"params": state["params"]}, "has the entries params, .* a dict of params"),
        (lambda state: [1], "this is a list"),
        (changed(("params", "more"), torch.zeros(1)), r"params has \['body.weight', .*'more'\]"),
        (changed(("params", "body.weight"), torch.zeros(2, 3)), r"has shape \(4, 3\).*\(2, 3\)"),
        (changed(("params", "body.weight"), torch.zeros(4, 3).double()), "float32.*float64"),
        (changed(("params", "body.weight"), None), "in the state dict NoneType"),
        (changed(("buffers",), {}), "buffers has"),
        (changed(("optimizer_state",), {}), "optimizer_state has"),
        (changed(("optimizer_state",), None), "optimizer_state has"),
        (changed(("time",), "soon"), "time"),
        (changed(("random_state",), "soon"), "random_state"),
    ],
)
@pytest.mark.usefixtures("types_unchecked")
def test_a_state_dict_of_something_else_is_refused(change: Any, named: str):
    carry = problem_of("adam").init(None)
    with pytest.raises(InvalidInputError, match=named):
        carry.load_state_dict(change(carry.state_dict()))


def test_the_state_of_another_optimizer_is_refused():
    carry, other = (problem_of(name).init(None) for name in ("adam", "momentum"))
    with pytest.raises(
        InvalidInputError, match=r"optimizer_state has .* another model or optimizer"
    ):
        carry.load_state_dict(other.state_dict())


def test_the_state_of_a_foreign_optimizer_is_refused():
    problem = innerloop.Problem(
        lambda p, h, b: p["w"].square().sum(), optim.adapt(torch.optim.SGD, lr=0.1)
    )
    carry = problem.init({"w": torch.ones(3)})
    with pytest.raises(InvalidInputError, match=r"FrozenState.*torch\.save\(carry\)"):
        carry.state_dict()
