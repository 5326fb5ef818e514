"""Run combinations of BOAT (boat-torch), which is written on `higher`, and print their gradients.

``python -m tests.boat_program higher`` or ``innerloop.higher``: the library that takes the name.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

MAPPINGS = (["NGD"], ["NGD", "GDA"], ["NGD", "DI"], ["NGD", "GDA", "DI"])
APPROXIMATIONS = (
    *(["RAD"], ["RAD", "PTT"], ["RAD", "RGT"], ["IGA"], ["IAD"], ["IAD", "PTT"]),
    *(["IAD", "CG", "PTT"], ["IAD", "NS", "PTT"]),
)
LOOPS = 4


def predicted(model: Any, data: Tensor, params: Any) -> Tensor:
    """Return what a model gives, with other parameters if they are given."""
    found: Tensor = model(data) if params is None else model(data, params=params)
    return found


def lower(
    data: dict[str, Tensor], upper_model: nn.Module, lower_model: nn.Module, params: Any = None
) -> Tensor:
    """Weighted least squares with a ridge penalty."""
    error = (predicted(lower_model, data["data"], params) - data["target"]) ** 2
    weights = lower_model.parameters() if params is None else params
    found: Tensor = (torch.sigmoid(upper_model(data["data"])) * error).mean()
    return found + 0.1 * sum((p**2).sum() for p in weights)


def outer(
    data: dict[str, Tensor], upper_model: nn.Module, lower_model: nn.Module, params: Any = None
) -> Tensor:
    """Least squares on other data."""
    return ((predicted(lower_model, data["data"], params) - data["target"]) ** 2).mean()


def aggregated(
    data: dict[str, Tensor],
    held_out: dict[str, Tensor],
    upper_model: nn.Module,
    lower_model: nn.Module,
    params: Any = None,
) -> Tensor:
    """A mixture of both losses, for GDA."""
    alpha = data["alpha"]
    return alpha * outer(held_out, upper_model, lower_model, params) + (1 - alpha) * lower(
        data, upper_model, lower_model, params
    )


def gradients(boat: Any, mapping: list[str], approximation: list[str]) -> list[Any]:
    """Return the gradients of the upper model after one iteration."""
    torch.manual_seed(0)
    upper_model, lower_model = nn.Linear(3, 1).double(), nn.Linear(3, 1).double()
    inner = torch.optim.SGD(lower_model.parameters(), lr=0.1)
    feeds = [
        {
            "data": torch.randn(8, 3).double(),
            "target": torch.randn(8, 1).double(),
            "alpha": torch.tensor(0.3).double(),
        }
        for _ in range(2)
    ]
    here = __name__
    problem = boat.Problem(
        {
            "fo_op": None,
            "gm_op": mapping,
            "na_op": approximation,
            "lower_level_model": lower_model,
            "upper_level_model": upper_model,
            "lower_level_var": list(lower_model.parameters()),
            "upper_level_var": list(upper_model.parameters()),
            "lower_level_opt": inner,
            "upper_level_opt": torch.optim.SGD(upper_model.parameters(), lr=0.1),
            "lower_iters": LOOPS,
            "device": "cpu",
            "accumulate_grad": False,
            "return_grad": True,
            "copy_last_param": False,
            "loss_log_path": str(Path(tempfile.mkdtemp(), "log")),
            "GDA": {"alpha_init": 0.3, "alpha_decay": 0.9},
            "DI": {"lr": 0.1},
            "CG": {"k": 5, "tolerance": 1e-10},
            "NS": {"k": 5},
            "FD": {"r": 1e-3},
            "RGT": {"truncate_iter": 1},
            "PTT": {"truncate_max_loss_iter": True},
            "RAD": {},
            "IAD": {},
        },
        {
            "lower_level_loss": {"function": f"{here}.lower", "params": {}},
            "upper_level_loss": {"function": f"{here}.outer", "params": {}},
            "gda_loss": {"function": f"{here}.aggregated", "params": {}},
        },
    )
    problem.build_ll_solver()
    problem.build_ul_solver()
    found, _ = problem.run_iter(*feeds, current_iter=1)
    return [None if g is None else g.flatten().tolist() for g in found]


def main(library: str) -> None:
    """Print, for each combination, its gradients or its error."""
    if library != "higher":
        for part in ("", ".patch", ".optim"):
            sys.modules[f"higher{part}"] = importlib.import_module(f"{library}{part}")
    boat = importlib.import_module("boat_torch")
    found: dict[str, Any] = {}
    for mapping, approximation in itertools.product(MAPPINGS, APPROXIMATIONS):
        name = f"{'+'.join(mapping)} {'+'.join(approximation)}"
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found[name] = gradients(boat, mapping, approximation)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    print(json.dumps(found))


if __name__ == "__main__":
    # So that BOAT finds the losses by the name of the module.
    importlib.import_module("tests.boat_program").main(sys.argv[1])
