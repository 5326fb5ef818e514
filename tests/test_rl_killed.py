"""A trainer that is killed at a random moment and resumed ends with the same weights, to the bit.

`tests/test_rl_ppo.py` does this with plain PPO.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from innerloop.rl.meta import MetaConfig, MetaGradient, MetaGradientConfig, MetaLearner

PROGRAM = """
import sys, torch
torch.set_num_threads(1)
from innerloop.rl.meta import {learner}, {config}
learner = {learner}({config}(**{settings}))
learner.train(sys.argv[1], resume=True, callback=lambda row: print("x", flush=True))
"""
META: dict[str, Any] = {
    "env": "mdp",
    "algorithm": "meta-sgd",
    "inner": "ppo",
    "iterations": 4,
    "tasks": 2,
    "episodes": 2,
    "hidden": (4,),
    "outer_epochs": 1,
    "inner_lr": 0.3,
}
GRADIENT: dict[str, Any] = {
    "env": "cartpole",
    "total_steps": 240,
    "num_envs": 2,
    "steps": 20,
    "minibatch": 20,
    "epochs": 2,
    "hidden": (8,),
}


def kill(program: str, folder: Path) -> None:
    """Run a program that prints a line after each iteration, and kill it in one of them."""
    command = [sys.executable, "-c", program, str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ)
    assert process.stdout is not None
    with process:
        for _ in range(random.Random().randrange(1, 4)):
            process.stdout.readline()
        time.sleep(random.Random().random() / 50)
        process.send_signal(signal.SIGKILL)


def tensors(learner: MetaLearner | MetaGradient) -> list[Tensor]:
    """Everything that is learned, and the state of the generator."""
    own = learner.rates if isinstance(learner, MetaLearner) else learner.learned
    critic = [] if isinstance(learner, MetaLearner) else [*learner.critic.parameters()]
    return [*learner.policy.parameters(), *own.values(), *critic, learner.generator.get_state()]


@pytest.mark.parametrize(
    ("learner", "config", "settings"),
    [
        (MetaLearner, MetaConfig, META),
        pytest.param(MetaGradient, MetaGradientConfig, GRADIENT, marks=pytest.mark.slow),
    ],
    ids=["meta", "meta-gradient"],
)
def test_a_killed_run_goes_on_with_the_same_weights(
    learner: Any, config: Any, settings: dict[str, Any], tmp_path: Path
) -> None:
    names = {"learner": learner.__name__, "config": config.__name__, "settings": settings}
    kill(PROGRAM.format(**names), tmp_path)
    assert (tmp_path / "checkpoint.pt").exists()
    resumed, whole = learner(config(**settings)), learner(config(**settings))
    resumed.train(tmp_path, resume=True)
    whole.train()
    assert all(map(torch.equal, tensors(whole), tensors(resumed)))
    rows = [repr({k: v for k, v in x.history.items() if k != "seconds"}) for x in (whole, resumed)]
    assert rows[0] == rows[1]
