"""Every private name of PyTorch that innerloop uses does what
``innerloop._utils.torch_private`` says it does."""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import operator
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree

from innerloop._utils import compiling, torch_private
from innerloop.optim import sgd

EXERCISED = {
    "redirect_checkpoint",
    "function_modes",
    "is_batched",
    "tree_map",
    "register_tree_node",
    "inside_transform",
    "inside_vmap",
    "inside_reverse_transform",
    "switches_gradients",
    "no_saved_tensors_hooks",
    "refusing_saved_tensors_hooks",
    "as_before_for_hooks",
    "inside_saved_tensors_hooks",
    "inside_dual_level",
    "jvp_levels",
    "storage_weakref",
    "observing",
    "observing_operations",
    "has_derivative",
    "innermost",
    "plain_form",
    "is_tracked",
    "add_lists",
    "are_plain",
    "batched_zero",
    "with_rows",
    "flatten",
    "has_onednn",
    "onednn_product",
    "prepare_compiler",
    "empty_graph",
    "unflatten",
    "multiply_list",
    "version",
    "gradient_hooks",
    "recorded_by",
    "hooks_so_far",
    "is_wrapped",
    "versions",
    "keeping_buffers",
    "plain_tensors",
    "unseen",
    "nodes_so_far",
    "is_newer",
    "only_forward_mode",
    "function_of",
    "is_view",
    "step_hooks",
    "OwnStepHook",
    "post_accumulate_hooks",
    "is_initialised",
    "mark_stepped",
    "backward_pass",
    "keeps_graph",
    "gradient",
    "graph_bytes",
    "distance",
    "weight_norm",
    "function_mode",
    "forward_mode",
    "derivative_levels",
    "reverse_over_forward",
    "divides_by_frequency",
    "lists_its_tables",
    "parameter_table",
    "buffer_table",
    "module_table",
    "uncompiled",
    "uncompiled_name",
    "forget_compiled_call",
    "is_once_differentiable",
    "is_asked_for",
    "never_compiled",
    "over_rows",
    "sends_sparse",
    "of_class",
    "data_getter",
    "backward_hooks",
    "module_hooks",
    "wrap_backward_hooks",
    "compile_graph",
    "inputs_for_compiler",
    "leave_lost_dual_level",
    "compiled_path",
    "compiler_is_at_rest",
    "may_compile",
    "count_function_modes",
    "random_row_by_row",
    "is_compiling",
    "traced_code",
    "guarding_hooks",
}


def test_every_name_is_exercised_here():
    names = {
        name
        for name, value in vars(torch_private).items()
        if callable(value) and not name.startswith("_")
    }
    own = {
        name
        for name in names
        if getattr(torch_private, name).__module__ in (torch_private.__name__, _pytree.__name__)
    }
    assert own == EXERCISED
    source = Path(__file__).read_text()
    assert all(f"_private.{name}(" in source for name in EXERCISED)
    assert all(inspect.getdoc(getattr(torch_private, name)) for name in own)


def test_tree_map_walks_containers_and_takes_none_for_a_leaf():
    seen = torch_private.tree_map(
        lambda x: "none" if x is None else x + 1, {"a": [1, (2, None)], "b": 3}
    )
    assert seen == {"a": [2, (3, "none")], "b": 4}


class Box:
    """Two values; of a kind that no pytree module knows."""

    def __init__(self, label: str, values: list[Any]) -> None:
        self.label, self.values = label, values


def test_a_registered_node_is_looked_into():
    torch_private.register_tree_node(
        Box, lambda box: box.values, lambda like, values: Box(like.label, values)
    )
    box = Box("kept", [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])])
    doubled = torch_private.tree_map(lambda x: 2 * x, box)
    assert doubled.label == "kept"
    assert [x.tolist() for x in doubled.values] == [[2.0, 4.0], [6.0, 8.0]]
    mapped = torch.func.vmap(lambda b: Box(b.label, [b.values[0] + b.values[1]]))(box)
    assert mapped.values[0].tolist() == [4.0, 6.0]
    gradient = torch.func.grad(lambda b: (b.values[0] * b.values[1]).sum())(box)
    assert gradient.values[0].tolist() == [3.0, 4.0]
    keys = torch_private.tree_map(type, Box("", []))
    assert keys.values == []


def observed(query: Callable[[], bool]) -> dict[str, bool]:
    """What the query answers in each surrounding."""
    seen: dict[str, bool] = {}

    def note(where: str) -> Callable[[Tensor], Tensor]:
        def body(x: Tensor) -> Tensor:
            seen[where] = query()
            return x.sum()

        return body

    x = torch.ones(2, 2)
    seen["plain"] = query()
    with torch.no_grad(), torch.autograd.forward_ad._set_fwd_grad_enabled(True):
        seen["no_grad"] = query()
    torch.func.grad(note("grad"))(x)
    torch.func.vmap(note("vmap"))(x)
    torch.func.jvp(note("jvp"), (x,), (x,))
    torch.func.vmap(torch.func.grad(note("grad in vmap")))(x)
    torch.func.grad(lambda x: torch.func.vmap(note("vmap in grad"))(x).sum())(x)
    with forward_ad.dual_level():
        seen["dual"] = query()
    seen["after"] = query()
    return seen


def test_whether_a_transform_is_running():
    outside = dict.fromkeys(("plain", "no_grad", "after"), False)
    inside = dict.fromkeys(("grad", "vmap", "jvp", "grad in vmap", "vmap in grad", "dual"), True)
    assert observed(lambda: torch_private.inside_transform()) == {**outside, **inside}


def test_whether_vmap_is_running():
    outside = dict.fromkeys(("plain", "no_grad", "grad", "jvp", "dual", "after"), False)
    inside = dict.fromkeys(("vmap", "grad in vmap", "vmap in grad"), True)
    assert observed(lambda: torch_private.inside_vmap()) == {**outside, **inside}


