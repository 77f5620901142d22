"""Videos through the real vLLM, in this process and as a server, against the trainer's own model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
import torch
from batches import logprobs_of
from servers import serve
from small_models import invent, show_videos, tell_processor
from test_families_videos import clip
from test_vllm import TOLERANCE, assert_alike, assert_in_step, by_engine, by_model, start

from vlmenv.agents.engines.base import Engine
from vlmenv.agents.engines.server import VLLMServerEngine
from vlmenv.agents.engines.teacher import ServerTeacher
from vlmenv.agents.families import FAMILIES
from vlmenv.agents.sampling import Sampling
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.core.errors import PromptError, ReadingError
from vlmenv.core.rollout import Observation
from vlmenv.core.video import Video

pytestmark = pytest.mark.vllm
UNEVEN = Video(clip(5, 96, 64).frames, np.array([0.0, 1 / 3, 0.9, 2.25, 7.1]), 8.0)
LATER = Video(UNEVEN.frames, 2 * UNEVEN.seconds + 0.13, 16.5)
"""the same frames at other times"""
GREEDY = Sampling(0.0, max_new_tokens=12)


def asked(*videos: Video, prompt: str = "What moves?") -> Observation:
    return {"images": (), "videos": videos, "prompt": prompt}


def batch() -> list[Observation]:
    """Clips of even and odd length, of one frame, and of more than vLLM would choose; two, and one beside images.

    Their texts stand before, between and after them. In groups, with prompts without videos among them.
    """
    still, image = clip(1, 50, 70), clip(2, 64, 64).frames[0]
    mixed: Observation = {
        "images": (image, image[::2]),
        "videos": (UNEVEN,),
        "prompt": "Is <image> in\n<video>, or <image>?",
    }
    plain: list[Observation] = [{"images": (image,), "prompt": "Locate it."}, {"images": (), "prompt": "2 and 3?"}]
    return [*[asked(clip(6, 64, 96))] * 3, *[mixed] * 2, asked(UNEVEN), asked(LATER), asked(still, UNEVEN), *plain]


@pytest.fixture(scope="module", params=["builtin", "qwen3_vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "builtin":
        return find_model("builtin")
    folder: Path = tmp_path_factory.mktemp("qwen3_vl")
    write("qwen3_vl", folder)
    # of which both take the size alone; the mean is that of images
    own = {"size": {"shortest_edge": 1024, "longest_edge": 30000}, "image_mean": [0.5, 0.5, 0.5]}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(own))
    return folder


def write(family: str, folder: Path) -> None:
    invent(family, folder, head=32)
    tell_processor(family, folder)
    show_videos(folder)


@pytest.fixture(scope="module", params=["in process", "server"])
def engine(request: pytest.FixtureRequest, folder: Path) -> Iterator[Engine]:
    family = VLMAgent.from_pretrained(folder).family
    with ExitStack() as opened:
        if request.param == "server":
            url = opened.enter_context(serve(folder, "--engine-length", "1024", "--engine-videos", "2")).url
            engine: Engine = VLLMServerEngine([url], folder, family)
        else:
            engine = start(VLMAgent.from_pretrained(folder), max_videos=2)
        opened.callback(engine.close)
        yield engine


@pytest.fixture
def agent(folder: Path, engine: Engine) -> VLMAgent:
    agent = VLMAgent.from_pretrained(folder, sampling=Sampling(max_new_tokens=12))
    agent.seed(0)
    agent.engine = engine
    agent.sync()
    return agent


def test_videos_are_in_step_before_and_after_each_update(agent: VLMAgent) -> None:
    assert_in_step(agent, batch())
    for _ in range(2):
        with torch.no_grad():
            for parameter in agent.policy.parameters():
                parameter.mul_(1.03)
        agent.sync()
        assert_in_step(agent, batch())


def test_a_long_clip_is_in_step(agent: VLMAgent) -> None:
    """vLLM itself would take 32 frames."""
    long = asked(clip(64, 64, 96))
    assert len(agent.encode([long])[0][0].images["image_grid_thw"]) == 1
    assert_in_step(agent, [long])


def test_the_same_frames_at_other_times_are_another_prompt(agent: VLMAgent) -> None:
    """Whichever comes first, whatever vLLM keeps of it."""
    for first, second in ((UNEVEN, LATER), (LATER, UNEVEN)):
        for video in (first, second, first):
            shown = [asked(video, prompt="What moves? " * 20)]
            assert_alike(by_engine(agent, shown, GREEDY), by_model(agent, shown, GREEDY))
    one, other = (by_engine(agent, [asked(video)], GREEDY).completions[0] for video in (UNEVEN, LATER))
    assert np.abs(one.logprobs[:1] - other.logprobs[:1]).max() > TOLERANCE


def test_more_videos_than_the_engine_takes_are_refused(agent: VLMAgent) -> None:
    with pytest.raises(PromptError, match="it has 3 videos, and the engine takes 2: raise --engine-videos"):
        agent.rollout([asked(UNEVEN, UNEVEN, LATER)])


def test_text_before_a_video_in_its_line_is_told(agent: VLMAgent) -> None:
    """Tokenizers join a space and the `<` of the time, which vLLM reads apart."""
    with pytest.raises(ReadingError, match="begin a line with <video>"):
        agent.rollout([asked(UNEVEN, prompt="Is <video> red?")])


def test_a_teacher_on_a_server_sees_videos(builtin: VLMAgent) -> None:
    shown = [asked(UNEVEN), asked(LATER)]
    rollout = builtin.rollout(shown)
    with serve("builtin", "--engine-length", "512") as served:
        teacher = ServerTeacher(served.url, builtin.family, builtin.encode)
        try:
            found = teacher.logprobs(rollout, shown)
        finally:
            teacher.close()
    builtin.family_policy.banned = torch.tensor([], dtype=torch.int64)  # which keep their small part on the server
    mask = builtin.logprobs(rollout).mask
    torch.testing.assert_close(found[mask], logprobs_of(builtin, rollout)[mask], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("name", "alike", "unlike"), [("qwen2_vl", 6, 8), ("qwen2_5_vl", 2, 8)])
def test_what_is_refused_differs(
    name: str, alike: int, unlike: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips of so many frames, 2 x 3 features each. With as many steps as these are wide, positions are the same.

    A failure here may mean that vLLM and transformers have come to agree, and these videos can go through vLLM.
    """
    monkeypatch.setattr(FAMILIES[name], "vllm_video_fault", None)
    write(name, tmp_path)
    agent = VLMAgent.from_pretrained(tmp_path, sampling=GREEDY)
    agent.engine = start(agent)
    try:
        for frames, same in ((alike, True), (unlike, False)):
            rollout = agent.rollout([asked(clip(frames, 64, 96))])
            expected = logprobs_of(agent, rollout)[0].numpy()
            found = rollout.completions[0].logprobs
            assert (np.abs(found - expected[: len(found)]).max() < TOLERANCE) == same
    finally:
        agent.close()
