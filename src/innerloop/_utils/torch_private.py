"""Every private name of PyTorch that innerloop uses, each with its reason.

``tests/test_private.py`` exercises each one, so that a PyTorch which moves one of them is noticed
by a test and mended here.
"""

from __future__ import annotations

import importlib
import inspect
import threading
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch._functorch import eager_transforms as _transforms
from torch._functorch import vmap as _vmap
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack as _no_transforms
from torch._guards import TracingContext as _TracingContext
from torch.autograd import forward_ad
from torch.autograd.graph import Node
from torch.multiprocessing import reductions
from torch.nn.modules import module as _modules
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks
from torch.utils import _pytree
from torch.utils import checkpoint as checkpointing
from torch.utils._python_dispatch import TorchDispatchMode as _TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from innerloop._utils.shared_block import SharedBlock

F = TypeVar("F", bound=Callable[..., Any])

_is_compiling = torch.compiler.is_compiling
_is_traced = torch.compiler.is_dynamo_compiling
_tracing = _TracingContext.try_get


def is_compiling() -> bool:
    """True if the compiler traces this code, or runs it on the way.

    The public question is answered for the whole process: while one thread compiles, it is True in
    all of them.
    """
    return _is_compiling() and (_is_traced() or _tracing() is not None)


def traced_code() -> list[types.CodeType]:
    """Return the functions that the compiler has traced so far; called while it compiles."""
    return _TracingContext.get_traced_code() or []


@contextmanager
def guarding_hooks() -> Iterator[None]:
    """Let code that is compiled in the block look for hooks on the modules which it runs.

    By default, where a module has none, compiled code does not look if it has some later.
    """
    before = _compiler_settings().skip_nnmodule_hook_guards
    _compiler_settings().skip_nnmodule_hook_guards = False
    try:
        yield
    finally:
        _compiler_settings().skip_nnmodule_hook_guards = before


def _compiler_settings() -> Any:
    # Not above: to import the compiler takes a second.
    return importlib.import_module("torch._dynamo.config")


# Containers of kinds that innerloop.tree does not walk itself. There is no public pytree module up
# to torch 2.13.
tree_map = _pytree.tree_map


def register_tree_node(
    cls: type, children: Callable[[Any], list[Any]], rebuild: Callable[[Any, list[Any]], Any]
) -> None:
    """Let torch.func and torch.compile look into instances of ``cls``.

    The context of a node is an emptied instance.
    """
    _pytree.register_pytree_node(
        cls,
        lambda node: (children(node), rebuild(node, [])),
        lambda values, like: rebuild(like, list(values)),
        serialized_type_name=f"{cls.__module__}.{cls.__name__}",
    )


_forward_lock = threading.RLock()
_forward_thread: list[int] = []
"""The thread in which innerloop takes a forward-mode derivative, once per nested one."""


@contextmanager
def only_forward_mode() -> Iterator[None]:
    """Let no other thread of innerloop take a forward-mode derivative inside the block.

    The level of ``torch.autograd.forward_ad`` belongs to the process: the first of two threads that
    leaves it takes the tangents of the other away. Inside a ``jvp``, whose thread has waited
    already, nothing is locked: on a GPU its backward passes run in a thread of their own.
    """
    if is_compiling() or jvp_levels():
        yield
        return
    with _forward_lock:
        _forward_thread.append(threading.get_ident())
        try:
            yield
        finally:
            _forward_thread.pop()


