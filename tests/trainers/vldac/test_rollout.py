"""Episodes without a model: what counts as one, what a broken world costs, and that figures are unbiased."""

import math

import numpy as np
import pytest

from trainers.vldac.rollout import World, episode_seed, evaluate


LOOK = {"image": np.zeros((4, 4, 3), np.uint8), "text": "go"}


class Scripted:
    """An episode's length follows from its seed; an action's reward is the number it says."""

    def __init__(self, outcomes=(), look=LOOK):
        self.outcomes, self.look, self.seeds = list(outcomes), look, []

    def reset(self, *, seed=None, options=None):
        self.seeds.append(seed)
        self.left = 1 + seed % 5
        return self.look, {}

    def step(self, action):
        self.left -= 1
        if self.outcomes:
            found = self.outcomes.pop(0)
            if isinstance(found, Exception):
                raise found
            return found
        return self.look, float(action), self.left == 0, False, {"action_valid": action != "0"}


def test_each_episode_counts_once_however_long_it_is():
    """Slots that take the next episode when free would count short ones first, if playing stopped at a number."""
    seeds = [episode_seed(7, i) for i in range(11)]
    lengths = [1 + seed % 5 for seed in seeds]
    for num_envs in (1, 3, 20):
        found = evaluate(lambda prompts: ["2"] * len(prompts), Scripted, 11, num_envs=num_envs, seed=7)
        assert found["length"] == pytest.approx(sum(lengths) / 11)
        assert found["return"] == pytest.approx(2 * sum(lengths) / 11)
        assert found["success_rate"] == 1
        assert found["invalid_rate"] == 0


def test_success_is_a_return_above_0_where_the_world_does_not_say():
    found = evaluate(lambda prompts: ["0"] * len(prompts), Scripted, 4)
    assert found["success_rate"] == 0
    assert found["invalid_rate"] == 1


def test_a_clock_truncates_and_an_end_is_an_end():
    world = World(Scripted, max_steps=2)
    world.start(4)  # five steps
    assert not world.step("1").truncated
    last = world.step("1")
    assert last.truncated
    assert not last.terminated
    assert last.episode.length == 2
    world.start(1)  # two steps: both at once
    world.step("1")
    both = world.step("1")
    assert both.terminated
    assert not both.truncated


def test_history_is_cleared_when_an_episode_begins():
    world = World(Scripted, history=2)
    world.start(4)
    assert len(world.prompt.frames) == 1
    world.step("1")
    world.step("1")
    assert len(world.prompt.frames) == 2
    world.start(4)
    assert len(world.prompt.frames) == 1


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (ZeroDivisionError("boom"), "ZeroDivisionError: boom"),
        ((LOOK, math.nan, False, False, {}), "a reward must be finite, got nan"),
        ((LOOK, None, False, False, {}), "a reward must be a number, got None"),
        ((LOOK, "1", False, False, {}), "a reward must be a number, got '1'"),
        ((LOOK, 1.0, False, {}), "must return .* got a tuple of 4"),
        (({"text": "go"}, 1.0, False, False, {}), "an observation must be"),
        (({**LOOK, "image": np.zeros((4, 4), np.uint8)}, 1.0, False, False, {}), r"got uint8 \(4, 4\)"),
        (({**LOOK, "image": np.zeros((4, 4, 3))}, 1.0, False, False, {}), "got float64"),
        (({**LOOK, "image": np.zeros((0, 4, 3), np.uint8)}, 1.0, False, False, {}), r"got uint8 \(0, 4, 3\)"),
        (({**LOOK, "text": None}, 1.0, False, False, {}), "a text must be a str, got NoneType"),
    ],
)
def test_a_broken_world_is_raised_by_name_or_left_out(outcome, message):
    world = World(lambda: Scripted([outcome]), index=6)
    world.start(4)
    with pytest.raises(RuntimeError, match=f"Environment 6 broke 1 times in a row.*{message}"):
        world.step("1")
    forgiving = World(lambda: Scripted([outcome]), max_restarts=1)
    forgiving.start(4)
    found = forgiving.step("1")
    assert not found.counted
    assert found.truncated
    assert found.episode is None
    assert forgiving.restarts == 1
    forgiving.start(3)
    with pytest.raises(RuntimeError, match="broke 2 times in a row"):
        forgiving.step("1")


def test_a_good_step_forgives():
    made = []

    def factory():
        made.append(Scripted([(LOOK, 1.0, False, False, {}), ValueError("x")]))
        return made[-1]

    world = World(factory, max_restarts=1)
    for _ in range(3):
        world.start(4)
        assert world.step("1").counted
        assert not world.step("1").counted
    assert len(made) == 4


def test_bad_numbers_are_refused():
    for options in ({"episodes": 0}, {"episodes": 2, "num_envs": 0}):
        with pytest.raises(ValueError, match="must be a whole number of at least 1"):
            evaluate(lambda prompts: [], Scripted, **options)
