"""The environments in other frameworks: their own loops and scorers, and the same rewards."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import httpx2
import numpy as np
import pytest
import torch
from adapter_rows import write_rows
from PIL import Image
from servers import free_port

import vlmenv.adapters
from vlmenv.adapters.task import PortableTask
from vlmenv.agents.engines.access import VARIABLE, server_token
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.commands.serve_env import Guarded
from vlmenv.compat.transformers import processor_without_videos
from vlmenv.core.errors import ConfigError, SampleError

COUNT = 20


def two_steps(trl: Any, folder: Path, *, max_completion_length: int) -> Any:
    """TRL's settings for two small steps on a CPU."""
    return trl.GRPOConfig(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=max_completion_length,
        report_to=[],
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
    )


@pytest.fixture(scope="module")
def task() -> PortableTask:
    return PortableTask("VLM-REC-v0", coordinates="norm1000")


@pytest.fixture(scope="module")
def answered(task: PortableTask) -> list[tuple[int, str, float]]:
    """Numbers of samples, answers and the environment's own rewards."""
    env: Any = gymnasium.make("VLM-REC-v0", coordinates="norm1000")
    found = []
    for place, index in enumerate(task.indices(COUNT, seed=0)):
        env.reset(options={"index": index})
        right = env.unwrapped.write_answer(env.unwrapped.source.get(index))
        text = (right, right.replace("[", "[1", 1), "no")[place % 3]
        found.append((index, text, float(env.step(text)[1])))
    assert len({reward for _, _, reward in found}) > 2
    return found


