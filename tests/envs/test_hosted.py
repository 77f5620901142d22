"""Gymnasium environments that are no visual tasks of ours, as tasks."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import gymnasium
import numpy as np
import pytest
from PIL import Image

from vlmenv.core.errors import ConfigError, RewardError, SampleError
from vlmenv.core.rollout import unbatch
from vlmenv.envs.hosted import HostedTask
from vlmenv.envs.making import make_envs
from vlmenv.envs.selfcheck import self_check
from vlmenv.envs.vector import VisualTaskVectorEnv


class Squares(gymnasium.Env[Any, str]):
    """How many of two squares are red?"""

    steps = 1

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Dict(
            {"images": gymnasium.spaces.Box(0, 255, (8, 4, 3), np.uint8), "prompt": gymnasium.spaces.Text(100)}
        )
        self.action_space = gymnasium.spaces.Text(1000)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.red, self.left = int(self.np_random.integers(3)), self.steps
        return self.seen(), {}

    def seen(self) -> Any:
        image = np.zeros((8, 4, 3), np.uint8)
        image[: 4 * self.red, :, 0] = 255
        return {"images": image, "prompt": "How many are red?"}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return self.seen(), float(str(self.red) in action), not self.left, False, {}


def red(observation: Any) -> int:
    return int((observation["images"][0][:, 0, 0] == 255).sum()) // 4


def test_its_rewards_are_its_own() -> None:
    task = HostedTask(Squares)
    found = set()
    for index in range(12):
        observation, info = task.reset(options={"index": index})
        for text in "012":
            assert task.score(text, task.source.get(index)).reward == float(text == str(red(observation)))
        found.add(red(observation))
        assert info["index"] == index
    assert found == {0, 1, 2}


def test_groups_show_the_same_start() -> None:
    envs = VisualTaskVectorEnv(partial(HostedTask, Squares), 6, group_size=3)
    observations, _ = envs.reset(seed=0)
    _, rewards, _, _, infos = envs.step(["0", "1", "2"] * 2)
    images = observations["images"]
    wanted = [red({"images": image}) for image in images]
    assert wanted == [wanted[0]] * 3 + [wanted[3]] * 3
    assert rewards.tolist() == [float(i % 3 == wanted[i]) for i in range(6)]
    assert infos["rewards"]["environment"].tolist() == rewards.tolist()


def test_training_and_evaluation_have_seeds_of_their_own() -> None:
    train, held_out = (HostedTask(Squares, split=split).source for split in ("train", "eval"))
    seeds = [[source.get(index).target for index in (0, 1, 2**62)] for source in (train, held_out)]
    assert all(seed % 2 == 0 for seed in seeds[0])
    assert all(seed % 2 == 1 for seed in seeds[1])
    assert max(itertools.chain(*seeds)) < 2**31


def test_other_terms_are_added() -> None:
    task = HostedTask(Squares, rewards={"environment": 1.0, "short": 0.5}, extra_terms={"short": lambda text, _: 1.0})
    assert task.score("0 1 2", task.source.get(0)).reward == 1.5


def test_there_is_no_right_answer_to_imitate() -> None:
    task = HostedTask(Squares)
    assert self_check(task) == []
    with pytest.raises(ConfigError, match="no right answers"):
        task.write_answer(task.source.get(0))


def test_a_registered_one_is_found_by_its_name() -> None:
    gymnasium.register("Squares-v0", entry_point=Squares)
    try:
        envs = make_envs("Squares-v0", 2, group_size=2)
        assert envs.reset(seed=0)[0]["prompt"] == ("How many are red?",) * 2
        with pytest.raises(ConfigError, match=r"registers no environment 'square'. Did you mean 'Squares-v0'\?"):
            make_envs(f"{__name__}:square", 2)
        with pytest.raises(ConfigError, match=r"registers no environment 'Nope-v0': call register_task"):
            make_envs(f"{__name__}:Nope-v0", 2)
    finally:
        del gymnasium.registry["Squares-v0"]


class Text(Squares):
    def seen(self) -> Any:
        return f"Say {self.red}."


def test_text_alone_will_do() -> None:
    observation, _ = HostedTask(Text).reset(seed=0)
    assert observation["images"] == ()
    assert observation["prompt"].startswith("Say ")


class Warmer(gymnasium.Env[Any, str]):
    """A number is to be found; each wrong guess costs a tenth, and is answered by a picture of where to look."""

    observation_space = gymnasium.spaces.Text(100)
    action_space = gymnasium.spaces.Text(1000)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.number = int(self.np_random.integers(9))
        return "Guess a number from 0 to 8.", {}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        guess = int(action) if action.isdigit() else -1
        picture = np.full((4, 4, 3), 255 if guess < self.number else 0, np.uint8)
        told = {"images": picture, "prompt": "Higher." if guess < self.number else "Lower."}
        return told, 1.0 if guess == self.number else -0.1, guess == self.number, action == "stop", {}


def guess(observation: Any) -> str:
    """The next guess of a player who counts up, from what is shown."""
    return str(sum(turn["role"] == "assistant" for turn in observation["turns"]))


def test_episodes_of_several_steps_are_conversations() -> None:
    """Two environments that show one sample play apart, and get the rewards of their own answers."""
    envs = VisualTaskVectorEnv(partial(HostedTask, Warmer, max_turns=12), 4, group_size=2)
    batch, _ = envs.reset(seed=0)
    alone = Warmer()
    seeds = [envs.task.source.get(index).target for index in envs.shown]
    numbers = [(alone.reset(seed=seed), alone.number)[1] for seed in seeds for _ in range(2)]
    total, ended = np.zeros(4), np.zeros(4, bool)
    shown = unbatch(batch)
    for _ in range(12):
        texts = [guess(one) if i % 2 == 0 else "stop" for i, one in enumerate(shown)]
        batch, rewards, terminated, truncated, infos = envs.step(texts)
        total, ended, shown = total + rewards * ~ended, terminated | truncated, unbatch(batch)
        if ended.all():
            break
    np.testing.assert_allclose(total, [1.0 - 0.1 * number if i % 2 == 0 else -0.1 for i, number in enumerate(numbers)])
    np.testing.assert_allclose(infos["rewards"]["environment"], total)
    for one, number in zip(shown[::2], numbers[::2], strict=True):
        assert [int(image.mean()) for image in one["images"]] == [255] * number


def test_a_budget_of_turns_cuts_an_episode_off() -> None:
    task = HostedTask(Warmer, max_turns=2)
    index = next(i for i in itertools.count() if task.hosted.reward("0", task.source.get(i).target) < 0)
    task.reset(options={"index": index})
    observation, reward, terminated, truncated, _ = task.step("0")
    assert (reward, terminated, truncated) == (-0.1, False, False)
    assert observation["prompt"] == "<image>Higher."
    _, reward, terminated, truncated, info = task.step("x")
    assert (reward, terminated, truncated) == (-0.1, False, True)
    assert info["rewards"] == {"environment": pytest.approx(-0.2)}


def test_the_budget_is_by_default_what_the_environment_says() -> None:
    assert HostedTask(Squares).max_turns == 1
    assert HostedTask(Warmer).max_turns == 8
    gymnasium.register("Warmer-v0", entry_point=Warmer, max_episode_steps=5)
    assert HostedTask("Warmer-v0").max_turns == 5


class Hesitant(Squares):
    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.seen(), 0.0, not action, False, {}


def test_an_environment_that_unexpectedly_goes_on_is_told() -> None:
    task = HostedTask(Hesitant)
    task.reset(seed=0)
    with pytest.raises(ConfigError, match=r"Hesitant goes on after an answer, .*give max_turns"):
        task.step("no")


class Numbers(Squares):
    def seen(self) -> Any:
        return np.zeros(3)


class Keys(Squares):
    def seen(self) -> Any:
        return {"question": "?", "image": None}


class Floats(Squares):
    def seen(self) -> Any:
        return {"prompt": "?", "images": [np.zeros((2, 2, 3))]}


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Numbers, "Numbers is no visual task: its observation, of type ndarray"),
        (Keys, "of keys question, image"),
        (Floats, "uint8 .*not float64"),
    ],
)
def test_others_are_refused(kind: type[Squares], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HostedTask(kind)


class Nothing(Squares):
    def seen(self) -> Any:
        return {"prompt": "?", "images": None}


class NoPixels(Squares):
    def seen(self) -> Any:
        return {"prompt": "?", "images": np.zeros((0, 4, 3), np.uint8)}


class Unstarted(Squares):
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        raise FileNotFoundError("no simulator")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Nothing, "images is one array or a tuple of arrays, not NoneType"),
        (NoPixels, r"not uint8 \[0, 4, 3\]"),
        (Unstarted, "Unstarted cannot be reset with seed 0: FileNotFoundError: no simulator"),
    ],
)
def test_what_gives_no_images_is_refused(kind: type[Squares], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        HostedTask(kind)


class Old(Squares):
    """Resets as Gym's environments did before Gymnasium: two keys would pass for an observation and its info."""

    def reset(self, **arguments: Any) -> Any:
        return super().reset(**arguments)[0]


