"""The source of ``examples/walkthrough.ipynb``; ``scripts/build_notebook.py`` makes the notebook
from it.
"""

# %% [markdown]
# # Differentiating through a training step
#
# Training changes parameters: $\theta_0$ becomes $\theta_1$, then $\theta_2$, and so on. Each is a
# *function* of the one before, so it has a derivative. This notebook computes that derivative, for
# a model so small that you can check every number on paper.
#
# The model has two parameters and one input, the loss is half the squared error:
#
# $$\hat y = (a^2 + b^2)\,x, \qquad L = \tfrac12 (\hat y - y)^2 .$$
#
# The data comes from $a = 3, b = 4$; training starts at $a_0 = 2, b_0 = 3$. Everything is in
# float64, so that a formula and a program can be compared to the last digits.

# %%
import io

import torch
from IPython.display import Image
from torch import nn

import innerloop
from innerloop import walkthrough


class Model(nn.Module):
    """Two parameters."""

    def __init__(self, a: float = 2.0, b: float = 3.0) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(a, dtype=torch.float64))
        self.b = nn.Parameter(torch.tensor(b, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.a**2 + self.b**2) * x


x = torch.tensor(0.1, dtype=torch.float64)
y = (3**2 + 4**2) * x


def loss_of(model: nn.Module) -> torch.Tensor:
    """Half the squared error."""
    return 0.5 * (model(x) - y) ** 2


# %% [markdown]
# ## One step of SGD, tracked
#
# An ordinary loop says `loss.backward(); optimizer.step()`. Under `innerloop.track` it says
# `loop.step(loss)` and uses `loop.model` in place of `model`. The update is the same, but every
# version of the parameters stays connected to the one before. With learning rate 1:
#
# $$a_1 = a_0 - (\hat y - y)\, 2 a_0 x = 2 - (-1.2)(0.4) = 2.48,
# \qquad b_1 = 3 - (-1.2)(0.6) = 3.72 .$$

# %%
model = Model()
optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

with innerloop.track(model, optimizer) as loop:
    loss = loop.step(loss_of(loop.model))
    outer_loss = loss_of(loop.model)

print(f"loss at step 0   {loss.item():.10g}")
for t in (0, 1):
    print(
        f"parameters at {t}  ",
        {name: round(p.item(), 10) for name, p in loop.parameters(time=t).items()},
    )
print(f"loss at step 1   {outer_loss.item():.10g}")

# %% [markdown]
# ## How $(a_1, b_1)$ depends on $(a_0, b_0)$
#
# The gradient is taken *at* $(a_0, b_0)$. A nudge of $a_0$ alone therefore changes the prediction,
# with it both gradients, and with them both parameters after the step. The product rule gives
#
# $$\frac{\partial a_1}{\partial a_0} = 1 - 2x(\hat y - y) - 4 x^2 a_0^2 = 1 + .24 - .16 = 1.08,
# \qquad \frac{\partial a_1}{\partial b_0} = - 4 x^2 a_0 b_0 = -.24 .$$
#
# The first two terms say how the step stretches the parameters. The last term is there because the
# residual depends on the parameters, too.

# %%
jacobian = innerloop.inspect.jacobian(loop.trajectory, time=1, wrt=0)
for later in "ab":
    for earlier in "ab":
        print(f"d {later}1 / d {earlier}0 = {jacobian[later][earlier].item():+.10g}")

# %% [markdown]
# ## The outer gradient, path by path
#
# Call the loss after the step the *outer* loss, $TL$. It sees $a_0$ in two ways: through $a_1$ and
# through $b_1$.
#
# $$\frac{\partial TL}{\partial a_0}
# = \frac{\partial TL}{\partial a_1} \frac{\partial a_1}{\partial a_0}
# + \frac{\partial TL}{\partial b_1} \frac{\partial b_1}{\partial a_0}
# = (-.24855552)(1.08) + (-.37283328)(-.24) = -.1789599744 .$$
#
# `inspect.paths` splits an outer gradient in this way, for any loop.

# %%
paths = innerloop.inspect.paths(loop.trajectory, outer_loss, time=1, wrt=0)
for earlier in "ab":
    through_a, through_b = (paths.through[later][earlier].item() for later in "ab")
    total = paths.total[earlier].item()
    print(
        f"d TL / d {earlier}0:  {through_a:+.10f} through a1  {through_b:+.10f} through b1  =  "
        f"{total:+.10f}"
    )

# %% [markdown]
# ## The outer step
#
# To *use* this gradient you need nothing new: `backward` leaves it in `.grad` of the model's own
# parameters, which are still those of step 0, and the ordinary optimizer moves them. This lowers
# the loss one inner step *later*.

# %%
outer_loss.backward()
print("outer gradient ", {name: round(p.grad.item(), 10) for name, p in model.named_parameters()})

optimizer.step()
print("after the step ", {name: round(p.item(), 10) for name, p in model.named_parameters()})

with innerloop.track(model, optimizer) as after:
    after.step(loss_of(after.model))
print(f"outer loss      {outer_loss.item():.4f} before, {loss_of(after.model).item():.4f} now")

# %% [markdown]
# ## Is it right?
#
# A derivative that nobody checked is a guess. `check_metagradient` repeats the computation from
# nudged starts, in float64, and raises an error if the two disagree.


# %%
def train_once(start: dict[str, torch.Tensor]) -> torch.Tensor:
    """The outer loss as a function of where training starts."""
    task = Model()
    with innerloop.track(task, torch.optim.SGD(task.parameters(), lr=1.0), params=start) as loop:
        loop.step(loss_of(loop.model))
        return loss_of(loop.model)


start = {name: p.detach() for name, p in Model().named_parameters()}
report = innerloop.check_metagradient(train_once, start, directions=1)
for row in report.comparisons:
    print(
        f"{row.input}:  autograd {row.autograd:+.10f}   finite differences {row.finite:+.10f}   "
        f"agree: {row.ok}"
    )

# %% [markdown]
# ## Two models
#
# Often the network that adapts to a task (*m*) and the one that learns where to start (*M*) are two
# objects. `params=` begins the loop of *m* at the parameters of *M*. The outer gradient then
# arrives at *M*, and *m* itself stays as it was.

# %%
M, m = Model(), Model()
meta_optimizer = torch.optim.SGD(M.parameters(), lr=1.0)
task_optimizer = torch.optim.SGD(m.parameters(), lr=1.0)

with innerloop.track(m, task_optimizer, params=dict(M.named_parameters())) as loop:
    loop.step(loss_of(loop.model))
    outer_loss = loss_of(loop.model)

outer_loss.backward()
meta_optimizer.step()
print("M moved to", {name: round(p.item(), 10) for name, p in M.named_parameters()})
print("m stays at", {name: p.item() for name, p in m.named_parameters()})

# %% [markdown]
# ## Many steps: influence fades, stays, or grows
#
# Over $k$ steps the Jacobians multiply:
# $\partial\theta_k/\partial\theta_0 = J_{k-1} \cdots J_1 J_0$. The effect of the product depends on
# the direction and on the learning rate. The minima of this loss form a ring, $a^2 + b^2 = 25$: a
# round valley. The following steps correct a nudge *across* the valley, but not a nudge *along* it,
# because all places on the ring are equally good. If the learning rate is so large that the steps
# leap over the valley, a nudge across it grows.


# %%
def influence(rate: float, steps: int = 10) -> None:
    """Print what is left of a nudge at step 0 after k steps."""
    model = Model()
    with innerloop.track(model, torch.optim.SGD(model.parameters(), lr=rate)) as loop:
        for _ in range(steps):
            loop.step(loss_of(loop.model))
    across = torch.tensor([2.0, 3.0], dtype=torch.float64) / 13**0.5
    along = torch.tensor([-3.0, 2.0], dtype=torch.float64) / 13**0.5
    print(f"learning rate {rate}:   k    across     along")
    for k in (0, 1, 2, 5, 10):
        nested = innerloop.inspect.jacobian(loop.trajectory, time=k, wrt=0)
        matrix = torch.stack([torch.stack([nested[p][q] for q in "ab"]) for p in "ab"])
        print(f"{k:22d} {across @ matrix @ across:9.5f} {along @ matrix @ along:9.5f}")


influence(rate=0.5)
influence(rate=2.8)

# %% [markdown]
# The picture shows the same. On the left, in blue, the map $\partial\theta_k/\partial\theta_0$
# squeezes a disc of starts around $\theta_0$ across the valley and stretches it along the valley.
# In orange, from another start, the steps are too large. On the right you see how much a nudge at
# step $t$ still matters at the end.

# %%
result = walkthrough.run()
picture = io.BytesIO()
walkthrough.write_picture(result, picture, dpi=80)
Image(picture.getvalue())

# %% [markdown]
# ## All of it, three ways
#
# `innerloop walkthrough` prints these numbers beside hand-derived formulas and finite differences
# of a plain `torch.optim` loop, and fails if a column disagrees. From Python it is data:

# %%
print(len(result.rows), "rows; all agree:", result.agrees)
worst = max(row.autograd_error for row in result.rows)
print("autograd and closed form differ by less than 1e-12:", worst < 1e-12)