def test_whether_the_innermost_grad_sees_a_tensor():
    """Also where an outer transform sees it: the inner one would return zeros all the same."""
    seen: dict[str, bool] = {}

    def note(where: str, outer: Tensor) -> Tensor:
        def body(inner: Tensor) -> Tensor:
            seen[f"constant in {where}"] = torch_private.is_tracked(torch.ones(()))
            seen[f"outer in {where}"] = torch_private.is_tracked((outer * 2).sum())
            seen[f"inner in {where}"] = torch_private.is_tracked((inner * 2).sum())
            seen[f"both in {where}"] = torch_private.is_tracked((inner * outer).sum())
            return inner.sum()

        torch.func.grad(body)(torch.ones(2))
        return outer.sum()

    x = torch.ones(2)
    note("grad alone", x)
    torch.func.grad(lambda x: note("grad in grad", x))(x)
    torch.func.jvp(lambda x: note("grad in jvp", x), (x,), (x,))
    torch.func.vmap(lambda x: note("grad in vmap", x))(torch.ones(3, 2))
    assert seen == {key: key.startswith(("inner", "both")) for key in seen}
    assert len(seen) == 16


def test_blocks_in_which_operations_are_not_handed_over():
    seen: list[str] = []

    class Told(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            seen.append("class")
            return super().__torch_function__(func, types, args, kwargs)

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append("mode")
            return func(*args, **(kwargs or {}))

    x = torch.zeros(2).as_subclass(Told)
    with Mode():
        with torch_private.plain_tensors():
            x.exp()
        assert seen == ["mode"]
        with torch_private.unseen():
            x.exp()
    assert seen == ["mode"]
    x.exp()
    assert seen == ["mode", "class"]


def test_the_version_counts_writes_in_place():
    x = torch.zeros(3)
    before = torch_private.version(x)
    assert torch_private.version(x + 1) == 0
    x.add_(1)
    x[0] = 2
    assert torch_private.version(x) == before + 2
    assert torch_private.version(x.view(3)) == torch_private.version(
        x
    )  # a view counts with its base
    x.data.add_(1)
    assert torch_private.version(x) == before + 2  # and .data does not count


def test_how_many_hooks_there_were():
    before = torch_private.hooks_so_far()
    torch.ones(1, requires_grad=True).register_hook(print)
    layer = torch.nn.Linear(1, 1)
    layer.register_full_backward_hook(print)
    assert torch_private.hooks_so_far() == before + 2
    assert not torch_private.is_wrapped(layer)
    torch_private.wrap_backward_hooks(layer, lambda hook: hook)
    assert torch_private.is_wrapped(layer)


def test_what_was_recorded_since():
    x = torch.ones(2, 2, requires_grad=True) * 2
    assert torch_private.versions([x, x.t()]) == [0, 0]
    count = torch_private.nodes_so_far()
    assert not torch_private.is_newer(x.grad_fn, count)
    with torch.no_grad():
        x.mul_(2)
    assert not torch_private.is_newer(x.grad_fn, count)
    x.mul_(2)
    assert torch_private.is_newer(x.grad_fn, count)
    assert torch_private.versions([x]) == [2]
    assert not torch_private.is_newer(None, count)


def test_what_records_an_edit_in_place():
    x = torch.ones(2, 2, requires_grad=True) * 2
    for y in (x, x.t()):
        node = torch_private.recorded_by(y)
        with torch.no_grad():
            y.mul_(2)
        assert torch_private.recorded_by(y) is node
        y.mul_(2)
        assert torch_private.recorded_by(y) is not node


def test_the_hooks_of_a_tensor():
    x = torch.ones(2, requires_grad=True)
    assert torch_private.gradient_hooks(x) == []
    double, nothing = (lambda g: 2 * g), (lambda g: None)
    first = x.register_hook(double)
    x.register_hook(nothing)
    assert torch_private.gradient_hooks(x) == [double, nothing]
    first.remove()
    assert torch_private.gradient_hooks(x) == [nothing]


def test_the_hooks_of_an_optimizer():
    optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
    assert torch_private.step_hooks(optimizer) == 0
    handles = [
        optimizer.register_step_pre_hook(lambda *_: None),
        optimizer.register_step_post_hook(lambda *_: None),
    ]
    assert torch_private.step_hooks(optimizer) == 2
    handles.append(register_optimizer_step_pre_hook(lambda *_: None))
    assert torch_private.step_hooks(optimizer) == 3
    seen: list[object] = []
    handles.append(optimizer.register_step_pre_hook(torch_private.OwnStepHook(seen.append)))
    assert torch_private.step_hooks(optimizer) == 3
    for handle in handles:
        handle.remove()
    assert torch_private.step_hooks(optimizer) == 0


def test_an_optimizer_and_a_wrapper_around_one():
    optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
    assert torch_private.is_initialised(optimizer)
    assert not torch_private.is_initialised(object.__new__(torch.optim.SGD))


def test_the_hooks_after_accumulation():
    x = torch.ones(2, requires_grad=True)
    assert torch_private.post_accumulate_hooks(x) == 0
    handle = x.register_post_accumulate_grad_hook(lambda _: None)
    assert torch_private.post_accumulate_hooks(x) == 1
    handle.remove()
    assert torch_private.post_accumulate_hooks(x) == 0


@pytest.mark.parametrize("mark", [True, False])
def test_a_scheduler_believes_that_its_optimizer_was_stepped(mark: bool):
    optimizer = torch.optim.SGD([torch.ones(2)], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    if mark:
        torch_private.mark_stepped(optimizer)
        scheduler.step()  # a warning would be an error
    else:
        with pytest.warns(UserWarning, match=r"before `optimizer.step\(\)`"):
            scheduler.step()


def test_a_backward_pass_knows_if_it_keeps_its_graph():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = x.exp()
    y.register_hook(lambda g: seen.append(torch_private.keeps_graph()))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    assert seen == [True, False]


def test_what_a_graph_holds():
    """exp holds its result; a product its two factors, of which one is that result."""
    x = torch.ones(10, requires_grad=True)
    y = x.exp()
    assert torch_private.graph_bytes([y]) == 40
    assert torch_private.graph_bytes([(x * y).sum(), y]) == 80
    assert torch_private.graph_bytes([x]) == 0


def test_the_distance_of_two_lists():
    a, b = [torch.tensor([3.0, 0.0]), torch.tensor(5.0)], [torch.zeros(2), torch.tensor(1.0)]
    assert torch_private.distance(a, b) == 5


def test_whether_a_backward_pass_is_running():
    seen = []
    x = torch.ones(2, requires_grad=True)
    y = (x * 2).sum()
    y.register_hook(lambda g: seen.append(torch_private.backward_pass() != -1))
    seen.append(torch_private.backward_pass() != -1)
    y.backward(retain_graph=True)
    torch.autograd.grad(y, x)
    seen.append(torch_private.backward_pass() != -1)
    assert seen == [False, True, True, False]


def test_a_dual_level_is_told_from_a_transform():
    assert not torch_private.inside_dual_level()
    with forward_ad.dual_level():
        assert torch_private.inside_dual_level()
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_private.inside_dual_level())
        return x

    torch.func.jvp(look, (torch.ones(1),), (torch.ones(1),))
    assert seen == [False]


def test_a_reverse_transform_is_told_from_the_others():
    seen: list[bool] = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_private.inside_reverse_transform())
        return x.sum()

    look(torch.ones(1))
    torch.func.jvp(look, (torch.ones(1),), (torch.ones(1),))
    torch.func.vmap(look)(torch.ones(2, 1))
    torch.func.grad(look)(torch.ones(1))
    torch.func.vmap(torch.func.grad(look))(torch.ones(2, 1))
    assert seen == [False, False, False, True, True]