class OldSteps(Squares):
    def step(self, action: str) -> Any:
        return self.seen(), 1.0, True, {}


class SaysFalse(Squares):
    def step(self, action: str) -> Any:
        return self.seen(), 1.0, "False", False, {}


class Grey(Squares):
    def seen(self) -> Any:
        return {"prompt": "?", "images": np.zeros((8, 4), np.uint8)}


class Unasked(Squares):
    def seen(self) -> Any:
        return {"prompt": None, "images": ()}


class Buttons(Squares):
    def __init__(self) -> None:
        super().__init__()
        self.action_space = gymnasium.spaces.Discrete(3)  # type: ignore[assignment]


class Unmade(Squares):
    def __init__(self) -> None:
        raise FileNotFoundError("no simulator")


def remembering() -> gymnasium.Env[Any, Any]:
    return gymnasium.make("VLM-REC-v0", system_prompt="Look twice.")


def vectorised() -> Any:
    return gymnasium.vector.SyncVectorEnv([Squares])


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Old, r"Old cannot be reset.*reset must return \(observation, info\), not a dict"),
        (OldSteps, r"step must return \(observation, reward, terminated, truncated, info\), not 4 values"),
        (SaysFalse, "terminated and truncated must be True or False, not 'False'"),
        (Grey, r"uint8 array \[H, W, 3\], not uint8 \[8, 4\]"),
        (Unasked, "Unasked: prompt is a text, not of type NoneType"),
        (Buttons, r"Buttons is no visual task: it takes actions of Discrete\(3\).*TransformAction"),
        (Unmade, "Unmade cannot be made: FileNotFoundError: no simulator"),
        (remembering, "RECEnv shows earlier turns"),
        (vectorised, "vectorised makes a SyncVectorEnv; give what makes one environment"),
        (Squares(), "env is an id, or a function that makes an environment, not a Squares"),
    ],
)
def test_what_is_no_environment_of_texts_is_refused(kind: Any, message: str) -> None:
    with pytest.raises((ConfigError, RewardError), match=message):
        HostedTask(kind)


