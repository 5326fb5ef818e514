"""``torch.compile`` as innerloop uses it: its options, and how often it had to compile."""

from __future__ import annotations

import dis
import gc
import itertools
import math
import os
import re
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from innerloop._utils import torch_private, tree
from innerloop._utils.definitions import Definitions
from innerloop._utils.random_state import RandomState
from innerloop._utils.shared_block import SharedBlock
from innerloop._utils.traced import Traced, copy_of
from innerloop.errors import (
    InnerLoopError,
    InvalidInputError,
    NotDifferentiableError,
    RecompilationWarning,
)

OPTIONS: dict[str, object] = {
    # With it, two max-pools and inputs that require grad give a wrong first derivative (torch 2.13,
    # CPU).
    "layout_optimization": False,
    # Guards have looked at the inputs already: 70 checks a step of a small network.
    "size_asserts": False,
    # Halves the time that compiling takes; the code is no slower.
    "cpp.max_horizontal_fusion_size": 1,
    # Random numbers are those of eager code, so a step can be compared with it and replayed.
    "fallback_random": True,
}
"""The options of inductor."""

SEPARATE: dict[str, object] = {"cpp_wrapper": True, "cpp_wrapper_build_separate": True}
"""Those of a step on a CPU besides."""

SMALL = 2**18
"""Elements of all inputs of a loop up to which its kernels are called from C++."""

MANY = 4
"""Code paths of one function from which on a warning says what recompiles."""

BACKEND: Callable[..., Any] | None = None
"""What compiles a graph; None: inductor. Tests set it."""

_numbers = itertools.count()


def step_options(inputs: Sequence[object]) -> dict[str, object]:
    """Return the options for the graph of a step.

    On a CPU, kernels are called from C++ and not from Python, which takes .8 to .9 of the time
    where they are short. They are in one file, and the calls in another, compiled with less
    optimisation. That takes two thirds of the time for a large graph, whose kernels are compiled
    one by one otherwise, and .8 of it for a small one; the code is as fast.
    """
    return {**OPTIONS, **SEPARATE} if _on_cpu(inputs) else OPTIONS


def loop_options(inputs: Sequence[object]) -> dict[str, object]:
    """Return the options for the graph of a whole loop.

    It is one file: with two the code takes 1.05 to 1.25 of the time. For a large graph that would
    be 10 s longer to compile than kernels which Python calls.
    """
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    # A size that the code is not specialised for must not be compared here, which would do it.
    sizes = [math.prod(n for n in x.shape if isinstance(n, int)) for x in tensors]
    is_small = _on_cpu(inputs) and sum(sizes) <= SMALL
    return {**OPTIONS, "cpp_wrapper": True} if is_small else OPTIONS


def _on_cpu(inputs: Sequence[object]) -> bool:
    return all(x.is_cpu for x in inputs if isinstance(x, torch.Tensor))


_LIBRARY = re.compile(r"__import_(innerloop_dot_|torch_dot_(utils_dot_)?_)")
"""Names in guards that stand for modules of innerloop and for private ones of torch."""

_TREES = ("_pytree.SUPPORTED_NODES", "_pytree']._LEAF_SPEC")
"""Tables in which torch.func looks up the classes of containers: those of a step are known."""

_OWN = "__import_innerloop_dot_"
"""What stands for a module of innerloop."""

_CODE = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    types.ModuleType,
    types.CodeType,
    type,
)
"""What a module defines once and does not change."""


def _guards_to_keep(guards: Sequence[Any]) -> list[bool]:
    """Leave out the guards of code and tables of innerloop itself, and of code inside torch.

    They are about half of the guards of a small step, and all are checked at every call.
    Whatever could change stays guarded: modules and functions of users and of torch.nn; numbers
    and flags, wherever they are.
    """
    return [
        not any(table in g.name for table in _TREES)
        and not (
            g.has_value
            and _LIBRARY.search(g.name)
            and isinstance(g.value, (*_CODE, dict, frozenset) if _OWN in g.name else _CODE)
        )
        for g in guards
    ]


_ABOUT_GRAD = re.compile("The .grad attribute of a Tensor that is not a leaf", re.IGNORECASE)
_ABOUT_ITSELF = re.compile("`torch._prims_common.check` is deprecated")
_SILENCED = [
    ("ignore", _ABOUT_GRAD, Warning, None, 0),
    # Inductor's own code for torch.diagonal: an error where warnings are errors.
    ("ignore", _ABOUT_ITSELF, FutureWarning, None, 0),
]


