"""Meta-learning of policies: an outer loop around policy-gradient or PPO inner loops."""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import innerloop
from innerloop import optim
from innerloop.errors import InvalidInputError, NonFiniteError
from innerloop.rl import _run
from innerloop.rl._checks import check_constant
from innerloop.rl._distributions import Categorical, Gaussian
from innerloop.rl._loss import ppo_loss
from innerloop.rl._meta_gradient import MetaGradient, MetaGradientConfig
from innerloop.rl._policy import ActorCritic, check_fits, stacked
from innerloop.rl._returns import discounted_returns, gae
from innerloop.rl._rollout import minibatch_order
from innerloop.rl._run import History
from innerloop.rl._surrogate import check_objective, score_term, surrogate
from innerloop.rl.envs._make import tensor_env
from innerloop.rl.envs._tensor_env import (
    Tasks,
    TensorEnv,
    check_horizon,
    count,
    repeat,
)

__all__ = [
    "ALGORITHMS",
    "Episodes",
    "MetaConfig",
    "MetaGradient",
    "MetaGradientConfig",
    "MetaLearner",
]

Params = Mapping[str, Tensor]


class Algorithm(NamedTuple):
    """What tells one meta-learner from another.

    Attributes:
        kind: the surrogate of the inner loop, or ``"importance"``: the ratio to the log-probability
            that the rollout stored.
        first_order: inner gradients are constants of the outer derivative.
        score_term: the outer objective accounts for the sampling of the inner data.
        learns_rates: one inner learning rate for each number in the parameters, learned.
        head_only: only the last layer of the policy adapts.
        interpolates: the outer gradient is the way back from the adapted parameters.
    """

    kind: str = "loaded_dice"
    first_order: bool = False
    score_term: bool = False
    learns_rates: bool = False
    head_only: bool = False
    interpolates: bool = False


ALGORITHMS: dict[str, Algorithm] = {
    "maml": Algorithm(),
    "fomaml": Algorithm(first_order=True),
    "reptile": Algorithm(first_order=True, interpolates=True),
    "meta-sgd": Algorithm(learns_rates=True),
    "anil": Algorithm(head_only=True),
    "e-maml": Algorithm(kind="reinforce", score_term=True),
    "promp": Algorithm(kind="importance"),
}
"""MAML and FOMAML (Finn et al. 2017), Reptile (Nichol et al. 2018), Meta-SGD (Li et al. 2017), ANIL
(Raghu et al. 2020), E-MAML (Stadie et al. 2018), ProMP (Rothfuss et al. 2019)."""