def test_a_mode_sees_that_gradients_are_switched_off():
    seen: list[Any] = []

    class See(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with See(), torch.no_grad():
        pass
    assert seen
    assert all(torch_private.switches_gradients(func) for func in seen)
    assert not torch_private.switches_gradients(torch.add)


def test_hooks_on_saved_tensors_are_taken_off_and_put_back():
    packed: list[Tensor] = []

    def pack(x: Tensor) -> Tensor:
        packed.append(x)
        return x

    x = torch.ones(2, requires_grad=True)
    with torch_private.no_saved_tensors_hooks():
        assert x.exp().requires_grad
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        with torch_private.no_saved_tensors_hooks():
            x.exp()
        assert not packed
        x.exp()
        assert len(packed) == 1


def test_hooks_on_saved_tensors_are_seen_and_refused_where_they_begin_inside():
    hooks = torch.autograd.graph.saved_tensors_hooks
    assert not torch_private.inside_saved_tensors_hooks()
    with hooks(lambda x: x, lambda x: x):
        assert torch_private.inside_saved_tensors_hooks()
        with torch_private.refusing_saved_tensors_hooks("not here"):
            torch.ones(2, requires_grad=True).exp().sum().backward()
            with pytest.raises(RuntimeError, match="not here"), hooks(lambda x: x, lambda x: x):
                pass
            with (
                torch_private.refusing_saved_tensors_hooks("nor here"),
                pytest.raises(RuntimeError, match="nor here"),
                hooks(lambda x: x, lambda x: x),
            ):
                pass
            with pytest.raises(RuntimeError, match="not here"), hooks(lambda x: x, lambda x: x):
                pass
    with hooks(lambda x: x, lambda x: x):
        pass


def test_hooks_on_saved_tensors_are_allowed_again_after_a_compilation_that_gave_up():
    refusing = torch_private.refusing_saved_tensors_hooks
    with torch_private.as_before_for_hooks():
        refusing("by a transform").__enter__()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        pass
    with refusing("around"):
        with torch_private.as_before_for_hooks():
            pass
        with pytest.raises(RuntimeError, match="around"), torch.autograd.graph.save_on_cpu():
            pass


@pytest.mark.parametrize(
    "sizes", [(1, 7, 40), (1, torch_private.LARGE, 40), (torch_private.LARGE,) * 2]
)
def test_lists_have_the_bits_and_the_derivatives_of_single_tensors(sizes: tuple[int, ...]):
    xs = [torch.linspace(-1, 1, n).requires_grad_() for n in sizes]
    ys = [torch.linspace(2, 3, n).requires_grad_() for n in sizes]
    for found, expected in (
        (
            torch_private.add_lists(xs, ys, 0.3),
            [torch.add(x, y, alpha=0.3) for x, y in zip(xs, ys, strict=True)],
        ),
        (torch_private.multiply_list(xs, 0.3), [x * 0.3 for x in xs]),
    ):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for used in (slice(None), slice(1, 2)):  # all results, and one of them alone
            slopes = []
            for results in (found, expected):
                total = torch.stack([(r**3).sum() for r in results[used]]).sum()
                slopes.append(
                    torch.autograd.grad(total, [*xs, *ys], create_graph=True, allow_unused=True)
                )
            for a, b in zip(*slopes, strict=True):
                assert (a is None or not a.any()) if b is None else torch.equal(a, b)
            second = [
                torch.autograd.grad(s[1].square().sum(), xs[1], retain_graph=True)[0]
                for s in slopes
            ]
            assert torch.equal(*second)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}])
def test_a_linear_step_keeps_nothing_large_for_its_derivative(settings: dict[str, Any]):
    # One call for a list keeps what it was given.
    optimizer = sgd(lr=0.1, **settings)
    params = {name: torch.ones(256, 128).requires_grad_() for name in "ab"}
    grads = {name: torch.ones(256, 128).requires_grad_() for name in "ab"}
    kept: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        state = optimizer.init(params)
        stepped, state = optimizer.update(grads, state, params)
        stepped, _ = optimizer.update(grads, state, stepped)
    assert stepped["a"].requires_grad
    assert not [x.shape for x in kept if x.numel() >= torch_private.LARGE]


def test_a_derivative_is_seen_at_any_level():
    constant, leaf = torch.ones(2), torch.ones(2, requires_grad=True)
    assert not torch_private.has_derivative(constant)
    assert torch_private.has_derivative(leaf)
    seen = []

    def inner(y: Tensor, x: Tensor) -> Tensor:
        seen.append(
            [
                torch_private.has_derivative(v)
                for v in (constant, x, y, x.detach(), y.detach(), x.detach() * constant)
            ]
        )
        return y

    torch.func.grad(lambda x: torch.func.grad(inner)(x.detach(), x))(torch.tensor(1.0))
    torch.func.grad(lambda x: torch.func.vmap(lambda y: inner(y, x))(x.expand(2)).sum())(
        torch.tensor(1.0)
    )
    torch.func.jvp(lambda x: inner(x, x), (torch.tensor(1.0),), (torch.tensor(1.0),))
    assert seen == [[False, True, True, False, False, False]] * 3