@contextmanager
def compiler_at_work() -> Iterator[None]:
    """Hide warnings of the compiler about itself, and let Python look for garbage less often.

    It looks at the .grad of its inputs, for one. The filters are not those of
    ``warnings.catch_warnings``, of which two threads that leave it undo each other's, and which
    lets each other warning be shown anew.
    """
    filters: Any = warnings.filters
    filters[:0] = _SILENCED
    try:
        with _seldom_collecting:
            yield
    finally:
        for silenced in _SILENCED:
            with suppress(ValueError):
                filters.remove(silenced)


class _SeldomCollecting(SharedBlock):
    """A block in which Python looks for garbage after 500,000 new objects, not after 700.

    The compiler makes millions that stay, and Python goes through them a thousand times: a seventh
    of the time that compiling takes.
    """

    OBJECTS = 500_000

    def __init__(self) -> None:
        super().__init__()
        self._before = gc.get_threshold()

    def begin(self) -> None:
        self._before = gc.get_threshold()
        if self._before[0]:  # 0: never
            gc.set_threshold(max(self._before[0], self.OBJECTS), *self._before[1:])

    def end(self) -> None:
        gc.set_threshold(*self._before)


_seldom_collecting = _SeldomCollecting()


def _reads_variables(code: types.CodeType) -> bool:
    """True if what PyTorch made of a function reads variables besides its arguments."""
    for i in dis.get_instructions(code):
        if i.opname.startswith("LOAD") and i.argval in code.co_freevars:
            return True
        if i.opname == "LOAD_GLOBAL" and not str(i.argval).startswith(_MADE):
            return True
    return False


_MADE = ("__compiled_fn", "__import_")
"""The names of graphs and of modules in compiled code."""


class CodePath:
    """A path of compiled code: what PyTorch runs as long as its guards hold.

    Args:
        function: the function that was compiled.
        asks: tells from the function's variables if the guards hold.
        code: what runs then.
        is_static: True if its only inputs are tensors that were found in the arguments or outside,
            of fixed shapes: every number that the function read is a constant of the code.
        is_closed: True if nothing but the arguments is read for them.
        draws: False if it draws no random numbers.
        traced: what it was compiled from; None: not kept.

    Attributes:
        is_static, is_closed, draws, traced: as given.
        run: the compiled function. It asks nothing: its caller knows that the guards hold.
        pullbacks: what was compiled of its pullback, by kinds of inputs; None: it cannot be.
    """

    __slots__ = (
        "_asks",
        "_cells",
        "_modes",
        "_names",
        "draws",
        "is_closed",
        "is_static",
        "pullbacks",
        "run",
        "traced",
    )

    def __init__(
        self,
        function: Callable[..., Any],
        asks: Callable[[dict[str, object]], bool],
        code: types.CodeType,
        *,
        is_static: bool,
        is_closed: bool,
        draws: bool,
        traced: Traced | None,
    ) -> None:
        own = function.__code__
        self.traced = traced
        self.pullbacks: dict[object, Callable[..., Any] | None] = {}
        self._asks = asks
        self._modes = torch_private.count_function_modes()
        self._names = own.co_varnames[: own.co_argcount]
        cells = function.__closure__ or ()
        self._cells = {n: c.cell_contents for n, c in zip(own.co_freevars, cells, strict=True)}
        self.is_static = is_static
        self.is_closed = is_static and is_closed and not _reads_variables(code)
        self.draws = draws
        self.run = types.FunctionType(code, function.__globals__, own.co_name, None, cells)

    @property
    def fits_here(self) -> bool:
        """True if as many function modes are on as when it was compiled: it puts them back."""
        return self._modes == torch_private.count_function_modes()

    def accepts(self, arguments: Sequence[object]) -> bool:
        """True if PyTorch would take this path."""
        if not self.fits_here:
            return False
        return self._asks({**self._cells, **dict(zip(self._names, arguments, strict=True))})


class _Run(NamedTuple):
    """A run of a graph.

    Attributes:
        given: its inputs.
        found: its outputs.
        graph: a copy of it; None: it is not kept.
        has_fixed_shapes: False if sizes are inputs as well.
    """

    given: Sequence[Any]
    found: Sequence[Any]
    graph: torch.fx.GraphModule | None
    has_fixed_shapes: bool


class _FedError(Exception):
    """Leaves compiled code where its graph would run; ``given`` is what that would be fed."""

    def __init__(self, given: Sequence[Any]) -> None:
        super().__init__()
        self.given = given


_CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint


def _plainly(body: Callable[..., Any], *inputs: Any, **_: object) -> Any:
    """Run what activation checkpointing wraps: the compiler chooses itself what it keeps."""
    return body(*inputs)