@dataclasses.dataclass(frozen=True)
class MetaConfig:
    """Settings of `MetaLearner`; the defaults are those of two-dimensional navigation.

    Attributes:
        env: a tensor environment, as `innerloop.rl.envs.tensor_env` takes it.
        algorithm: one of `ALGORITHMS`.
        inner: ``"pg"``: one step of SGD on all data of an adaptation step; ``"ppo"``: epochs of
            minibatches with the clipped surrogate.
        iterations: outer updates.
        tasks: in each iteration.
        episodes: of each task, before and after each adaptation step.
        adaptation_steps: rollouts that the inner loop learns from, one after the other.
        inner_lr: learning rate of the first adaptation step; ``"meta-sgd"`` learns factors on it.
        later_lr: factor on it from the second adaptation step on.
        inner_epochs: of a PPO inner loop.
        inner_minibatches: in each of its epochs.
        inner_adam: Adam in place of SGD in the inner loop.
        outer_lr: learning rate of the outer Adam; with ``"reptile"`` the outer step, by SGD.
        anneal: let ``outer_lr`` fall linearly to 0.
        outer_epochs: outer updates on the same rollouts.
        outer_clip: clip range of the outer loss.
        outer_weights: one weight for each adaptation step: the outer loss is the weighted mean of
            what the policies reach after each of them. Empty: after the last one only. Without the
            earlier ones a policy may learn to need all its steps; without the later ones nothing
            keeps a further step from spoiling what the first one reached (Antoniou et al., "How
            to train your MAML", 2019, take all steps).
        clip: clip range of a PPO inner loop.
        gamma: discount.
        lam: λ of the advantages.
        objective: ``"expected"`` or ``"sampled"``: warn if the algorithm is biased for it.
        hidden: sizes of the hidden layers.
        log_std: the first log standard deviation of continuous actions.
        seed: of everything.
    """

    env: str = "navigation"
    algorithm: str = "promp"
    inner: str = "pg"
    iterations: int = 40
    tasks: int = 20
    episodes: int = 10
    adaptation_steps: int = 1
    inner_lr: float = 0.5
    later_lr: float = 0.5
    inner_epochs: int = 2
    inner_minibatches: int = 4
    inner_adam: bool = False
    outer_lr: float = 0.005
    anneal: bool = False
    outer_epochs: int = 8
    outer_clip: float = 0.3
    outer_weights: tuple[float, ...] = ()
    clip: float = 0.2
    gamma: float = 0.99
    lam: float = 1.0
    objective: str | None = None
    hidden: tuple[int, ...] = (64, 64)
    log_std: float = -0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.algorithm not in ALGORITHMS:
            raise InvalidInputError(
                f"there is no algorithm {self.algorithm!r}: choose one of {', '.join(ALGORITHMS)}"
            )
        if self.inner not in ("pg", "ppo"):
            raise InvalidInputError(f"inner={self.inner!r}: write 'pg' or 'ppo'")
        whole = "iterations tasks episodes adaptation_steps inner_epochs inner_minibatches"
        for name in (*whole.split(), "outer_epochs"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name}={getattr(self, name)}: write 1 or more")
        for name in ("inner_lr", "outer_lr", "outer_clip", "clip"):
            if not getattr(self, name) > 0:
                raise InvalidInputError(f"{name}={getattr(self, name)} must be positive")
        self._check_outer_weights()
        if ALGORITHMS[self.algorithm].score_term and self.inner == "ppo":
            raise InvalidInputError(
                "the score term of e-maml belongs to inner='pg' with the reinforce surrogate: a "
                "PPO inner loop counts the effect of sampling in its ratios already"
            )

    def _check_outer_weights(self) -> None:
        weights = self.outer_weights
        if not isinstance(weights, (tuple, list)) or not all(
            isinstance(weight, (int, float)) for weight in weights
        ):
            raise InvalidInputError(
                f"outer_weights={weights!r}: write one number for each adaptation step, (2.0, 1.0)"
            )
        if not weights:
            return
        if len(weights) != self.adaptation_steps:
            raise InvalidInputError(
                f"outer_weights={weights} has {len(weights)} numbers for "
                f"{self.adaptation_steps} adaptation_steps: write one for each"
            )
        if not all(weight >= 0 for weight in weights) or not 0 < sum(weights) < math.inf:
            raise InvalidInputError(
                f"outer_weights={weights}: write numbers that are not negative, at least one that "
                "is positive, and whose sum is finite"
            )
        if ALGORITHMS[self.algorithm].interpolates:
            raise InvalidInputError(
                f"{self.algorithm} moves towards the adapted parameters and has no outer loss that "
                "outer_weights could weight: leave them out"
            )


class Episodes(NamedTuple):
    """Episodes of several tasks: ``[tasks, time, episodes, ...]``.

    Attributes:
        observations: in which the actions were taken.
        actions: taken.
        log_probs: of the actions, under the policy that took them.
        advantages: normalised for each task.
        rewards: 0 after the end of an episode.
        mask: False after the end of an episode.
    """

    observations: Tensor
    actions: Tensor
    log_probs: Tensor
    advantages: Tensor
    rewards: Tensor
    mask: Tensor

    def returns(self) -> Tensor:
        """Return the mean return of the episodes of each task, ``[tasks]``."""
        return self.rewards.sum(1).mean(-1)


