"""Videos for engines: whose go through vLLM, how they are sent, and what is refused. No vLLM is needed for that."""

from __future__ import annotations

import base64
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import stand_in_server
import torch
from accelerate import Accelerator
from safetensors.numpy import save
from small_models import invent, show_videos
from stand_in_server import Answering, agent_of
from test_families_videos import clip

import vlmenv
from vlmenv.agents.engines.base import Request
from vlmenv.agents.engines.checks import check_prompt
from vlmenv.agents.engines.teacher import ServerTeacher
from vlmenv.agents.engines.videos import FrameLoader, as_frames, packed
from vlmenv.agents.families import FAMILIES, weightless_family
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig
from vlmenv.building import check_videos
from vlmenv.cli import main
from vlmenv.core.errors import ConfigError, EngineError, PromptError, ReadingError
from vlmenv.core.rollout import Observation
from vlmenv.core.video import Video
from vlmenv.doctor import DoctorConfig, examine
from vlmenv.envs.making import make_envs
from vlmenv.envs.video_qa import VideoQAEnv
from vlmenv.options.task import EngineOptions, TaskConfig

opened, model, good = stand_in_server.opened, stand_in_server.model, stand_in_server.good
"""fixtures"""
SERVED = EngineOptions(engine="vllm-server", server=("http://127.0.0.1:1",))
UNEVEN = Video(clip(3, 100, 70).frames, np.array([0.1, 1 / 3, 7.25]), 8.0)


def asked(*videos: Video, prompt: str = "What moves?") -> Observation:
    return {"images": (), "videos": videos, "prompt": prompt}


def test_families_whose_videos_go_through_vllm() -> None:
    found = {name for name, family in FAMILIES.items() if family.takes_videos and family.vllm_video_fault is None}
    assert found == {"qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"}


