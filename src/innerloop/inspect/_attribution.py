"""Trace outcomes of training back to the examples it has seen."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from innerloop._carry import Carry
from innerloop._problem import Problem, check_problem
from innerloop._types import HyperTree, Params
from innerloop._unroll import unroll
from innerloop._utils import caches, tree
from innerloop._utils.arguments import check_function, check_instance, check_seed, shown
from innerloop._utils.random_state import RandomState
from innerloop._utils.text_table import table
from innerloop.errors import InvalidInputError, NotDifferentiableError
from innerloop.inspect._metajacobian import check_chunk, chunks, cotangents_of, sweep_of
from innerloop.inspect._plot import COLOURS, axes_of, figure_with, tidy
from innerloop.strategy._checkpointed import Checkpointed
from innerloop.strategy._engine.loop_function import PulledMany, Watcher
from innerloop.strategy._engine.step_pullback import Cotangents, Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOGETHER = 16
"""So many trainings run at once."""
MOST_WEIGHTED = 8
"""So many forms of one problem are kept, in case that the next call asks for one of them."""
Queries = Callable[[Mapping[str, Tensor]], Tensor]
"""``queries(params) -> [Q]``, the outcomes."""


class Check(NamedTuple):
    """Predicted against real changes, after training again without some of the examples.

    Attributes:
        predicted: ``[subsets, Q]``, what the scores say.
        real: ``[subsets, Q]``, what happened.
        correlation: ``[Q]``, Spearman's rank correlation over the subsets.
        slope: ``[Q]``, real over predicted, by least squares.
    """

    predicted: Tensor
    real: Tensor
    correlation: Tensor
    slope: Tensor

    def __repr__(self) -> str:
        c, s = self.correlation, self.slope
        return (
            f"Check(rank correlation {float(c.mean()):.3f} on average, {float(c.min()):.3f} at "
            f"least, over {len(c)} queries; slope {float(s.median()):.2f} in the median, from "
            f"{len(self.real)} trainings)"
        )

    def plot(self, ax: Axes | None = None) -> Figure:
        """Draw real over predicted change; needs matplotlib (``pip install 'innerloop[plot]'``).

        The outcomes are of different size, so each is drawn in units of its own largest change.
        """
        ax = axes_of(ax, "Check.plot", (4.2, 4.0))
        p, r = (x.detach().double().cpu() for x in (self.predicted, self.real))
        for i in range(p.shape[1]):
            unit = float(torch.cat([p[:, i], r[:, i]]).abs().max()) or 1.0
            ax.plot(
                (p[:, i] / unit).tolist(),
                (r[:, i] / unit).tolist(),
                "o",
                markersize=3,
                alpha=0.5,
                color=COLOURS[0],
            )
        ax.plot([-1, 1], [-1, 1], color="#767676", linewidth=0.8)
        title = f"rank correlation {float(self.correlation.mean()):.3f}"
        tidy(ax, x="predicted change", y="real change", title=title)
        return figure_with(ax)


class Attribution:
    """What each training example does to each outcome; made by `attribute`.

    Attributes:
        scores: ``[Q, N]``, the derivative of each outcome by the weight of each example. A positive
            score says that the example raises the loss (it is harmful), a negative one that it
            helps.
        losses: ``[Q]``, the outcomes.
        by_step: ``[T, Q, N]`` with ``attribute(..., by_step=True)``: the same, split by the step in
            which the example was drawn; else None.
        checked: what `check` found when it was last called; None before.
    """

    def __init__(
        self,
        scores: Tensor,
        losses: Tensor,
        by_step: Tensor | None,
        again: Callable[[Tensor], Tensor],
        weights: Tensor,
    ) -> None:
        self.scores = scores
        self.losses = losses
        self.by_step = by_step
        self.checked: Check | None = None
        self._again = again
        self._weights = weights

    def predicted(self, dropped: Sequence[int] | Tensor) -> Tensor:
        """Return how the outcomes ``[Q]`` would change without these examples, to first order.

        Args:
            dropped: indices of examples, or a mask ``[N]``.

        Example:
            See `attribute`.
        """
        mask = self._mask(dropped)
        return -(self.scores * (self._weights * mask).to(self.scores)).sum(1)

    def grouped(self, groups: Tensor | Sequence[int]) -> Tensor:
        """Return the scores summed by group, ``[Q, G]``, given the group of each example."""
        index = torch.as_tensor(groups, device=self.scores.device)
        if index.shape != (self.scores.shape[1],) or index.is_floating_point():
            raise InvalidInputError(
                f"groups has shape {tuple(index.shape)}: write a whole number for each of the "
                f"{self.scores.shape[1]} examples"
            )
        found = self.scores.new_zeros(len(self.scores), int(index.max()) + 1 if len(index) else 0)
        return found.index_add(1, index, self.scores)

    def top(self, query: int = 0, count: int = 5) -> dict[str, Tensor]:
        """Return the indices of the most helpful and the most harmful examples for a query."""
        order = self.scores[query].argsort()
        return {"helpful": order[:count], "harmful": order.flip(0)[:count]}

    def retrain(self, weights: Tensor) -> Tensor:
        """Return the outcomes ``[Q]`` of training again with other weights ``[N]``.

        Given ``[S, N]``, training runs S times, at once where vmap can run it, and the outcomes are
        ``[S, Q]``.

        Example:
            >>> import torch, innerloop
            >>> x = torch.tensor([1.0, 2.0, 4.0])
            >>> problem = innerloop.Problem(
            ...     lambda params, hyper, batch: (hyper["weights"] * (params["p"] - x) ** 2).sum(),
            ...     innerloop.optim.sgd(lr=0.5),
            ... )
            >>> found = innerloop.attribute(
            ...     lambda params: params["p"][None],
            ...     problem,
            ...     {"p": torch.tensor(0.0)},
            ...     None,
            ...     steps=1,
            ...     hyper={"weights": torch.ones(3)},
            ... )
            >>> found.losses, found.retrain(torch.tensor([1.0, 1.0, 0.0]))  # the sum of w x
            (tensor([7.]), tensor([3.]))
        """
        if weights.ndim not in (1, 2) or weights.shape[-1:] != self._weights.shape:
            raise InvalidInputError(
                f"weights has shape {tuple(weights.shape)}: write one number for each of the "
                f"{len(self._weights)} examples"
            )
        weights = weights.to(self._weights)
        if weights.ndim == 1:
            return self._again(weights)
        try:
            # A batching rule that PyTorch lacks only takes time.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return torch.func.vmap(self._again, chunk_size=TOGETHER)(weights)
        except Exception:
            # What vmap cannot do (random numbers, .item()) is run one after the other.
            return torch.stack([self._again(row) for row in weights])

    def check(
        self, subsets: int = 16, drop: float = 0.03, *, to: float = 0.0, seed: int = 0
    ) -> Check:
        """Train again without random subsets, and compare with what the scores predict.

        Attribution belongs together with its check: behind a chaotic training the scores are exact
        and say nothing, and only training again shows that.

        Args:
            subsets: how many trainings.
            drop: the share of the examples that each leaves out.
            to: the factor of their weights, 0 for left out. A small change, .9, is predicted better
                than removal.
            seed: of the subsets.

        Returns:
            A `Check`; a mean rank correlation below about .5 says that the scores are worthless.

        Raises:
            InvalidInputError: a subset would hold no example, or there are fewer than 2 subsets.
        """
        examples = self.scores.shape[1]
        size = round(drop * examples)
        if not 1 <= size < examples or subsets < 2:
            raise InvalidInputError(
                f"subsets={subsets}, drop={drop}: write at least 2 subsets of at least one of the "
                f"{examples} examples, and not of all"
            )
        check_seed("seed", seed)
        generator = torch.Generator().manual_seed(seed)
        predicted, weights = [], []
        for _ in range(subsets):
            dropped = torch.randperm(examples, generator=generator)[:size]
            mask = self._mask(dropped)
            weights.append(torch.where(mask, self._weights * to, self._weights))
            predicted.append(self.predicted(dropped) * (1 - to))
        real = self.retrain(torch.stack(weights)) - self.losses
        p, r = torch.stack(predicted).double(), real.double()
        correlation = torch.stack([_rank_correlation(a, b) for a, b in zip(p.T, r.T, strict=True)])
        slope = (p * r).sum(0) / (p * p).sum(0).clamp_min(1e-300)
        self.checked = Check(p, r, correlation, slope)
        return self.checked

    def _mask(self, dropped: Sequence[int] | Tensor) -> Tensor:
        index = torch.as_tensor(dropped, device=self._weights.device)
        if index.dtype == torch.bool:
            return index
        mask = torch.zeros(len(self._weights), dtype=torch.bool, device=self._weights.device)
        mask[index.long()] = True
        return mask

    def __repr__(self) -> str:
        queries, examples = self.scores.shape
        rows = []
        for q in range(min(queries, 5)):
            found = self.top(q, 3)
            rows.append(
                [
                    str(q),
                    f"{float(self.losses[q]):.4g}",
                    ", ".join(map(str, found["helpful"].tolist())),
                    ", ".join(map(str, found["harmful"].tolist())),
                ]
            )
        shown = table(rows, header=["query", "loss", "most helpful", "most harmful"], align=">>")
        more = f"\nand {queries - 5} more queries" if queries > 5 else ""
        return f"Attribution of {queries} outcomes to {examples} examples\n{shown}{more}"

    def plot(self, query: int = 0, ax: Axes | None = None) -> Figure:
        """Draw the sorted scores; needs matplotlib (``pip install 'innerloop[plot]'``)."""
        ax = axes_of(ax, "Attribution.plot")
        values = self.scores[query].detach().cpu().double().sort()[0]
        ax.fill_between(range(len(values)), values.tolist(), color=COLOURS[0], linewidth=0)
        ax.axhline(0, color="#767676", linewidth=0.8)
        tidy(
            ax,
            x="example, from the most helpful to the most harmful",
            y="d loss / d weight",
            title=f"attribution of query {query}",
        )
        return figure_with(ax)


def _rank_correlation(a: Tensor, b: Tensor) -> Tensor:
    """Return Spearman's rank correlation; 0 where one side is constant."""
    x, y = (_ranks(v) for v in (a, b))
    x, y = x - x.mean(), y - y.mean()
    size = x.norm() * y.norm()
    return (x @ y / size) if float(size) else torch.zeros((), dtype=torch.float64)