def test_the_plain_form_has_the_tasks_first():
    """Of tasks along the last dimension, within a gradient, and of two vmaps."""
    x = torch.arange(24.0).reshape(2, 3, 4)
    seen = []

    def note(x: Tensor) -> Tensor:
        seen.append(torch_private.plain_form(x))
        return x.sum()

    torch.func.vmap(torch.func.grad(note), in_dims=2)(x)
    torch.func.vmap(torch.func.vmap(note, in_dims=1), in_dims=1)(x)
    note(x)
    assert torch.equal(seen[0], x.permute(2, 0, 1))
    assert seen[1].shape == (3, 4, 2)
    assert torch.equal(seen[1], x.permute(1, 2, 0))
    assert torch.equal(seen[2], x)
    assert not any(s.requires_grad for s in seen)


def test_the_innermost_tensor_is_plain():
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_private.innermost(x))
        return x.sum()

    torch.func.vmap(torch.func.grad(look))(torch.ones(3, 2))
    assert seen[0].shape == (3, 2)
    assert torch_private.innermost(seen[0]) is seen[0]


def test_jvp_levels_are_counted():
    seen: list[int] = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_private.jvp_levels())
        return x.sum()

    def along(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.func.jvp(fn, (x,), (torch.ones_like(x),))[1]

    look(torch.ones(1))
    along(look)(torch.ones(1))
    along(along(look))(torch.ones(1))
    torch.func.vmap(torch.func.grad(look))(torch.ones(2, 1))
    assert seen == [0, 1, 2, 0]


def test_a_storage_reference_expires_with_the_memory():
    x = torch.ones(3)
    reference = torch_private.storage_weakref(x)
    view = x[1:]
    del x
    assert not reference.expired()
    del view
    assert reference.expired()


def test_operations_are_observed_in_backward_passes_and_below_transforms():
    shapes: list[torch.Size] = []
    x = torch.ones(3, requires_grad=True)
    with torch_private.observing(lambda t: shapes.append(t.shape)):
        (x * 2).sum().backward()
        torch.func.vmap(lambda y: y * 2)(torch.ones(5, 7))
    assert shapes.count(torch.Size([3])) >= 2
    assert torch.Size([5, 7]) in shapes
    del shapes[:]
    torch.ones(2) * 2
    assert not shapes


def test_operations_are_seen_with_their_names():
    x, names = torch.ones(3, requires_grad=True), []
    with torch_private.observing_operations(lambda name, inputs, result: names.append(name)):
        x.sqrt().sum().backward()
    assert "aten.sqrt" in names
    assert "SqrtBackward0" in names


def test_weight_norm_is_what_the_parametrization_calls():
    layer = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(2, 3))
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        layer(torch.ones(2))
    assert torch_private.weight_norm() in seen
    torch.testing.assert_close(
        torch_private.weight_norm()(torch.tensor([[3.0, 4.0]]), torch.ones(1, 1)),
        torch.tensor([[0.6, 0.8]]),
    )


def test_the_innermost_function_mode_is_known():
    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    assert torch_private.function_mode() is None
    with Mode(), Mode() as inner:
        assert torch_private.function_mode() is inner


def test_forward_mode_and_the_number_of_derivatives_are_known():
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append((torch_private.forward_mode(), torch_private.derivative_levels()))
        return x.sum()

    look(torch.ones(2))
    torch.func.vmap(torch.func.grad(look))(torch.ones(2, 2))
    torch.func.jvp(torch.func.grad(look), (torch.ones(2),), (torch.ones(2),))
    with forward_ad.dual_level():
        look(torch.ones(2))
    assert seen == [(False, 0), (False, 1), (True, 2), (True, 1)]


def test_an_embedding_says_whether_it_divides_by_frequency():
    w, at = torch.ones(2, 1, requires_grad=True), torch.tensor([0])
    nodes = [
        torch.nn.functional.embedding(at, w, scale_grad_by_freq=flag).grad_fn
        for flag in (False, True)
    ]
    assert [torch_private.divides_by_frequency(node) for node in nodes] == [False, True]


def test_the_order_of_transforms_is_known():
    seen = []

    def look(x: Tensor) -> Tensor:
        seen.append(torch_private.reverse_over_forward())
        return x.square().sum()

    at = torch.ones(2)
    look(at)
    torch.func.grad(look)(at)
    torch.func.jvp(torch.func.grad(look), (at,), (at,))
    torch.func.grad(lambda x: torch.func.jvp(look, (x,), (at,))[1])(at)
    assert seen == [False, False, False, True]


def test_the_tables_of_a_module():
    module = torch.nn.BatchNorm1d(2)
    module.register_module("none", None)
    assert list(torch_private.parameter_table(module)) == ["weight", "bias"]
    assert torch_private.parameter_table(module)["bias"] is module.bias
    assert "running_mean" in torch_private.buffer_table(module)
    assert torch_private.module_table(module) == {"none": None}
    for table in torch_private.REGISTRIES:
        assert isinstance(vars(module)[table], dict)
    assert torch_private.parameter_table(object.__new__(torch.nn.Linear)) == {}