def _forward_level() -> bool:
    """True if a level of forward mode is on, and is not one that innerloop uses elsewhere."""
    return forward_ad._current_level >= 0 and (
        not _forward_thread
        or _forward_thread[-1:] == [threading.get_ident()]
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def inside_transform() -> bool:
    """True if a ``torch.func`` transform (grad, vmap, jvp, ...) or a forward-mode level is running.

    ``torch.autograd.grad`` must not be called there, ``detach`` drops tangents, and some operations
    lack a batching rule. No public query exists.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None or _forward_level()


def inside_dual_level() -> bool:
    """True if a level of ``torch.autograd.forward_ad`` was entered outside ``torch.func``."""
    return torch._C._functorch.peek_interpreter_stack() is None and _forward_level()


def jvp_levels() -> int:
    """Count the ``torch.func.jvp`` that are running around each other."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


def derivative_levels() -> int:
    """Count the ``torch.func.grad``, ``vjp`` and ``jvp`` that are running around each other.

    A level of dual numbers around them counts too.
    """
    stack = torch._C._functorch.get_interpreter_stack() or []
    kinds = torch._C._functorch.TransformType
    levels = sum(level.key() in (kinds.Grad, kinds.Jvp) for level in stack)
    return levels + (_forward_level() and not any(level.key() == kinds.Jvp for level in stack))


def is_once_differentiable(node: object) -> bool:
    """True if a node is a custom Function whose backward must not be differentiated again."""
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    wrapped = getattr(backward, "__wrapped__", None)
    return (
        wrapped is not None
        and getattr(backward, "__globals__", {}).get("__name__") == "torch.autograd.function"
    )


def sends_sparse(node: Any) -> bool:
    """True if a node of an embedding sends a sparse gradient to its table (``sparse=True``)."""
    return bool(getattr(node, "_saved_sparse", False))


def function_of(node: Any) -> type | None:
    """Return the ``torch.autograd.Function`` that a node of the graph belongs to, None if none.

    Compiled code drops the backward rule of such a class under ``torch.func``.
    """
    found: type | None = getattr(node, "_forward_cls", None)
    return found


def divides_by_frequency(node: Any) -> bool:
    """True if a node of ``F.embedding`` has ``scale_grad_by_freq``."""
    return bool(node._saved_scale_grad_by_freq)


def reverse_over_forward() -> bool:
    """True if ``torch.func.grad`` or ``vjp`` is running around ``jvp``."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    kinds = [level.key() for level in stack]
    jvp, grad = torch._C._functorch.TransformType.Jvp, torch._C._functorch.TransformType.Grad
    return jvp in kinds and grad in kinds[: len(kinds) - kinds[::-1].index(jvp)]


def inside_vmap() -> bool:
    """True if one of the running transforms is ``torch.func.vmap``."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def is_batched(tensor: Tensor) -> bool:
    """True if ``tensor`` stands for many, of ``vmap`` or of ``autograd.grad(is_grads_batched)``."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def batched_zero() -> Tensor:
    """Return a 0-dim zero of which every running ``vmap`` has one for each of its rows.

    Added to a tensor, it makes room for what each row will write there.
    """
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or []
    rows = [
        (functorch.CVmapInterpreterPtr(level).batchSize(), level.level())
        for level in stack
        if level.key() == functorch.TransformType.Vmap
    ]
    # A tensor that was made inside a transform belongs to the innermost one.
    with _no_transforms():
        plain = [torch.zeros(count) for count, _ in rows]
    zero = torch.zeros(())
    for zeros, (_, level) in zip(plain, rows, strict=True):
        zero = zero + functorch._add_batch_dim(zeros, 0, level)
    return zero


def with_rows(x: Tensor) -> Tensor:
    """Return ``x`` as a tensor of which every running ``vmap`` has one for each of its rows."""
    return x + batched_zero().to(x)


class over_rows:  # noqa: N801 (used like a function, at every step of a layer)
    """Run the block for all rows of the tensors that `row` is given at once.

    As ``torch.func.vmap``, which takes as long to look through its arguments as a small layer
    takes to compute. Each row draws random numbers of its own.

    Args:
        count: the number of rows.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        loaded: Any = _vmap
        loaded.lazy_load_decompositions()

    def __enter__(self) -> over_rows:
        self._level = torch._C._functorch._vmap_increment_nesting(self._count, "different")
        return self

    def __exit__(self, *_: object) -> None:
        torch._C._functorch._vmap_decrement_nesting()

    def row(self, stacked: Tensor) -> Tensor:
        """Return what stands for one row of ``stacked``, inside the block."""
        found: Tensor = torch._C._functorch._add_batch_dim(stacked, 0, self._level)
        return found

    def stacked(self, row: Tensor) -> Tensor:
        """Return the results of all rows, stacked; called inside the block."""
        found: Tensor = torch._C._functorch._remove_batch_dim(row, self._level, self._count, 0)
        return found


def inside_reverse_transform() -> bool:
    """True if one of the running transforms is ``torch.func.grad`` or ``vjp``.

    Hooks on saved tensors are refused there.
    """
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Grad for level in stack)


def switches_gradients(function: object) -> bool:
    """True if ``function`` is the one by which ``torch.no_grad`` and its kind do their work.

    A ``TorchFunctionMode`` sees that function.
    """
    return function is torch._C._set_grad_enabled


@contextmanager
def no_saved_tensors_hooks() -> Iterator[None]:
    """Take the innermost hooks on saved tensors off for a while.

    The public interface only covers them with others, or refuses hooks altogether.
    """
    pack_and_unpack = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if pack_and_unpack is None:
        yield
        return
    torch._C._autograd._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        torch._C._autograd._push_saved_tensors_default_hooks(*pack_and_unpack)


class refusing_saved_tensors_hooks:  # noqa: N801 (used like a function, at every step)
    """Raise a RuntimeError with ``message`` where hooks on saved tensors begin inside the block.

    The public ``disable_saved_tensors_hooks`` refuses those that are there already, too.
    """

    def __init__(self, message: str) -> None:
        self._message = message

    def __enter__(self) -> None:
        self._before = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
        torch._C._autograd._saved_tensors_hooks_disable(self._message, False)

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            torch._C._autograd._saved_tensors_hooks_enable()
        else:
            torch._C._autograd._saved_tensors_hooks_disable(self._before, False)


def is_asked_for(node: Node | None) -> bool:
    """True if the backward pass that is running goes on to ``node``, or ends there.

    The public ``needs_input_grad`` of a Function says only which inputs require grad.
    """
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf that torch.autograd.grad was asked for
        return True


def never_compiled(function: F) -> F:
    """Return ``function``, which compiled code calls as it is, and everything that it calls.

    The public ``torch.compiler.disable`` imports the compiler at once, this one at the first call.
    """
    disable: Any = _disable_dynamo
    kept: F = disable(function)
    return kept


class as_before_for_hooks:  # noqa: N801 (used like a function)
    """Leave hooks on saved tensors allowed after the block if they were before it.

    A compilation that traces a ``torch.func`` transform and gives up forbids them for good.
    """

    def __enter__(self) -> None:
        self._before = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            torch._C._autograd._saved_tensors_hooks_enable()