def _ranks(v: Tensor) -> Tensor:
    """Return ranks, equal ones for equal values."""
    _, inverse, counts = v.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts.double() - 1) / 2)[inverse]


def attribute(
    queries: Queries,
    problem: Problem,
    params: Params | Carry | None,
    batches: object,
    *,
    weights: str = "weights",
    hyper: HyperTree = None,
    index: Callable[[Any], Tensor] | None = None,
    strategy: Checkpointed | None = None,
    steps: int | None = None,
    chunk: int | None = None,
    by_step: bool = False,
) -> Attribution:
    r"""Compute the exact influence of every training example on many outcomes at once.

    The score of example i for outcome q is :math:`dL_q / dw_i`, through all steps of training,
    where :math:`w_i` is the weight of the example in the inner loss (Koh and Liang 2017 for the
    idea, Bae et al. 2024 for the way through training). All outcomes share one replay of the loop:
    each step is recorded once, and Q cotangents are pulled through it.

    Args:
        queries: ``queries(params) -> [Q]``, the outcomes, losses on Q held-out examples say.
        problem: its loss reads ``hyper[weights]``, ``(w[i] * losses).mean()`` for the examples i of
            the batch. With ``index`` the loss returns one number per example instead, and the
            weighted mean is formed here.
        params, batches, steps: as in `unroll`.
        weights: the name of the weights in ``hyper``, a tensor ``[N]``.
        hyper: a dict with the weights, ones in general.
        index: ``index(batch) -> [B]``, the examples of a batch: then ``loss(params, hyper, batch)``
            gives ``[B]`` losses, or a pair ``([B], penalty)``.
        strategy: which states are kept; default `Checkpointed`. With ``compile=True`` steps and
            pullbacks are compiled, for each size of a chunk once, and take a third of the time.
        chunk: how many outcomes are pulled back at once; None: all. Memory grows with it.
        by_step: also keep what each step contributes, ``[T, Q, N]``.

    Returns:
        An `Attribution`. Ranks are good, sizes are not: removal is a large step, and its effect is
        2 to 4 times what the scores predict. Examples that were never drawn get exactly 0.

    Raises:
        InvalidInputError: ``hyper`` has no such weights, or a result has the wrong shape.
        NotDifferentiableError: the weights do not act on the loss.

    Cost:
        One training, one replay, and Q pulls through each recorded step, batched by vmap; memory
        for Q adjoints of the state.

    Example:
        One step with rate 1 on (Σ w_i (θ - x_i)²/2) moves θ by -Σ w_i (θ - x_i).

        >>> import torch, innerloop
        >>> x = torch.tensor([1.0, 2.0, 4.0])
        >>> problem = innerloop.Problem(
        ...     lambda params, hyper, batch: (hyper["weights"] * (params["p"] - x) ** 2).sum() / 2,
        ...     innerloop.optim.sgd(lr=1.0),
        ... )
        >>> found = innerloop.attribute(
        ...     lambda params: params["p"][None],
        ...     problem,
        ...     {"p": torch.tensor(0.0)},
        ...     None,
        ...     steps=1,
        ...     hyper={"weights": torch.ones(3)},
        ... )
        >>> found.scores, found.predicted([2])
        (tensor([[1., 2., 4.]]), tensor([-4.]))
    """
    check_problem(problem)
    check_function("queries", queries, "write a function queries(params) that returns a tensor [Q]")
    if index is not None:
        check_function("index", index, "write a function index(batch) that returns a tensor [B]")
    check_instance("weights", weights, str, 'the name of an entry of hyper, weights="weights"')
    if not isinstance(hyper, Mapping) or not isinstance(hyper.get(weights), Tensor):
        raise InvalidInputError(
            f"hyper has no tensor {weights!r}: write hyper={{{weights!r}: torch.ones(N)}}, the "
            "weights of the N examples"
        )
    w: Tensor = hyper[weights]  # type: ignore[assignment]
    if w.ndim != 1 or not w.is_floating_point():
        raise InvalidInputError(
            f"hyper[{weights!r}] has shape {tuple(w.shape)} and dtype {w.dtype}: write one "
            "floating-point number for each example"
        )
    check_chunk(chunk)
    if hasattr(batches, "__next__"):
        batches = list(batches)  # type: ignore[call-overload]
    local: Problem | None = None
    if index is not None:
        local = _weighted(problem, weights, index, gathered=True)
        problem = _weighted(problem, weights, index, gathered=False)
    strategy = Checkpointed(product="reverse") if strategy is None else strategy
    start = problem.init(params).detach()
    if start.random_state is None:
        start = start._replace(random_state=RandomState.now())
    others = tree.map_tensors(Tensor.detach, dict(hyper))

    def train(values: Tensor) -> Any:
        with torch.no_grad():
            return unroll(
                problem,
                start,
                batches,
                hyper={**others, weights: values.detach()},
                strategy=strategy,
                steps=steps,
            )

    def again(values: Tensor) -> Tensor:
        with torch.no_grad():
            return _outcomes(queries, train(values).params)

    sweep = sweep_of(problem, start, batches, others, strategy, steps)
    total = sweep.steps
    end = {n: p.detach().requires_grad_() for n, p in sweep.end.params.items()}
    with torch.enable_grad():
        losses = _outcomes(queries, end)
    if not losses.requires_grad:
        raise InvalidInputError(
            "queries(params) does not depend on params: compute the outcomes from its argument"
        )
    leaves = tree.leaves(others)
    place = next(i for i, x in enumerate(leaves) if x is others[weights])
    rows, stepwise = [], []
    for chosen in chunks(len(losses), chunk):
        many = cotangents_of(losses, end, chosen, sweep)
        collect = _Scores(many, place, len(chosen), w, total if by_step else 0)
        if local is not None and index is not None:
            collect.gather = _Gather(local, weights, index)
        sweep.pull(collect, [i == place for i in range(len(leaves))])
        if not collect.reached and total:
            raise NotDifferentiableError(
                f"the inner loss does not depend on hyper[{weights!r}]: multiply the losses of the "
                f"batch by hyper[{weights!r}][indices], or pass index="
            )
        rows.append(collect.scores)
        stepwise.append(collect.steps)
    scores = torch.cat(rows) if rows else w.new_zeros(0, len(w))
    steps_too = torch.cat([s for s in stepwise if s is not None], 1) if by_step else None
    return Attribution(scores, losses.detach(), steps_too, again, w.detach())


