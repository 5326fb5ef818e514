"""``innerloop.assign``: gradients go into ``.grad`` as ``backward`` puts them there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import innerloop
from innerloop.errors import InvalidInputError
from tests.oracles import smooth_noise

pytestmark = pytest.mark.usefixtures("float64")


class Pair(NamedTuple):
    first: Any
    second: Any


def parameters() -> dict[str, Any]:
    """Every container, 0-dim and empty tensors, and leaves that are no tensors."""
    return {
        "rate": torch.tensor(0.5).requires_grad_(),
        "rest": [smooth_noise(2, 3).requires_grad_(), 7, None, "text"],
        "pair": Pair(torch.zeros(0, 2).requires_grad_(), (smooth_noise(4).requires_grad_(),)),
    }


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, Tensor)]


def loss(tree: Any) -> Tensor:
    return torch.stack([x.sin().sum() * (i + 1) for i, x in enumerate(tensors(tree))]).sum()


def test_it_does_what_backward_does() -> None:
    ours, theirs = parameters(), parameters()
    for _ in range(3):
        loss(theirs).backward()
        leaves, spec = torch.utils._pytree.tree_flatten(ours)
        weights = iter(range(1, 9))
        grads = [x.cos() * next(weights) if isinstance(x, Tensor) else None for x in leaves]
        innerloop.assign(ours, torch.utils._pytree.tree_unflatten(grads, spec))
        for x, y in zip(tensors(ours), tensors(theirs), strict=True):
            assert x.grad is not None
            torch.testing.assert_close(x.grad, y.grad, rtol=1e-15, atol=0)
            assert not x.grad.requires_grad


def test_an_outer_loop_of_torch_optim_is_the_one_of_backward() -> None:
    """Adam on a learning rate and the start, three outer steps: the same bits as unroll and
    backward."""
    problem = innerloop.Problem(
        lambda p, h, b: (p["w"] ** 4).sum() / 4, innerloop.optim.sgd(), optimizer_hyper=("lr",)
    )

    def train(step: Callable[[Any, Any], None]) -> list[Tensor]:
        params = {"w": smooth_noise(3).requires_grad_()}
        hyper = {"lr": torch.tensor(0.1).requires_grad_()}
        outer = torch.optim.Adam([params["w"], hyper["lr"]], lr=0.01)
        schedule = torch.optim.lr_scheduler.ExponentialLR(outer, 0.9)
        for _ in range(3):
            outer.zero_grad()
            step(params, hyper)
            outer.step()
            schedule.step()
        return [params["w"].detach(), hyper["lr"].detach()]

    def by_backward(params: Any, hyper: Any) -> None:
        traj = innerloop.unroll(problem, params, None, steps=3, hyper=hyper)
        traj.params["w"].square().sum().backward()

    def by_assign(params: Any, hyper: Any) -> None:
        _, grads = innerloop.metagradient(
            lambda traj, hyper: traj.params["w"].square().sum(), problem, params, None, steps=3,
            hyper=hyper,
        )  # fmt: skip
        innerloop.assign({"params": params, "hyper": hyper}, grads)

    for x, y in zip(train(by_assign), train(by_backward), strict=True):
        assert torch.equal(x, y)


def test_none_leaves_the_gradient_as_it_is() -> None:
    tree = {"a": torch.ones(2).requires_grad_(), "b": torch.ones(1).requires_grad_()}
    innerloop.assign(tree, {"a": None, "b": None})
    assert tree["a"].grad is None
    innerloop.assign(tree, {"b": None, "a": torch.ones(2)})  # the order of a dict does not matter
    innerloop.assign(tree, {"a": None, "b": torch.ones(1)})
    assert torch.equal(tree["a"].grad, torch.ones(2))  # type: ignore[arg-type]


def test_the_memory_of_a_gradient_is_not_shared() -> None:
    x, g = torch.ones(2).requires_grad_(), torch.ones(2)
    innerloop.assign(x, g)
    innerloop.assign(x, g)
    assert torch.equal(g, torch.ones(2))
    assert torch.equal(x.grad, 2 * torch.ones(2))  # type: ignore[arg-type]
    g.zero_()
    assert torch.equal(x.grad, 2 * torch.ones(2))  # type: ignore[arg-type]


def test_a_gradient_with_a_graph_is_detached() -> None:
    x = torch.ones(2).requires_grad_()
    (g,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
    innerloop.assign([x], [g])
    assert x.grad is not None
    assert not x.grad.requires_grad


@pytest.mark.parametrize("order", ["ss", "sd", "ds", "sds"])
def test_sparse_gradients_add_up_with_dense_ones(order: str) -> None:
    """As the gradients of an embedding do: s is a sparse one, d a dense one."""
    x = torch.zeros(4, 2).requires_grad_()
    dense = smooth_noise(4, 2)
    sparse = torch.sparse_coo_tensor(
        torch.tensor([[1, 3, 1]]), smooth_noise(3, 2, phase=1.0), (4, 2), check_invariants=False
    )
    total = torch.zeros(4, 2)
    for kind in order:
        g = sparse if kind == "s" else dense
        innerloop.assign({"x": x}, {"x": g})
        total = total + g.to_dense()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.to_dense(), total)
    assert x.grad.is_sparse == ("d" not in order)


def test_one_tensor_in_two_places_gets_the_sum() -> None:
    x = torch.ones(2).requires_grad_()
    innerloop.assign([x, x], [torch.ones(2), 2 * torch.ones(2)])
    assert torch.equal(x.grad, 3 * torch.ones(2))  # type: ignore[arg-type]


one = torch.tensor(1.0).double()


def leaf() -> Tensor:
    return one.clone().requires_grad_()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda x: ({"x": x}, {"y": one}), r"tree has the entries \['x'\].*\['y'\]"),
        (lambda x: ({"x": x}, {}), r"the entries \[\]"),
        (lambda x: ({"x": x}, one), "grads has Tensor there"),
        (lambda x: ({"x": [x, x]}, {"x": [one]}), r"tree\['x'\] has 2 entries, .* 1 entries"),
        (lambda x: ([x], one), r"tree has 1 entries, and grads has Tensor"),
        (lambda x: ([x, 3], [one, one]), r"tree\[1\] is int, which has no \.grad"),
        (lambda x: (x, 3.0), "gradient of tree is float"),
        (lambda x: (x, [one]), "gradient of tree is list"),
        (lambda x: ([x], [one.reshape(1)]), r"gradient of tree\[0\] has shape \(1,\)"),
        (lambda x: ([x], [one.float()]), r"dtype torch.float32, and the tensor has torch.float64"),
        (lambda x: ([x], [one.to("meta")]), "device meta"),
        (lambda x: ([x, x.detach()], [one, one]), r"tree\[1\] requires no grad"),
        (lambda x: ([x, 2 * x], [one, one]), "computed from other tensors"),
        (lambda x: (nn.Linear(1, 1), {}), r"named_parameters"),
        (lambda x: ({"m": nn.Linear(1, 1)}, {"m": {}}), r"tree\['m'\] is a module"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(
    make: Callable[[Tensor], tuple[Any, Any]], match: str
) -> None:
    x = leaf()
    tree, grads = make(x)
    with pytest.raises(InvalidInputError, match=match):
        innerloop.assign(tree, grads)
    assert x.grad is None
