"""The source of ``examples/meta_policy.ipynb``; ``scripts/build_notebook.py`` makes the notebook
from it.
"""

# %% [markdown]
# # From one step to a policy that learns to learn
#
# innerloop began with a notebook of two cells: the gradient of new parameters with respect to old
# ones, and the same where another model gives the old ones. This notebook goes from there to a
# policy that one PPO update adapts to a new task, in about a minute and a half of computing.

# %%
import dataclasses
import itertools
import tempfile
from pathlib import Path

import matplotlib.figure
import torch
from IPython.display import Image
from meta_policy import (
    CONFIG,
    draw_influence,
    draw_paths,
    draw_returns,
    influence,
    interval,
    learner_of,
    random_start,
)
from rl_figures import learned_discounts
from torch.func import grad, vmap

import innerloop
from innerloop import rl
from innerloop.rl import ActorCritic, Rollout, envs
from innerloop.rl.ppo import ppo_problem

torch.set_num_threads(1)
torch.manual_seed(0)
ITERATIONS, TASKS = CONFIG.iterations, 200
folder = Path(tempfile.mkdtemp())


def shown(figure: matplotlib.figure.Figure, name: str) -> Image:
    """Write a figure to a file, and show it."""
    figure.savefig(folder / name, dpi=80)
    return Image(folder / name)


# %% [markdown]
# ## One step
#
# The parameter w of a model m is 4, its loss w², and SGD takes one step of rate 1/4. The new
# parameter is w - 2w/4, so its derivative by the old one is 1/2.

# %%
m = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.constant_(m.weight, 4.0)
optimizer, x = torch.optim.SGD(m.parameters(), lr=0.25), torch.ones(1, 1)

with innerloop.track(m, optimizer) as loop:
    loop.step(loop.model(x).square().mean())

print("d new / d old =", torch.autograd.grad(loop.model.weight.sum(), m.weight)[0].item())

# %% [markdown]
# ## Two models
#
# The old parameter may come from another model M, the meta-model. m learns the task, and the
# gradient arrives at M.

# %%
M = torch.nn.Linear(1, 1, bias=False)
torch.nn.init.constant_(M.weight, 2.0)

with innerloop.track(m, optimizer, params=dict(M.named_parameters())) as loop:
    loop.step(loop.model(x).square().mean())

print("d new / d M   =", torch.autograd.grad(loop.model.weight.sum(), M.weight)[0].item())

# %% [markdown]
# ## An update of PPO is a loop
#
# A rollout is collected once; then come a few epochs of minibatches, each one a step of Adam on the
# clipped surrogate, the critic's error and the entropy bonus. `ppo_problem` makes that step a
# `Problem`, and `Rollout.minibatches` are its batches. Advantages come by way of `hyper`, so that
# even the discount has a gradient:

# %%
policy = ActorCritic(1, envs.Discrete(2), hidden=(4,))
observations, actions = torch.randn(6, 2, 1), torch.randint(2, (6, 2))
with torch.no_grad():
    distribution, values = policy(observations)
rollout = Rollout(
    observations=observations,
    actions=actions,
    rewards=actions.float(),
    values=values,
    log_probs=distribution.log_prob(actions),
    last_value=values[-1],
)
gamma = torch.tensor(0.9, requires_grad=True)
advantages, returns = rollout.gae(gamma=gamma, lam=0.95)
traj = innerloop.unroll(
    ppo_problem(policy),
    dict(policy.named_parameters()),
    rollout.minibatches(epochs=2, size=4),
    hyper={"advantages": advantages, "returns": returns},
)
outer = traj.params["actor.2.weight"].square().sum()
print("d outer / d gamma =", torch.autograd.grad(outer, gamma)[0].item())

# %% [markdown]
# ## Which surrogate?
#
# Differentiating through a policy-gradient step needs the *second* derivative of its surrogate, and
# most surrogates have only the first one right. A bandit with three arms can be enumerated, so
# there is no noise in this table, only bias: the relative error of the expected outer gradient,
# for J(θ + α ∇J) ("expected") and for E[J(θ + α g)] with the gradient g of four sampled pulls
# ("sampled").

# %%
pays = torch.tensor([1.0, 0.3, -0.5], dtype=torch.float64)
theta = torch.tensor([0.2, -0.1, 0.4], dtype=torch.float64)
pulls = torch.tensor(list(itertools.product(range(3), repeat=4)))


def log_probs(theta, arms):
    """Of some pulls."""
    return theta.log_softmax(0)[arms]


def expected_return(theta):
    """Of one pull."""
    return (theta.softmax(0) * pays).sum()