class _Gather(NamedTuple):
    """How a step reads the weights of its own examples alone.

    Attributes:
        problem: the problem whose loss takes ``[B]`` weights.
        weights: their name in hyper.
        examples: their indices, given a batch.
    """

    problem: Problem
    weights: str
    examples: Callable[[Any], Tensor]


class _Scores(Watcher):
    """Adds up what the steps contribute to the cotangents of the weights."""

    gather: _Gather | None = None

    def __init__(self, many: Cotangents, place: int, count: int, w: Tensor, steps: int) -> None:
        self.many = many
        self._place = place
        self.scores = w.new_zeros(count, len(w))
        self.steps = w.new_zeros(steps, count, len(w)) if steps else None
        self.reached = False
        self._chosen: Tensor | None = None

    def prepare(self, t: int, step: Step) -> Step:
        if self.gather is None:
            return step
        # The derivative by the weights of all examples would be a dense [Q, N] at every step.
        problem, name, examples = self.gather
        self._chosen = examples(step.batch)
        assert isinstance(step.hyper, dict)
        hyper = {**step.hyper, name: step.hyper[name][self._chosen]}
        return step._replace(problem=problem, hyper=hyper)

    def on_step(
        self, t: int, adjoint: Cotangents, of_hyper: Cotangents, many: PulledMany | None
    ) -> None:
        assert many is not None
        found = many.hyper[self._place]
        if found is not None:
            self.reached = True
            rows = [self.scores, *([self.steps[t]] if self.steps is not None else [])]
            for row in rows:
                if self._chosen is None:
                    row += found
                else:
                    row.index_add_(1, self._chosen, found)


