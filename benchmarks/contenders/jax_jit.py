"""The peer JAX: the whole meta-gradient under one `jit`, the tasks under `vmap`, the steps under
`scan`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.contenders.base import Gradients, MetaGradient
from benchmarks.models import GPT
from benchmarks.workloads import Workload

if TYPE_CHECKING:
    import jax

Params = dict[str, "jax.Array"]
Forward = Callable[[Params, "jax.Array"], "jax.Array"]


def prepare(workload: Workload, remat: bool = False) -> MetaGradient:
    """`remat` keeps only the states and computes each step anew in the backward pass."""
    _one_thread()
    import jax
    from jax import lax
    from jax import numpy as jnp

    model = workload.model()
    forward = gpt(model) if isinstance(model, GPT) else mlp
    initial = {name: jnp.asarray(p.detach().numpy()) for name, p in model.named_parameters()}
    tasks = workload.batches()
    inner_x = jnp.stack(
        [jnp.stack([jnp.asarray(b.x.numpy()) for b in task.inner]) for task in tasks]
    )
    inner_y = jnp.stack(
        [jnp.stack([jnp.asarray(b.y.numpy()) for b in task.inner]) for task in tasks]
    )
    outer_x = jnp.stack([jnp.asarray(task.outer.x.numpy()) for task in tasks])
    outer_y = jnp.stack([jnp.asarray(task.outer.y.numpy()) for task in tasks])

    def batch_loss(params: Params, x: Any, y: Any) -> Any:
        log_p = jax.nn.log_softmax(forward(params, x))
        return -jnp.take_along_axis(log_p, y[..., None], -1).mean()

    def step(params: Params, batch: Any) -> tuple[Params, None]:
        grads = jax.grad(batch_loss)(params, *batch)
        return jax.tree.map(lambda p, g: p - workload.lr * g, params, grads), None

    def adapted_loss(params: Params, xs: Any, ys: Any, x: Any, y: Any) -> Any:
        params, _ = lax.scan(jax.checkpoint(step) if remat else step, params, (xs, ys))
        return batch_loss(params, x, y)

    def mean_loss(params: Params) -> Any:
        if len(tasks) == 1:
            return adapted_loss(params, inner_x[0], inner_y[0], outer_x[0], outer_y[0])
        return jax.vmap(adapted_loss, (None, 0, 0, 0, 0))(
            params, inner_x, inner_y, outer_x, outer_y
        ).mean()

    compiled = jax.jit(jax.grad(mean_loss))

    def run() -> Gradients:
        grads: Gradients = jax.block_until_ready(compiled(initial))
        return grads

    return run


def _one_thread() -> None:
    """JAX sizes its thread pools by the processors it may use when its backend starts, and has no
    option for it.

    So it starts while this process is bound to one processor. The threads it makes stay there; ours
    may move again.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_cpu_multi_thread_eigen" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
    import jax

    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        jax.config.update("jax_platforms", "cpu")
        jax.devices()
    finally:
        os.sched_setaffinity(0, allowed)


def mlp(params: Params, x: jax.Array) -> jax.Array:
    from jax import numpy as jnp

    depth = len(params) // 2
    for i in range(depth):
        x = x @ params[f"layers.{i}.weight"].T + params[f"layers.{i}.bias"]
        if i < depth - 1:
            x = jnp.tanh(x)
    return x


def gpt(model: GPT) -> Forward:
    """The forward pass of `benchmarks.models.GPT`, from the same named parameters."""
    from jax import nn as jnn
    from jax import numpy as jnp

    depth, heads = len(model.blocks), model.heads

    def linear(params: Params, name: str, x: jax.Array) -> jax.Array:
        return x @ params[f"{name}.weight"].T + params[f"{name}.bias"]

    def norm(params: Params, name: str, x: jax.Array) -> jax.Array:
        centred = x - x.mean(-1, keepdims=True)
        variance = (centred * centred).mean(-1, keepdims=True)
        return (
            centred / jnp.sqrt(variance + 1e-5) * params[f"{name}.weight"] + params[f"{name}.bias"]
        )

    def attention(params: Params, name: str, x: jax.Array) -> jax.Array:
        batch, length, width = x.shape
        shape = (batch, length, 3, heads, width // heads)
        qkv = linear(params, f"{name}.query_key_value", x).reshape(shape).transpose(2, 0, 3, 1, 4)
        scores = qkv[0] @ qkv[1].swapaxes(-1, -2) / math.sqrt(width // heads)
        weights = jnn.softmax(jnp.where(jnp.tri(length, dtype=bool), scores, -jnp.inf), -1)
        mixed = (weights @ qkv[2]).transpose(0, 2, 1, 3).reshape(batch, length, width)
        return linear(params, f"{name}.project", mixed)

    def forward(params: Params, tokens: jax.Array) -> jax.Array:
        x = params["token.weight"][tokens] + params["position"][: tokens.shape[1]]
        for i in range(depth):
            block = f"blocks.{i}"
            x = x + attention(params, f"{block}.attention", norm(params, f"{block}.norm1", x))
            hidden = linear(params, f"{block}.expand", norm(params, f"{block}.norm2", x))
            x = x + linear(params, f"{block}.contract", jnn.gelu(hidden, approximate=False))
        return norm(params, "norm", x) @ params["head.weight"].T

    return forward
