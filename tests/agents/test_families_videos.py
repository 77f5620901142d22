"""Videos in the families that take them: text, pixels, positions, and the equality with transformers' own pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import shared
from small_models import from_published, invent, show_videos
from test_conformance import assert_alike, build, gradients, image
from torch import nn
from transformers import AutoTokenizer
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.video_utils import VideoMetadata

import vlmenv
from vlmenv.adapters.task import PortableTask
from vlmenv.agents.families import FAMILIES, weightless_family
from vlmenv.agents.families.base import Family
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.algos.batch import Rollouts
from vlmenv.building import check_videos
from vlmenv.core.errors import ConfigError, ModelError
from vlmenv.core.rollout import Observation, Rollout
from vlmenv.core.video import Video
from vlmenv.envs.video_qa import VideoQAEnv
from vlmenv.envs.vqa import VQAEnv
from vlmenv.options.task import TaskConfig

NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
PUBLISHED = ("published qwen2_5_vl", "published qwen3_vl")
TIMED = ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe", "published qwen3_vl")


def clip(frames: int, height: int, width: int, rate: float = 2.0) -> Video:
    rng = np.random.default_rng([frames, height, width])
    shown = rng.integers(256, size=(frames, height, width, 3), dtype=np.uint8)
    return Video(shown, np.arange(frames) / rate, frames / rate)


@pytest.fixture(scope="module", params=(*NAMES, *PUBLISHED))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def folder(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp(name.replace(" ", "_"))
    make: Callable[[str, Path], None] = from_published if name.startswith("published") else invent
    make(name.removeprefix("published "), folder)
    if not name.startswith("published"):  # which have no part for videos in their template
        show_videos(folder)
    return folder


@pytest.fixture
def agent(folder: Path) -> VLMAgent:
    return build(folder)


def prompts() -> list[Observation]:
    """Groups: a video; an image, a video of odd length between texts, and an image; an image; a text."""
    a: Observation = {"images": (), "videos": (clip(6, 64, 96),), "prompt": "What moves?"}
    b: Observation = {
        "images": (image((64, 64)), image((40, 120))),
        "videos": (clip(3, 96, 64, 0.5),),
        "prompt": "Is <image> in <video>, or <image>?",
    }
    c: Observation = {"images": (image((64, 96)),), "prompt": "Locate it."}
    d: Observation = {"images": (), "prompt": "How many is 2 and 3?"}
    return [a, a, b, b, c, d]


def rows_of(family: Family, rollout: Rollout) -> dict[str, torch.Tensor]:
    """The vision inputs of a batch as transformers names them, images and videos apart."""
    found: dict[str, list[torch.Tensor]] = {}
    seconds: list[float] = []
    shown = {"What": [2], "Is": [1, 2, 1], "Loca": [1], "How": []}  # kinds of media in reading order
    rates = {"What": [2.0], "Is": [0.5]}
    for index in rollout.prompt_index:
        prompt = rollout.prompts[index]
        text = family.processor.tokenizer.decode(prompt.input_ids)
        key = next(word for word in ("What", "Loca", "How", "Is") if f"{word}" in text.replace("assistant", ""))
        if not prompt.images:
            continue
        grids = prompt.images["image_grid_thw"]
        parts = prompt.images["pixel_values"].split(grids.prod(1).tolist())
        for kind, grid, part in zip(shown[key], grids, parts, strict=True):
            names = ("pixel_values", "image_grid_thw") if kind == 1 else ("pixel_values_videos", "video_grid_thw")
            found.setdefault(names[0], []).append(part)
            found.setdefault(names[1], []).append(grid[None])
        seconds += [2 / rate for rate in rates.get(key, [])]
    joined = {one: torch.cat(parts) for one, parts in found.items()}
    return joined | ({"second_per_grid_ts": torch.tensor(seconds)} if family.model_type == "qwen2_5_vl" else {})


def plain_logprobs(agent: VLMAgent, rollout: Rollout) -> list[torch.Tensor]:
    """Log-probabilities from transformers alone: prompt and completion in one row, padded, positions its own."""
    model = agent.family.model
    pairs = list(zip(rollout.prompt_index, rollout.completions, strict=True))
    rows = [torch.from_numpy(np.concatenate([rollout.prompts[i].input_ids, one.token_ids])) for i, one in pairs]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    types = (ids == model.config.image_token_id).int() + 2 * (ids == model.config.video_token_id).int()
    inputs = rows_of(agent.family, rollout)
    logits = model(input_ids=ids, attention_mask=mask, mm_token_type_ids=types, **inputs).logits
    logits[..., agent.family.banned_tokens] = -torch.inf
    logprobs = torch.log_softmax(logits / rollout.temperature, dim=-1)
    found = []
    for row, (i, one) in enumerate(pairs):
        start, tokens = len(rollout.prompts[i].input_ids) - 1, torch.from_numpy(one.token_ids)
        found.append(logprobs[row, start : start + len(tokens)].gather(-1, tokens[:, None])[:, 0])
    return found


@pytest.mark.slow
def test_a_shared_video_changes_neither_values_nor_gradients(agent: VLMAgent, name: str) -> None:
    """What is sampled, what is scored, and what transformers computes."""
    within = 1e-4 if "qwen3_5" in name else 1e-5
    rollout = agent.rollout(prompts())
    assert len(rollout.prompts) == 4
    for length, one in zip((6, 3, 5, 1, 4, 2), rollout.completions, strict=True):
        one.token_ids, one.logprobs = one.token_ids[:length], one.logprobs[:length]
    weights = torch.linspace(-1, 1, len(rollout))
    values = agent.logprobs(rollout).values
    grads = gradients(agent, (values * weights[:, None]).sum())
    plain = plain_logprobs(agent, rollout)
    expected = gradients(agent, sum((w * row.sum() for w, row in zip(weights, plain, strict=True)), torch.tensor(0.0)))
    for row, one in enumerate(rollout.completions):
        torch.testing.assert_close(values[row, : len(one.token_ids)], plain[row], atol=within, rtol=0)
        np.testing.assert_allclose(one.logprobs, plain[row].detach().numpy(), atol=within)
    assert_alike(grads, expected, within=within)


@pytest.mark.slow
def test_another_video_is_another_prompt(agent: VLMAgent) -> None:
    one, *_ = prompts()
    (video,) = one["videos"]
    later = Video(video.frames, video.seconds, 2 * video.duration)
    other = Video(255 - video.frames, video.seconds, video.duration)
    shown = [one, {**one, "videos": (video.copy(),)}, {**one, "videos": (later,)}, {**one, "videos": (other,)}]
    encoded, index = agent.encode(shown)
    assert index.tolist() == [0, 0, 1, 2]
    assert not torch.equal(encoded[0].images["pixel_values"], encoded[2].images["pixel_values"])
    agent.family_policy.share_prefixes = False
    repeated = agent.logprobs(agent.rollout(shown)).values
    assert repeated.isfinite().all()


@pytest.mark.slow
def test_text_pixels_and_lengths(folder: Path, name: str) -> None:
    """The text by hand, the patches by an own computation, and the number of tokens without pixels."""
    family = weightless_family(folder)
    video, side = clip(3, 64, 96), family.processor.image_processor.patch_size
    width, height = family.frame_size(video)
    features = (width // side // 2) * (height // side // 2)
    shown: Observation = {"images": (), "videos": (video,), "prompt": "Is <video> red?"}
    text = family.processor.tokenizer.decode(family.encode(shown).input_ids)
    pads = "<|video_pad|>" * features
    if name in TIMED:  # frames at 0, 0.5 and 1 second, the last one twice
        steps = "".join(f"<{at} seconds><|vision_start|>{pads}<|vision_end|>" for at in ("0.2", "1.0"))
        assert f"Is {steps} red?" in text
    else:
        assert f"Is <|vision_start|>{2 * pads}<|vision_end|> red?" in text
    assert family.lengths([shown]) == [len(family.encode(shown).input_ids)]
    assert family.read(shown).video_tokens == (2 * features,)


def test_pixels_are_those_of_the_frames(tmp_path: Path) -> None:
    invent("qwen3_vl", tmp_path)
    family = weightless_family(tmp_path)
    video = clip(3, 64, 96)
    inputs = family.process_video(video)
    assert inputs["image_grid_thw"].tolist() == [[2, 4, 6]]
    mean, std = (np.array(getattr(family.processor.image_processor, f"image_{one}")) for one in ("mean", "std"))
    frames = (video.frames[[0, 1, 2, 2]] / 255 - mean) / std
    # steps, frames of a step, rows and columns of merged patches, in them patches, and in these pixels
    grid = frames.reshape(2, 2, 2, 2, 16, 3, 2, 16, 3).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7).reshape(48, -1)
    np.testing.assert_allclose(inputs["pixel_values"].numpy(), grid, atol=1e-5)


def test_times_are_written_as_the_published_processors_write_them(tmp_path: Path) -> None:
    """Of a stored processor, whose video processor is not needed to write the text."""
    invent("qwen3_vl", tmp_path)
    family, video = weightless_family(tmp_path), clip(7, 64, 96, 1.7)
    standing_in = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    unchecked = type("Qwen3VLProcessor", (Qwen3VLProcessor,), {"check_argument_for_proper_class": lambda *_: None})
    processor = unchecked(family.processor.image_processor, AutoTokenizer.from_pretrained(tmp_path), standing_in)
    grid = family.process_video(video)["image_grid_thw"]
    metadata = VideoMetadata(total_num_frames=7, fps=1.7, frames_indices=list(range(7)))
    theirs = processor.replace_video_token({"video_grid_thw": grid, "video_metadata": [metadata]}, 0)
    assert family.expanded_video(video) == theirs


@pytest.mark.parametrize("name", ["published qwen2_5_vl", "published qwen3_vl"], indirect=True)
@pytest.mark.slow
def test_pixels_are_those_of_the_published_video_processor(name: str, folder: Path) -> None:
    """That one needs torchvision, whose bicubic interpolation differs from Pillow's by a rounding."""
    pytest.importorskip("torchvision")
    from transformers import AutoVideoProcessor

    published = AutoVideoProcessor.from_pretrained(shared(f"models/{name.removeprefix('published ')}"))
    family = weightless_family(folder)
    for video in (clip(6, 120, 200), clip(8, 56, 64), clip(4, 20, 300), clip(64, 500, 700)):
        frames = torch.from_numpy(video.frames).permute(0, 3, 1, 2)
        theirs = published(videos=[frames], do_sample_frames=False, return_tensors="pt")
        ours = family.process_video(video)
        assert ours["image_grid_thw"].tolist() == theirs["video_grid_thw"].tolist()
        assert (ours["pixel_values"] - theirs["pixel_values_videos"]).abs().mean() < 0.01