def test_the_methods_that_list_the_tables_of_a_module():
    module = torch.nn.Linear(2, 1)
    assert torch_private.lists_its_tables(module)

    class Listing(torch.nn.Linear):
        def named_modules(self, *args: Any, **kwargs: Any) -> Any:
            return super().named_modules(*args, **kwargs)

    class Members(torch.nn.Linear):
        def _named_members(self, *args: Any, **kwargs: Any) -> Any:
            return super()._named_members(*args, **kwargs)

    assert not torch_private.lists_its_tables(Listing(2, 1))
    assert not torch_private.lists_its_tables(Members(2, 1))
    module.named_modules = lambda *args, **kwargs: iter(())  # type: ignore[method-assign]
    assert not torch_private.lists_its_tables(module)
    module = torch.nn.Linear(2, 1)
    module._named_members = lambda *args, **kwargs: iter(())  # type: ignore[method-assign]
    assert not torch_private.lists_its_tables(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile itself
def test_what_compile_leaves_in_a_module():
    module = torch.nn.Linear(1, 1)
    compiled: Any = torch.compile(module)
    assert torch_private.uncompiled(compiled) is module
    assert torch_private.uncompiled(module) is module
    names = [torch_private.uncompiled_name(name) for name, _ in compiled.named_parameters()]
    assert names == ["weight", "bias"]

    def refuse(*_: Any) -> Any:
        raise AssertionError("the compiled call ran")

    module.compile(backend=lambda graph, inputs: refuse)
    torch_private.forget_compiled_call(module)
    assert module(torch.ones(1)).shape == (1,)


def test_a_tensor_of_a_class_is_no_view():
    class Own(Tensor):
        pass

    found = torch_private.of_class(Own, torch.ones(2))
    assert type(found) is Own
    assert not found._is_view()
    assert torch_private.NO_TORCH_FUNCTION is torch.nn.Parameter.__torch_function__


def test_a_mode_sees_the_data_of_a_tensor():
    seen = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(func == torch_private.data_getter())
            return func(*args, **(kwargs or {}))

    x = torch.ones(1)
    with Mode():
        _ = x.data
    assert seen == [True]


def test_hooks_of_a_module_are_wrapped_at_each_call():
    module, wrapped = torch.nn.Linear(1, 1), []
    assert not torch_private.backward_hooks(module)
    assert torch_private.module_hooks(module) == ()
    module.register_full_backward_hook(lambda module, inputs, outputs: None)
    module.register_full_backward_pre_hook(lambda module, outputs: (2 * outputs[0],))  # type: ignore[index]
    assert torch_private.backward_hooks(module)
    assert len(torch_private.module_hooks(module)) == 2
    torch_private.wrap_backward_hooks(module, lambda hook: wrapped.append(hook) or hook)  # type: ignore[func-returns-value]
    module(torch.ones(1, 1, requires_grad=True)).sum().backward()
    module(torch.ones(1, 1, requires_grad=True)).sum().backward()
    assert len(wrapped) == 4
    assert module.bias.grad is not None
    assert module.bias.grad.item() == 4


def test_once_differentiable_is_seen_in_the_graph():
    class Marked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, g: Tensor) -> Tensor:
            return g

    x = torch.ones(1, requires_grad=True)
    nodes = (Marked.apply(x).grad_fn, x.clone().grad_fn)
    assert [torch_private.is_once_differentiable(node) for node in nodes] == [True, False]


def test_what_a_backward_pass_is_asked_for():
    found = []

    class Asking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Tensor) -> Tensor:
            return sum(inputs, torch.zeros(()))

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Any:
            found.append([torch_private.is_asked_for(n) for n, _ in ctx.next_functions])
            return (g,) * len(ctx.next_functions)

    leaf, other, constant = torch.ones((), requires_grad=True), torch.ones(()), torch.ones(())
    inside = other.requires_grad_() * 2
    for asked in ([leaf], [inside], [other], [leaf, other]):
        torch.autograd.grad(Asking.apply(leaf, inside, constant), asked, retain_graph=True)
    Asking.apply(leaf, inside, constant).backward()
    both = [True, True, False]
    assert found == [[True, False, False], [False, True, False], [False, True, False], both, both]


def test_rows_are_run_at_once():
    x = torch.arange(6.0).reshape(3, 2).requires_grad_()
    again = torch_private.over_rows(3)
    for _ in range(2):
        with again as rows:
            row = rows.row(x)
            assert row.shape == (2,)
            total, same = rows.stacked(row.sum()), rows.stacked(torch.ones(4))
            drawn = rows.stacked(torch.rand_like(row))
        assert total.tolist() == [1, 5, 9]
        assert same.shape == (3, 4)
        assert drawn.unique().numel() == 6
        assert torch.autograd.grad(total.sum(), x)[0].equal(torch.ones(3, 2))
    assert not torch_private.inside_transform()


def test_a_thread_that_does_not_compile_is_not_told_that_another_one_does():
    here: dict[str, Any] = {}

    def helper(x: Tensor) -> Tensor:
        return x + 1

    def traced(x: Tensor) -> Tensor:
        return helper(x) * (2 if torch_private.is_compiling() else 3)

    def backend(graph: Any, inputs: Any) -> Any:
        here["code"] = torch_private.traced_code()
        here["thread"] = torch_private.is_compiling()
        others: list[tuple[bool, bool]] = []

        def ask() -> None:
            others.append((torch.compiler.is_compiling(), torch_private.is_compiling()))

        other = threading.Thread(target=ask)
        other.start()
        other.join()
        here["other"] = others[0]
        return graph

    run: Any = torch.compile(traced, backend=backend)
    assert run(torch.ones(())).item() == 4
    assert traced(torch.ones(())).item() == 6
    assert here["thread"]
    assert here["other"] == (True, False)
    assert {helper.__code__, traced.__code__} <= set(here["code"])
    assert torch_private.traced_code() == []


def test_compiled_code_looks_for_hooks_if_it_is_told_to():
    results: list[float] = []
    for guarding in (False, True):
        torch.compiler.reset()
        layer = nn.Linear(1, 1, bias=False).requires_grad_(False)
        layer.weight.fill_(1.0)
        run: Any = torch.compile(lambda x, of=layer: of(x).sum(), backend="eager")  # type: ignore[misc]
        with torch_private.guarding_hooks() if guarding else contextlib.nullcontext():
            run(torch.ones(1))
        layer.register_forward_hook(lambda module, inputs, output: 2 * output)
        results.append(run(torch.ones(1)).item())
    assert results == [1.0, 2.0]
    assert torch._dynamo.config.skip_nnmodule_hook_guards


def test_the_hooks_of_all_modules_are_these():
    seen: list[object] = []
    before = [len(table) for table in torch_private.GLOBAL_MODULE_HOOKS]
    of_all = torch.nn.modules.module
    handles = [
        of_all.register_module_forward_pre_hook(lambda *args: seen.append(1)),
        of_all.register_module_forward_hook(lambda *args: None),
        of_all.register_module_full_backward_pre_hook(lambda *args: None),
        of_all.register_module_full_backward_hook(lambda *args: None),
    ]
    try:
        now = [len(table) for table in torch_private.GLOBAL_MODULE_HOOKS]
    finally:
        for handle in handles:
            handle.remove()
    assert now == [count + 1 for count in before]
    assert [len(table) for table in torch_private.GLOBAL_MODULE_HOOKS] == before


