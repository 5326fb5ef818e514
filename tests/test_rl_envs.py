"""Environments: Gymnasium is the oracle of the cart, closed forms that of the others, and the three
kinds of autoreset lead to the same transitions."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from innerloop import InvalidInputError
from innerloop.errors import MissingExtraError
from innerloop.rl import envs

# -- dynamics --------------------------------------------------------------------------------------


def test_the_cart_moves_as_that_of_gymnasium() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    theirs = gymnasium.make("CartPole-v1").unwrapped
    env, tasks = envs.CartPole(), {n: torch.tensor([x]) for n, x in envs_usual().items()}
    state = torch.tensor([[0.1, -0.2, 0.05, 0.3]], dtype=torch.float64)
    theirs.reset()
    theirs.state = state[0].numpy().copy()
    for action in torch.randint(2, (40,)):
        state, reward, ended = env.step(state, action[None], tasks)
        _, pay, out, _, _ = theirs.step(action.item())
        assert torch.allclose(state[0], torch.as_tensor(theirs.state), rtol=0, atol=1e-7)
        assert bool(ended) == out
        assert reward.item() == pay == 1
        if out:
            return
    raise AssertionError("the pole did not fall")


def envs_usual() -> dict[str, float]:
    return {"gravity": 9.8, "cart": 1.0, "pole": 0.1, "length": 0.5, "force": 10.0}


def test_tasks_of_the_cart_stay_in_their_range_and_change_the_motion() -> None:
    env = envs.CartPole(spread=0.5)
    tasks = env.sample_tasks(1000, torch.Generator().manual_seed(0))
    assert all(
        (x >= usual / 1.5 - 1e-6).all() and (x <= usual * 1.5 + 1e-6).all() and x.std() > usual / 10
        for usual, x in zip(envs_usual().values(), tasks.values(), strict=True)
    )
    state = torch.full((1000, 4), 0.04)
    moved, _, _ = env.step(state, torch.ones(1000, dtype=torch.long), tasks)
    assert len(moved[:, 1].unique()) > 900


def test_the_half_cheetah_moves_as_that_of_gymnasium() -> None:
    pytest.importorskip("mujoco")
    pytest.importorskip("imageio")  # which Gymnasium imports with its own environments
    gymnasium = pytest.importorskip("gymnasium")
    env, generator = envs.HalfCheetah(), torch.Generator().manual_seed(0)
    tasks = {"direction": torch.tensor([1.0, -1.0])}
    state = env.initial(tasks, generator)
    theirs = [gymnasium.make("HalfCheetah-v5").unwrapped for _ in range(2)]
    for own, row in zip(theirs, state, strict=True):
        own.reset()
        own.set_state(row[:9].numpy(), row[9:].numpy())
    for _ in range(20):
        action = torch.rand(2, 6, generator=generator) * 2 - 1
        state, reward, ended = env.step(state, action, tasks)
        assert not ended.any()
        for i, own in enumerate(theirs):
            seen, _, _, _, info = own.step(action[i].numpy())
            assert torch.allclose(env.observe(state)[i], torch.as_tensor(seen).float(), atol=1e-5)
            sign = tasks["direction"][i].item()
            paid = sign * info["x_velocity"] + info["reward_ctrl"]
            assert reward[i].item() == pytest.approx(paid, abs=1e-5)
    env = envs.HalfCheetah("velocity")
    goal = {"velocity": torch.tensor([0.0, 2.0])}
    moved, reward, _ = env.step(state, torch.zeros(2, 6), goal)
    speed = (moved[:, 0] - state[:, 0]) / 0.05
    assert torch.allclose(reward, -(speed.float() - goal["velocity"]).abs(), atol=1e-5)
    assert (env.sample_tasks(1000)["velocity"] <= 2).all()


@pytest.mark.usefixtures("types_unchecked")
def test_a_half_cheetah_needs_mujoco_and_a_task(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="write 'direction' or 'velocity'"):
        envs.HalfCheetah("jump")  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "mujoco", None)
    for make in (envs.HalfCheetah, lambda: envs.tensor_env("cheetah")):
        with pytest.raises(
            MissingExtraError, match=r"'mujoco', which is not .*innerloop\[mujoco\]"
        ):
            make()


def test_navigation_is_what_finn_et_al_describe() -> None:
    env, tasks = envs.Navigation(), {"goal": torch.tensor([[0.3, -0.4], [0.1, 0.1]])}
    state, reward, ended = env.step(
        env.initial(tasks), torch.tensor([[0.0, 0.0], [1.0, 7.0]]), tasks
    )
    assert torch.allclose(reward, torch.tensor([-0.5, 0.0]))
    assert ended.tolist() == [False, True]
    assert torch.allclose(state, torch.tensor([[0.0, 0.0], [0.1, 0.1]]))
    goals = env.sample_tasks(4000)["goal"]
    assert goals.abs().max() <= 0.5
    # U[-1/2, 1/2] has the standard deviation 1/√12.
    assert torch.allclose(goals.std(0), torch.full((2,), 12**-0.5), atol=0.01)


def test_random_mdps_have_the_distributions_of_their_paper() -> None:
    env = envs.TabularMDP()
    tasks = env.sample_tasks(400)
    assert torch.allclose(tasks["transition"].sum(-1), torch.ones(400, 10, 5))
    # Dirichlet(1) of dimension 10: each chance is Beta(1, 9), of variance 9 / (100 · 11).
    assert abs(tasks["transition"].var().item() - 9 / 1100) < 2e-4
    assert abs(tasks["reward"].mean().item() - 1) < 0.02
    assert abs(tasks["reward"].std().item() - 1) < 0.02
    one = {name: x[:1].expand(20000, *x.shape[1:]) for name, x in tasks.items()}
    state, reward, _ = env.step(
        torch.full((20000,), 3), torch.full((20000,), 2, dtype=torch.long), one
    )
    frequency = state.bincount(minlength=10) / 20000
    assert torch.allclose(frequency, tasks["transition"][0, 3, 2], atol=0.015)
    assert abs((reward.mean() - tasks["reward"][0, 3, 2]).item()) < 0.03


def test_arms_of_a_bandit_pay_what_they_should() -> None:
    env, tasks = envs.Bandit(arms=2), {"mean": torch.tensor([[0.2, 0.7]]).expand(20000, 2)}
    actions = torch.ones(20000, dtype=torch.long)
    _, reward, _ = env.step(env.initial(tasks), actions, tasks)
    assert set(reward.tolist()) == {0.0, 1.0}
    assert abs(reward.mean().item() - 0.7) < 0.02


def test_exact_returns_of_the_game_equal_a_long_sum() -> None:
    game, gamma = envs.MatrixGame(), 0.9
    first, second = torch.randn(2, 5, dtype=torch.float64)
    p, q = first.sigmoid(), second.sigmoid()
    joint = torch.tensor(
        [p[0] * q[0], p[0] * (1 - q[0]), (1 - p[0]) * q[0], (1 - p[0]) * (1 - q[0])]
    )
    payoff, values = torch.tensor([-1.0, -3.0, 0.0, -2.0]), [0.0, 0.0]
    for t in range(600):
        values[0] += gamma**t * float(joint.double() @ payoff.double())
        values[1] += gamma**t * float(joint.double() @ payoff[[0, 2, 1, 3]].double())
        chance = torch.zeros(4)
        for state in range(4):
            mine = p[1 + state]
            yours = q[1 + (0, 2, 1, 3)[state]]
            chance += joint[state] * torch.tensor(
                [mine * yours, mine * (1 - yours), (1 - mine) * yours, (1 - mine) * (1 - yours)]
            )
        joint = chance
    found = game.returns(first, second, gamma=gamma)
    for value, long_sum in zip(found, values, strict=True):
        assert abs(value.item() - (1 - gamma) * long_sum) < 1e-5


def test_the_game_against_a_fixed_opponent_agrees_with_its_exact_return() -> None:
    game, gamma, n = envs.MatrixGame(horizon=60), 0.9, 4000
    mine, yours = torch.randn(2, 5)
    tasks = {"opponent": yours.sigmoid().expand(n, 5)}
    state, total = game.initial(tasks), torch.zeros(n)
    for t in range(60):
        action = 1 - torch.bernoulli(mine.sigmoid()[state]).long()
        state, reward, _ = game.step(state, action, tasks)
        total += gamma**t * reward
    exact = game.returns(mine, yours, gamma=gamma)[0] / (1 - gamma)
    assert abs(total.mean() - exact) < 4 * total.std() / n**0.5 + 0.05


def test_a_game_without_end_needs_a_discount() -> None:
    with pytest.raises(InvalidInputError, match="has no end"):
        envs.MatrixGame().returns(torch.zeros(5), torch.zeros(5), gamma=1.0)


@pytest.mark.parametrize("name", ["bandit", "cartpole", "game", "mdp", "navigation"])
def test_every_tensor_environment_runs_and_repeats_itself(name: str) -> None:
    def run(batch: envs.Batch, generator: torch.Generator) -> list[Tensor]:
        space, seen = batch.action_space, []
        for _ in range(5):
            action = (
                torch.randint(space.n, (3,), generator=generator)
                if isinstance(space, envs.Discrete)
                else torch.randn(3, space.size, generator=generator)
            )
            seen += [*batch.step(action)]
        return seen

    one, two = (envs.Batch(envs.tensor_env(name), 3, seed=4) for _ in range(2))
    first = one.reset()
    assert first.shape == (3, one.observation_space.size)
    assert torch.equal(first, two.reset())
    run(two, torch.Generator().manual_seed(9))
    two.load_state_dict(one.state_dict())
    for a, b in zip(
        run(one, torch.Generator().manual_seed(1)),
        run(two, torch.Generator().manual_seed(1)),
        strict=True,
    ):
        assert torch.equal(a, b)


# -- autoreset -------------------------------------------------------------------------------------


class Counter(envs.TensorEnv):
    """Its observation is the number of steps since the start; terminates at `end`."""

    observation_space = envs.Box(1)
    action_space = envs.Discrete(2)

    def __init__(self, horizon: int, end: int) -> None:
        self.horizon, self.end = horizon, end

    def sample_tasks(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        return {"none": torch.zeros(n)}

    def initial(self, tasks: Any, generator: torch.Generator | None = None) -> Tensor:
        return torch.zeros(len(tasks["none"]), 1)

    def observe(self, state: Tensor) -> Tensor:
        return state

    def step(
        self, state: Tensor, action: Tensor, tasks: Any, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        state = state + 1
        return state, state.squeeze(-1), state.squeeze(-1) >= self.end


def test_a_batch_starts_again_in_the_same_step() -> None:
    batch = envs.Batch(Counter(horizon=3, end=99), 2)
    batch.reset()
    found = [batch.step(torch.zeros(2, dtype=torch.long)) for _ in range(6)]
    assert [x.observation[0].item() for x in found] == [1, 2, 0, 1, 2, 0]
    assert [x.final_observation[0].item() for x in found] == [1, 2, 3, 1, 2, 3]
    assert [x.truncated[0].item() for x in found] == [False, False, True] * 2
    assert not any(x.terminated.any() for x in found)
    assert all(x.valid.all() for x in found)
    batch = envs.Batch(Counter(horizon=3, end=3), 2)
    batch.reset()
    found = [batch.step(torch.zeros(2, dtype=torch.long)) for _ in range(3)]
    assert found[-1].terminated.all()
    assert not found[-1].truncated.any()


def gymnasium_counter(gymnasium: Any, horizon: int) -> Any:
    class Env(gymnasium.Env):
        observation_space = gymnasium.spaces.Box(0, 99, (1,))
        action_space = gymnasium.spaces.Discrete(2, start=5)

        def reset(self, *, seed: Any = None, options: Any = None) -> Any:
            super().reset(seed=seed)
            self.t = 0
            return self.see(), {}

        def see(self) -> Any:
            return self.observation_space.low * 0 + self.t

        def step(self, action: int) -> Any:
            assert action in (5, 6)
            self.t += 1
            return self.see(), float(self.t), False, self.t >= horizon, {}

    return Env


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP", "DISABLED"])
def test_every_autoreset_of_gymnasium_gives_the_same_episodes(mode: str) -> None:
    gymnasium = pytest.importorskip("gymnasium")
    made = [lambda h=h: gymnasium_counter(gymnasium, h)() for h in (3, 4)]
    vector = gymnasium.vector.SyncVectorEnv(
        made, autoreset_mode=gymnasium.vector.AutoresetMode[mode]
    )
    batch = envs.GymnasiumBatch(vector)
    seen = batch.reset()
    rows: list[list[tuple[float, ...]]] = [[], []]
    for _ in range(12):
        found = batch.step(torch.zeros(2, dtype=torch.long))
        for i in range(2):
            if found.valid[i]:
                row = (seen[i], found.reward[i], found.final_observation[i], found.truncated[i])
                rows[i].append(tuple(float(x) for x in row))
        seen = found.observation
    for horizon, steps in zip((3, 4), rows, strict=True):
        episode = [(t, t + 1, t + 1, t + 1 == horizon) for t in range(horizon)]
        assert steps == (episode * 4)[: len(steps)]
        assert len(steps) >= 9


def test_a_tensor_environment_as_one_of_gymnasium_is_the_same() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    env = envs.Navigation(horizon=4)
    tasks = env.sample_tasks(3)
    vector = envs.to_gymnasium(env, tasks)
    assert isinstance(vector, gymnasium.vector.VectorEnv)
    ours, theirs = envs.Batch(env, tasks), envs.GymnasiumBatch(vector)
    assert torch.equal(ours.reset(), theirs.reset())
    for _ in range(9):
        action = torch.randn(3, 2)
        for a, b in zip(ours.step(action), theirs.step(action), strict=True):
            assert torch.equal(a, b)
    assert vector.observation_space.contains(vector.reset(seed=1)[0])


def test_environments_of_gymnasium_go_on_from_a_state() -> None:
    pytest.importorskip("gymnasium")
    one, two = (envs.make("CartPole-v1", 4, seed=7) for _ in range(2))
    one.reset()
    actions = torch.randint(2, (300, 4))
    for action in actions[:200]:
        one.step(action)
    two.load_state_dict(one.state_dict())
    ended = 0
    for action in actions[200:]:
        a, b = one.step(action), two.step(action)
        assert all(map(torch.equal, a, b))
        ended += int(a.terminated.sum())
    assert ended > 5
    state = one.state_dict()
    other = envs.make("MountainCar-v0", 4)
    with pytest.raises(InvalidInputError, match=r"do not fit|another observation|must be whole"):
        other.load_state_dict(state)


# -- what does not fit -----------------------------------------------------------------------------


def test_what_does_not_fit_is_named() -> None:
    batch = envs.Batch(envs.Navigation(), 2)
    with pytest.raises(InvalidInputError, match="call reset"):
        batch.step(torch.zeros(2, 2))
    batch.reset()
    with pytest.raises(InvalidInputError, match="does not fit the action space"):
        batch.step(torch.zeros(2))
    with pytest.raises(InvalidInputError, match="an action is NaN"):
        batch.step(torch.full((2, 2), torch.nan))
    arms = envs.Batch(envs.Bandit(arms=3), 2)
    arms.reset()
    for action in (torch.tensor([0, 3]), torch.tensor([0.0, 1.0])):
        with pytest.raises(InvalidInputError, match="whole numbers from 0 to 2"):
            arms.step(action)
    with pytest.raises(InvalidInputError, match="ends at step 0"):
        envs.Batch(envs.Navigation(horizon=0), 2)
    with pytest.raises(InvalidInputError, match="0 copies"):
        envs.Batch(envs.Navigation(), 0)
    with pytest.raises(InvalidInputError, match="first dimension"):
        envs.Batch(envs.Navigation(), {"goal": torch.zeros(2, 2), "x": torch.zeros(3)})
    with pytest.raises(InvalidInputError, match="no tensor environment 'maze'"):
        envs.tensor_env("maze")


def test_what_gymnasium_lacks_is_named() -> None:
    gymnasium = pytest.importorskip("gymnasium")
    with pytest.raises(InvalidInputError, match="Gymnasium cannot make 'Nowhere-v0'"):
        envs.make("Nowhere-v0")
    with pytest.raises(InvalidInputError, match=r"no gymnasium.vector.VectorEnv"):
        envs.make(gymnasium.make("CartPole-v1"))
    vector = gymnasium.make_vec("CartPole-v1", num_envs=2)
    vector.metadata = {}
    with pytest.raises(InvalidInputError, match="does not say how it resets"):
        envs.make(vector)
    strange = gymnasium.make_vec("CartPole-v1", num_envs=2)
    strange.single_action_space = gymnasium.spaces.MultiBinary(3)
    with pytest.raises(InvalidInputError, match="only Box and Discrete"):
        envs.make(strange)