class MetaLearner:
    """Learn a policy, or how it learns, so that a few adaptation steps on a new task suffice.

    One iteration samples tasks, acts, adapts to each task, acts again with the adapted policies,
    and takes the gradient of what these reach through the inner loops, all tasks at once by
    ``torch.func.vmap`` of `innerloop.unroll`.

    Args:
        config: the settings.
        env: another tensor environment than ``config.env`` names.
        policy: a module that maps observations to ``(distribution, None)``; default an
            `ActorCritic` without critic. Advantages come from a linear fit of the returns to
            features of observation and time, for each task (Duan et al., "Benchmarking deep
            reinforcement learning for continuous control", 2016).

    Example:
        >>> from innerloop.rl.meta import MetaConfig, MetaLearner
        >>> learner = MetaLearner(MetaConfig(env="bandit", iterations=2, gamma=1.0))
        >>> history = learner.train()
        >>> history["iteration"]
        [1, 2]
    """

    def __init__(
        self,
        config: MetaConfig | None = None,
        *,
        env: TensorEnv | None = None,
        policy: nn.Module | None = None,
    ) -> None:
        self.config = config = MetaConfig() if config is None else config
        self.algorithm = ALGORITHMS[config.algorithm]
        self.env = tensor_env(config.env) if env is None else env
        check_horizon(self.env)
        self.generator = torch.Generator().manual_seed(config.seed)
        size, actions = self.env.observation_space.size, self.env.action_space
        self.policy = policy or ActorCritic(
            size,
            actions,
            hidden=config.hidden,
            log_std=config.log_std,
            generator=self.generator,
            critic=False,
        )
        check_fits(self.policy, torch.zeros(2, size), actions)
        self._call, _, _ = innerloop.functional(self.policy)
        self.params = dict(self.policy.named_parameters())
        self.rates: dict[str, Tensor] = {}
        if self.algorithm.learns_rates:
            self.rates = {
                name: torch.ones_like(p, requires_grad=True) for name, p in self.params.items()
            }
        learned = [*self.params.values(), *self.rates.values()]
        self.optimizer: torch.optim.Optimizer = (
            torch.optim.SGD(learned, lr=config.outer_lr)
            if self.algorithm.interpolates
            else torch.optim.Adam(learned, lr=config.outer_lr)
        )
        self._frozen = self._not_adapted()
        self.problem = innerloop.Problem(
            self._inner_loss, self._inner_optimizer(), optimizer_hyper=self._rates_at
        )
        if config.objective is not None and not self.algorithm.interpolates:
            kind = "ratio" if self.algorithm.kind == "importance" else self.algorithm.kind
            check_objective(
                config.objective,  # type: ignore[arg-type]
                kind=kind,  # type: ignore[arg-type]
                score_term=self.algorithm.score_term,
                steps=self.env.horizon,
            )
        self.counters: dict[str, Any] = {"iteration": 0, "steps": 0, "seconds": 0.0, "history": {}}
        self.state = innerloop.OuterState(
            model={"policy": self.policy, "rates": self.rates},
            optimizer=self.optimizer,
            scheduler=_run.Settings(dataclasses.asdict(config), free=["iterations"]),
            random=self.generator,
            counters=self.counters,
        )

    @property
    def history(self) -> History:
        """Return the diagnostics of all iterations, by name."""
        return self.counters["history"]

    def train(
        self,
        out: str | os.PathLike[str] | None = None,
        *,
        resume: bool = False,
        checkpoint_every: int = 1,
        callback: Callable[[Mapping[str, float]], object] | None = None,
        progress: bool = True,
    ) -> History:
        """Take the iterations that are left; the arguments are those of `PPO.train`.

        Returns:
            The diagnostics of all iterations, by name.
        """
        folder = None if out is None else Path(out)
        _run.start(self.state, folder, resume)
        counters, total = self.counters, self.config.iterations
        with _run.bar(total, counters["iteration"], "iteration", progress) as shown:
            while counters["iteration"] < total:
                row = self.iterate()
                shown.update(1)
                last = f"return_{self.config.adaptation_steps}"
                shown.set_postfix_str(f"{row['return_0']:.1f}, adapted {row[last]:.1f}", False)
                done = counters["iteration"]
                if folder and (done == total or done % checkpoint_every == 0):
                    self.state.save(folder / _run.CHECKPOINT)
                    _run.write_table(self.history, folder / _run.TABLE)
                if callback is not None:
                    callback(row)
        return self.history

    def iterate(self) -> dict[str, float]:
        """Sample tasks, adapt to them, update the meta-parameters, and return the diagnostics."""
        start, config = time.perf_counter(), self.config
        tasks = self.env.sample_tasks(config.tasks, self.generator)
        data, adapted = self._acted(tasks, config.adaptation_steps)
        left = max(0.0, 1 - self.counters["iteration"] / config.iterations)
        for group in self.optimizer.param_groups:
            group["lr"] = config.outer_lr * (left if config.anneal else 1.0)
        losses: list[float] = []
        if self.algorithm.interpolates:
            self._step_towards(adapted)
        else:
            batches = [self._batches(d) for d in data[:-1]]
            losses = [self._update(batches, data) for _ in range(config.outer_epochs)]
        self.counters["iteration"] += 1
        self.counters["steps"] += sum(int(d.mask.sum()) for d in data)
        self.counters["seconds"] += time.perf_counter() - start
        row = {
            "iteration": self.counters["iteration"],
            "steps": self.counters["steps"],
            **{f"return_{k}": d.returns().mean().item() for k, d in enumerate(data)},
            "outer_loss": losses[0] if losses else math.nan,
            "seconds": round(self.counters["seconds"], 3),
        }
        _run.append(self.history, row)
        return row

    def evaluate(
        self, tasks: int | Tasks = 40, *, steps: int = 3, episodes: int = 20, seed: int = 10_000
    ) -> Tensor:
        """Return the mean returns on held-out tasks after 0 to ``steps`` adaptation steps.

        Neither the meta-parameters nor the learner's generator change.

        Args:
            tasks: the tasks, or how many to draw.
            steps: adaptation steps, each on episodes of the policy adapted so far.
            episodes: of each task, at each number of steps.
            seed: of tasks and episodes.

        Returns:
            ``[steps + 1, tasks]``.
        """
        generator = torch.Generator().manual_seed(seed)
        if isinstance(tasks, int):
            tasks = self.env.sample_tasks(tasks, generator)
        data, _ = self._acted(tasks, steps, episodes, generator)
        return torch.stack([d.returns() for d in data])

    def adapt(self, data: Episodes, params: Params | None = None, *, step: int = 0) -> Params:
        """Return parameters adapted to each task, stacked, without a graph.

        Args:
            data: of an adaptation step.
            params: the parameters to start from, stacked over tasks; default the meta-parameters.
            step: how many adaptation steps came before this one.

        Raises:
            InvalidInputError: what belongs to the policy that acted requires grad.
        """
        n = len(data.rewards)
        for name, x in data._asdict().items():
            check_constant(name, x)
        if params is None:
            params = {name: p.expand(n, *p.shape) for name, p in self.params.items()}
        hyper = {"step": torch.full((), float(step)), **self._rates()}
        batches = self._batches(data)
        with torch.no_grad():
            run = torch.func.vmap(
                lambda params, batches: dict(
                    innerloop.unroll(
                        self.problem, params, batches, hyper=hyper, strategy=innerloop.FirstOrder()
                    ).params
                ),
                in_dims=(0, 0),
            )
            return {name: p.detach() for name, p in run(dict(params), batches).items()}

    @torch.no_grad()
    def collect(
        self,
        params: Params,
        tasks: Tasks,
        episodes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Episodes:
        """Act in each task with parameters of its own, stacked over tasks."""
        episodes = self.config.episodes if episodes is None else episodes
        generator = self.generator if generator is None else generator
        n, each = count(tasks), repeat(tasks, episodes)
        act = self._actors(params)
        state = self.env.initial(each, generator)
        alive = torch.ones(n * episodes, dtype=torch.bool)
        rows: list[tuple[Tensor, ...]] = []
        for _ in range(self.env.horizon):
            seen = self.env.observe(state)
            distribution = act(seen.unflatten(0, (n, episodes)))
            action = distribution.sample(generator).flatten(0, 1)
            state, reward, ended = self.env.step(state, action, each, generator)
            rows.append((seen, action, torch.where(alive, reward, 0.0), alive, *distribution))
            alive = alive & ~ended
            if not bool(alive.any()):
                break
        seen, action, reward, mask, *taken = (torch.stack(x) for x in zip(*rows, strict=True))
        if not bool(reward.isfinite().all()):
            t, i = (~reward.isfinite()).nonzero()[0].tolist()
            raise InvalidInputError(
                f"{type(self.env).__name__} paid a reward of {reward[t, i].item()} at step {t} of "
                f"episode {i % episodes} of task {i // episodes}, which would turn every parameter "
                "into NaN: look at the environment and the policy"
            )
        advantages = self._advantages(
            *(x.unflatten(1, (n, episodes)) for x in (seen, reward, mask))
        )
        log_prob = type(distribution)(*taken).log_prob(action.unflatten(1, (n, episodes)))
        stacked = (seen, action, log_prob.flatten(1), advantages.flatten(1, 2), reward, mask)
        return Episodes(*(x.unflatten(1, (n, episodes)).transpose(0, 1) for x in stacked))

    def _actors(self, params: Params) -> Callable[[Tensor], Categorical | Gaussian]:
        """Return the policies of several tasks, ``[tasks, n, ...]`` in and out, without a graph."""
        if type(self.policy) is ActorCritic:  # A subclass may have another forward.
            return stacked(self.policy, params)
        act = torch.func.vmap(lambda p, o: tuple(self._call(p, o)[0]))
        kind = type(self.policy(torch.zeros(1, self.env.observation_space.size))[0])

        def acting(seen: Tensor) -> Categorical | Gaussian:
            found = kind(*act(dict(params), seen))
            if isinstance(found, Categorical):
                return found
            # A standard deviation that no state changes has one row for each task.
            mean, log_std = found
            return kind(mean, log_std.reshape(len(mean), -1, mean.shape[-1]).expand_as(mean))

        return acting

    def summary(self) -> str:
        """Evaluate 40 held-out tasks, and say in a line what training reached."""
        found = self.evaluate()
        errors = 1.96 * found.std(1) / math.sqrt(found.shape[1])
        steps = ", ".join(f"{m:.2f} ± {e:.2f}" for m, e in zip(found.mean(1), errors, strict=True))
        return (
            f"{self.counters['steps']} steps in {self.counters['seconds']:.0f} s; returns on "
            f"{found.shape[1]} held-out tasks after 0 to {len(found) - 1} adaptation steps: {steps}"
        )

    def write_picture(self, out: str | os.PathLike[str]) -> Path:
        """Draw the learning curves as ``curve.png`` in the folder ``out``, and return its path.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        path = Path(out) / _run.PICTURE
        lines = [f"return_{k}" for k in range(self.config.adaptation_steps + 1)]
        _run.write_curve(self.history, "steps", lines, path)
        return path

    # -- the inner loop ----------------------------------------------------------------------------

    def _inner_optimizer(self) -> optim.Optimizer:
        return optim.adam(eps=1e-5) if self.config.inner_adam else optim.sgd()

    def _rates(self) -> dict[str, Tensor]:
        return {f"rate.{name}": rate for name, rate in self.rates.items()}

    def _rates_at(self, hyper: Mapping[str, Tensor], t: int) -> dict[str, Any]:
        """Return the learning rates: smaller ones from the second rollout on."""
        config = self.config
        factor = torch.where(hyper["step"] > 0, config.later_lr, 1.0)
        rates = {
            name: factor
            * config.inner_lr
            * hyper.get(f"rate.{name}", 1.0)
            * (name not in self._frozen)
            for name in self.params
        }
        return {"lr": rates}

    def _not_adapted(self) -> set[str]:
        """Return the parameters that the inner loop leaves alone: all but the head's, for ANIL."""
        if not self.algorithm.head_only:
            return set()
        matrices = [name for name, p in self.params.items() if p.ndim > 1]
        prefix = matrices[-1].rpartition(".")[0]
        return {name for name in self.params if name.rpartition(".")[0] != prefix}

    def _inner_loss(self, params: Params, hyper: object, batch: Episodes) -> Tensor:
        distribution, _ = self._call(params, batch.observations)
        log_probs = distribution.log_prob(batch.actions)
        if self.config.inner == "ppo" or self.algorithm.kind == "importance":
            clip = self.config.clip if self.config.inner == "ppo" else math.inf
            return ppo_loss(
                log_probs,
                batch.log_probs,
                batch.advantages,
                clip=clip,
                normalize=False,
                mask=batch.mask,
            ).policy
        return -surrogate(
            log_probs,
            batch.advantages,
            kind=self.algorithm.kind,  # type: ignore[arg-type]
            mask=batch.mask,
            reduction="steps",
        )

    def _batches(self, data: Episodes) -> list[Episodes]:
        """Return the steps of the inner loop on one rollout, each with the tasks first."""
        if self.config.inner == "pg":
            return [data]
        flat = Episodes(*(x.flatten(1, 2) for x in data))
        order = minibatch_order(self.config.inner_epochs, flat.mask.shape[1], self.generator)
        return [
            Episodes(*(x[:, indices] for x in flat))
            for row in order.unbind()
            for indices in row.tensor_split(self.config.inner_minibatches)
        ]

    # -- the outer loop ----------------------------------------------------------------------------

    def _acted(
        self,
        tasks: Tasks,
        steps: int,
        episodes: int | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[list[Episodes], Params]:
        """Act and adapt in turns: return all episodes, and the parameters after ``steps``."""
        n = count(tasks)
        params: Params = {name: p.detach().expand(n, *p.shape) for name, p in self.params.items()}
        saved = self.generator.get_state()
        data = [self.collect(params, tasks, episodes, generator)]
        for k in range(steps):
            params = self.adapt(data[-1], params, step=k)
            data.append(self.collect(params, tasks, episodes, generator))
        if generator is not None:
            # The minibatches of a PPO inner loop were drawn from the learner's own.
            self.generator.set_state(saved)
        return data, params

    def _update(self, batches: list[list[Episodes]], data: list[Episodes]) -> float:
        """Take one outer step through the inner loops of all tasks; return the outer loss.

        Args:
            batches: the steps of the inner loop on each rollout but the last.
            data: the rollouts. Each but the first shows what the adaptation before it reached.
        """
        strategy = innerloop.FirstOrder() if self.algorithm.first_order else innerloop.StoreAll()
        counted = self.config.outer_weights or (*[0.0] * (len(data) - 2), 1.0)
        weights = [weight / sum(counted) for weight in counted]

        def reached(params: Any, hyper: Any, batches: Any, data: Any) -> tuple[Any, Any]:
            """Return the outer losses of one task, and the log-probabilities of its rollouts."""
            losses, acted = [], []
            # One rollout after the other, as in `adapt`: each was taken by the policy before it.
            for k, weight in enumerate(weights):
                if self.algorithm.score_term:
                    acted.append(self._log_probs(params, data[k]))
                params = innerloop.unroll(
                    self.problem,
                    params,
                    batches[k],
                    hyper={"step": torch.full((), float(k)), **hyper},
                    strategy=strategy,
                ).params
                losses.append(self._outer_loss(params, data[k + 1]) if weight else torch.zeros(()))
            return losses, acted

        losses, acted = torch.func.vmap(reached, in_dims=(None, None, 0, 0))(
            self.params, self._rates(), batches, data
        )
        value = torch.stack([w * x.mean() for w, x in zip(weights, losses, strict=True)]).sum()
        loss = value
        for j, weight in enumerate(weights):
            for k in range(j + 1 if acted and weight else 0):
                loss = loss + weight * self._score(acted[k], data[k].mask, data[j + 1])
        self.optimizer.zero_grad()
        loss.backward()
        learned = [p for group in self.optimizer.param_groups for p in group["params"]]
        norm = nn.utils.clip_grad_norm_([p for p in learned if p.grad is not None], 1.0)
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"the outer gradient of iteration {self.counters['iteration']} is not finite "
                "(lower inner_lr or outer_lr?); the meta-parameters were not changed"
            )
        self.optimizer.step()
        return value.item()

    def _log_probs(self, params: Params, data: Episodes) -> Tensor:
        return self._call(params, data.observations)[0].log_prob(data.actions)

    def _outer_loss(self, params: Params, data: Episodes) -> Tensor:
        return ppo_loss(
            self._log_probs(params, data),
            data.log_probs,
            data.advantages,
            clip=self.config.outer_clip,
            normalize=False,
            mask=data.mask,
        ).policy

    @staticmethod
    def _score(acted: Tensor, mask: Tensor, outer: Episodes) -> Tensor:
        """Return what the sampling of a rollout adds to the loss of a later one, over all tasks."""
        value = -outer.returns() / outer.rewards.shape[1]
        # The mean over the other tasks: one that held the task itself would shrink its term.
        others = (value.sum() - value) / max(len(value) - 1, 1)
        terms = [
            score_term(acted[i], value[i], baseline=others[i], mask=mask[i])
            for i in range(len(value))
        ]
        return torch.stack(terms).mean()

    def _step_towards(self, adapted: Params) -> None:
        """Reptile: move towards the mean of the adapted parameters."""
        for name, p in self.params.items():
            p.grad = p.detach() - adapted[name].mean(0)
        self.optimizer.step()

    def _advantages(self, seen: Tensor, reward: Tensor, mask: Tensor) -> Tensor:
        """Return advantages over a linear baseline, normalised for each task, ``[T, n, e]``."""
        config, steps = self.config, len(reward)
        clock = (torch.arange(steps).to(seen) / 100).view(-1, 1, 1, 1).expand(*seen.shape[:3], 1)
        columns = [seen, seen**2, clock, clock**2, clock**3, torch.ones_like(clock)]
        features = torch.cat(columns, -1) * mask.unsqueeze(-1)
        # Rewards after the end of an episode are 0.
        target = discounted_returns(reward, gamma=config.gamma)
        x, y = (v.transpose(0, 1).flatten(1, 2).double() for v in (features, target.unsqueeze(-1)))
        gram = x.mT @ x + 1e-5 * torch.eye(x.shape[-1]).double() * x.shape[1]
        weights = torch.linalg.solve(
            gram, x.mT @ (y * mask.transpose(0, 1).flatten(1).unsqueeze(-1))
        )
        values = (x @ weights).view(len(x), steps, -1).transpose(0, 1).to(reward)
        found = target - values
        if config.lam != 1:
            last = torch.zeros_like(mask)
            last[-1] = True
            end = last | (mask & ~torch.cat([mask[1:], torch.zeros_like(mask[:1])]))
            found = gae(
                reward,
                values,
                torch.zeros_like(reward[0]),
                gamma=config.gamma,
                lam=config.lam,
                terminated=end,
            ).advantages
        total = mask.sum((0, 2), keepdim=True)
        mean = (found * mask).sum((0, 2), keepdim=True) / total
        centred = (found - mean) * mask
        deviation = (centred.square().sum((0, 2), keepdim=True) / total).sqrt()
        return centred / (deviation + 1e-8)
