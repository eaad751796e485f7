"""Episodes in Gymnasium worlds, many at once: what happened at each step, and how well a policy does.

A world speaks text: `reset(seed=) -> (observation, info)`, `step(str) -> (observation, reward, terminated, truncated,
info)`, with observations `{"image": uint8 (H, W, 3), "text": str}` and `action_valid` and `success` in `info`.
Gymnasium's own vector environments are not used: they reset one step late, which would be a step that nobody took.
"""

import math
from base64 import b64decode, b64encode
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trainers.vldac.policy import Prompt


# what a world keeps of an episode beside the environment and the frames
_OF_EPISODE = ("text", "total", "length", "invalid", "_success")


@dataclass
class Episode:
    """A finished episode: sum of rewards, steps, whether it succeeded, and its share of invalid actions."""

    total: float
    length: int
    success: bool
    invalid: float


@dataclass
class Outcome:
    """
    What a step came to.

    Attributes:
        reward (`float`): 0 where the environment broke.
        terminated, truncated (`bool`): How the episode ended, if it did; a broken one is truncated.
        valid (`bool`): Whether the environment took the action.
        counted (`bool`): False where the environment broke: the step never happened.
        episode ([`Episode`], *optional*): The one that ended here; none of a broken environment.
    """

    reward: float
    terminated: bool
    truncated: bool
    valid: bool = True
    counted: bool = True
    episode: Episode | None = None