_saved_tensors_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def inside_saved_tensors_hooks() -> bool:
    """True if hooks on saved tensors are active, as in a checkpointed forward or its repetition.

    The compiler cannot trace the question, and a loss that it compiles is refused on its own.
    """
    return not is_compiling() and _saved_tensors_hooks(True) is not None


_checkpoint: Any = inspect.unwrap(checkpointing.checkpoint)


def redirect_checkpoint(to: Callable[..., Any]) -> None:
    """Let every call of ``torch.utils.checkpoint.checkpoint`` become ``to(original, *arguments)``.

    Packages import that function by name and keep it in a ``functools.partial`` (the
    ``_gradient_checkpointing_func`` of Hugging Face's models), so that another one in its module
    would not be called. The function itself asks an attribute for the form of it that the compiler
    does not trace, and makes that at the first call; here it is given another one. Its own form,
    ``original``, is made where it is called.
    """
    plain = _checkpoint
    if vars(plain).get("_innerloop_redirected") is not to:
        original = vars(plain).get("_innerloop_original")
        if original is None:
            original = never_compiled(
                types.FunctionType(
                    plain.__code__,
                    plain.__globals__,
                    plain.__name__,
                    plain.__defaults__,
                    plain.__closure__,
                )
            )
            inspect.unwrap(original).__kwdefaults__ = plain.__kwdefaults__
        vars(plain)["_innerloop_original"] = original
        vars(plain)["_innerloop_redirected"] = to
        vars(plain)["__dynamo_disable"] = never_compiled(partial(to, original))


def is_tracked(tensor: Tensor) -> bool:
    """True if the innermost ``torch.func.grad`` sees ``tensor``.

    For a result that it does not see, ``torch.func.grad`` silently returns zeros.

    Its own level wraps constants too, so ``requires_grad`` is asked as well; that alone would take
    a tensor from outside for its own.
    """
    return tensor.requires_grad and torch._C._functorch.is_gradtrackingtensor(tensor)


def has_derivative(tensor: Tensor) -> bool:
    """True if any level differentiates ``tensor``.

    The levels are autograd, each ``torch.func.grad`` that is running, and forward mode.
    """
    while True:
        if tensor.requires_grad or (
            _forward_level() and forward_ad.unpack_dual(tensor).tangent is not None
        ):
            return True
        if not torch._C._functorch.is_functorch_wrapped_tensor(tensor):
            return False
        tensor = torch._C._functorch.get_unwrapped(tensor)


def innermost(tensor: Tensor) -> Tensor:
    """Return the plain tensor inside the wrappers of ``torch.func``.

    A batched tensor has the dimension of the tasks.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def plain_form(tensor: Tensor) -> Tensor:
    """Return the numbers of ``tensor`` as a constant, in one form whatever transforms run.

    The dimensions of ``vmap`` come first.
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        place = torch._C._functorch.maybe_get_bdim(tensor)
        tensor = torch._C._functorch.get_unwrapped(tensor)
        if place > 0:
            tensor = tensor.movedim(place, 0)
    return tensor.detach()


LARGE = 16_384
"""Elements from which on an operation of a tensor costs less than keeping the tensor does."""


def add_lists(xs: list[Tensor], ys: list[Tensor], alpha: float) -> list[Tensor]:
    """Compute ``x + alpha * y`` for each pair, with the bits of one ``torch.add`` each.

    It is one call, and one node of the graph, for all small tensors. That node keeps both lists
    until it is gone, which the node of a ``torch.add`` does not.
    """
    if not any(y.numel() >= LARGE for y in ys):
        return list(torch._foreach_add(xs, ys, alpha=alpha))
    found = list(ys)
    small = []
    for i, (x, y) in enumerate(zip(xs, ys, strict=True)):
        if y.numel() >= LARGE:
            found[i] = torch.add(x, y, alpha=alpha)
        else:
            small.append(i)
    if small:
        added = torch._foreach_add([xs[i] for i in small], [ys[i] for i in small], alpha=alpha)
        for i, z in zip(small, added, strict=True):
            found[i] = z
    return found


def multiply_list(xs: list[Tensor], factor: float) -> list[Tensor]:
    """Compute ``x * factor`` for each tensor, in one call where all are small."""
    if any(x.numel() >= LARGE for x in xs):
        return [x * factor for x in xs]
    return list(torch._foreach_mul(xs, factor))


def has_onednn() -> bool:
    """True if `onednn_product` works here."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def onednn_product(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a @ b.T`` by oneDNN, without a derivative.

    ``torch.mm`` asks oneDNN for coarser dtypes only.
    """
    found: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return found


def flatten(tensors: list[Tensor]) -> Tensor:
    """Return the entries of all tensors side by side.

    One call takes half of the time of ``torch.cat`` and a ``reshape`` for each of them.
    """
    return torch._C._nn.flatten_dense_tensors(tensors)


def unflatten(flat: Tensor, like: list[Tensor]) -> tuple[Tensor, ...]:
    """Undo `flatten`: return views of ``flat`` with the shapes of ``like``, none of them empty."""
    return tuple(torch._C._nn.unflatten_dense_tensors(flat, like))


def distance(xs: list[Tensor], ys: list[Tensor]) -> float:
    """Compute the norm of the differences between two lists of tensors, in a few calls."""
    norms = torch._foreach_norm(torch._foreach_sub(xs, ys))
    return float(torch.stack([n.double() for n in norms]).norm())