def test_a_budget_of_no_turns_is_refused() -> None:
    with pytest.raises(ConfigError, match="max_turns must be at least 1, not 0"):
        HostedTask(Warmer, max_turns=0)


def test_numbers_become_text_by_wrappers() -> None:
    text = gymnasium.spaces.Text(100)

    def lake() -> gymnasium.Env[Any, Any]:
        numbers = gymnasium.make("FrozenLake-v1", is_slippery=False)
        told = gymnasium.wrappers.TransformObservation(numbers, lambda field: f"You are on field {field}.", text)
        return gymnasium.wrappers.TransformAction(told, int, text)  # type: ignore[arg-type]

    with pytest.raises(RewardError, match="invalid literal"):
        HostedTask(lake)  # whose actions are to take any text
    task = HostedTask(lambda: gymnasium.wrappers.TransformAction(lake(), lambda one: one or "0", text))
    task.reset(seed=0)
    walked = [task.step(way)[:4] for way in "112212"]
    assert [(reward, over) for _, reward, over, _ in walked] == [(0.0, False)] * 5 + [(1.0, True)]
    assert walked[0][0]["prompt"] == "You are on field 4."


def test_images_of_pillow_will_do() -> None:
    class Pillow(Squares):
        def seen(self) -> Any:
            return {"prompt": "?", "images": Image.fromarray(super().seen()["images"])}

    shown, expected = (HostedTask(kind).reset(seed=0)[0]["images"] for kind in (Pillow, Squares))
    assert np.array_equal(shown, expected)


