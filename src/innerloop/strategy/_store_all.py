"""Keep the whole graph."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from innerloop._trajectory import Trajectory
from innerloop._utils.execution import Mode, mode
from innerloop.errors import InvalidInputError
from innerloop.strategy._base import KeptGraphs, Loop, Strategy
from innerloop.strategy._engine.compiled_step import CompiledProblem, with_counts
from innerloop.strategy._engine.plain_run import plain_run


@dataclasses.dataclass(frozen=True)
class StoreAll(Strategy):
    """Run the loop and let autograd keep everything: exact, fast, and memory grows with every step.

    **Cost** for T steps, with G one inner gradient, A what a first-order step saves, P parameters,
    S optimizer state: time about 3 T G (the floor of exact reverse mode), memory T (2.23 A + P +
    S).

    **When**: short loops; when states at every time are wanted (`Trajectory.at`,
    `innerloop.inspect`); as the oracle of every other strategy. **Not** when memory runs out.

    Args:
        compile: compile one step with ``torch.compile``, and call it T times: it takes seconds to a
            minute once per problem and shape, whatever T is. What it returns and its pullback are
            compared with uncompiled code at the first call and at random later ones, and refused
            if they differ. Inside ``torch.func`` transforms, and where ``metagradient(...,
            compile=True)`` compiles the whole loop, this has no effect. The gradient has no further
            derivative (``create_graph=True`` raises).

    Example:
        >>> import innerloop
        >>> innerloop.StoreAll(), innerloop.StoreAll().exact
        (StoreAll(), True)
    """

    compile: bool = False

    exact = True
    compiles: ClassVar[bool] = True
    differentiates: ClassVar[frozenset[str]] = frozenset({"params", "hyper"})

    @property
    def keeps_graph(self) -> bool:
        """True unless the steps are compiled."""
        return not self.compile

    def __repr__(self) -> str:
        return "StoreAll(compile=True)" if self.compile else "StoreAll()"

    def kept_graphs(self) -> KeptGraphs:
        """Return that `track` keeps them, as it does without a strategy."""
        if self.compile:
            raise InvalidInputError(
                f"track(..., strategy={self!r}): the graphs of a hand-written loop are not "
                'compiled. Write Checkpointed(slots="all", compile=True), whose steps run again, '
                "StoreAll(), or the loop as innerloop.unroll"
            )
        return KeptGraphs(first_order=False)

    def run(self, loop: Loop) -> Trajectory:
        """Run the loop step by step, recorded by autograd."""
        if not self.compile or mode() is not Mode.EAGER:
            return plain_run(loop)
        compiled = CompiledProblem(loop.problem, "reverse")
        return plain_run(loop, compiled.record, lambda carry: with_counts(carry, loop.start))