def test_other_families_refuse_videos_by_name() -> None:
    takes = {name for name, family in FAMILIES.items() if family.takes_videos}
    assert takes == set(NAMES)


def test_a_refusal_says_what_to_do(tmp_path: Path) -> None:
    invent("internvl", tmp_path)
    shown: Observation = {"images": (), "videos": (clip(2, 32, 32),), "prompt": "?"}
    with pytest.raises(ModelError, match=r"type internvl are not trained on videos.*Qwen3-VL.*frames as 'images'"):
        weightless_family(tmp_path).encode(shown)


def test_what_takes_no_videos_is_told_before_anything_runs(tmp_path: Path) -> None:
    invent("internvl", tmp_path)
    task = VideoQAEnv()
    check_videos(TaskConfig(), task)
    check_videos(TaskConfig(model=str(tmp_path)), VQAEnv())
    with pytest.raises(ModelError, match="not trained on videos here"):
        check_videos(TaskConfig(model=str(tmp_path)), task)
    with pytest.raises(ConfigError, match="VLM-VideoQA-v0 takes videos, and other trainers"):
        PortableTask("VLM-VideoQA-v0")


@pytest.mark.slow
def test_the_built_in_model_trains_on_clips_with_masked_frames(tmp_path: Path) -> None:
    """By PAPO, which looks at them masked; a batch is the same after a checkpoint."""
    small = {"steps": 1, "prompts_per_step": 1, "group_size": 2, "eval_limit": 0, "max_new_tokens": 8, "device": "cpu"}
    run = vlmenv.train(env="VLM-VideoQA-v0", algo="papo_g", video_frames=4, output=tmp_path / "run", **small)
    assert (run.path / "metrics.jsonl").read_text().count("\n") == 1
    agent = VLMAgent.from_pretrained("builtin", sampling=Sampling(max_new_tokens=4))
    shown: list[Observation] = [{"images": (), "videos": (clip(4, 32, 32),), "prompt": "?"}] * 2
    rollouts = Rollouts.scored(shown, agent.rollout(shown), np.zeros(2), {})
    again = Rollouts.from_state(rollouts.state_dict())
    assert again.observations() == rollouts.observations()
    assert again.observations()[0]["videos"] == shown[0]["videos"]
    assert again[:1].videos == rollouts.videos[:1]
    assert Rollouts.joined([rollouts, again]).videos == rollouts.videos * 2


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("<video> and <video>", "2 <video> marks for 1 videos"), ("<|video_pad|>", "control tokens")],
)
def test_marks_and_videos_must_agree(tmp_path: Path, prompt: str, message: str) -> None:
    invent("qwen3_vl", tmp_path)
    shown: Observation = {"images": (), "videos": (clip(2, 32, 32),), "prompt": prompt}
    with pytest.raises(ValueError, match=message):
        weightless_family(tmp_path).encode(shown)