class Late(Squares):
    """Fails with other seeds than those that it is tried with."""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed == 6:
            raise FileNotFoundError("scene 6 is lost")
        return super().reset(seed=seed)


def test_a_start_that_fails_later_is_told_with_its_seed() -> None:
    task = HostedTask(Late)
    with pytest.raises(SampleError, match=r"seed 6.*scene 6 is lost"):
        task.reset(options={"index": 3})
    with pytest.raises(RewardError, match="scene 6 is lost"):
        task.hosted.reward("1", 6)


class Buffered(Squares):
    """Writes every picture into the same array."""

    buffer = np.zeros((8, 4, 3), np.uint8)

    def seen(self) -> Any:
        self.buffer[:] = super().seen()["images"]
        return {"images": self.buffer, "prompt": "?"}


def test_samples_keep_their_images() -> None:
    samples = [HostedTask(kind).source for kind in (Buffered, Squares)]
    shown, expected = ([source.get(index).images[0] for index in range(8)] for source in samples)
    assert all(map(np.array_equal, shown, expected))
    assert len({image.tobytes() for image in shown}) > 1


class Rating(Squares):
    value: Any = None

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self.seen(), self.value if action else 0.0, True, False, {}


@pytest.mark.parametrize("value", [None, np.zeros(2), 1j, float("nan"), np.float32("inf"), 10**400])
def test_a_reward_that_is_no_finite_number_is_told(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rating, "value", value)
    task = HostedTask(Rating)
    with pytest.raises(RewardError, match="must be"):
        task.score("x", task.source.get(0))


@pytest.mark.parametrize("value", [True, np.True_, np.float32(1), np.int64(1)])
def test_a_reward_is_any_number(value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rating, "value", value)
    task = HostedTask(Rating)
    reward = task.score("x", task.source.get(0)).reward
    assert (type(reward), reward) == (float, 1.0)


class Singular(Squares):
    def seen(self) -> Any:
        return {"prompt": "?", "image": np.zeros((2, 2, 3), np.uint8)}


def test_parts_that_models_do_not_see_are_told() -> None:
    with pytest.warns(RuntimeWarning, match="Singular: models see prompt and images alone, not image"):
        HostedTask(Singular)


class Closing(Squares):
    closed = 0

    def close(self) -> None:
        Closing.closed += 1


def test_closing_closes_it() -> None:
    VisualTaskVectorEnv(partial(HostedTask, Closing), 2).close()
    assert Closing.closed == 1


class Failing(Squares):
    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return (self.seen(), 1 / len(action) if action else 0.0, True, False, {}) if action != "x" else 1 / 0  # type: ignore[return-value]


def test_its_failures_are_told() -> None:
    task = HostedTask(Failing)
    with pytest.raises(RewardError, match="Failing failed on the answer 'x': ZeroDivisionError: division by zero"):
        task.score("x", task.source.get(0))


def test_a_data_set_is_refused() -> None:
    with pytest.raises(ConfigError, match="draws its own samples"):
        HostedTask(Squares, dataset="rows.jsonl")


class Unseeded(gymnasium.Env[Any, str]):
    """Shows a shade that no seed decides, and then two more. The answer is how bright it is, from 0 to 9."""

    observation_space = gymnasium.spaces.Dict(
        {"images": gymnasium.spaces.Box(0, 255, (4, 4, 3), np.uint8), "prompt": gymnasium.spaces.Text(100)}
    )
    action_space = gymnasium.spaces.Text(1000)
    open = 0

    def __init__(self) -> None:
        Unseeded.open += 1

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 3
        return self.seen(), {}

    def seen(self) -> Any:
        image = np.random.default_rng().integers(256, size=(4, 4, 3), dtype=np.uint8)
        self.shade = int(image[0, 0, 0]) // 26
        return {"images": image, "prompt": "How bright is the first pixel's red, from 0 to 9?"}

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        right = float(action == str(self.shade))
        return self.seen(), right, not self.left, False, {}

    def close(self) -> None:
        Unseeded.open -= 1