@pytest.mark.slow
def test_trl_takes_steps(builtin: VLMAgent, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    processor: Any = processor_without_videos(find_model("builtin"))
    processor.tokenizer.padding_side = "left"
    spec = vlmenv.adapters.trl("VLM-REC-v0", rows=4, coordinates="norm1000")
    given: list[tuple[Any, Any, list[float]]] = []

    def watched(completions: Any, index: Any, **columns: Any) -> list[float]:
        rewards = spec.reward_funcs[0](completions=completions, index=index, **columns)
        given.append((completions, index, rewards))
        return rewards

    trainer = trl.GRPOTrainer(
        model=builtin.family.model,
        reward_funcs=watched,
        args=two_steps(trl, tmp_path, max_completion_length=24),
        train_dataset=spec.train_dataset,
        processing_class=processor,
    )
    before = [one.detach().clone() for one in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    logged = {name for line in trainer.state.log_history for name in line}
    assert {"rewards/iou", "rewards/format"} <= logged
    env: Any = gymnasium.make("VLM-REC-v0", coordinates="norm1000")
    assert given
    for completions, index, rewards in given:
        for completion, number, reward in zip(completions, index, rewards, strict=True):
            env.reset(options={"index": number})
            content = completion[-1]["content"]
            text = content if isinstance(content, str) else content[0]["text"]
            assert env.step(text)[1] == pytest.approx(reward, abs=1e-9)


CROP = '{"bbox_2d": [100, 100, 300, 300]}'
ANSWER = "<think>It is small.</think><answer>red</answer>"
CALL = f"<tool_call>\n{json.dumps({'name': 'respond', 'arguments': {'answer': CROP}})}\n</tool_call>"


REQUESTS = {"VLM-Zoom-v0": CROP, "VLM-Search-v0": '{"open": 2}'}
"""A request of each task of several turns."""


def rewards_of(index: int, *texts: str, name: str = "VLM-Zoom-v0") -> list[float]:
    """The environment's own rewards of an episode's answers."""
    env: Any = gymnasium.make(name, coordinates="norm1000")
    env.reset(options={"index": index})
    return [float(env.step(text)[1]) for text in texts]


@pytest.mark.slow
def test_trl_plays_episodes_of_several_turns(
    builtin: VLMAgent, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its optimiser takes steps on conversations with crops. What is sampled is given, as the model knows no tools."""
    trl = pytest.importorskip("trl")
    from trl.chat_template_utils import qwen3_vl_chat_template

    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    processor: Any = processor_without_videos(find_model("builtin"))
    processor.tokenizer.padding_side, processor.chat_template = "left", qwen3_vl_chat_template
    spec = vlmenv.adapters.trl("VLM-Zoom-v0", rows=2, coordinates="norm1000")
    given: list[tuple[list[int], list[float]]] = []
    shown: list[list[int]] = []

    def watched(index: Any, **columns: Any) -> list[float]:
        given.append((index, spec.reward_funcs[0](index=index, **columns)))
        return given[-1][1]

    class Given(trl.GRPOTrainer):  # type: ignore[misc, name-defined]
        """The first of each pair of episodes asks for a crop, then answers; the second answers at once."""

        def _generate_single_turn(self, prompt_ids: Any, images: Any, *rest: Any, **more: Any) -> Any:
            calls = not shown or len(shown[-1]) < len(prompt_ids)
            shown.append([len(one) for one in images])
            texts = [CALL if calls and row % 2 == 0 else ANSWER for row in range(len(prompt_ids))]
            return [self._tokenizer.encode(f"{text}<|im_end|>", add_special_tokens=False) for text in texts], None

    trainer = Given(
        model=builtin.family.model,
        reward_funcs=watched,
        args=two_steps(trl, tmp_path, max_completion_length=300),
        train_dataset=spec.train_dataset,
        processing_class=processor,
        environment_factory=spec.environment_factory,
    )
    before = [one.detach().clone() for one in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
    assert shown == [[1, 1, 1, 1], [2, 2]] * 2  # images of each conversation: the question's, and the crop
    assert {"rewards/accuracy", "rewards/crops"} <= {name for line in trainer.state.log_history for name in line}
    for index, rewards in given:
        asked, at_once = rewards_of(index[0], CROP, ANSWER), rewards_of(index[0], ANSWER)
        assert asked[0] < 0
        assert rewards[:2] == pytest.approx([sum(asked), at_once[0]], abs=1e-9)
    assert len(given) == 2


def test_trl_ends_episodes_as_the_environment_does() -> None:
    """By budgets, by a last answer through the tool, and where there was no room for another answer."""
    pytest.importorskip("trl")
    spec = vlmenv.adapters.trl("VLM-Zoom-v0", rows=1, coordinates="norm1000")
    (reward,), index = spec.reward_funcs, spec.train_dataset[0]["index"]
    assert spec.environment_factory is not None
    last = [{"role": "assistant", "content": "<answer>red</answer>", "reasoning_content": "It is small."}]

    def played(*texts: Any, completion: list[dict[str, Any]] = last) -> tuple[list[Any], float]:
        environment = spec.environment_factory()
        environment.reset(index=index, prompt="not used")
        told = [environment.respond(text) for text in texts]
        return told, reward([completion], index=[index], environments=[environment])[0]

    told, found = played(json.loads(CROP))
    assert [block["type"] for block in told[0]] == ["image", "text"]
    assert found == pytest.approx(sum(rewards_of(index, CROP, ANSWER)), abs=1e-9)
    told, found = played(CROP, CROP, CROP, CROP)
    assert told[2:] == ["No further answer is possible."] * 2
    assert found == pytest.approx(sum(rewards_of(index, CROP, CROP, CROP)), abs=1e-9)
    assert played(ANSWER)[1] == pytest.approx(rewards_of(index, ANSWER)[0], abs=1e-9)
    cut = [{"role": "tool", "name": "respond", "content": "red"}]
    assert played(completion=cut)[1] == pytest.approx(rewards_of(index, "")[0], abs=1e-9)
    with pytest.raises(ConfigError, match="give the trainer its environment_factory"):
        reward([last], index=[index])
    assert vlmenv.adapters.trl("VLM-Zoom-v0", rows=1, max_turns=1).environment_factory is None


def test_trl_places_images(tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from trl.data_utils import prepare_multimodal_messages

    spec = vlmenv.adapters.trl("VLM-VQA-v0", dataset=str(write_rows(tmp_path)))
    rows = {row["index"]: row for row in spec.train_dataset}
    told = prepare_multimodal_messages(rows[0]["prompt"], rows[0]["images"])
    kinds = [[block["type"] for block in turn["content"]] for turn in told]
    assert kinds == [["text"], ["text", "image", "text", "image", "text"]]
    shown = [block["image"].getpixel((0, 0)) for block in told[1]["content"] if block["type"] == "image"]
    assert shown == [(255, 0, 0), (0, 0, 255)]
    assert len(spec.train_dataset.select([0])) == 1


def test_trl_leaves_out_what_is_broken(tmp_path: Path) -> None:
    file = write_rows(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no image")
    file.write_text(file.read_text() + file.read_text().splitlines()[1].replace("a.png", "b.png") + "\n")
    with pytest.warns(RuntimeWarning, match="left out: 2 of 3 samples"):
        spec = vlmenv.adapters.trl("VLM-VQA-v0", dataset=str(file), skip_broken=True)
    assert [row["index"] for row in spec.train_dataset] == [2]


def pixels(url: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,")))))


def test_skyrl(task: PortableTask, answered: list[tuple[int, str, float]]) -> None:
    gym = pytest.importorskip("skyrl_gym")
    kind = vlmenv.adapters.skyrl("VLM-REC-v0", coordinates="norm1000")
    gym.register("vlm_rec_of_tests", entry_point=kind)
    for index, text, reward in answered:
        env = gym.make("vlm_rec_of_tests", env_config={}, extras={"extra_info": {"index": index}})
        told, _ = env.init([])
        image, question = told[-1]["content"]
        np.testing.assert_array_equal(pixels(image["image_url"]["url"]), task.observation(index)["images"][0])
        assert question["text"] == task.observation(index)["prompt"]
        output = env.step(text)
        assert output["done"]
        assert output["reward"] == pytest.approx(reward, abs=1e-9)
        assert env.get_metrics()["reward"] == output["reward"]
    with pytest.raises(ConfigError, match="extra_info"):
        gym.make("vlm_rec_of_tests", env_config={}, extras={})


@pytest.mark.parametrize(("name", "request_"), REQUESTS.items())
def test_skyrl_plays_episodes_of_several_turns(name: str, request_: str) -> None:
    pytest.importorskip("skyrl_gym")
    index = PortableTask(name).indices(1, seed=0)[0]
    env = vlmenv.adapters.skyrl(name, coordinates="norm1000")({}, {"extra_info": {"index": index}})
    assert env.get_metrics() == {}
    env.init([])
    outputs = [env.step(text) for text in (request_, ANSWER)]
    assert [one["done"] for one in outputs] == [False, True]
    wanted = rewards_of(index, request_, ANSWER, name=name)
    assert [one["reward"] for one in outputs] == pytest.approx(wanted, abs=1e-9)
    (turn,) = outputs[0]["observations"]
    assert (turn["role"], [block["type"] for block in turn["content"]]) == ("user", ["image_url", "text"])
    assert outputs[1]["observations"] == []
    assert env.get_metrics()["reward"] == pytest.approx(sum(one["reward"] for one in outputs))
    with pytest.raises(ConfigError, match="the episode has ended"):
        env.step(ANSWER)
    assert env.max_turns == {"VLM-Zoom-v0": 3, "VLM-Search-v0": 4}[name]


@pytest.mark.parametrize(("name", "request_"), REQUESTS.items())
def test_gem_plays_episodes_of_several_turns(name: str, request_: str) -> None:
    pytest.importorskip("gem")
    env = vlmenv.adapters.gem(name, coordinates="norm1000")()
    first, info = env.reset(seed=0)
    second, *asked = env.step(request_)
    last, *answer = env.step(ANSWER)
    wanted = rewards_of(info["index"], request_, ANSWER, name=name)
    assert [asked[0], answer[0]] == pytest.approx(wanted, abs=1e-9)
    assert [one[1:3] for one in (asked, answer)] == [[False, False], [True, False]]
    assert [len(one["images"]) for one in (first, second, last)] == [1, 1, 0]
    assert second["problem"].startswith({"VLM-Zoom-v0": "This part, enlarged.", "VLM-Search-v0": "Image 2."}[name])


@pytest.mark.parametrize(("name", "request_"), REQUESTS.items())
def test_openenv_plays_episodes_of_several_turns(name: str, request_: str) -> None:
    pytest.importorskip("openenv.core.env_server.interfaces")
    spec = vlmenv.adapters.openenv(name, coordinates="norm1000")
    env = spec.environment()
    index = env.reset(seed=0).metadata["index"]
    seen = [env.step(spec.action(text=text)) for text in (request_, ANSWER)]
    assert [one.done for one in seen] == [False, True]
    wanted = rewards_of(index, request_, ANSWER, name=name)
    assert [one.reward for one in seen] == pytest.approx(wanted, abs=1e-9)
    assert [[block["type"] for block in turn["content"]] for turn in seen[0].messages] == [["image_url", "text"]]
    assert seen[1].messages == []
    assert seen[1].metadata["rewards"][{"VLM-Zoom-v0": "crops", "VLM-Search-v0": "opened"}[name]] == 1
    with pytest.raises(ConfigError, match="call reset"):
        env.step(spec.action(text=ANSWER))
    with pytest.raises(ConfigError, match="reset knows no indx; it knows seed, episode_id and index"):
        env.reset(indx=3)  # which would show another sample


def test_verifiers_refuses_episodes_of_several_turns() -> None:
    pytest.importorskip("verifiers.v1")
    with pytest.raises(ConfigError, match="a taskset of verifiers asks for a single reply: give max_turns=1"):
        vlmenv.adapters.verifiers("VLM-Zoom-v0", rows=1)


@pytest.mark.slow
def test_gem(task: PortableTask, answered: list[tuple[int, str, float]]) -> None:
    gem = pytest.importorskip("gem")
    gem.register("vlm:rec-of-tests", vlmenv.adapters.gem("VLM-REC-v0", coordinates="norm1000"))
    env = gem.make("vlm:rec-of-tests")
    for index, text, reward in answered:
        observation, info = env.reset(idx=index)
        assert (observation["problem"], info["index"]) == (task.observation(index)["prompt"], index)
        assert env.spawn(same_state=True).step(text)[1] == pytest.approx(reward, abs=1e-9)
        _, got, terminated, truncated, _ = env.step(text)
        assert (got, terminated, truncated) == (pytest.approx(reward, abs=1e-9), True, False)
    first, again = env.reset(seed=4)[0], env.spawn().reset(seed=4)[0]
    assert first["problem"] == again["problem"]


@pytest.mark.slow
def test_openenv(task: PortableTask, answered: list[tuple[int, str, float]]) -> None:
    pytest.importorskip("openenv.core.env_server.http_server")
    from fastapi.testclient import TestClient

    spec = vlmenv.adapters.openenv("VLM-REC-v0", coordinates="norm1000")
    with TestClient(spec.app(sessions=2)) as client, client.websocket_connect("/ws") as session:
        for index, text, reward in answered:
            session.send_json({"type": "reset", "data": {"index": index}})
            shown = session.receive_json()["data"]["observation"]
            assert shown["messages"][-1]["content"][1]["text"] == task.observation(index)["prompt"]
            session.send_json({"type": "step", "data": {"text": text}})
            told = session.receive_json()["data"]
            assert told["done"]
            assert told["reward"] == pytest.approx(reward, abs=1e-9)
        session.send_json({"type": "step", "data": {"text": "again"}})
        assert "reset" in str(session.receive_json())


def test_gem_takes_other_environments() -> None:
    """Those that are no visual tasks are made into one, as in training."""
    pytest.importorskip("gem")
    gymnasium.register("Fixed-v0", entry_point=Fixed)
    try:
        env = vlmenv.adapters.gem("Fixed-v0")()
        observation, info = env.reset(idx=2)
        assert observation == {"problem": "Say seed 4.", "images": []}
        assert info["index"] == 2
        assert env.spawn(same_state=True).step("4")[1] == 1.0
        assert env.step("5")[1:4] == (0.0, True, False)
    finally:
        del gymnasium.registry["Fixed-v0"]


class Fixed(gymnasium.Env[Any, str]):
    """The right answer is the seed."""

    observation_space = gymnasium.spaces.Text(100)
    action_space = gymnasium.spaces.Text(100)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        self.seed = seed
        return f"Say seed {seed}.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "", float(action == str(self.seed)), True, False, {}


def test_gem_refuses_earlier_turns() -> None:
    pytest.importorskip("gem")
    with pytest.raises(ConfigError, match="without earlier turns"):
        vlmenv.adapters.gem("VLM-REC-v0", system_prompt="Look twice.")().reset(seed=0)


@pytest.fixture
def openenv_client() -> Iterator[Any]:
    pytest.importorskip("openenv.core.env_server.http_server")
    from fastapi.testclient import TestClient

    app = vlmenv.adapters.openenv("VLM-REC-v0", coordinates="norm1000").app(sessions=2)
    with TestClient(app) as client:
        yield client


@pytest.mark.slow
def test_openenv_tells_wrong_requests_and_goes_on(openenv_client: Any) -> None:
    wrong = [{"index": one} for one in ("x", -1, 1.5, True, [1])]
    for data in wrong:
        answer = openenv_client.post("/reset", json=data)
        assert answer.status_code == 422
        assert "sample" in answer.json()["detail"]
    with openenv_client.websocket_connect("/ws") as session:

        def ask(kind: str, data: Any) -> Any:
            session.send_json({"type": kind, "data": data})
            return session.receive_json()

        for data in wrong:
            assert "sample" in ask("reset", data)["data"]["message"]
        assert "seed is a whole number" in ask("reset", {"seed": -1})["data"]["message"]
        ask("reset", {"index": 3})
        for data in ({"text": 3}, {"text": None}, {}, {"text": ["a"]}):
            assert ask("step", data)["data"]["code"] == "VALIDATION_ERROR"
        assert ask("step", {"text": "\ud800 \0 " + "[" * 5000})["data"]["done"]


@pytest.mark.slow
def test_openenv_sessions_do_not_disturb_each_other(
    openenv_client: Any, answered: list[tuple[int, str, float]]
) -> None:
    (first, text, reward), (second, _, _) = answered[0], answered[1]
    connect = openenv_client.websocket_connect
    with connect("/ws") as one, connect("/ws") as other:
        seen = []
        for session, data in ((one, {"index": first}), (other, {"index": second})):
            session.send_json({"type": "reset", "data": data})
            session.receive_json()
        for session in (one, other):
            session.send_json({"type": "step", "data": {"text": text}})
            seen.append(session.receive_json()["data"]["reward"])
        assert seen[0] == pytest.approx(reward, abs=1e-9)
        assert seen[1] < seen[0]
        for session in (one, other):  # without seed and index, both follow one order
            session.send_json({"type": "reset", "data": {}})
            seen.append(session.receive_json()["data"]["observation"]["metadata"]["index"])
        assert seen[2:] == [index for index, _, _ in answered[:2]]


def test_openenv_leaves_out_what_is_broken(tmp_path: Path) -> None:
    pytest.importorskip("openenv.core.env_server.interfaces")
    file = write_rows(tmp_path)
    file.write_text(file.read_text() + file.read_text().splitlines()[1].replace("a.png", "b.png") + "\n")
    (tmp_path / "a.png").write_bytes(b"no image")
    env = vlmenv.adapters.openenv("VLM-VQA-v0", dataset=str(file), skip_broken=True).environment()
    for given in ({}, {}, {"seed": 5}):
        assert env.reset(**given).metadata == {"index": 2}
    with pytest.raises(SampleError, match=r"a\.png"):
        env.reset(index=0)


@pytest.mark.slow
def test_verifiers(task: PortableTask, answered: list[tuple[int, str, float]]) -> None:
    vf = pytest.importorskip("verifiers.v1")
    kind = vlmenv.adapters.verifiers("VLM-REC-v0", rows=COUNT, coordinates="norm1000")
    for one, (index, text, reward) in zip(kind(vf.TasksetConfig()), answered, strict=True):
        assert one.data.index == index
        assert one.data.prompt_text.endswith(task.observation(index)["prompt"])

        class Trace:
            last_reply = text

        assert asyncio.run(one.score(Trace())) == pytest.approx(reward, abs=1e-9)


@pytest.mark.slow
def test_swift(task: PortableTask, answered: list[tuple[int, str, float]]) -> None:
    pytest.importorskip("swift.rewards.orm")
    function = vlmenv.adapters.swift()()
    texts, keys = [text for _, text, _ in answered], [task.key(index) for index, _, _ in answered]
    assert function(texts, solution=keys) == pytest.approx([reward for _, _, reward in answered], abs=1e-9)


@pytest.mark.parametrize("name", ["skyrl", "gem", "openenv", "verifiers", "swift"])
def test_a_missing_framework_is_told_with_its_extra(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("skyrl_gym", "gem", "openenv", "verifiers", "swift"):
        monkeypatch.setitem(sys.modules, module, None)
        for known in [one for one in sys.modules if one.startswith(f"{module}.")]:
            monkeypatch.delitem(sys.modules, known)
    adapter = getattr(vlmenv.adapters, name)
    with pytest.raises(ConfigError, match=rf"vlmenv\[{name}\]"):
        adapter() if name == "swift" else adapter("VLM-REC-v0")


def served(kind: str, path: str, **headers: str) -> bool:
    """Whether a request reaches the app."""
    reached, sent = [], []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        reached.append(scope)

    async def send(message: Any) -> None:
        sent.append(message)

    async def receive() -> Any:
        return {}

    method = {} if kind == "websocket" else {"method": "GET"}
    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": kind, "path": path, "headers": raw, **method}
    asyncio.run(Guarded(app, "gpu-box.lan")(scope, receive, send))
    assert bool(reached) != bool(sent)
    return bool(reached)


@pytest.mark.parametrize(("kind", "path"), [("http", "/state"), ("websocket", "/ws")])
def test_a_served_environment_needs_the_token(kind: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "the-token-of-this-server")
    right = {"authorization": "Bearer the-token-of-this-server"}
    assert served(kind, path, host="127.0.0.1:8001", **right)
    assert served(kind, path, host="gpu-box.lan:8001", **right)
    assert not served(kind, path, host="127.0.0.1:8001")
    assert not served(kind, path, host="127.0.0.1:8001", authorization="Bearer the-token-of-another")
    assert not served(kind, path, host="evil.example:8001", **right)
    for other in ("/mcp", "/harness", "/docs", "/openapi.json", "/ws/", "/STATE"):
        assert not served(kind, other, host="127.0.0.1:8001", **right)


@pytest.mark.slow
def test_an_environment_is_served(task: PortableTask) -> None:
    pytest.importorskip("openenv.core.env_server.http_server")
    from openenv.core import GenericEnvClient

    port = free_port()
    command = [sys.executable, "-m", "vlmenv", "serve-env", "VLM-REC-v0", "--port", str(port)]
    command += ["--coordinates", "norm1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert f"http://127.0.0.1:{port}" in server.stdout.readline()
            url = f"http://127.0.0.1:{port}"
            right = {"Authorization": f"Bearer {server_token()}"}
            with httpx2.Client(transport=httpx2.HTTPTransport(retries=8), base_url=url) as client:
                answer = client.post("/reset", json={"seed": 1}, headers=right)
                assert answer.json()["observation"]["messages"][-1]["role"] == "user"
                assert client.post("/reset", json={"seed": 1}).status_code == 401
                plain = right | {"Content-Type": "text/plain"}
                assert client.post("/reset", content="{}", headers=plain).status_code == 415
            with GenericEnvClient(base_url=url, headers=right).sync() as env:
                index = task.indices(1, seed=0)[0]
                env.reset(index=index)
                right_answer = task.task.write_answer(task.task.source.get(index))
                told = env.step({"text": right_answer})
                expected = task.score([right_answer], [index])[0].reward
                assert (told.done, told.reward) == (True, pytest.approx(expected, abs=1e-9))
        finally:
            server.terminate()