class World:
    """
    One environment with the frames that its policy remembers.

    Args:
        factory (`Callable[[], Env]`): Makes the environment, and makes it anew when it broke.
        index (`int`): Its number, for messages.
        history (`int`, *optional*, defaults to 1): Frames in a prompt, at most; cleared when an episode begins.
        max_steps (`int`, *optional*): An episode is truncated after so many steps.
        max_restarts (`int`, *optional*, defaults to 0): Restarts in a row before its error is raised.
    """

    def __init__(
        self,
        factory: Callable[[], Any],
        index: int = 0,
        history: int = 1,
        max_steps: int | None = None,
        max_restarts: int = 0,
    ) -> None:
        self.factory, self.index, self.max_steps, self.max_restarts = factory, index, max_steps, max_restarts
        self.frames: deque[np.ndarray] = deque(maxlen=history)
        self.env = self._made()
        self.text, self.total, self.length, self.invalid = "", 0.0, 0, 0
        self.restarts, self._in_a_row, self._success = 0, 0, False

    def _made(self) -> Any:
        env = self.factory()
        for method in ("reset", "step"):
            if not callable(getattr(env, method, None)):
                raise TypeError(
                    f"`environment_factory` must return a gymnasium.Env, got {type(env).__name__} without {method}(). "
                    "Pass a function or class that makes one."
                )
        return env

    @property
    def prompt(self) -> Prompt:
        """What the policy sees now."""
        return Prompt(tuple(self.frames), self.text)

    def start(self, seed: int) -> None:
        """A new episode, a function of its seed."""
        while True:
            self.frames.clear()
            self.total, self.length, self.invalid, self._success = 0.0, 0, 0, False
            try:
                found = self.env.reset(seed=seed)
                if not isinstance(found, tuple) or len(found) != 2:
                    raise TypeError(f"reset() must return (observation, info), got {_kind(found)}.")
                self._see(found[0])
                return
            except Exception as error:
                self._broke(error)

    def step(self, action: str) -> Outcome:
        """Hand the action over."""
        try:
            found = self.env.step(action)
            if not isinstance(found, tuple) or len(found) != 5:
                raise TypeError(
                    f"step() must return (observation, reward, terminated, truncated, info), got {_kind(found)}."
                )
            observation, reward, terminated, truncated, info = found
            reward = _number(reward)
            self._see(observation)
        except Exception as error:
            self._broke(error)
            return Outcome(0.0, False, True, counted=False)
        self._in_a_row = 0
        self.total += reward
        self.length += 1
        valid = bool(info.get("action_valid", True))
        self.invalid += not valid
        self._success = self._success or bool(info.get("success", False))
        out_of_time = self.max_steps is not None and self.length >= self.max_steps
        outcome = Outcome(reward, bool(terminated), (bool(truncated) or out_of_time) and not terminated, valid)
        if outcome.terminated or outcome.truncated:
            # a world that does not tell succeeds with a return above 0, as in the paper
            success = self._success if "success" in info else self.total > 0
            outcome.episode = Episode(self.total, self.length, success, self.invalid / self.length)
        return outcome

    def state(self) -> dict[str, Any] | None:
        """Where the episode is, for JSON; None of an environment without `get_state()` and `set_state()`."""
        if not (hasattr(self.env, "get_state") and hasattr(self.env, "set_state")) or not self.frames:
            return None
        frames = [{"shape": frame.shape, "bytes": b64encode(frame.tobytes()).decode()} for frame in self.frames]
        own = {name: getattr(self, name) for name in _OF_EPISODE}
        return {"env": self.env.get_state(), "frames": frames, **own}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state()` was."""
        self.env.reset(seed=0)
        self.env.set_state(state["env"])
        self.frames.clear()
        for frame in state["frames"]:
            self.frames.append(np.frombuffer(b64decode(frame["bytes"]), np.uint8).reshape(frame["shape"]))
        for name in _OF_EPISODE:
            setattr(self, name, state[name])

    def _see(self, observation: Any) -> None:
        if not isinstance(observation, dict) or not {"image", "text"} <= observation.keys():
            raise TypeError(
                f'an observation must be {{"image": uint8 (H, W, 3), "text": str}}, got {_kind(observation)}.'
            )
        image = np.asarray(observation["image"])
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise ValueError(f"an image must be uint8 (H, W, 3), got {image.dtype} {image.shape}.")
        if not isinstance(observation["text"], str):
            raise TypeError(f"a text must be a str, got {_kind(observation['text'])}.")
        self.frames.append(np.array(image))  # some worlds draw into one array
        self.text = observation["text"]

    def _broke(self, error: Exception) -> None:
        self._in_a_row += 1
        if self._in_a_row > self.max_restarts:
            raise RuntimeError(
                f"Environment {self.index} broke {self._in_a_row} times in a row, most recently by "
                f"{type(error).__name__}: {error}"
            ) from error
        self.restarts += 1
        self.env = self._made()


def evaluate(
    policy: Callable[[Sequence[Prompt]], list[str]],
    env_fn: Callable[[], Any],
    episodes: int,
    *,
    num_envs: int = 8,
    image_history: int = 1,
    max_episode_steps: int | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """
    Play whole episodes with any policy. Episode e is a function of (`seed`, e), whatever `num_envs` is, and each is
    played to its end, so that short ones are not counted more often.

    Args:
        policy (`Callable`): List of [`Prompt`] -> list of answers; [`VisionPolicy`] for a model.
        env_fn (`Callable[[], Env]`): Makes an environment.
        episodes (`int`): How many.
        num_envs (`int`, *optional*, defaults to 8): Environments at once, a batch of the policy.
        image_history (`int`, *optional*, defaults to 1): Frames in a prompt.
        max_episode_steps (`int`, *optional*): Steps after which an episode is truncated.
        seed (`int`, *optional*, defaults to 0): Of all episodes.

    Returns:
        `dict[str, float]`: `success_rate`, `return`, `length` (steps), `invalid_rate` (share of steps), means.

    Example:

    ```python
    evaluate(VisionPolicy(model, processor), lambda: gymnasium.make("you/World-v0"), episodes=50)
    ```
    """
    for name, value in (("episodes", episodes), ("num_envs", num_envs)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
    worlds = [World(env_fn, i, image_history, max_episode_steps) for i in range(min(num_envs, episodes))]
    for i, world in enumerate(worlds):
        world.start(episode_seed(seed, i))
    done: list[Episode] = []
    following, playing = len(worlds), list(worlds)
    while playing:
        answers = policy([world.prompt for world in playing])
        for world, answer in zip(list(playing), answers, strict=True):
            outcome = world.step(answer)
            if outcome.episode is None:
                continue
            done.append(outcome.episode)
            if following < episodes:
                world.start(episode_seed(seed, following))
                following += 1
            else:
                playing.remove(world)
    for world in worlds:
        getattr(world.env, "close", lambda: None)()
    return figures(done)


def figures(done: Sequence[Episode]) -> dict[str, float]:
    """Means over episodes; an invalid share is one of steps."""
    steps = sum(episode.length for episode in done)
    return {
        "success_rate": sum(episode.success for episode in done) / len(done),
        "return": sum(episode.total for episode in done) / len(done),
        "length": steps / len(done),
        "invalid_rate": sum(episode.invalid * episode.length for episode in done) / steps,
    }


def episode_seed(*path: int) -> int:
    """One seed below 2^31 for a path of numbers, for example (seed, process, environment, episode)."""
    return int(np.random.SeedSequence(path).generate_state(1)[0] >> 1)


def _number(reward: Any) -> float:
    if isinstance(reward, str) or reward is None:
        raise TypeError(f"a reward must be a number, got {reward!r}.")
    value = float(reward)
    if not math.isfinite(value):
        raise ValueError(f"a reward must be finite, got {value}.")
    return value


def _kind(value: Any) -> str:
    return f"a tuple of {len(value)}" if isinstance(value, tuple) else type(value).__name__