class Compiled:
    """A function that is compiled when it is first called.

    Args:
        function: a function defined inside another one, so that its code is nobody else's: it gets
            a name of its own.
        what: names the function in errors and warnings.
        replaced: functions of PyTorch, which a mode does not see in compiled code, and what runs in
            place of them.
        around: makes the block in which it is called.
        options: returns the options for a graph, given its inputs.
        keeps_graph: True if its pullback will be compiled from the same graph.
        pulled_back: True if autograd goes back through what it returns, wherever its arguments
            require grad.

    Attributes:
        compilations: how often PyTorch has compiled it so far; it may begin once more for the same
            code path.
        precision: the relative precision of the coarsest numbers in it (ε of their dtype), which
            autocast makes coarser than its inputs.
        path: that the last call took; None: not known.
        random_state: that before the last call; None: it drew nothing.
        outside: returns tensors that the function may read besides those in its arguments.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        what: str,
        replaced: Mapping[object, Callable[..., object]] | None = None,
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
        options: Callable[[Sequence[object]], dict[str, object]] = loop_options,
        *,
        keeps_graph: bool = False,
        pulled_back: bool = False,
    ) -> None:
        self.compilations = 0
        self._keeps_graph, self._pulled_back = keeps_graph, pulled_back
        self._is_asked = False
        self._options = options
        self.path: CodePath | None = None
        self.random_state: RandomState | None = None
        self.outside: Callable[[], list[torch.Tensor]] = list
        self._known: dict[types.CodeType, CodePath] = {}
        self._ran: _Run | None = None
        self._paths = 0
        self.precision = 0.0
        self._replaced = replaced or {}
        self._what, self._around = what, around
        self._function = function
        self._definitions = Definitions()
        self._traced: list[types.CodeType] = []
        self._guarding: AbstractContextManager[None] | None = None
        self._begin()

    def _begin(self) -> None:
        """Forget what is compiled."""
        function = self._function
        self.path = None
        self._known.clear()
        # torch.compile counts recompilations per code object, and refuses a ninth: each function
        # gets code of its own.
        name = f"{function.__name__}_{next(_numbers)}"
        function.__code__ = function.__code__.replace(co_name=name)
        self._compiled = torch.compile(
            function,
            fullgraph=True,
            backend=self._compile,
            options={"guard_filter_fn": self._guards_to_keep},
        )
        self._definitions = Definitions()

    def _guards_to_keep(self, guards: Sequence[Any]) -> list[bool]:
        """Choose the guards of code that was compiled; what they are about was used in it."""
        self._definitions.note([g.value for g in guards if g.has_value], self._traced)
        return _guards_to_keep(guards)

    def __call__(self, *args: Any, explain: Callable[[], object] = lambda: None) -> Any:
        """Call the compiled function.

        Args:
            args: its arguments.
            explain: runs it uncompiled where it cannot be compiled: an error which that raises is
                the true reason, and may be the user's own.
        """
        if not self._definitions.are_unchanged():
            self._begin()
        before = self.compilations
        path = self.path
        failed: Exception | None = None
        try:
            if path is not None and torch_private.compiler_is_at_rest() and path.accepts(args):
                with self._around():
                    return self.again(path, args)
            self.path, self.random_state, self._ran = None, RandomState.now(), None
            if not before and BACKEND is None:
                torch_private.prepare_compiler(self._options(()))
            with self._around(), compiler_at_work(), torch_private.as_before_for_hooks():
                found = self._compiled(*args)
            self.path = self._path_taken(args, found)
        except InnerLoopError:
            raise
        except Exception as error:
            failed = error
        finally:
            if self._guarding is not None:
                guarding, self._guarding = self._guarding, None
                guarding.__exit__(None, None, None)
        if failed is not None:
            torch_private.leave_lost_dual_level()
            explain()
            if self._paths >= MANY and type(failed).__name__ == "FailOnRecompileLimitHit":
                raise NotDifferentiableError(
                    f"{self._what} was compiled {self._paths} times, each time for inputs of other "
                    "shapes or other numbers, strings and flags that the loss reads, and PyTorch "
                    "gives up there: pass what changes as tensors of one shape, or write "
                    "compile=False"
                ) from failed
            raise self.refusal(failed) from failed
        if self.compilations == before:
            return found
        self._paths += 1
        if self._paths == MANY:
            warnings.warn(
                f"{self._what} was compiled {self._paths} times so far, because its inputs "
                "change in shape, in dtype, in which of them require grad, or in the Python "
                "numbers, strings and flags that the loss reads. PyTorch gives up after 8 times: "
                "pass what changes as tensors of one shape. TORCH_LOGS=recompiles says why",
                RecompilationWarning,
                stacklevel=2,
            )
        return found

    def would_take(self, path: CodePath, arguments: Sequence[object]) -> bool:
        """True if a call now would take a path: nothing that it was compiled from has changed."""
        return (
            self._definitions.are_unchanged()
            and path in self._known.values()
            and path.accepts(arguments)
        )

    def again(self, path: CodePath, arguments: tuple[Any, ...]) -> Any:
        """Take a path; the caller knows that it is the right one."""
        self.random_state = RandomState.now() if path.draws else None
        found = path.run(*arguments)
        self._ran = None
        return found

    def path_for(self, arguments: Sequence[object]) -> CodePath | None:
        """Return the path that a call would take now; None: not known, or it would compile."""
        if not torch_private.compiler_is_at_rest() or not self._definitions.are_unchanged():
            return None
        return next((p for p in self._known.values() if p.accepts(arguments)), None)

    def inputs_of(self, path: CodePath, arguments: Sequence[object]) -> Sequence[Any] | None:
        """Return what the graph of a path would be fed in a call; None: it would run none.

        The code of the path finds it, wherever it is, and is left before anything runs.
        """
        before, self.path, self._is_asked = self.path, None, True
        try:
            path.run(*arguments)
        except _FedError as fed:
            return fed.given
        finally:
            self.path, self._is_asked = before, False
        return None

    def _path_taken(self, arguments: tuple[Any, ...], found: object) -> CodePath | None:
        """Return the path that the last call took, which returned ``found``."""
        ran, self._ran = self._ran, None
        newest = torch_private.compiled_path(self._function)
        if newest is None:
            return None
        known = self._known.get(newest[1])
        if known is None and ran is not None:
            fed = ran.given
            before, now = self.random_state, RandomState.now()
            inside = {*map(id, tree.tensors(arguments))}
            seen = inside.union(map(id, self.outside()))
            # What code without numbers of its own does not draw once it never does.
            is_static = ran.has_fixed_shapes and seen.issuperset(map(id, fed))
            drew = before is None or now is None or not before.equals(now)
            is_closed = inside.issuperset(map(id, fed))
            traced = None
            if ran.graph is not None and ran.has_fixed_shapes:
                traced = Traced.of(ran.graph, ran.found, arguments, found)
            known = self._known[newest[1]] = CodePath(
                self._function,
                *newest,
                is_static=is_static,
                is_closed=is_closed,
                draws=drew or not is_static,
                traced=traced,
            )
        return known if known is not None and known.accepts(arguments) else None

    def _compile(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Compile a graph; the function returned notes what it is fed."""
        self._prepare(graph)
        kept = copy_of(graph) if self._keeps_graph else None
        made = self._made(graph, inputs)
        has_fixed_shapes = not any(
            isinstance(size, torch.SymInt)
            for x in inputs
            for size in (x.shape if isinstance(x, torch.Tensor) else [x])
        )

        def run(*given: Any) -> Any:
            if self.path is not None:
                return made(*given)
            if self._is_asked:
                raise _FedError(given)
            found = made(*given)
            self._ran = _Run(given, found, kept, has_fixed_shapes)
            return found

        return run

    def refusal(self, failed: Exception) -> NotDifferentiableError:
        """Return the error for what PyTorch could not compile."""
        return NotDifferentiableError(
            f"{self._what} cannot be compiled: write compile=False. PyTorch says: {failed}"
        )

    def _prepare(self, graph: torch.fx.GraphModule) -> None:
        """Replace what a mode would replace; note the precision."""
        for node in graph.graph.nodes:
            value = node.meta.get("example_value")
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                self.precision = max(self.precision, torch.finfo(value.dtype).eps)
            if node.op == "call_function" and node.target in self._replaced:
                node.target = self._replaced[node.target]
            elif node.op == "call_function" and node.target is _CHECKPOINT:
                node.target = _plainly
        graph.recompile()

    def _made(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        self.compilations += 1
        self._traced = torch_private.traced_code()
        if self._guarding is None:
            # The guards are made when this function has returned.
            self._guarding = torch_private.guarding_hooks()
            self._guarding.__enter__()
        return self.lowered(graph, inputs)

    def lowered(self, graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        """Let the backend compile a graph."""
        if BACKEND is not None:
            return BACKEND(graph, inputs)
        options = self._options(inputs)
        return torch_private.compile_graph(graph, inputs, options, pulled_back=self._pulled_back)


def compile_cache(directory: str | os.PathLike[str]) -> None:
    """Keep compiled code in a directory, so that a second process starts in seconds.

    PyTorch keeps it in a temporary directory of the user otherwise, which a container or a cluster
    job loses. This sets the environment variable ``TORCHINDUCTOR_CACHE_DIR``; call it before
    anything is compiled. Code is looked up by its content, the options and the versions, so old
    entries do no harm, and the directory may be deleted at any time.

    Args:
        directory: where the code is kept; it is made if it is missing.

    Raises:
        InvalidInputError: the directory cannot be made.

    Example:
        >>> import tempfile, innerloop
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     innerloop.compile_cache(directory)
    """
    path = Path(directory).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"compile_cache({str(path)!r}): the directory cannot be made ({error}). Pass one in "
            "which this process may write"
        ) from error
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(path)