class Drifting(Unseeded):
    """Starts alike, and goes on as no seed decides."""

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        super().reset(**arguments)
        self.shade = 0
        return {"images": np.zeros((4, 4, 3), np.uint8), "prompt": "How bright is it?"}, {}


class Ageing(Squares):
    """Asks twice, and tells its age from its fifth answer on, which two tries do not find."""

    steps, age = 2, 0

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.age += 1
        seen, *rest = super().step(action)
        return seen | {"prompt": f"Age {max(self.age, 5)}"}, *rest


def brightness(observation: Any) -> str:
    return str(int(observation["images"][-1][0, 0, 0]) // 26)


@pytest.mark.parametrize(("kind", "why"), [(Unseeded, "starts differently"), (Drifting, "goes on differently")])
def test_each_episode_of_one_that_does_not_repeat_itself_is_played_once(
    kind: type[Unseeded], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers to what each environment shows are right in all of its turns."""
    monkeypatch.setattr(Unseeded, "open", 0)
    envs = VisualTaskVectorEnv(partial(HostedTask, kind), 6)
    for _ in range(2):
        shown, total = unbatch(envs.reset(seed=0)[0]), np.zeros(6)
        for turn in range(3):
            texts = [brightness(one) if i < 4 else "no" for i, one in enumerate(shown)]
            batch, rewards, terminated, _, infos = envs.step(texts)
            shown, total = unbatch(batch), total + rewards
            assert terminated.all() == (turn == 2)
        assert total.tolist() == [3.0] * 4 + [0.0] * 2
        assert infos["rewards"]["environment"].tolist() == total.tolist()
        assert len(set(infos["target"])) == 6
    assert kind.open <= 8  # of 12 episodes: those that have ended lend theirs
    envs.close()
    assert kind.open == 0
    with pytest.raises(ConfigError, match=f"{kind.__name__} {why}.* no group .* ppo or reinforce"):
        VisualTaskVectorEnv(partial(HostedTask, kind), 6, group_size=2)


class Chancy(Unseeded):
    """Ends at once in the tries, and goes on later."""

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left = self.left if action else 1
        return super().step(action)


def test_an_end_by_chance_makes_no_task_of_one_step() -> None:
    task = HostedTask(Chancy)
    assert task.max_turns == 8
    task.reset(seed=0)
    assert task.step("5")[2:4] == (False, False)
    assert HostedTask(Chancy, max_turns=1).max_turns == 1


def test_an_episode_cannot_be_played_again_with_other_answers() -> None:
    task = HostedTask(Unseeded)
    sample = task.source.get(0)
    assert task.respond(sample, ("a",)) is not None
    assert task.score("a", sample).reward == 0
    with pytest.raises(RewardError, match=r"starts differently .* cannot be played again"):
        task.score("b", sample)


def test_registration_may_say_so() -> None:
    gymnasium.register("Noted-v0", entry_point=Warmer, nondeterministic=True)
    try:
        with pytest.raises(ConfigError, match="Noted-v0 is registered with nondeterministic=True"):
            make_envs("Noted-v0", 2, group_size=2)
        envs = make_envs("Noted-v0", 2)
        shown = unbatch(envs.reset(seed=0)[0])
        alone = Warmer()
        for index, one in zip(envs.shown, shown, strict=True):
            alone.reset(seed=int(envs.shown[index].id.removeprefix("seed-")))
            assert one["prompt"].startswith("Guess")
        assert envs.step([str(alone.number)] * 2)[1][1] == 1.0  # the last one's
    finally:
        del gymnasium.registry["Noted-v0"]


def test_what_goes_on_differently_later_is_told() -> None:
    task = HostedTask(Ageing)
    task.reset(seed=0)
    task.step("no")
    with pytest.raises(RewardError, match=r"Ageing does not repeat an episode.*nondeterministic=True"):
        task.step("no")