def version(tensor: Tensor) -> int:
    """Return how often ``tensor`` has been written in place.

    So a buffer is known to have changed without comparing its values.
    """
    return tensor._version


def versions(tensors: Iterable[Tensor]) -> list[int]:
    """Count for each tensor how often it has been written in place."""
    return [tensor._version for tensor in tensors]


def nodes_so_far() -> int:
    """Count the nodes that this thread has recorded so far."""
    return torch._C._autograd._get_sequence_nr()


def is_newer(node: Any, count: int) -> bool:
    """True if a node was recorded after `nodes_so_far` gave ``count``."""
    return node is not None and node._sequence_nr() >= count


def recorded_by(tensor: Tensor) -> object:
    """Return the node that an in-place operation on ``tensor`` replaces if autograd records it.

    That of a view is made anew after any in-place operation, that of its base is not.
    """
    base = tensor._base
    return tensor.grad_fn if base is None else base.grad_fn


def is_view(tensor: Tensor) -> bool:
    """True if ``tensor`` is a view of another one: ``detach_()`` is refused for those."""
    return tensor._is_view()


def gradient_hooks(tensor: Tensor) -> list[Callable[[Tensor], Tensor | None]]:
    """Return the hooks of ``tensor.register_hook``.

    Training runs them on each gradient, and they cannot be listed publicly.
    """
    return list((tensor._backward_hooks or {}).values())


def post_accumulate_hooks(tensor: Tensor) -> int:
    """Count the hooks of ``tensor.register_post_accumulate_grad_hook``."""
    return len(tensor._post_accumulate_grad_hooks or {})


class OwnStepHook:
    """A hook of the library's own on an optimizer's step, which `step_hooks` does not count."""

    def __init__(self, hook: Callable[..., None]) -> None:
        self._hook = hook

    def __call__(self, *args: object) -> None:
        self._hook(*args)


def step_hooks(optimizer: torch.optim.Optimizer) -> int:
    """Count the hooks on the optimizer's step.

    They come from ``register_step_pre_hook`` and ``register_step_post_hook``, of the optimizer and
    of all optimizers (``torch.optim.optimizer.register_optimizer_step_pre_hook``).
    """
    tables = (
        optimizer._optimizer_step_pre_hooks,
        optimizer._optimizer_step_post_hooks,
        _global_optimizer_pre_hooks,
        _global_optimizer_post_hooks,
    )
    if not any(tables):
        return 0
    hooks = [hook for table in tables for hook in table.values()]
    return len([hook for hook in hooks if type(hook) is not OwnStepHook])


def is_initialised(optimizer: torch.optim.Optimizer) -> bool:
    """True if the constructor of ``torch.optim.Optimizer`` has run for it, unlike for a wrapper."""
    return "_optimizer_step_pre_hooks" in vars(optimizer)


def mark_stepped(optimizer: torch.optim.Optimizer) -> None:
    """Note on the optimizer what ``optimizer.step`` notes.

    Without it a scheduler warns that it was stepped before its optimizer.
    """
    optimizer._opt_called = True  # type: ignore[attr-defined]


_graph_task = torch._C._current_graph_task_id


def backward_pass() -> int:
    """Return a number for the backward pass that is running in this thread, -1 if none is.

    Code that runs during one is a hook or a recomputation.
    """
    return _graph_task()


_run_backward = torch.autograd.Variable._execution_engine.run_backward
_PLAIN_TENSORS = frozenset((Tensor, nn.Parameter))


def are_plain(tensors: Iterable[object]) -> bool:
    """True if all are tensors of no class of their own, and no mode looks at their operations."""
    return (
        _PLAIN_TENSORS.issuperset(map(type, tensors))
        and not torch._C._len_torch_function_stack()
        and not torch._C._len_torch_dispatch_stack()
    )


def gradient(
    loss: Tensor, inputs: Sequence[Tensor], create_graph: bool, retain_graph: bool
) -> tuple[Tensor | None, ...]:
    """Differentiate the sum of ``loss``, as ``torch.autograd.grad(..., allow_unused=True)`` does.

    What that does before and after the engine runs takes 26 microseconds, which is 3 % of a step of
    a small network. On other devices it also hands the context to the engine's threads, so there it
    is called.
    """
    if (
        type(loss) is not Tensor
        or not loss.is_cpu
        or not loss.is_floating_point()
        or torch._C._len_torch_function_stack()
        or is_compiling()
        or any(type(x) not in _PLAIN_TENSORS or not x.is_cpu for x in inputs)
    ):
        seeds = torch.ones_like(loss) if loss.ndim else None
        return torch.autograd.grad(
            loss,
            inputs,
            seeds,
            retain_graph=retain_graph,
            create_graph=create_graph,
            allow_unused=True,
        )
    # Made anew: a hook on the loss may write it.
    seed = torch.ones_like(loss)
    found: tuple[Tensor | None, ...] = _run_backward(
        (loss,), (seed,), retain_graph, create_graph, tuple(inputs), True, accumulate_grad=False
    )
    return found