@pytest.mark.parametrize("command", ["train", "eval", "sample", "vlmenv.train"])
def test_videos_that_vllm_reads_otherwise_are_refused_early(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before a server is asked: there is none at that address."""
    invent("qwen2_5_vl", tmp_path)
    server, told = "http://127.0.0.1:1", "videos of qwen2_5_vl go with engine hf, the model itself: vLLM counts"
    out = tmp_path / "run"
    if command == "vlmenv.train":
        with pytest.raises(ConfigError, match=told):
            vlmenv.train(
                env="VLM-VideoQA-v0",
                model=str(tmp_path),
                engine="vllm-server",
                server=[server],
                device="cpu",
                output=out,
            )
        return
    options = ["--env", "VLM-VideoQA-v0", "--model", str(tmp_path), "--engine", "vllm-server", "--server", server]
    with pytest.raises(SystemExit):
        main([command, *options, "--device", "cpu", "--output", str(out)])
    assert told in " ".join(capsys.readouterr().err.split())


@pytest.mark.slow
def test_the_doctor_tells_of_them(tmp_path: Path) -> None:
    invent("qwen2_5_vl", tmp_path)
    config = DoctorConfig(env="VLM-VideoQA-v0", model=str(tmp_path), device="cpu", generation=SERVED)
    findings = {one.check: one for one in examine(config, torch.device("cpu"))}
    assert "videos of qwen2_5_vl go with engine hf" in str(findings["samples"])


def test_other_families_and_engines_are_looked_at_where_they_are_known(tmp_path: Path) -> None:
    check_videos(TaskConfig(generation=SERVED), VideoQAEnv())
    invent("qwen2_vl", tmp_path)
    with pytest.raises(
        ConfigError, match=r"videos of qwen2_vl go with .* last step in time, transformers from the size"
    ):
        check_videos(TaskConfig(model=str(tmp_path), generation=SERVED), VideoQAEnv())
    check_videos(TaskConfig(model=str(tmp_path), generation=EngineOptions(engine="my_engine:Mine")), VideoQAEnv())


def test_an_engine_without_videos_is_refused_before_training_and_by_prompt() -> None:
    agent = VLMAgent.from_pretrained("builtin")
    agent.engine = SimpleNamespace(max_length=2048, max_images=None, max_videos=0)  # type: ignore[assignment]
    with pytest.raises(PromptError, match="it has 1 videos, and the engine takes 0"):
        agent.rollout([asked(clip(4, 32, 32))])
    envs = make_envs("VLM-VideoQA-v0", 2, group_size=2)
    with pytest.raises(ConfigError, match="the task takes videos, and the engine none"):
        Trainer(agent, envs, GRPO(GRPOConfig(group_size=2)), TrainerConfig(), Accelerator(cpu=True))
    agent.check_episodes(1, 8)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen3_vl"])
def test_engines_are_told_one_mark_for_each_video(name: str, tmp_path: Path) -> None:
    """A video token alone. vLLM's processor puts what encloses the steps of Qwen3-VL in its place."""
    invent(name, tmp_path)
    show_videos(tmp_path)
    family = weightless_family(tmp_path)
    request = Request(family.encode(asked(clip(3, 64, 96), clip(2, 64, 64))), ())
    decode = family.processor.tokenizer.decode
    start, between, end = decode(request.token_ids).split("<|video_pad|>")
    texts = [family.expanded_video(one) for one in (clip(3, 64, 96), clip(2, 64, 64))]
    assert start + texts[0] + between + texts[1] + end == decode(request.prompt.input_ids)


def test_a_server_reads_the_frames_and_times_that_vllm_in_process_is_given() -> None:
    family = weightless_family(find_model("builtin"))
    data = packed(family, UNEVEN)
    frames, metadata = FrameLoader.load_bytes(data, num_frames=32, fps=2)
    ours, told = as_frames(family, UNEVEN)
    assert np.array_equal(frames, ours)
    assert metadata == told
    assert frames.shape == (3, *family.frame_size(UNEVEN)[::-1], 3)
    assert [number / metadata["fps"] for number in metadata["frames_indices"]] == UNEVEN.seconds.tolist()


FRAMES, SECONDS = np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2)
BROKEN = {
    "a file": (b"\x00\x00\x00\x18ftypmp42", "as trainers of vlmenv send them"),
    "no times": (save({"frames": FRAMES}), "not frames"),
    "an image": (save({"frames": FRAMES[0], "seconds": SECONDS}), r"not uint8 \[4, 4, 3\] with float64 \[2\]"),
    "no frames": (save({"frames": FRAMES[:0], "seconds": SECONDS[:0]}), r"not uint8 \[0, 4, 4, 3\]"),
    "floats": (save({"frames": FRAMES.astype(np.float32), "seconds": SECONDS}), "not float32"),
    "more times": (save({"frames": FRAMES, "seconds": np.zeros(3)}), r"with float64 \[3\]"),
    "whole times": (save({"frames": FRAMES, "seconds": np.zeros(2, np.int64)}), "with int64"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_server_refuses_other_bytes(name: str) -> None:
    data, message = BROKEN[name]
    with pytest.raises(ValueError, match=message):
        FrameLoader.load_bytes(data)


@pytest.mark.slow
def test_videos_go_to_servers_behind_the_images(good: Answering, opened: ExitStack) -> None:
    agent, image = agent_of(opened, good.url), UNEVEN.frames[0]
    shown: Observation = {"images": (image,), "videos": (UNEVEN, clip(2, 64, 64)), "prompt": "Which?"}
    with pytest.raises(EngineError, match="encodes a prompt differently"):  # it leaves one token for each
        agent.act([shown])
    (body,) = [body for path, body in good.asked if path.endswith("generate")]
    assert [part["type"] for part in body["content_parts"]] == ["image_url", "video_url", "video_url"]
    urls = [part["url"].removeprefix("data:video/x-vlmenv;base64,") for part in body["content_parts"][1:]]
    for url, video in zip(urls, shown["videos"], strict=True):
        frames, metadata = FrameLoader.load_bytes(base64.b64decode(url, validate=True))
        assert np.array_equal(frames, agent.family.resized_frames(video))
        assert metadata["frames_indices"] == video.seconds.tolist()
    with pytest.raises(PromptError, match="it has 3 videos, and the engine takes 2: raise --engine-videos"):
        agent.act([asked(UNEVEN, UNEVEN, UNEVEN)])


def test_the_server_with_the_fewest_videos_decides(good: Answering, model: dict[str, Any], opened: ExitStack) -> None:
    other = opened.enter_context(stand_in_server.answering(Answering({**model, "videos": 1})))
    agent = agent_of(opened, good.url, other.url)
    with pytest.raises(PromptError, match="it has 2 videos, and the engine takes 1"):
        agent.act([asked(UNEVEN, UNEVEN)])


def test_a_teacher_on_a_server_is_shown_videos(builtin: VLMAgent, good: Answering, opened: ExitStack) -> None:
    shown = [asked(UNEVEN)]
    rollout = builtin.imitate(shown, ["red"])
    teacher = ServerTeacher(good.url, builtin.family, builtin.encode)
    opened.callback(teacher.close)
    with pytest.raises(EngineError, match="encodes a prompt differently"):  # it leaves one token for each video
        teacher.logprobs(rollout, shown)
    (body,) = [body for path, body in good.asked if path.endswith("generate")]
    assert [part["type"] for part in body["content_parts"]] == ["video_url"]
    good.model["videos"] = 0
    other = ServerTeacher(good.url, builtin.family, builtin.encode)
    opened.callback(other.close)
    with pytest.raises(ConfigError, match="the teacher's server takes no videos"):
        other.logprobs(rollout, shown)


def test_text_before_a_video_is_told_where_readings_differ(builtin: VLMAgent) -> None:
    prompt = builtin.family.encode(asked(UNEVEN, prompt="Is <video> red?"))
    other = prompt.input_ids[:-1].tolist()
    with pytest.raises(ReadingError, match="text apart from the time of a video behind it: begin a line with <video>"):
        check_prompt(Request(prompt, (), (UNEVEN,)), other)
    with pytest.raises(ReadingError, match="processors or chat templates differ"):
        check_prompt(Request(prompt, ()), other)