def test_what_is_never_compiled_runs_in_compiled_code_as_it_is():
    traced: list[bool] = []

    def inner(x: Tensor) -> Tensor:
        traced.append(torch.compiler.is_compiling())
        return x + 1

    kept = torch_private.never_compiled(inner)

    def outer(x: Tensor) -> Tensor:
        return kept(x * 2) * 3

    compiled: Any = torch.compile(outer, backend="eager")
    assert compiled(torch.ones(())).item() == 9
    assert traced == [False]


def test_a_sparse_look_up_is_seen_in_the_graph():
    table, rows = torch.eye(3).requires_grad_(), torch.tensor([[0, 2]])
    found = [
        look_up(rows, table, sparse=sparse).grad_fn
        for look_up in (torch.nn.functional.embedding, torch.nn.functional.embedding_bag)
        for sparse in (True, False)
    ]
    nodes = [n if "Embedding" in type(n).__name__ else n.next_functions[0][0] for n in found if n]
    assert [torch_private.sends_sparse(node) for node in nodes] == [True, False, True, False]


def test_views_and_functions_of_nodes_are_told_apart():
    x = torch.ones(3, requires_grad=True)
    assert torch_private.is_view(torch.ones(3)[1:])
    assert not torch_private.is_view(torch.ones(3))
    assert torch_private.function_of(x.sin().grad_fn) is None


def test_forward_mode_in_one_thread_at_a_time():
    with torch_private.only_forward_mode(), torch_private.only_forward_mode():
        assert torch.func.jvp(torch.sin, (torch.zeros(1),), (torch.ones(1),))[1] == 1
    assert not torch_private.inside_transform()