def keeps_graph() -> bool:
    """True if the backward pass that is running retains the graph for another one."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def graph_bytes(ends: Iterable[Tensor]) -> int:
    """Return the size of the tensors that the graph behind ``ends`` holds for a backward pass.

    One that was written in place since then cannot be read, and is left out.
    """
    held: dict[int, Tensor] = {}
    seen: set[Any] = set()
    stack: list[Any] = [x.grad_fn for x in ends]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack.extend([child for child, _ in node.next_functions])
        names = [n for n in dir(node) if n.startswith("_saved_")]
        values: list[Any] = []
        with suppress(RuntimeError):
            values += [getattr(node, n) for n in names]
            values += getattr(node, "saved_tensors", ())
        for x in values:
            for y in x if isinstance(x, (list, tuple)) else (x,):
                if isinstance(y, Tensor) and y.layout == torch.strided:
                    held.setdefault(y.untyped_storage().data_ptr(), y)
    return sum(x.untyped_storage().nbytes() for x in held.values())


def storage_weakref(tensor: Tensor) -> Any:
    """Return a reference to the memory of ``tensor`` whose ``expired()`` tells when it is gone.

    Autograd keeps the memory alive, not the tensor object.
    """
    return reductions.StorageWeakRef(tensor.untyped_storage())


class _Observer(_TorchDispatchMode):
    def __init__(self, seen: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(x, Tensor):
                self._seen(x)
        return result


def observing(seen: Callable[[Tensor], Any]) -> AbstractContextManager[Any]:
    """Call ``seen`` with every tensor that an operation returns inside the block.

    It sees operations in backward passes and below ``torch.func`` too.
    """
    return _Observer(seen)


class _OperationObserver(_TorchDispatchMode):
    def __init__(self, seen: Callable[[str, Any, Any], Any]) -> None:
        super().__init__()
        self._seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        node = torch._C._current_autograd_node()
        self._seen(str(func.overloadpacket) if node is None else node.name(), args, result)
        return result


def observing_operations(seen: Callable[[str, Any, Any], Any]) -> AbstractContextManager[Any]:
    """Call ``seen(name, inputs, result)`` with every operation inside the block.

    In a backward pass the name is that of the autograd node, elsewhere that of the operation.
    """
    return _OperationObserver(seen)


def weight_norm() -> Callable[..., Tensor]:
    """Return the operation behind both forms of weight normalisation in ``torch.nn.utils``.

    There is no public name for it.
    """
    operation: Callable[..., Tensor] = torch._weight_norm
    return operation


def count_function_modes() -> int:
    """Count the function modes that are on."""
    count: int = torch._C._len_torch_function_stack()
    return count


def function_modes() -> list[Any]:
    """Return all function modes that are on, the innermost one last."""
    count = torch._C._len_torch_function_stack()
    return [torch._C._get_function_stack_at(i) for i in range(count)]


def function_mode() -> Any:
    """Return the innermost ``TorchFunctionMode``.

    Only that one can be left, and there is no public way to ask which one it is.
    """
    count = torch._C._len_torch_function_stack()
    return torch._C._get_function_stack_at(count - 1) if count else None


def forward_mode() -> bool:
    """True if a forward-mode derivative is being taken, by ``torch.func.jvp`` or dual numbers.

    No public query exists.
    """
    return not is_compiling() and _forward_level()


NO_TORCH_FUNCTION = torch._C._disabled_torch_function_impl
"""The ``__torch_function__`` of a class of tensors that has none, like that of `nn.Parameter`."""


def plain_tensors() -> Any:
    """Return the block in which subclasses of tensors are handed no operation."""
    return torch._C.DisableTorchFunctionSubclass()


def unseen() -> Any:
    """Return the block in which neither modes nor subclasses are handed an operation."""
    return torch._C.DisableTorchFunction()


def of_class(cls: type[Tensor], tensor: Tensor) -> Tensor:
    """Return ``tensor``, a constant, as a ``cls``; ``as_subclass`` would give a view."""
    return Tensor._make_subclass(cls, tensor)


def data_getter() -> Any:
    """Return the function under which a ``TorchFunctionMode`` sees ``tensor.data``."""
    return vars(torch._C.TensorBase)["data"].__get__


def backward_hooks(module: nn.Module) -> bool:
    """True if a module has hooks that see gradients; they cannot be listed publicly."""
    return bool(vars(module).get("_backward_hooks") or vars(module).get("_backward_pre_hooks"))


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


GLOBAL_MODULE_HOOKS: tuple[Mapping[int, object], ...] = (
    _modules._global_forward_pre_hooks,
    _modules._global_forward_hooks,
    _modules._global_backward_pre_hooks,
    _modules._global_backward_hooks,
)
"""The hooks of all modules (``register_module_forward_hook``), by a number for each registration.

Compiled code does not look if they are still the same.
"""


def module_hooks(module: nn.Module) -> tuple[Callable[..., object], ...]:
    """Return the hooks of a module; compiled code does not look if they are still the same."""
    own = vars(module)
    return tuple(hook for name in _HOOKS if own.get(name) for hook in own[name].values())


def hooks_so_far() -> int:
    """Count the hooks of all kinds that were registered in this process so far."""
    return RemovableHandle.next_id


def is_wrapped(module: nn.Module) -> bool:
    """True if `wrap_backward_hooks` has been called for a module."""
    return "_get_backward_hooks" in vars(module)


def wrap_backward_hooks(
    module: nn.Module, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Let each forward call of ``module`` register ``wrap(hook)`` in place of its hooks."""

    def hooks() -> tuple[list[Callable[..., Any]], list[Callable[..., Any]]]:
        full, others = type(module)._get_backward_hooks(module)
        return [wrap(h) for h in full], [wrap(h) for h in others]

    def before() -> list[Callable[..., Any]]:
        return [wrap(h) for h in type(module)._get_backward_pre_hooks(module)]

    vars(module).update(_get_backward_hooks=hooks, _get_backward_pre_hooks=before)