def adapted_return(theta, arms, kind, with_score):
    """Behind a step of size 1 along the surrogate of these pulls."""

    def inner(t):
        return rl.surrogate(log_probs(t, arms)[None], pays[arms][None], kind=kind)

    value = expected_return(theta + grad(inner)(theta))
    return value + rl.score_term(log_probs(theta, arms), value) if with_score else value


def expected(theta):
    """The first objective."""
    return expected_return(theta + grad(expected_return)(theta))


def sampled(theta):
    """The second one; the gradient of log softmax is one-hot minus probabilities."""
    scores = torch.eye(3, dtype=torch.float64)[pulls] - theta.softmax(0)
    steps = (pays[pulls].unsqueeze(-1) * scores).mean(1)
    return log_probs(theta, pulls).sum(1).exp() @ ((theta + steps).softmax(1) @ pays)


truths = grad(expected)(theta), grad(sampled)(theta)
chances = log_probs(theta, pulls).sum(1).exp()
print(f"{'inner surrogate':26}{'expected':>9}{'sampled':>9}")
for kind in ("loaded_dice", "dice", "ratio", "reinforce"):
    for with_score in (False, True):
        each = vmap(lambda a: grad(adapted_return)(theta, a, kind, with_score))(pulls)  # noqa: B023
        bias = [((chances @ each - t).norm() / t.norm()).item() for t in truths]
        name = kind + (" + score_term" if with_score else "")
        print(f"{name:26}" + "".join(f"{b:>9.1%}" for b in bias))

# %% [markdown]
# What most public code differentiates is the line `reinforce`. Return curves do not show such an
# error; test gradients. The page "Reinforcement learning" of the
# documentation has more steps, and what to choose.
#
# ## A policy that learns from one PPO update
#
# A task is a goal on the plane that the policy cannot see. It acts for ten episodes, and then takes
# one PPO update: two epochs of four minibatches. The outer loop differentiates through these eight
# steps, for 20 tasks at once, and learns where to start.

# %%
config = dataclasses.replace(CONFIG, iterations=ITERATIONS)
learner = learner_of(config)
history = learner.train(progress=False)
trained = learner.evaluate(TASKS, steps=1)
print(f"meta-learned: {interval(trained[0])} before, {interval(trained[1])} after one update")

# %% [markdown]
# Compare it with a random start, which may choose its learning rate and its clip range, and chooses
# them on the test tasks themselves:

# %%
random, chosen = random_start(config, TASKS)
print(f"rate {chosen.inner_lr}, clip range {chosen.clip} is best")
print(f"random start: {interval(random[0])} before, {interval(random[1])} after one update")
draw_returns(trained, random, folder / "returns.png", dpi=80)
Image(folder / "returns.png")

# %% [markdown]
# Bars are means over held-out tasks, with 95 % intervals. Before the update the policy waits near
# the origin, and after it it goes to where the rewards were:

# %%
draw_paths(learner, folder / "paths.png", dpi=80)
Image(folder / "paths.png")

# %% [markdown]
# How much do the parameters before each of the eight steps matter for the adapted policy? One
# `autograd.grad` to every state of the trajectory says it:

# %%
draw_influence(influence(learner), folder / "influence.png", dpi=80)
Image(folder / "influence.png")

# %% [markdown]
# ## Hyper-parameters are parameters, too
#
# Ten states in a row pay noise and a small signal in turns. A table of values moves to a discounted
# return, and the discount of each state learns from how well the new values predict the
# undiscounted return of *another* episode (Xu et al., 2018). Discounts rise in front of the signal
# and fall in front of the noise.

# %%
times = [0, 30, 60, 125, 250, 500, 1000]
found = [learned_discounts(seeds=20, iterations=t, meta_lr=0.05) for t in times]
figure = matplotlib.figure.Figure(figsize=(5.2, 3.2), layout="constrained")
axes = figure.add_subplot()
for i, name in enumerate(("in front of signal", "in front of noise")):
    axes.plot(times, [pair[i].mean().item() for pair in found], "o-", label=name)
axes.set(xlabel="outer updates", ylabel="learned discount", ylim=(0, 1))
axes.legend(loc="center right")
shown(figure, "discounts.png")

# %% [markdown]
# `innerloop.rl.meta.MetaGradient` does the same with γ, λ, the entropy coefficient and the learning
# rate of PPO, while it trains. From the command line:
#
# ```console
# $ innerloop rl ppo --env CartPole-v1 --out runs/cartpole
# $ innerloop rl meta --out runs/navigation
# $ innerloop rl meta-gradient --env CartPole-v1 --gamma 0.5 --out runs/discount
# ```