class _Doubled(torch.overrides.TorchFunctionMode):
    """Doubles what ``torch.autograd.grad`` returns."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        return tuple(2 * g for g in found) if func is torch.autograd.grad else found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(), (1, 1)])
def test_the_engine_is_called_as_pytorch_calls_it(dtype: torch.dtype, shape: tuple[int, ...]):
    x = torch.tensor([0.5, -2.0], dtype=dtype, requires_grad=True)
    weight = torch.nn.Parameter(torch.tensor(3.0, dtype=dtype))
    idle = torch.ones(2, requires_grad=True)
    loss = (weight * x**3).sum().reshape(shape)
    loss.register_hook(lambda g: g.mul_(2))
    first = torch_private.gradient(loss, [x, idle, weight], True, True)
    again = torch.autograd.grad(loss, [x, idle, weight], create_graph=True, allow_unused=True)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert first[1] is None
    assert first[0] is not None
    (second,) = torch_private.gradient(first[0][0], [x], False, False)
    torch.testing.assert_close(second, torch.stack([2 * 18 * x[0], 0 * x[1]]))
    torch_private.gradient(loss, [x], False, False)
    with pytest.raises(RuntimeError, match="second time"):
        torch_private.gradient(loss, [x], False, False)
    with _Doubled():
        (seen,) = torch_private.gradient(weight * weight, [weight], False, False)
        assert seen == 12


def test_a_compiled_backward_pass_may_keep_its_graph():
    config = importlib.import_module("torch._functorch.config")
    before = config.donated_buffer
    with torch_private.keeping_buffers():
        assert not config.donated_buffer
    assert config.donated_buffer == before


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_a_graph_is_compiled_with_options():
    graph = torch.fx.symbolic_trace(lambda x: (x.sin() + 1,))
    x = torch.arange(3.0)
    (found,) = torch_private.compile_graph(graph, [x], {"layout_optimization": False})(x)
    torch.testing.assert_close(found, x.sin() + 1)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_a_graph_with_a_gradient_in_it_is_compiled_and_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A second process would compile again if PyTorch did not take such a graph for a safe one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    counters = importlib.import_module("torch._dynamo.utils").counters["aot_autograd"]
    graph = torch.fx.Graph()
    x, cotangent = graph.placeholder("x"), graph.placeholder("cotangent")
    x.meta["example_value"] = torch.empty(3)
    graph.call_function(torch_private.GRAD_MODE, (True,))
    at = graph.call_function(torch.detach, (x,))
    at.meta["example_value"] = torch.empty(3)
    at = graph.call_method("requires_grad_", (at,))
    ends = [graph.call_function(torch.sin, (at,)), graph.call_function(torch.zeros_like, (at,))]
    graph.call_function(torch_private.GRAD_MODE, (False,))
    found = graph.call_function(
        torch_private.gradient_or_zeros, (ends, [at], [cotangent] * 2), {"create_graph": False}
    )
    graph.output((graph.call_function(operator.getitem, (found, 0)),))
    module = torch.fx.GraphModule({}, graph)
    values = [torch.arange(3.0), torch.tensor([1.0, 2.0, 3.0])]
    before = dict(counters)
    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad(), torch_private.inputs_for_compiler(values) as stand_ins:
            run = torch_private.compile_graph(module, stand_ins, {})
        with torch.no_grad():
            (pulled,) = run(*values)
        torch.testing.assert_close(pulled, values[0].cos() * values[1])
    new = {name: counters[name] - before.get(name, 0) for name in counters}
    assert new.get("autograd_cache_hit") == 1, new
    assert not new.get("autograd_cache_bypass"), new


@pytest.mark.compiled
def test_other_threads_run_compiled_code_while_a_graph_is_traced():
    symbolic_trace: Any = importlib.import_module("torch.fx._symbolic_trace")
    lock = importlib.import_module("torch._dynamo.convert_frame").compile_lock
    double = torch.compile(lambda x: 2 * x, backend="eager")
    double(torch.ones(3))

    def in_a_thread(function: Callable[[], Any]) -> Any:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(function).result()

    def free() -> bool:
        taken = lock.acquire(blocking=False)
        if taken:
            lock.release()
        return taken

    with torch_private.inputs_for_compiler([torch.ones(3)]):
        # As PyTorch does for the whole process while it traces.
        symbolic_trace._is_fx_tracing_flag = True
        try:
            assert torch.equal(in_a_thread(lambda: double(torch.ones(3))), torch.full((3,), 2.0))
        finally:
            symbolic_trace._is_fx_tracing_flag = False
        assert not in_a_thread(free)
    assert in_a_thread(free)
    assert not torch.compiler.is_compiling()


def test_a_lost_level_of_forward_mode_is_left():
    square = lambda x: torch.func.jvp(torch.square, (x,), (torch.ones(1),))[1]  # noqa: E731
    torch_private.leave_lost_dual_level()
    torch._C._enter_dual_level()
    with pytest.raises(RuntimeError, match="Nested"):
        square(torch.ones(1))
    torch_private.leave_lost_dual_level()
    assert square(torch.ones(1)) == 2
    with forward_ad.dual_level():
        torch_private.leave_lost_dual_level()
        assert forward_ad.unpack_dual(forward_ad.make_dual(torch.ones(1), torch.ones(1))).tangent


def test_a_graph_that_raises_leaves_nothing_on():
    functorch = torch._C._functorch

    def state() -> list[object]:
        disabled = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
        depth = functorch.get_dynamic_layer_stack_depth()
        return [depth, functorch.get_inplace_requires_grad_allowed(), disabled]

    def compile_in_vain() -> None:
        with torch_private.inputs_for_compiler([torch.ones(3)]):
            torch_private.GRAD_MODE(False)
            torch._C._autograd._saved_tensors_hooks_disable("not in here")
            functorch._grad_increment_nesting()
            functorch.set_inplace_requires_grad_allowed(True)
            raise ValueError

    before = state()
    with pytest.raises(ValueError):  # noqa: PT011
        compile_in_vain()
    assert torch.is_grad_enabled()
    assert state() == before


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_the_path_that_compiled_code_took_is_known():
    factor = torch.tensor(3.0)

    def function(x: Tensor, times: int) -> Tensor:
        return x * times * factor

    assert torch_private.compiled_path(function) is None
    compiled: Any = torch.compile(function, backend="eager", dynamic=False)
    assert torch_private.compiler_is_at_rest()
    assert torch_private.may_compile()
    with torch.compiler.set_stance("force_eager"):
        assert not torch_private.compiler_is_at_rest()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch_private.compiler_is_at_rest()
        assert not torch_private.may_compile()
    x = torch.ones(2)
    for times in (2, 5):
        compiled(x, times)
        found = torch_private.compiled_path(function)
        assert found is not None
        asks, code = found
        for given, answer in (((x, times), True), ((x, 7), False), ((x.double(), times), False)):
            assert asks({"x": given[0], "times": given[1], "factor": factor}) is answer
        again = types.FunctionType(code, globals(), "again", None, function.__closure__)
        assert again(x, times).tolist() == [3.0 * times] * 2


def test_each_row_below_vmap_draws_its_own_random_numbers():
    states = [torch.Generator().manual_seed(i).get_state() for i in range(3)]
    numbers: list[int] = []

    @contextmanager
    def use(row: int, number: int) -> Iterator[None]:
        numbers.append(number)
        before = torch.get_rng_state()
        torch.set_rng_state(states[row])
        yield
        states[row] = torch.get_rng_state()
        torch.set_rng_state(before)

    def draw(x: Tensor) -> tuple[Tensor, ...]:
        return torch.rand(2), torch.nn.functional.dropout(x), x.clone().normal_(), torch.randperm(5)

    xs = torch.ones(3, 4)
    torch.manual_seed(7)
    with torch_private.random_row_by_row(3, use):
        found = torch.func.vmap(draw, randomness="different")(xs)
    # All rows of an operation are told the same number, from the generator.
    assert [len({*numbers[i : i + 3]}) for i in range(0, len(numbers), 3)] == [1] * 4
    torch.manual_seed(7)
    assert numbers[::3] == [int(torch.randint(2**62, ())) for _ in range(4)]
    for i in range(3):
        torch.manual_seed(i)
        for ours, theirs in zip(found, draw(xs[i]), strict=True):
            assert torch.equal(ours[i], theirs)


def test_a_call_of_checkpoint_is_redirected_under_every_name():
    kept = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    plain = inspect.unwrap(torch.utils.checkpoint.checkpoint)
    before = dict(vars(plain))
    calls: list[Any] = []

    def instead(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return original(*args, **kwargs)

    x = torch.ones(2, requires_grad=True)
    try:
        torch_private.redirect_checkpoint(instead)
        torch_private.redirect_checkpoint(instead)
        assert torch.equal(kept(torch.sin, x), x.sin())
        assert calls == [((torch.sin, x), {"use_reentrant": False})]
        with pytest.raises(ValueError, match="keyword"):
            torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=True, other=1)
    finally:
        vars(plain).clear()
        vars(plain).update(before)
    kept(torch.sin, x).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, x.detach().cos())


def test_all_function_modes_are_listed():
    outer, inner = TorchFunctionMode(), TorchFunctionMode()
    with outer, inner:
        assert torch_private.function_modes() == [outer, inner]
        assert torch_private.count_function_modes() == 2
    assert torch_private.function_modes() == []


def test_a_tensor_that_stands_for_many():
    found: list[bool] = []
    x = torch.ones(2, requires_grad=True)
    assert not torch_private.is_batched(x)
    y = x.sin()
    y.register_hook(lambda g: found.append(torch_private.is_batched(g)))
    torch.autograd.grad(y, x, torch.eye(2), is_grads_batched=True)

    def look(row: Tensor) -> Tensor:
        found.append(torch_private.is_batched(row))
        return row

    torch.func.vmap(look)(torch.eye(2))
    assert found == [True, True]


def test_tensors_side_by_side():
    tensors = [torch.randn(2, 3), torch.randn(()), torch.randn(4, 1, 2)]
    flat = torch_private.flatten(tensors)
    assert torch.equal(flat, torch.cat([x.reshape(-1) for x in tensors]))
    pieces = torch_private.unflatten(flat, tensors)
    assert all(map(torch.equal, pieces, tensors))
    assert all(x.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for x in pieces)


def test_plain_tensors():
    plain = [torch.ones(2), nn.Parameter(torch.ones(2))]
    assert torch_private.are_plain(plain)
    assert not torch_private.are_plain([*plain, torch.ones(2).as_subclass(Marked)])
    assert not torch_private.are_plain([*plain, None])
    with torch.device("cpu"):
        assert not torch_private.are_plain(plain)
    with torch_private.observing(lambda _: None):
        assert not torch_private.are_plain(plain)


class Marked(Tensor):
    """A tensor of a class of its own."""


def test_a_zero_for_each_row_of_every_vmap():
    def written(x: Tensor) -> Tensor:
        sums = torch.ones(2) + torch_private.batched_zero()
        sums.add_(x.detach())
        return (sums * x).sum()

    slope = torch.func.grad(written)
    xs = torch.arange(6.0).view(2, 3)
    assert torch.equal(torch.func.vmap(slope)(xs[0]), 2 + 2 * xs[0])
    assert torch.equal(torch.func.vmap(torch.func.vmap(slope))(xs), 2 + 2 * xs)
    assert torch.equal(torch_private.batched_zero(), torch.zeros(()))
    assert torch.func.vmap(lambda _: torch_private.with_rows(xs))(torch.ones(3)).shape == (3, 2, 3)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
def test_the_compiler_is_prepared_once():
    instructions = importlib.import_module("torch._inductor.cpu_vec_isa")
    codecache = importlib.import_module("torch._inductor.codecache")
    config = importlib.import_module("torch._inductor.config")
    options = compiling.step_options(())
    for _ in range(2):
        torch_private.prepare_compiler(options)
    assert len(torch_private._preparing) == (0 if torch.cuda.is_available() else 1)
    for thread in torch_private._preparing:
        thread.join()
    assert instructions.pick_vec_isa().bit_width() >= 128
    # The thread drops errors: PyTorch repeats them where it needs what is prepared.
    for form in (compiling.step_options, compiling.loop_options):
        two = bool(form(()).get("cpp_wrapper_build_separate"))
        with torch_private._trusted_vector_instructions(), config.patch(form(())):
            codecache.CppWrapperCodeCache.load_pybinding(**torch_private.empty_graph(two))


class _File:
    """A builder of a file, as PyTorch has them, which waits until another one is at work too."""

    def __init__(self, path: Path, meeting: threading.Barrier) -> None:
        self._path, self._meeting = path, meeting

    def get_target_file_path(self) -> str:
        return str(self._path)

    def build(self) -> None:
        self._meeting.wait(timeout=60)
        assert not self._path.exists()
        self._path.touch()


def test_two_files_are_compiled_at_the_same_time(tmp_path: Path):
    meeting = threading.Barrier(2)
    files = [_File(tmp_path / name, meeting) for name in ("main.o", "kernels.o")]
    both = torch_private._Together(files)
    assert both.get_target_file_path() == str(tmp_path / "main.o")
    both.build()
    assert all((tmp_path / name).exists() for name in ("main.o", "kernels.o"))
    (tmp_path / "kernels.o").unlink()
    # PyTorch builds what is missing.
    assert both.get_target_file_path() == str(tmp_path / "kernels.o")
    alone = torch_private._Together([files[0], _File(tmp_path / "kernels.o", threading.Barrier(1))])
    alone.build()
    assert Path(alone.get_target_file_path()).exists()


def test_an_error_in_one_of_two_files_is_raised(tmp_path: Path):
    meeting = threading.Barrier(2)
    files = [_File(tmp_path / name, meeting) for name in ("main.o", "missing/kernels.o")]
    with pytest.raises(FileNotFoundError):
        torch_private._Together(files).build()


@pytest.mark.compiled
def test_cpp_is_compiled_in_threads_inside_the_block(tmp_path: Path, monkeypatch: Any):
    codecache = importlib.import_module("torch._inductor.codecache")
    config = importlib.import_module("torch._inductor.config")
    cache = codecache.CppWrapperCodeCache
    built: list[Sequence[Any]] = []
    monkeypatch.setattr(torch_private._Together, "build", lambda self: built.append(self._builders))
    options, before = compiling.step_options(()), vars(cache).get("load_pybinding")
    graph = torch_private.empty_graph(True)
    # Code that no other test has compiled.
    graph["main_code"] = f"{graph['main_code']}// {tmp_path}\n"
    with (
        torch_private._trusted_vector_instructions(),
        config.patch(options),
        torch_private._CPP_IN_THREADS,
        torch_private._CPP_IN_THREADS,
    ):
        function = cache.load_pybinding(**graph)
        assert vars(cache)["load_pybinding"] is not before
    assert vars(cache).get("load_pybinding") is before
    # Nothing was built in advance: it is when the function is called.
    assert function([]) == []
    ((main, kernels),) = built
    assert main.get_target_file_path().endswith("main.o")
    assert kernels.get_target_file_path().endswith("optimized.o")


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")
@pytest.mark.parametrize("pulled_back", [False, True])
def test_a_pullback_is_lowered_at_once_where_it_is_needed(
    pulled_back: bool, tmp_path: Path, monkeypatch: Any
):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    importlib.import_module("torch._inductor.codecache").CppWrapperCodeCache.cache_clear()
    build, built = torch_private._Together.build, []

    def counted(self: Any) -> None:
        built.append(self)
        build(self)

    monkeypatch.setattr(torch_private._Together, "build", counted)
    x = torch.full((3,), 1.5, requires_grad=True)
    (y,) = torch_private.compile_graph(
        torch.fx.symbolic_trace(lambda x: ((x.sin() * x).exp(),)),
        [x],
        compiling.step_options([x]),
        pulled_back=pulled_back,
    )(x)
    assert len(built) == 1 + pulled_back
    # In a first backward pass PyTorch compiles by itself.
    (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=pulled_back)
    assert len(built) == 1 + pulled_back
    if pulled_back:
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], slope)
    at = x.detach()
    torch.testing.assert_close(slope, (at.sin() * at).exp() * (at.sin() + at * at.cos()))


def test_what_the_user_says_about_vector_instructions_stays():
    config = importlib.import_module("torch._inductor.config")
    assert config.cpp.vec_isa_ok is None
    with torch_private._trusted_vector_instructions():
        assert config.cpp.vec_isa_ok is True
    assert config.cpp.vec_isa_ok is None
    with (
        config.patch({"cpp.vec_isa_ok": False}),
        torch_private._trusted_vector_instructions(),
    ):
        assert config.cpp.vec_isa_ok is False


def test_a_product_by_onednn():
    if not torch_private.has_onednn():
        pytest.skip("this PyTorch was built without oneDNN")
    a, b = torch.randn(5, 7), torch.randn(3, 7)
    torch.testing.assert_close(torch_private.onednn_product(a, b), a @ b.T)
    torch.testing.assert_close(torch_private.onednn_product(b, a.mT.contiguous().mT), b @ a.T)