TENSOR_TABLES = ("_parameters", "_buffers")
"""The attributes of a module that hold its own tensors."""
REGISTRIES = (*TENSOR_TABLES, "_modules")
"""The attributes in which a module finds what it registers: ``getattr`` looks there last."""


def lists_its_tables(module: nn.Module) -> bool:
    """True if ``named_parameters`` and ``named_buffers`` list what stands in the tables."""
    kind = type(module)
    return (
        kind.named_modules is nn.Module.named_modules
        and kind._named_members is nn.Module._named_members
        and vars(module).keys().isdisjoint(("named_modules", "_named_members"))
    )


def parameter_table(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict in which a module keeps its own parameters; empty before ``__init__``.

    Publicly a parameter can be replaced by another one only, not by a plain tensor.
    """
    table: dict[str, Tensor | None] = vars(module).get("_parameters", {})
    return table


def buffer_table(module: nn.Module) -> dict[str, Tensor | None]:
    """Return the dict in which a module keeps its own buffers; publicly it can only be read."""
    table: dict[str, Tensor | None] = vars(module)["_buffers"]
    return table


def module_table(module: nn.Module) -> dict[str, nn.Module | None]:
    """Return the dict of a module's children, with the entries that are None."""
    table: dict[str, nn.Module | None] = vars(module)["_modules"]
    return table


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside the one that ``torch.compile`` made, or the module itself."""
    inner = (vars(module).get("_modules") or {}).get("_orig_mod")
    return module if inner is None else inner


def uncompiled_name(name: str) -> str:
    """Return a parameter's name without what ``torch.compile`` puts in between."""
    return name.replace("_orig_mod.", "")


def forget_compiled_call(module: nn.Module) -> None:
    """Let a copied module run its own forward, not what ``module.compile()`` made of another."""
    vars(module)["_compiled_call_impl"] = None


_preparing: list[threading.Thread] = []


def _trusted_vector_instructions() -> AbstractContextManager[object]:
    """Let PyTorch believe, inside the block, what the processor says about AVX2 and AVX-512.

    Else it compiles a program with its headers for each of three sets of instructions: 3 seconds
    each where nothing was compiled before. That guards against compilers, and builds of PyTorch,
    older than any that this version of PyTorch can be built or used with. What the user has set,
    stays.
    """
    config = importlib.import_module("torch._inductor.config")
    if config.cpp.vec_isa_ok is not None:
        return nullcontext()
    found: AbstractContextManager[object] = config.patch({"cpp.vec_isa_ok": True})
    return found


def empty_graph(in_two_files: bool) -> dict[str, object]:
    """Return what inductor compiles for a graph that does nothing."""
    main = """#include <torch/csrc/inductor/cpp_wrapper/cpu.h>
CACHE_TORCH_DTYPE(float32);
void inductor_entry_impl(AtenTensorHandle*, AtenTensorHandle*) {}
"""
    kernels = "#include <torch/csrc/inductor/cpp_prefix.h>\n"
    return {
        "argtypes": ["std::vector<AtenTensorHandle>"],
        "main_code": main,
        "device_type": "cpu",
        "needs_vec_isa": not in_two_files,
        "kernel_needs_vec_isa": in_two_files,
        "num_outputs": 0,
        "kernel_code": kernels if in_two_files else None,
    }


def prepare_compiler(options: Mapping[str, object]) -> None:
    """Let a thread do, once in a process, what inductor needs before it compiles a first graph.

    It finds out which vector instructions the compiler of C++ has, and compiles the headers of
    PyTorch, which takes 10 seconds where no graph was compiled before: PyTorch keeps the result.
    This passes while PyTorch follows the function.
    """
    if _preparing or torch.cuda.is_available():
        return
    # Not in the thread: two threads that import the same modules wait for each other.
    instructions = importlib.import_module("torch._inductor.cpu_vec_isa")
    codecache = importlib.import_module("torch._inductor.codecache")
    config = importlib.import_module("torch._inductor.config")

    def prepare() -> None:
        # Without a compiler PyTorch says so where it needs it.
        with suppress(Exception), _trusted_vector_instructions(), config.patch(dict(options)):
            instructions.pick_vec_isa()
            if options.get("cpp_wrapper"):
                graph = empty_graph(bool(options.get("cpp_wrapper_build_separate")))
                codecache.CppWrapperCodeCache.load_pybinding(**graph)

    _preparing.append(threading.Thread(target=prepare, daemon=True))
    _preparing[0].start()


def compile_graph(
    graph: torch.fx.GraphModule,
    inputs: Sequence[Any],
    options: Mapping[str, object],
    *,
    pulled_back: bool = False,
) -> Any:
    """Compile a graph by inductor, as ``torch.compile(backend="inductor", options=options)`` does.

    ``torch.compile`` takes options or a backend of one's own, not both.

    Args:
        graph, inputs, options: as PyTorch gives and takes them.
        pulled_back: True if a pullback will be needed wherever the inputs require grad. It is then
            lowered while the forward part is compiled, not in the first backward pass.
    """
    # Imported late: it takes a second.
    from torch._inductor import compile_fx

    lowered = _lowered_at_once() if pulled_back else nullcontext()
    with _trusted_vector_instructions(), _CPP_IN_THREADS, lowered:
        return compile_fx.compile_fx(graph, list(inputs), config_patches=dict(options))


@contextmanager
def _lowered_at_once() -> Iterator[None]:
    """Let PyTorch lower a pullback inside the block, where it does so in the first backward pass.

    There it learns whether the graph is kept, and whether the pullback may therefore overwrite what
    the forward part has saved. Here it must not, whatever the user will do; to say so by the
    setting ``donated_buffer`` leaves the question open, and a pass that keeps its graph is refused.
    """
    config = importlib.import_module("torch._functorch.config")
    stages: Any = importlib.import_module("torch._functorch._aot_autograd.graph_compile")
    try:
        find = stages.collect_bw_donated_buffer_idxs
        at_once = config.patch(force_non_lazy_backward_lowering=True)
    except AttributeError:
        # A PyTorch that has moved them lowers it later.
        yield
        return
    stages.collect_bw_donated_buffer_idxs = lambda *_, **__: []
    try:
        with at_once:
            yield
    finally:
        stages.collect_bw_donated_buffer_idxs = find


class _Together:
    """Several files that are compiled at the same time, as one of PyTorch's builders of a file.

    Args:
        builders: one for each file.
    """

    def __init__(self, builders: Sequence[Any]) -> None:
        self._builders = builders

    def _missing(self) -> list[Any]:
        return [b for b in self._builders if not Path(b.get_target_file_path()).exists()]

    def get_target_file_path(self) -> str:
        """Return the first file that is missing, or one that is there if none is."""
        path: str = next(iter(self._missing()), self._builders[0]).get_target_file_path()
        return path

    def build(self) -> None:
        """Compile what is missing."""
        if missing := self._missing():
            with ThreadPoolExecutor(len(missing)) as threads:
                # The list lets an error through.
                list(threads.map(lambda builder: builder.build(), missing))


class _CppInThreads(SharedBlock):
    """A block in which threads compile the C++ of graphs, and whoever calls one waits for it.

    PyTorch waits for each file in turn. Here the kernels of a graph and what calls them are
    compiled at the same time, and while the next graph (of the backward pass) is being made.
    """

    def begin(self) -> None:
        self._cache = importlib.import_module("torch._inductor.codecache").CppWrapperCodeCache
        self._before = vars(self._cache).get("load_pybinding")
        self._cache.load_pybinding = staticmethod(partial(_load_when_called, self._cache))

    def end(self) -> None:
        if self._before is None:
            del self._cache.load_pybinding
        else:
            self._cache.load_pybinding = self._before


_CPP_IN_THREADS = _CppInThreads()


def _load_when_called(cache: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """Let a thread compile a graph's C++; return what loads it in its first call, and runs it."""
    is_there = True

    def submit(work: Callable[[], None]) -> Future[None]:
        nonlocal is_there
        is_there = False
        if isinstance(work, partial) and len(work.args) == 2 and len(work.args[1]) > 2:
            lock, (*files, linked) = work.args
            work = partial(work.func, lock, (_Together(files), linked))

        def tried() -> None:
            # PyTorch compiles what is missing when it loads the whole, and says what is wrong then:
            # at each call, for an interruption or a full disk may have passed.
            with suppress(Exception):
                work()

        thread = ThreadPoolExecutor(1)
        done = thread.submit(tried)
        thread.shutdown(wait=False)
        return done

    load = cache.load_pybinding_async(*args, **kwargs, submit_fn=submit)
    if is_there:
        found: Callable[..., Any] = load()
        return found
    function: Callable[..., Any] | None = None

    def when_called(*given: Any) -> Any:
        nonlocal function
        if function is None:
            function = load()
        return function(*given)

    return when_called


# What the compiler writes into graphs itself: code with other functions is not looked up in its
# cache.
GRAD_MODE = torch._C._set_grad_enabled
gradient_or_zeros = _transforms._autograd_grad


def leave_lost_dual_level() -> None:
    """Leave a level of forward mode that a graph has entered, and an exception left open.

    PyTorch's compiler does not; every later ``jvp`` of the process would be refused.
    """
    if forward_ad._current_level >= 0:
        return
    try:
        level = torch._C._enter_dual_level()
    except RuntimeError:
        level = 0
    torch._C._exit_dual_level(level=level)


@contextmanager
def _compiling_in_this_process() -> Iterator[None]:
    """Say that the compiler is at work, as ``torch.compile`` does while it holds its lock.

    A graph is traced under a flag of the whole process, at which compiled functions in other
    threads take themselves for traced ones, and refuse, unless the compiler is at work.
    """
    before = torch.compiler._is_compiling_flag
    torch.compiler._is_compiling_flag = True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


@contextmanager
def inputs_for_compiler(inputs: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Return what stands for inputs of fixed shapes while a graph of one's own is compiled.

    Inductor looks compiled code up where the symbols for shapes are known, which are those of
    ``torch.compile`` otherwise. A graph that raises in the middle leaves the transforms and modes
    on that it has entered; they are left here.
    """
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    shapes = importlib.import_module("torch.fx.experimental.symbolic_shapes")
    guards = importlib.import_module("torch._guards")
    transforms = torch._C._functorch
    frames = importlib.import_module("torch._dynamo.convert_frame")
    mode = fake.FakeTensorMode(shape_env=shapes.ShapeEnv())
    depth = transforms.get_dynamic_layer_stack_depth()
    may_require_grad = transforms.get_inplace_requires_grad_allowed()
    is_recording = torch.is_grad_enabled()
    refused = torch._C._autograd._saved_tensors_hooks_get_disabled_error_message()
    try:
        with (
            frames.compile_lock,
            _compiling_in_this_process(),
            guards.tracing(_TracingContext(mode)),
            torch._C._PreserveDispatchKeyGuard(),
        ):
            yield [mode.from_tensor(x, static_shapes=True) for x in inputs]
    finally:
        leave_lost_dual_level()
        transforms.pop_dynamic_layer_stack_and_undo_to_depth(depth)
        transforms.set_inplace_requires_grad_allowed(may_require_grad)
        torch.set_grad_enabled(is_recording)
        if refused is None:
            torch._C._autograd._saved_tensors_hooks_enable()


def compiled_path(
    function: Callable[..., object],
) -> tuple[Callable[[dict[str, object]], bool], types.CodeType] | None:
    """Return the path of its code that ``torch.compile`` of a function took last; None: not known.

    These are the question that PyTorch asks of the function's variables before it takes the path,
    and the code that it runs then. PyTorch does both from inside the interpreter, which takes as
    long as the kernels of a small network.
    """
    try:
        entries = importlib.import_module("torch._C._dynamo.eval_frame")
        newest = entries._debug_get_cache_entry_list(function.__code__)[0]
        asks: Callable[[dict[str, object]], bool] = newest.guard_manager.check
        code: types.CodeType = newest.code
    except (ImportError, AttributeError, IndexError):
        return None
    return (asks, code) if code.co_freevars == function.__code__.co_freevars else None


def compiler_is_at_rest() -> bool:
    """True unless PyTorch is compiling what runs now, or was told not to run what is compiled.

    Of the user's stances, "force_eager" alone forbids to run what is there.
    """
    running = torch._C._dynamo.eval_frame.get_eval_frame_callback()
    return not running and _stance() != "force_eager"


def may_compile() -> bool:
    """True unless the user's stance forbids to compile."""
    return _stance() == "default"


def _stance() -> str:
    """Return what ``torch.compiler.set_stance`` was told."""
    found: str = torch._dynamo.eval_frame._stance.stance
    return found


def keeping_buffers() -> AbstractContextManager[object]:
    """Let a compiled backward pass inside this block take ``retain_graph=True`` in any case.

    It refuses that where it overwrites what the forward pass saved, which does not matter to a
    graph that is used once.
    """
    # Nothing but compiled code imports it.
    config = importlib.import_module("torch._functorch.config")
    found: AbstractContextManager[object] = config.patch(donated_buffer=False)
    return found


class _RowByRow(_TorchDispatchMode):
    """Below ``vmap``: draws the random numbers of each row of a batch by themselves."""

    def __init__(
        self, rows: int, use: Callable[[int, int], AbstractContextManager[object]]
    ) -> None:
        super().__init__()
        self._rows = rows
        self._use = use
        self._alone = 0
        self._number = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        if all(self._row(x, 0) is x for x in (*args, *kwargs.values())):
            # vmap calls it row by row itself (randperm).
            place, self._alone = self._alone % self._rows, self._alone + 1
            if place == 0:
                self._number = _drawn()
            with self._use(place, self._number):
                return func(*args, **kwargs)
        found: list[Any] = []
        number = _drawn()
        for i in range(self._rows):
            row = [self._row(x, i) for x in args]
            with self._use(i, number):
                found.append(func(*row, **{k: self._row(x, i) for k, x in kwargs.items()}))
        if func._schema.is_mutable and isinstance(args[0], Tensor):
            return args[0]  # its rows, which are views, have been written
        if isinstance(found[0], (tuple, list)):
            return tuple(torch.stack(column) for column in zip(*found, strict=True))
        return torch.stack(found)

    def _row(self, x: Any, i: int) -> Any:
        """Return what belongs to row i of an argument: of a tensor, or of a size."""
        if isinstance(x, Tensor) and x.dim() and x.shape[0] == self._rows:
            return x[i]
        if isinstance(x, (list, tuple)) and x and type(x[0]) is int and x[0] == self._rows:
            return list(x[1:])
        return x


def _drawn() -> int:
    """Draw a number from the generator of the CPU, as one row would."""
    return int(torch.randint(2**62, ()))


def random_row_by_row(
    rows: int, use: Callable[[int, int], AbstractContextManager[object]]
) -> AbstractContextManager[Any]:
    """Draw the random numbers of each row below ``vmap`` inside ``use(row, number)``.

    The number was drawn for the operation, from PyTorch's generator: whoever rewinds that one gets
    the same numbers again. ``vmap(randomness="different")`` draws those of all rows at once, so
    that they depend on how many there are. It hands operations to the kernels with the rows in
    front.
    """
    return _RowByRow(rows, use)