def _outcomes(queries: Queries, params: Mapping[str, Tensor]) -> Tensor:
    found = queries(params)
    if not isinstance(found, Tensor) or found.ndim != 1:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise InvalidInputError(
            f"queries(params) returned {shape}: return a tensor [Q], one number for each outcome"
        )
    return found


_known: MutableMapping[Problem, dict[object, Problem]] = caches.cache(
    "weighted problems", weak=True
)
"""The problems that `_weighted` has made: what was compiled for one serves the next call."""


def _weighted(
    problem: Problem, weights: str, index: Callable[[Any], Tensor], *, gathered: bool
) -> Problem:
    """Return `_made_weighted`, the same object for the same arguments."""
    known = _known.setdefault(problem, {})
    parts = problem.loss, problem.optimizer, problem.optimizer_hyper, problem.targets
    # What was made holds all of them, so that no other object can come to have their identities.
    made_of = (weights, gathered, *map(id, (index, *parts)))
    if made_of not in known:
        if len(known) >= MOST_WEIGHTED:
            known.clear()
        known[made_of] = _made_weighted(problem, weights, index, gathered=gathered)
    return known[made_of]


def _made_weighted(
    problem: Problem, weights: str, index: Callable[[Any], Tensor], *, gathered: bool
) -> Problem:
    """Return the problem whose loss is the weighted mean of what its loss gives per example.

    Args:
        problem: the user's.
        weights: the name in hyper.
        index: the examples of a batch.
        gathered: True if hyper holds the weights of the batch alone.
    """
    per_example = problem.loss

    def loss(first: Any, hyper: Any, batch: Any, *more: Any) -> Any:
        found = per_example(first, hyper, batch, *more)
        penalty: Any = 0
        if isinstance(found, tuple):
            found, penalty = found
        chosen = index(batch)
        if not isinstance(chosen, Tensor):
            raise InvalidInputError(
                f"index(batch) returned {shown(chosen)}: return a tensor [B], the numbers of the "
                "batch's examples"
            )
        if not isinstance(found, Tensor) or found.ndim != 1 or found.shape != chosen.shape:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise InvalidInputError(
                f"with index= the loss gives one number per example, [{len(chosen)}] here; it gave "
                f"{shape}: leave out the mean (reduction='none')"
            )
        here = hyper[weights] if gathered else hyper[weights][chosen]
        return (here * found).mean() + penalty

    weighted = copy.copy(problem)
    weighted.loss = loss
    return weighted
