"""Graphs of many steps are freed without a stack that grows with them."""

from __future__ import annotations

import subprocess
import sys

import pytest

# In a thread whose stack holds what a few hundred steps need, if each calls the destructor of the
# one before: on the main thread's stack that were some 10,000 steps.
PROGRAM = """
import gc, threading, torch, innerloop
torch.set_num_threads(1)
STEPS = 1200
x = torch.ones(3)

def adam():
    return innerloop.optim.adam(lr=0.01, eps=0.1)

def track():
    with innerloop.track(torch.nn.Linear(3, 3), adam()) as loop:
        for _ in range(STEPS):
            loop.step(loop.model(x).square().mean())
        return loop, loop.at(600).params["bias"].sum(), loop.model.bias.sum()

def first_order():
    with innerloop.track(torch.nn.Linear(3, 3), adam(), first_order=True) as loop:
        for _ in range(STEPS):
            loop.step(loop.model(x).square().mean())
        return loop, loop.model.weight.sum(), loop.model.bias.sum()

def unroll(strategy=innerloop.StoreAll()):
    problem = innerloop.Problem(lambda p, h, b: (p["w"] @ x).square().mean(), adam())
    start = {"w": torch.eye(3).requires_grad_()}
    traj = innerloop.unroll(problem, start, None, steps=STEPS, strategy=strategy, save_at=[600])
    return traj, traj.at(600).params["w"].sum(), traj.params["w"].sum()

def by_first_order():
    return unroll(innerloop.FirstOrder())

def truncated():
    traj, _, last = unroll(innerloop.Truncated(STEPS - 1))
    return traj, last, last

def replayed():
    strategy = innerloop.Checkpointed()
    with innerloop.track(torch.nn.Linear(3, 3), adam(), strategy=strategy) as loop:
        for _ in range(STEPS):
            loop.step(lambda: loop.model(x).square().mean())
        return loop, loop.model.weight.sum(), loop.model.bias.sum()

def bridge():
    model = torch.nn.Linear(3, 3)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=0.1)
    context = innerloop.higher.innerloop_ctx(model, optimizer, copy_initial_weights=False)
    with context as (fast, inner):
        for _ in range(STEPS):
            inner.step(fast(x).square().mean())
        first, *_ = fast.parameters(time=600)
        return fast, first.sum(), fast.bias.sum()

def run():
    for order in ORDERS:
        held = dict(zip("abc", MAKE()))
        for name in order:
            del held[name]
        gc.collect()
    print("done", flush=True)

threading.stack_size(256 * 1024)
"""
LOOPS = ["track", "first_order", "unroll", "by_first_order", "truncated", "replayed", "bridge"]


@pytest.mark.parametrize("loop", LOOPS)
def test_a_long_graph_is_freed_in_any_order(loop: str) -> None:
    orders = ["abc", "cba"] if loop in ("track", "unroll", "bridge") else ["bca"]
    code = f"{PROGRAM}\nORDERS, MAKE = {orders!r}, {loop}\n"
    code += "thread = threading.Thread(target=run)\nthread.start()\nthread.join()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr[-2000:]
