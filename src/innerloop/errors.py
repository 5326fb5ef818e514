"""Errors of innerloop: each says what was passed, why it cannot work, what to write instead."""

from __future__ import annotations


class InnerLoopError(RuntimeError):
    """Base class of every error that innerloop raises."""


class InvalidInputError(InnerLoopError, ValueError):
    """An argument has the wrong value, shape, name or combination."""


class NotDifferentiableError(InnerLoopError):
    """A derivative was asked for that does not exist, or that this setting does not compute."""


class NonFiniteError(InvalidInputError):
    """A loss, a parameter or a gradient became NaN or infinite; it names the first step."""


class CapturedTensorError(InnerLoopError):
    """A tensor that needs a gradient is used by a loss without being one of its arguments."""


class MetaGradientError(InnerLoopError, AssertionError):
    """Autograd and finite differences disagree about a meta-gradient."""


class SolverError(InnerLoopError):
    """A linear system that implicit differentiation needs was not solved."""


class SingularSystemError(SolverError):
    """The linear system has no solution, or no unique one: its matrix is singular."""


class IndefiniteSystemError(SolverError):
    """Conjugate gradients met a matrix that is not positive definite."""


class SolverNotConvergedError(SolverError):
    """An iterative solver stopped before it reached its tolerance."""


class ProcessGroupError(InnerLoopError):
    """Another process of a group has ended or raised an error."""


class NotConvergedWarning(UserWarning):
    """An inner problem was differentiated implicitly before it had converged."""


class PrecisionWarning(UserWarning):
    """A derivative is computed in a precision in which it may come out wrong."""


class UnreachedGradientWarning(UserWarning):
    """A gradient goes elsewhere than expected: the model's own ``.grad`` stays as it was."""


class CapturedParameterWarning(UserWarning):
    """An inner loss uses a parameter of the user's model that the inner loop does not update."""


class BiasedSurrogateWarning(UserWarning):
    """A surrogate of reinforcement learning is biased for the objective that was stated."""


class CostWarning(UserWarning):
    """What was asked for will take long; it says how long, and what would be cheaper."""


class RecompilationWarning(UserWarning):
    """Compiled code is compiled again and again, which takes longer than it saves."""


class MissingExtraError(InnerLoopError, ImportError):
    """An optional dependency is not installed."""

    @classmethod
    def of(cls, package: str, extra: str, purpose: str) -> MissingExtraError:
        """Make the error for a missing package that ``pip install 'innerloop[extra]'`` brings."""
        return cls(
            f"{purpose} needs the package {package!r}, which is not installed: pip install "
            f"'innerloop[{extra}]'"
        )
