"""``map_tasks``: one function over many tasks, in chunks, on one process or several."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from innerloop._inner_gradient.graph import refusing_own_functions
from innerloop._metagradient import distributed
from innerloop._utils import torch_private, tree
from innerloop._utils.arguments import check_flag
from innerloop._utils.caches import cache
from innerloop._utils.compiled_check import LaterChecks, Trust, check_compiled, moved_by_rounding
from innerloop._utils.compiling import Compiled
from innerloop._utils.progress import Report, closing, reporter
from innerloop._utils.random_state import RandomState, at_random_state, restored_on_error
from innerloop._utils.traceable import refuse_numpy
from innerloop.errors import InvalidInputError
from innerloop.nn._catalogue import HIDDEN
from innerloop.nn._mode import unwatched

_compiled: MutableMapping[object, _CompiledChunks] = cache("compiled chunks of tasks")
_WRITE = (
    "map_tasks records no graph around its chunks, so that memory stays bounded: take the "
    "gradients inside, in fn, and let it return them, value, grads = map_tasks(one_task, tasks, "
    'params, reduce="mean") with one_task(task, params) = innerloop.metagradient(outer, problem, '
    "params, task, wrt='params'), and pass {name: p.detach() for name, p in params.items()}"
)


def map_tasks(
    fn: Callable[..., Any],
    tasks: object,
    *shared: object,
    chunk_size: int | None = None,
    randomness: str = "different",
    reduce: str | None = None,
    compile: bool = False,
    group: Any = None,
    progress: bool | Report = False,
) -> Any:
    r"""Return the results of ``fn(task, *shared)`` for all tasks, many of which run at once.

    .. math:: r_i = f(\tau_i, \sigma), \qquad i = 0, \dots, N - 1;
        \qquad \text{or } \tfrac1N \textstyle\sum_i r_i, \ \sum_i r_i

    The tasks of a chunk run together under ``torch.func.vmap``, the chunks one after another, so
    the memory is that of one chunk and the results. No graph is recorded around a chunk: ``fn``
    takes its gradients itself, by `innerloop.metagradient`.

    Args:
        fn: ``fn(task, *shared)`` returns a pytree of tensors; it is a function of its arguments.
        tasks: a pytree of tensors with the tasks along their first dimension, N: data, per-task
            initial weights, hyper-parameters. Leaves that are not tensors go to every task.
        shared: what every task gets as it is. Tensors in it must not require grad.
        chunk_size: how many tasks run at once; default: all of them.
        randomness: ``"different"``: each task draws torch's random numbers from a generator of its
            own, whose seed is made of the task's number and of one number that this function draws,
            so they do not depend on the chunks and processes; ``"same"``: all tasks draw the same
            numbers; ``"error"``: drawing raises. A ``torch.Generator`` of its own that ``fn`` draws
            from knows nothing of tasks.
        reduce: ``"mean"`` or ``"sum"`` over all tasks, of every leaf; None: the results of all
            tasks are stacked along a new first dimension.
        compile: compile a chunk as a whole. It is compared with eager code at the first call and at
            random later ones. Random numbers and norms with running statistics in training mode
            are refused. The last chunk is filled up with copies of a task, so that it has the same
            shape.
        group: a group of processes (``torch.distributed.group.WORLD`` under ``torchrun``), each of
            which passes the same arguments: every process takes a share of the tasks, and all get
            the reduced result.
        progress: as in `unroll`; tasks are counted.

    Returns:
        A pytree like the result of ``fn``.

    Raises:
        InvalidInputError: no tasks, sizes that differ, something that requires grad.
        ProcessGroupError: another process of the group raised or ended.

    Example:
        On the loss (w - c)²/2 a step with lr 0.5 goes half of the way to c, so the outer loss
        w₁²/2 has the derivative w₁/2 = (w₀ + c)/4.

        >>> import torch, innerloop
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, c: (params["w"] - c) ** 2 / 2, innerloop.optim.sgd(lr=0.5)
        ... )
        >>> def one_task(c, params):
        ...     return innerloop.metagradient(
        ...         lambda traj, hyper: traj.params["w"] ** 2 / 2,
        ...         problem,
        ...         params,
        ...         c[None],
        ...         wrt="params",
        ...     )
        >>> params = {"w": torch.tensor(2.0)}
        >>> value, grads = innerloop.map_tasks(one_task, torch.tensor([0.0, 2.0, 4.0]), params)
        >>> grads
        {'w': tensor([0.5000, 1.0000, 1.5000])}
        >>> value, grads = innerloop.map_tasks(
        ...     one_task, torch.tensor([0.0, 2.0, 4.0]), params, chunk_size=2, reduce="mean"
        ... )
        >>> grads
        {'w': tensor(1.)}
    """
    check_flag("compile", compile)
    count = _check(fn, tasks, shared, chunk_size, randomness, reduce, group)
    share = range(count)
    run = distributed.Run(group, count) if group is not None else None
    if run is not None:
        share = run.share
    size = len(share) if chunk_size is None else min(chunk_size, max(len(share), 1))
    report = reporter(progress)
    with restored_on_error(), closing(report):
        draws = _Draws(randomness, run)
        total = _Total(reduce)
        call = _CompiledChunks.of(fn) if compile else None
        with run.shared_fate() if run is not None else nullcontext():
            # A process without a task of its own runs one all the same, which counts nothing: it
            # has to know what the results look like.
            for begin in range(share.start, max(share.stop, share.start + 1), max(size, 1)):
                places = range(begin, min(begin + size, share.stop))
                counted = len(places)
                if not counted:
                    places = range(count - 1, count)
                found = _chunk(fn, call, draws, tasks, shared, places, size)
                total.add(found, counted)
                report("forward", places.stop - share.start, len(share))
        if run is None:
            return total.result(count)
        return run.reduced(total.sums(), count, mean=reduce == "mean")


def _check(
    fn: object,
    tasks: object,
    shared: Sequence[object],
    chunk_size: object,
    randomness: object,
    reduce: object,
    group: object,
) -> int:
    """Return the number of tasks, or raise."""
    if not callable(fn):
        raise InvalidInputError(f"fn is {type(fn).__name__}: write a function fn(task, *shared)")
    if chunk_size is not None and (
        not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1
    ):
        raise InvalidInputError(f"chunk_size={chunk_size!r}: write a number of tasks, 1 or more")
    if randomness not in ("different", "same", "error"):
        raise InvalidInputError(f'randomness={randomness!r}: write "different", "same" or "error"')
    if reduce not in (None, "mean", "sum"):
        raise InvalidInputError(f'reduce={reduce!r}: write "mean", "sum" or None')
    if group is not None and reduce is None:
        raise InvalidInputError(
            "with group= every process gets the reduced result, and reduce is None: write "
            'reduce="mean" or reduce="sum"'
        )
    for name, value in (("tasks", tasks), ("shared", shared)):
        for path, x in tree.named_tensors(value, name):
            if torch_private.has_derivative(x):
                raise InvalidInputError(f"{path} requires grad, and {_WRITE}")
    named = list(tree.named_tensors(tasks, "tasks"))
    if not named:
        raise InvalidInputError(
            "tasks holds no tensor: stack the data of all tasks along a first dimension"
        )
    for path, x in named:
        if x.dim() == 0:
            raise InvalidInputError(
                f"{path} has no dimension, and the tasks lie along the first one: pass what all "
                "tasks have in common as a further argument, map_tasks(fn, tasks, shared)"
            )
    sizes = {path: len(x) for path, x in named}
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{path} has {n}" for path, n in sizes.items())
        raise InvalidInputError(
            f"the first dimension is that of the tasks, and it differs: {listed}. Pass what all "
            "tasks have in common as a further argument"
        )
    count = next(iter(sizes.values()))
    if count == 0:
        raise InvalidInputError("there are no tasks: the first dimension of tasks is 0")
    return count


def _chunk(
    fn: Callable[..., Any],
    call: _CompiledChunks | None,
    draws: _Draws,
    tasks: object,
    shared: tuple[object, ...],
    places: range,
    size: int,
) -> Any:
    """Return the stacked results of the tasks in ``places``."""
    some = tree.map_tensors(lambda x: x[places.start : places.stop], tasks)
    if call is not None:
        found = call(fn, some, shared, size)
    else:
        found = draws.run(places, lambda how: _batched(fn, some, shared, how))
    for path, x in tree.named_tensors(found, "what fn returns"):
        if x.requires_grad:
            raise InvalidInputError(
                f"{path} requires grad, through a tensor that fn has not got as an argument (a "
                f"parameter of a module, say), and {_WRITE}"
            )
    return found


def _batched(
    fn: Callable[..., Any], some: object, shared: tuple[object, ...], randomness: str
) -> Any:
    """Return ``fn`` over the first dimension of ``some``; leaves that are no tensors are kept."""
    tensors, template = tree.split(some)
    box: list[Any] = []

    def one(values: list[Tensor]) -> list[Tensor]:
        found, rest = tree.split(fn(tree.join(template, values), *shared))
        box[:] = [rest]
        return found

    stacked = torch.func.vmap(one, randomness=randomness)(tensors)
    return tree.join(box[0], stacked)


class _Draws:
    """The random numbers of the tasks; making one draws a number from the user's generator.

    Args:
        randomness: as in `map_tasks`.
        run: the processes, which share the seed of the first; None: there is one.
    """

    def __init__(self, randomness: str, run: distributed.Run | None) -> None:
        self._randomness = randomness
        self._seed = int(torch.randint(2**62, ())) if randomness == "different" else 0
        if run is not None:
            self._seed = run.first(self._seed)
        self._start = RandomState.now()
        self._drew = False

    def run(self, places: range, call: Callable[[str], Any]) -> Any:
        """Call ``call(randomness of vmap)`` such that each task draws its own numbers."""
        if self._randomness == "error":
            return call("error")
        if self._randomness == "same" or not self._drew:
            with at_random_state(self._start):
                # An operation that vmap cannot draw differently raises; it may in the second try.
                found = call(self._randomness)
                after = RandomState.now()
            assert self._start is not None
            assert after is not None
            if self._randomness == "same" or after.equals(self._start):
                return found
            self._drew = True
        # splitmix64 of the task's number: seeds of neighbours have nothing in common.
        seeds = [_mixed(self._seed + 0x9E3779B97F4A7C15 * (i + 1)) for i in places]
        with at_random_state(self._start):

            @contextmanager
            def use(row: int, number: int) -> Iterator[None]:
                # The generator itself goes on by the number only, so that a step that runs again
                # from where it stood draws the same.
                with at_random_state(None):
                    torch.manual_seed(_mixed(seeds[row] + number))
                    yield

            with torch_private.random_row_by_row(len(places), use):
                return call("different")


def _mixed(x: int) -> int:
    """Return the output function of splitmix64 (Steele, Lea & Flood 2014), below 2**63."""
    x &= 2**64 - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1


class _Total:
    """The results so far: kept, or summed."""

    def __init__(self, reduce: str | None) -> None:
        self._reduce = reduce
        self._chunks: list[Any] = []
        self._sums: Any = None

    def add(self, found: Any, counted: int) -> None:
        """Add the results of a chunk, of which the first ``counted`` count."""
        if self._reduce is None:
            self._chunks.append(found)
            return
        sums = tree.map_tensors(lambda x: _summable(x)[:counted].sum(0), found)
        if self._sums is not None:
            pairs = zip(tree.leaves(self._sums), tree.leaves(sums), strict=True)
            sums = tree.with_leaves(sums, [a + b if isinstance(b, Tensor) else b for a, b in pairs])
        self._sums = sums

    def sums(self) -> Any:
        """Return the sums over the tasks so far."""
        return self._sums

    def result(self, count: int) -> Any:
        """Return what `map_tasks` returns, for ``count`` tasks in all."""
        if self._reduce is None:
            columns = zip(*map(tree.leaves, self._chunks), strict=True)
            joined = [
                torch.cat(column) if isinstance(column[0], Tensor) else column[0]
                for column in columns
            ]
            return tree.with_leaves(self._chunks[0], joined)
        if self._reduce == "sum":
            return self._sums
        return tree.map_tensors(lambda x: x / count, self._sums)


def _summable(x: Tensor) -> Tensor:
    return x.long() if x.dtype is torch.bool else x


class _CompiledChunks:
    """The compiled chunks of one function."""

    def __init__(self) -> None:
        def chunk(fn: Any, some: Any, shared: Any) -> Any:
            return torch.func.vmap(lambda task: fn(task, *shared), randomness="error")(some)

        self._call = Compiled(chunk, "a chunk of tasks", HIDDEN, unwatched)
        self._verified: set[object] = set()
        self._trust, self._later = Trust(), LaterChecks()
        self._lock = threading.RLock()

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> _CompiledChunks:
        """Return those of ``fn``, or of a function with the same code."""
        key = getattr(fn, "__code__", fn)
        return _compiled.setdefault(key, cls())

    def __call__(
        self, fn: Callable[..., Any], some: Any, shared: tuple[object, ...], size: int
    ) -> Any:
        """Return the results of the tasks ``some``, which are filled up to ``size``."""
        with self._lock:
            return self._checked(fn, some, shared, size)

    def _checked(
        self, fn: Callable[..., Any], some: Any, shared: tuple[object, ...], size: int
    ) -> Any:
        tensors = list(tree.tensors(some))
        count = len(tensors[0])
        filled = tree.map_tensors(lambda x: _filled(x, size), some)
        begin = time.perf_counter()

        def explain() -> None:
            self._first_alone(fn, some, shared)
            refuse_numpy("the function given to map_tasks", (fn,))

        with self._trust.at_stake(self._call):
            found = self._call(fn, filled, shared, explain=explain)
        end = time.perf_counter()
        found = tree.map_tensors(lambda x: x[:count].detach(), found)
        kind = tuple(
            (x.shape, x.dtype, x.device) if isinstance(x, Tensor) else type(x)
            for x in tree.leaves((filled, shared))
        )
        known = self._trust.covers(self._call.compilations) and kind in self._verified
        if known:
            self._later.called(end - begin)
        if not known or self._later.due():
            with self._trust.at_stake():
                self._first_alone(fn, some, shared)
                expected = _batched(fn, some, shared, "error")

                def perturbed() -> dict[str, object]:
                    moved = moved_by_rounding((some, shared), self._call.precision)
                    return _groups(_batched(fn, *moved, "error"))

                what = "a chunk of tasks"
                check_compiled(_groups(found), _groups(expected), what, perturbed=perturbed)
            self._verified.add(kind)
            self._trust.gained(self._call.compilations)
            self._later.checked(time.perf_counter() - end)
        return found

    def _first_alone(self, fn: Callable[..., Any], some: Any, shared: tuple[object, ...]) -> None:
        """Run the first task eagerly, without vmap: its graph shows what compiled code drops."""
        with refusing_own_functions(), at_random_state(RandomState.now()):
            fn(tree.map_tensors(lambda x: x[0], some), *shared)


def _filled(x: Tensor, size: int) -> Tensor:
    missing = size - len(x)
    return torch.cat([x, x[:1].expand(missing, *x.shape[1:])]) if missing else x


def _groups(found: object) -> dict[str, object]:
    """Return each tensor as a group of its own."""
    return dict(tree.named_tensors(found, "what fn returns"))
