"""The contenders. A new one is a function `prepare(workload)` in a file of its own and one line in
`CONTENDERS`."""

from __future__ import annotations

from functools import partial

from benchmarks.contenders import (
    handwritten,
    higher_loop,
    innerloop_track,
    innerloop_unroll,
    jax_jit,
    torchopt_loop,
)
from benchmarks.contenders.base import Contender

CONTENDERS: tuple[Contender, ...] = (
    Contender("track", innerloop_track.prepare, ("innerloop",), ours=True),
    Contender("unroll, StoreAll", innerloop_unroll.prepare, ("innerloop",), ours=True),
    Contender(
        "metagradient, vmap", innerloop_unroll.prepare_vmap, ("innerloop",), ("M1",), ours=True
    ),
    Contender(
        "StoreAll(compile=True)",
        partial(innerloop_unroll.prepare, compile=True),
        ("innerloop",),
        ("M2", "M3", "M4"),
        ours=True,
    ),
    Contender(
        "Checkpointed(slots='all', compile=True)",
        partial(innerloop_unroll.prepare, strategy="Checkpointed", slots="all", compile=True),
        ("innerloop",),
        ("M4",),
        ours=True,
    ),
    Contender("map_tasks", innerloop_unroll.prepare_map_tasks, ("innerloop",), ("M1",), ours=True),
    Contender(
        "map_tasks(compile=True)",
        partial(innerloop_unroll.prepare_map_tasks, compile=True),
        ("innerloop",),
        ("M1",),
        ours=True,
    ),
    Contender("higher", higher_loop.prepare, ("higher",)),
    Contender("TorchOpt", torchopt_loop.prepare, ("torchopt",)),
    Contender("hand-written loop", handwritten.prepare),
    Contender(
        "hand-written loop, fused Adam", partial(handwritten.prepare, fused=True), workloads=("M2",)
    ),
    Contender("JAX jit", jax_jit.prepare, ("jax",), ("M1", "M4")),
    Contender("JAX jit, remat", partial(jax_jit.prepare, remat=True), ("jax",), ("M4",)),
)

__all__ = ["CONTENDERS", "Contender"]
