"""What every family of models must do: one suite, on small random models of each.

Invented tokenizers and processors, and published ones where they lie beside the checkout.
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import logprobs_of, loss_of, optimizer_of, train, weights_of
from small_models import PLACES, from_published, invent, published_processor
from tapes import on_tapes
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForImageTextToText
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.gemma4 import image_processing_pil_gemma4
from transformers.models.glm4v.processing_glm4v import Glm4vProcessor
from transformers.models.glm46v.processing_glm46v import Glm46VProcessor
from transformers.models.idefics3.processing_idefics3 import Idefics3Processor
from transformers.models.internvl.processing_internvl import InternVLProcessor
from transformers.models.llava_onevision.processing_llava_onevision import LlavaOnevisionProcessor
from transformers.models.pixtral import image_processing_pil_pixtral
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.processing_qwen2_vl import Qwen2VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.processing_smolvlm import SmolVLMProcessor
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available

from vlmenv.agents.checkpoints import load_model
from vlmenv.agents.families import FAMILIES, Processor, coordinate_space, family_of, resize_rule
from vlmenv.agents.families.base import Family
from vlmenv.agents.passes import Steps
from vlmenv.agents.policy import Policy
from vlmenv.agents.published import PublishedProcessor
from vlmenv.agents.quantization import quantize
from vlmenv.agents.sampling import PassLimits, state_bytes, token_bytes
from vlmenv.agents.vlm import Sampling, VLMAgent
from vlmenv.core.errors import ConfigError, ModelError, PromptError
from vlmenv.core.rollout import IMAGE_MARK, Observation, Rollout, Turn

if not is_torchvision_available():  # which these processors want only for functions that Pillow's parts have too
    sys.modules["transformers.models.pixtral.image_processing_pixtral"] = image_processing_pil_pixtral
    sys.modules["transformers.models.gemma4.image_processing_gemma4"] = image_processing_pil_gemma4
from transformers.models.gemma4.processing_gemma4 import Gemma4Processor
from transformers.models.pixtral.processing_pixtral import PixtralProcessor

pytestmark = pytest.mark.slow

Shape = tuple[int, int]


@dataclass(frozen=True)
class Case:
    """A model of a family, and what is known of it from elsewhere than from the family."""

    processor: type[ProcessorMixin]
    """the published class"""
    coordinates: str
    never: tuple[str, ...]
    """tokens that no answer may hold, nor the text of a prompt"""
    end: tuple[str, ...]
    counts: dict[Shape, int]
    """features of images of some heights and widths, by hand"""
    vision: str = r"model\.visual\."
    """names of the weights of vision tower and projectors"""
    projector: str = r"model\.visual\.merger\."
    blocks: str = r"model\.(visual\.blocks|language_model\.layers)\.\d+"
    shapes: tuple[Shape, Shape, Shape] = ((64, 96), (40, 120), (64, 64))
    """height and width of the images that log-probabilities are computed with"""
    processor_arguments: dict[str, Any] = field(default_factory=dict)
    within: float = 1e-5
    """largest difference in float32"""
    unused: str = "^$"
    """names of the weights that no pass uses"""
    layers: int = 2
    """blocks of the language model"""


QWEN_TOKENS = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>")
CROP_TOKENS = ("<image>", "<fake_token_around_image>", "<global-img>", *PLACES)
TILE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>", "<|im_start|>")
qwen = functools.partial(Case, never=QWEN_TOKENS, end=("<|im_end|>",), counts={(64, 96): 6, (256, 256): 36})
tiles = functools.partial(
    Case,
    InternVLProcessor,
    "norm1000",
    TILE_TOKENS,
    ("<|im_end|>",),
    vision=r"model\.(vision_tower|multi_modal_projector)\.",
    projector=r"model\.multi_modal_projector\.",
    blocks=r"model\.(vision_tower\.encoder\.layer|language_model\.layers)\.\d+",
)
crops = functools.partial(
    Case,
    coordinates="norm1000",
    never=CROP_TOKENS,
    end=("<end_of_utterance>",),
    vision=r"model\.(vision_model|connector)\.",
    projector=r"model\.connector\.",
    blocks=r"model\.(vision_model\.encoder|text_model)\.layers\.\d+",
)
glm = functools.partial(
    Case,
    coordinates="norm1000",
    never=("<|image|>", "<|video|>", "<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "[gMASK]"),
    end=("<|user|>",),
    counts={(64, 96): 6},
    projector=r"model\.visual\.(merger|downsample)\.",
)
gemma4 = functools.partial(
    Case,
    Gemma4Processor,
    "norm1000",
    ("<|image|>", "<|image>", "<image|>", "<|audio|>", "<|audio>", "<|video|>", "<bos>", "<|turn>"),
    ("<turn|>",),
    # Enlarged to at most 70 features of 16 x 16 pixels: 6 x 10 of 64 x 96, and 4 x 14 of 40 x 120.
    {(64, 96): 6 * 10, (40, 120): 4 * 14, (200, 200): 8 * 8},
    vision=r"model\.(vision_tower|embed_vision)\.",
    projector=r"model\.embed_vision\.",
    blocks=r"model\.(vision_tower\.encoder|language_model)\.layers\.\d+",
)
DEEPSTACK = r"model\.visual\.(deepstack_)?merger"
CASES = {
    "qwen2_vl": qwen(Qwen2VLProcessor, "norm1000"),
    "qwen2_5_vl": qwen(Qwen2_5_VLProcessor, "resized"),
    "qwen3_vl": qwen(Qwen3VLProcessor, "norm1000", projector=DEEPSTACK),
    "qwen3_vl_moe": qwen(Qwen3VLProcessor, "norm1000", projector=DEEPSTACK),
    "qwen3_5": qwen(Qwen3VLProcessor, "norm1000", within=1e-4),
    "qwen3_5_moe": qwen(Qwen3VLProcessor, "norm1000", within=1e-4),
    # Tiles of 4 x 4 patches, merged by 2 x 2: 4 features each, and a tile of the whole where there are several.
    "internvl": tiles(
        counts={(64, 96): (4 + 1) * 4, (40, 120): (3 + 1) * 4, (16, 16): 4},
        processor_arguments={"image_seq_length": 4},
    ),
    **{
        f"internvl {text}": tiles(
            counts={(64, 96): (4 + 1) * 4, (16, 16): 4}, processor_arguments={"image_seq_length": 4}
        )
        for text in ("qwen3", "qwen3_moe")
    },
    # Brought to a longest side of 64, and then to whole crops of 32: 4 features each, and a crop of the whole.
    "idefics3": crops(
        Idefics3Processor,
        counts={(64, 96): (4 + 1) * 4, (40, 120): (2 + 1) * 4},
        processor_arguments={"image_seq_len": 4},
    ),
    "smolvlm": crops(
        SmolVLMProcessor,
        counts={(64, 96): (4 + 1) * 4, (40, 120): (2 + 1) * 4},
        processor_arguments={"image_seq_len": 4},
    ),
    "glm4v": glm(Glm4vProcessor),
    "glm4v_moe": glm(Glm4vProcessor),
    "glm46v": glm(Glm46VProcessor),
    # 4 x 4 patches, averaged by 2 x 2, whatever the size. Two layers, the first of which sees 12 tokens.
    "gemma3": Case(
        Gemma3Processor,
        "norm1000",
        ("<image_soft_token>", "<start_of_image>", "<end_of_image>", "<start_of_turn>", "<bos>"),
        ("<end_of_turn>",),
        {(64, 96): 4, (300, 20): 4},
        vision=r"model\.(vision_tower|multi_modal_projector)\.",
        projector=r"model\.multi_modal_projector\.",
        blocks=r"model\.(vision_tower\.encoder|language_model)\.layers\.\d+",
        processor_arguments={"image_seq_length": 4},
    ),
    # The later half of the layers takes keys and values of the earlier.
    "gemma4": gemma4(layers=4),
    "gemma4 experts": gemma4(),
    # 2 x 2 patches of 8: a feature for each 16 pixels.
    "mistral3": Case(
        PixtralProcessor,
        "norm1000",
        ("[IMG]", "[IMG_BREAK]", "[IMG_END]", "[INST]", "[/INST]", "<s>"),
        ("</s>",),
        {(64, 96): 24, (40, 120): 2 * 6, (192, 96): 6 * 3},
        vision=r"model\.(vision_tower|multi_modal_projector)\.",
        projector=r"model\.multi_modal_projector\.",
        blocks=r"model\.(vision_tower\.transformer|language_model)\.layers\.\d+",
        processor_arguments={"patch_size": 8, "spatial_merge_size": 2},
    ),
    # Tiles of 4 x 4 features, the whole first, with an end of line each.
    "llava_onevision": Case(
        LlavaOnevisionProcessor,
        "norm1000",
        ("<image>", "<video>", "<|im_start|>"),
        ("<|im_end|>",),
        {(32, 32): 16 + 4 * 5, (64, 32): 16 + 8 * 5, (96, 96): 16 + 12 * 13},
        vision=r"model\.(vision_tower|multi_modal_projector|image_newline)",
        projector=r"model\.(multi_modal_projector|image_newline)",
        blocks=r"model\.(vision_tower\.encoder|language_model)\.layers\.\d+",
        processor_arguments={
            "num_image_tokens": 16,
            "vision_feature_select_strategy": "full",
            "vision_aspect_ratio": "anyres_max_9",
        },
        unused=r"model\.vision_tower\.post_layernorm\.",
    ),
    "published qwen2_5_vl": qwen(
        Qwen2_5_VLProcessor, "resized", end=("<|im_end|>", "<|endoftext|>"), counts={(480, 640): 391, (960, 1280): 1564}
    ),
    "published qwen3_vl": qwen(
        Qwen3VLProcessor,
        "norm1000",
        end=("<|im_end|>", "<|endoftext|>"),
        counts={(480, 640): 300, (960, 1280): 1200},
        projector=DEEPSTACK,
    ),
    "published internvl3_hf": tiles(
        counts={(480, 640): 13 * 256, (448, 448): 256},
        shapes=((64, 64), (40, 80), (64, 64)),
        processor_arguments={"image_seq_length": 256},
    ),
    "published smolvlm": crops(
        Idefics3Processor,
        counts={(480, 640): 13 * 64},
        shapes=((32, 128), (40, 160), (128, 32)),
        processor_arguments={"image_seq_len": 64},
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a case's model."""

    @functools.cache
    def make(name: str) -> Path:
        folder: Path = tmp_path_factory.mktemp(name.replace(" ", "_"))
        if name.startswith("published "):
            from_published(name.removeprefix("published "), folder)
        else:
            invent(name, folder)
        return folder

    return make


@functools.cache
def processor_of(folder: Path) -> Processor:
    return Processor.from_pretrained(folder)


@pytest.fixture(params=CASES, scope="module")
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def case(name: str) -> Case:
    return CASES[name]


@pytest.fixture(scope="module")
def folder(name: str, folders: Callable[[str], Path]) -> Path:
    return folders(name)


def build(folder: Path, weights: Path | None = None) -> VLMAgent:
    """An agent as `from_pretrained` makes it, but for the processor, which is loaded once."""
    model = load_model(weights or folder, torch.float32).eval()
    family = family_of(model.config.model_type)(model, processor_of(folder))
    agent = VLMAgent(family, folder, sampling=Sampling(0.8, max_new_tokens=6))
    agent.seed(0)
    return agent


@pytest.fixture
def agent(folder: Path) -> VLMAgent:
    return build(folder)


def image(shape: Shape) -> np.ndarray:
    return np.random.default_rng(shape).integers(256, size=(*shape, 3), dtype=np.uint8)


def prompts(case: Case) -> list[Observation]:
    """Groups of a prompt with one image, of a longer one with two between its texts, and of a text."""
    first, *others = map(image, case.shapes)
    a: Observation = {"images": (first,), "prompt": "Locate the red circle."}
    b: Observation = {"images": tuple(others), "prompt": "Which is larger, <image> or <image>, and how much?"}
    c: Observation = {"images": (), "prompt": "How many is 2 and 3?"}
    return [a, a, b, b, c]


def conversations(case: Case) -> list[tuple[Observation, list[dict[str, Any]]]]:
    """Observations, each with the messages that it stands for, written out by hand."""
    first, *others = map(image, case.shapes)
    shown: dict[str, Any] = {"type": "image"}

    def turn(role: str, *parts: str | dict[str, Any]) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}

    earlier: tuple[Turn, ...] = (
        {"role": "system", "text": "Be brief."},
        {"role": "user", "text": "<image>Is it larger than <image>?"},
        {"role": "assistant", "text": "No."},
    )
    said = [
        turn("system", "Be brief."),
        turn("user", shown, "Is it larger than ", shown, "?"),
        turn("assistant", "No."),
    ]
    return [
        ({"images": (*others, first), "prompt": "Locate it."}, [turn("user", shown, shown, shown, "Locate it.")]),
        ({"images": (first,), "prompt": "Locate it: <image>"}, [turn("user", "Locate it: ", shown)]),
        (
            {"images": (*others, first), "prompt": "<image> or <image><image>\n?"},
            [turn("user", shown, " or ", shown, shown, "\n?")],
        ),
        (
            {"images": (*others, first), "prompt": "And\n<image>?", "turns": earlier},
            [*said, turn("user", "And\n", shown, "?")],
        ),
        ({"images": (first,), "prompt": "Why?", "turns": earlier[:1]}, [said[0], turn("user", shown, "Why?")]),
    ]


@pytest.fixture(scope="module")
def rollout(folder: Path, name: str) -> Rollout:
    """Sampled completions, cut so that their lengths differ."""
    result = build(folder).rollout(prompts(CASES[name]))
    for length, completion in zip((6, 3, 5, 1, 4), result.completions, strict=True):
        completion.token_ids, completion.logprobs = completion.token_ids[:length], completion.logprobs[:length]
    return result


def plain_logprobs(agent: VLMAgent, rollout: Rollout) -> list[torch.Tensor]:
    """Log-probabilities from transformers alone: prompt and completion in one row, padded, positions its own."""
    model, sequences = agent.family.model, []
    for index, completion in zip(rollout.prompt_index, rollout.completions, strict=True):
        sequences.append(torch.from_numpy(np.concatenate([rollout.prompts[index].input_ids, completion.token_ids])))
    ids = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in sequences], batch_first=True)
    starts = [len(rollout.prompts[index].input_ids) - 1 for index in rollout.prompt_index]
    columns = sorted({start + i for start in starts for i in range(6) if start + i < ids.shape[1]})
    inputs = images_per_row(agent.family, [rollout.prompts[index].images for index in rollout.prompt_index])
    inputs |= agent.family.unpacked_arguments(ids)
    if hasattr(model.model, "get_rope_index"):
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=torch.tensor(columns), **inputs).logits
    logits[..., agent.family.banned_tokens] = -torch.inf
    logprobs = torch.log_softmax(logits / rollout.temperature, dim=-1)
    return [
        logprobs[row, columns.index(start) : columns.index(start) + len(completion.token_ids)].gather(
            -1, torch.from_numpy(completion.token_ids)[:, None]
        )[:, 0]
        for row, (start, completion) in enumerate(zip(starts, rollout.completions, strict=True))
    ]


def images_per_row(family: Family, rows: list[Any]) -> dict[str, torch.Tensor]:
    """Vision inputs of a batch of rows, as the published processors lay them out."""
    if not family.model_type.startswith(("idefics3", "smolvlm")):
        names = {name for images in rows for name in images}
        return {name: torch.cat([images[name] for images in rows if images]) for name in names}
    crops = [images["pixel_values"][:, 0] if images else torch.zeros(0, 3, 1, 1) for images in rows]
    size = max(crop.shape[-1] for crop in crops)
    values = torch.zeros(len(rows), max(map(len, crops)), 3, size, size)
    mask = torch.zeros(*values.shape[:2], size, size, dtype=torch.long)
    for row, crop in enumerate(crops):
        if len(crop):
            values[row, : len(crop)], mask[row, : len(crop)] = crop, 1
    return {"pixel_values": values, "pixel_attention_mask": mask}


def gradients(agent: VLMAgent, loss: torch.Tensor) -> dict[str, torch.Tensor | None]:
    agent.policy.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in agent.policy.named_parameters()}


def assert_alike(
    actual: dict[str, torch.Tensor | None], expected: dict[str, torch.Tensor | None], within: float
) -> None:
    """Gradients differ by no more than a share of the largest."""
    largest = max(float(gradient.abs().max()) for gradient in expected.values() if gradient is not None)
    assert largest > 0
    for name, gradient in expected.items():
        assert (actual[name] is None) == (gradient is None), name
        if gradient is not None:
            assert (actual[name] - gradient).abs().max() <= within * largest, name


def test_every_family_is_in_the_suite() -> None:
    ours = {name for name, family in FAMILIES.items() if family.__module__.startswith("vlmenv.")}
    assert ours <= CASES.keys()


def test_what_is_sampled_is_what_is_scored_and_what_transformers_computes(
    agent: VLMAgent, rollout: Rollout, case: Case
) -> None:
    """Values and gradients: a shared prompt changes neither."""
    assert len(rollout.prompts) == 3
    assert len({len(prompt.input_ids) for prompt in rollout.prompts}) == 3
    weights = torch.linspace(-1, 1, len(rollout))
    values = agent.logprobs(rollout).values
    shared = gradients(agent, (values * weights[:, None]).sum())
    plain = plain_logprobs(agent, rollout)
    expected = gradients(
        agent, sum((weight * row.sum() for weight, row in zip(weights, plain, strict=True)), torch.tensor(0.0))
    )
    for row, completion in enumerate(rollout.completions):
        length = len(completion.token_ids)
        torch.testing.assert_close(values[row, :length], plain[row], atol=case.within, rtol=0)
        np.testing.assert_allclose(completion.logprobs, plain[row].detach().numpy(), atol=case.within)
        assert not values[row, length:].any()
    assert_alike(shared, expected, within=case.within)


@pytest.mark.parametrize(
    "limits", [PassLimits(rows=1), PassLimits(rows=2), PassLimits(tokens=1), PassLimits(None, 10**9)]
)
def test_prompts_that_run_in_several_passes_give_the_same_completions(
    agent: VLMAgent, case: Case, limits: PassLimits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass holds no more prompts than it may; a prompt that a group shares runs once."""
    agent.seed(3)
    whole = agent.rollout(prompts(case))
    passes: list[int] = []
    prefill = Policy.prefill

    def noting(self: Policy, own: Any) -> Any:
        passes.append(len(own))
        return prefill(self, own)

    monkeypatch.setattr(Policy, "prefill", noting)
    agent.seed(3)
    agent.limits = limits
    parts = agent.rollout(prompts(case))
    assert passes == {1: [1, 1, 1], 2: [2, 1], None: [1, 1, 1] if limits.tokens == 1 else [3]}[limits.rows]
    assert parts.texts == whole.texts
    for ours, theirs in zip(parts.completions, whole.completions, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=0 if len(passes) == 1 else 1e-5)


def test_replayed_steps_give_the_same_completions(
    folder: Path, name: str, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With adapters, caches that grow, and completions that leave."""
    agent = adapted(folder)
    monkeypatch.setattr(Steps, "GROWTH", 12)
    agent.sampling = Sampling(0.0, max_new_tokens=24)
    first = agent.rollout(prompts(case)).completions[0].token_ids.tolist()
    monkeypatch.setitem(vars(agent.family), "end_tokens", (max(first, key=first.index),))
    right = agent.rollout(prompts(case))
    with on_tapes() as replays:
        found = agent.rollout(prompts(case))
    assert agent.family_policy.graph_fault == ""
    assert sum(replays) > 3
    for ours, theirs in zip(found.completions, right.completions, strict=True):
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        within = 5e-6 if name.startswith("gemma4") else 2e-6  # float32 rounds to 5e-7 here
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=within, rtol=0)


@torch.no_grad()
def test_what_prompts_leave_takes_the_bytes_that_are_counted(agent: VLMAgent, case: Case) -> None:
    encoded, _ = agent.encode(prompts(case))
    prefixes, _ = agent.family_policy.prefill(encoded)
    held = [one for past in prefixes.past.values() for one in past.tensors]
    config, rows = agent.family.model.config, len(encoded)
    tokens = rows * prefixes.packing.longest
    counted = tokens * token_bytes(config, torch.float32) + rows * state_bytes(config, torch.float32)
    assert sum(one.numel() * one.element_size() for one in held) == counted


def test_a_group_is_the_same_alone_as_among_its_neighbours(agent: VLMAgent, rollout: Rollout, case: Case) -> None:
    """Nothing of a packed neighbour is seen: no key, no window that reaches into it, and no state."""
    together = logprobs_of(agent, rollout)
    for index in range(len(rollout.prompts)):
        rows = np.flatnonzero(rollout.prompt_index == index)
        alone = logprobs_of(agent, rollout[rows[0] : rows[-1] + 1])
        torch.testing.assert_close(alone, together[rows][:, : alone.shape[1]], atol=case.within, rtol=0)


class InDouble(TorchFunctionMode):
    """Computes in float64 where a model's own code casts to float32."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        function = torch.Tensor.double if function is torch.Tensor.float else function
        given = [torch.float64 if one is torch.float32 else one for one in args]
        named = {name: torch.float64 if one is torch.float32 else one for name, one in (kwargs or {}).items()}
        return function(*given, **named)


def test_in_float64_a_shared_prompt_is_exact(agent: VLMAgent, rollout: Rollout) -> None:
    agent.family.model.double()
    agent.family.model.set_experts_implementation("eager")  # the grouped product of experts is for float32 alone
    images = [{name: in_double(value) for name, value in one.images.items()} for one in rollout.prompts]
    prompts = [replace(one, images=own) for one, own in zip(rollout.prompts, images, strict=True)]
    exact, weights = replace(rollout, prompts=prompts), torch.linspace(-1, 1, len(rollout), dtype=torch.float64)
    with InDouble():
        values, plain = agent.logprobs(exact).values, plain_logprobs(agent, exact)
        losses = (values * weights[:, None]).sum(), sum(w * row.sum() for w, row in zip(weights, plain, strict=True))
        shared, expected = (gradients(agent, loss) for loss in losses)
    for row, right in enumerate(plain):
        torch.testing.assert_close(values[row, : len(right)], right, atol=1e-12, rtol=1e-12)
    assert_alike(shared, expected, within=1e-12)


def adapted(folder: Path, quantization: Any = None, *, published: bool = False) -> VLMAgent:
    """An agent with adapters that change it, perhaps over weights as they are published, in bfloat16."""
    pytest.importorskip("peft")
    agent = build(folder)
    with torch.no_grad():
        for parameter in agent.family.model.parameters() if published else ():
            parameter.copy_(parameter.bfloat16())
    if quantization is not None:
        assert quantize(agent.family, quantization, agent.device, vision=True) > 8
    torch.manual_seed(0)
    agent.add_lora(rank=4, alpha=8, vision=True)
    for parameter in agent.parameters():
        nn.init.normal_(parameter, std=0.05)
    return agent


@pytest.mark.parametrize("kind", ["lora", "vision"])
def test_frozen_weights_in_bfloat16_change_no_bit(folder: Path, case: Case, kind: str) -> None:
    """Under autocast: what is sampled, log-probabilities and gradients."""
    found: list[list[torch.Tensor]] = []
    for narrow in (False, True):
        agent = adapted(folder, published=True) if kind == "lora" else build(folder)
        if kind == "vision":
            with torch.no_grad():
                for parameter in agent.parameters():
                    parameter.copy_(parameter.bfloat16())
            agent.freeze(vision=True, projector=True)
        if narrow:
            assert agent.hold("frozen") == 0
            types = {one.dtype for one in agent.policy.parameters() if not one.requires_grad}
            assert types == {torch.float32, torch.bfloat16}
        with torch.autocast("cpu", torch.bfloat16):
            sampled = agent.rollout(prompts(case))
            loss = loss_of(agent, sampled)
        grads = [one for one in gradients(agent, loss).values() if one is not None]
        found.append([loss.detach(), *(torch.from_numpy(one.logprobs) for one in sampled.completions), *grads])
    assert len(found[0]) == len(found[1]) > 10
    assert all(map(torch.equal, *found))


QUANTISED = [(name, "nf4") for name in CASES if not name.startswith("published")]
"""Which layers are quantised depends on the family alone, so int8 has a dense model and one with experts."""


@pytest.mark.parametrize(
    ("name", "quantization"), [*QUANTISED, ("qwen3_vl", "int8"), ("qwen3_vl_moe", "int8")], indirect=["name"]
)
def test_over_a_quantised_base_a_shared_prompt_is_exact(folder: Path, rollout: Rollout, quantization: str) -> None:
    """Values and gradients are those of transformers alone, on the same quantised model."""
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    agent, weights = adapted(folder, quantization), torch.linspace(-1, 1, len(rollout))
    values = agent.logprobs(rollout).values
    shared = gradients(agent, (values * weights[:, None]).sum())
    plain = plain_logprobs(agent, rollout)
    expected = gradients(
        agent, sum((weight * row.sum() for weight, row in zip(weights, plain, strict=True)), torch.tensor(0.0))
    )
    for row, right in enumerate(plain):
        torch.testing.assert_close(values[row, : len(right)], right, atol=1e-5, rtol=0)
    assert_alike(shared, expected, within=1e-5)
    unquantised = logprobs_of(adapted(folder), rollout)
    assert (unquantised - values).abs().max() > 1e-4


def in_double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def test_repeating_prompts_gives_the_same(agent: VLMAgent, rollout: Rollout) -> None:
    """The plain way, which can be asked for."""
    weights = torch.linspace(-1, 1, len(rollout))
    found = []
    for agent.family_policy.share_prefixes in (True, False):
        result = agent.logprobs(rollout)
        found.append((result, gradients(agent, (result.values * weights[:, None]).sum())))
    torch.testing.assert_close(found[1][0].values, found[0][0].values, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1][0].entropy, found[0][0].entropy, atol=1e-4, rtol=1e-4)
    assert torch.equal(found[1][0].mask, found[0][0].mask)
    assert_alike(found[1][1], found[0][1], within=1e-5)


def test_a_frozen_vision_tower_sees_each_prompt_once(agent: VLMAgent, case: Case) -> None:
    """In rollout, update and reference together; and what it saw serves as well as if it looked again."""
    agent.freeze(vision=True, projector=True)
    reference, runs = agent.reference(), []
    agent.family.vision_tower().register_forward_hook(lambda *_: runs.append(1))
    rollout = agent.rollout(prompts(case))
    kept = agent.logprobs(rollout), reference.logprobs(rollout)
    assert len(runs) == 2  # of three prompts, one is a text
    fresh = replace(rollout, prompts=[replace(prompt) for prompt in rollout.prompts])
    for agent.family_policy.share_prefixes in (True, False):
        for result in kept:
            torch.testing.assert_close(result.values, agent.logprobs(fresh).values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("share_prefixes", [True, False])
def test_where_weights_are_divided_every_pass_runs_every_block_once(
    agent: VLMAgent, case: Case, share_prefixes: bool
) -> None:
    """With images that were seen before, without any, and where answers are one token long."""
    agent.freeze(vision=True, projector=True)
    rollout = agent.rollout(prompts(case))
    text = rollout[-1:]
    first = text.completions[0]
    short = replace(text, completions=[replace(first, token_ids=first.token_ids[:1], logprobs=first.logprobs[:1])])
    parts, ran = (rollout, text, short), []
    expected = [agent.logprobs(part).values for part in parts]
    agent.runs_every_module, agent.sharded, agent.family_policy.share_prefixes = True, True, share_prefixes
    assert agent.reference().policy.family.vision_tower() is not agent.family.vision_tower()
    for block in agent.blocks():
        block.register_forward_pre_hook(lambda block, _: ran.append(block))
    for part, values in zip(parts, expected, strict=True):
        ran.clear()
        torch.testing.assert_close(agent.logprobs(part).values, values, atol=1e-5, rtol=0)
        assert [ran.count(block) for block in agent.blocks()] == [1] * (2 + case.layers)


def test_images_matter(agent: VLMAgent, rollout: Rollout) -> None:
    """Each image changes the log-probabilities of its own prompt's completions, and of no other's."""
    before = logprobs_of(agent, rollout)
    for index in range(2):
        prompt = rollout.prompts[index]
        changed = prompt.images["pixel_values"].clone()
        changed[-1] += 1
        others = [*rollout.prompts]
        others[index] = replace(prompt, images={**prompt.images, "pixel_values": changed})
        moved = (logprobs_of(agent, replace(rollout, prompts=others)) - before).abs().amax(dim=1)
        own = torch.from_numpy(rollout.prompt_index == index)
        assert (moved[own] > 1e-6).all()
        assert (moved[~own] < 1e-6).all()


def test_recomputing_activations_gives_the_same_gradients(agent: VLMAgent, rollout: Rollout, case: Case) -> None:
    """And every block is run again in the backward pass."""
    runs: list[str] = []
    blocks = [name for name, _ in agent.family.model.named_modules() if re.fullmatch(case.blocks, name)]
    assert len(blocks) == 2 + case.layers
    for name in blocks:
        norm = next(agent.family.model.get_submodule(name).children())
        norm.register_forward_pre_hook(lambda *_, name=name: runs.append(name))
    expected = gradients(agent, loss_of(agent, rollout))
    once = [runs.count(name) for name in blocks]
    agent.enable_gradient_checkpointing()
    assert_alike(gradients(agent, loss_of(agent, rollout)), expected, within=1e-6)
    assert once == [1] * len(blocks)
    assert [runs.count(name) for name in blocks] == [3] * len(blocks)


def test_blocks_are_listed_in_the_order_in_which_they_run(agent: VLMAgent, rollout: Rollout, case: Case) -> None:
    named, ran = {module: name for name, module in agent.family.model.named_modules()}, []
    for module, name in named.items():
        if re.fullmatch(case.blocks, name):
            module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
    agent.logprobs(rollout)
    assert [named[block] for block in agent.blocks()] == list(dict.fromkeys(ran))
    assert len(set(ran)) == 2 + case.layers


def test_a_saved_model_is_loaded_bit_for_bit(agent: VLMAgent, folder: Path, case: Case, tmp_path: Path) -> None:
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.mul_(1.01)
    before = weights_of(agent)
    agent.save(tmp_path / "model")
    plain = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").state_dict()
    for name, tensor in agent.family.model.state_dict().items():
        assert torch.equal(plain[name], tensor.to(plain[name].dtype)), name
    again = build(folder)
    again.load(tmp_path / "model")
    for name, tensor in weights_of(again).items():
        assert torch.equal(tensor, before[name]), name
    for file in {file.name for file in folder.iterdir()} - {"model.safetensors"}:
        kept = "generation_config.base.json" if file == "generation_config.json" else file
        assert (tmp_path / "model" / kept).read_bytes() == (folder / file).read_bytes(), file


def test_adapters_are_on_every_linear_layer_and_merge(
    agent: VLMAgent, folder: Path, rollout: Rollout, tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    linear = {name for name, module in agent.family.model.named_modules() if isinstance(module, nn.Linear)}
    before = logprobs_of(agent, rollout)
    agent.add_lora(rank=4, alpha=8, vision=True)
    trained = {name for name, parameter in agent.policy.named_parameters() if parameter.requires_grad}
    assert trained == {f"model.{name}.lora_{part}.default.weight" for name in linear - {"lm_head"} for part in "AB"}
    assert torch.equal(logprobs_of(agent, rollout), before)
    train(agent, rollout, steps=1)
    after = logprobs_of(agent, rollout)
    assert (after - before).abs().max() > 1e-3
    agent.publish(tmp_path / "model", dtype=torch.float32)
    merged = build(folder, tmp_path / "model")
    torch.testing.assert_close(logprobs_of(merged, rollout), after, atol=1e-5, rtol=1e-5)


def test_a_frozen_vision_tower_stays_as_it_is(agent: VLMAgent, rollout: Rollout, case: Case) -> None:
    """By the published names of the weights."""
    named = dict(agent.family.model.named_parameters())
    vision = {name for name in named if re.match(case.vision, name)}
    projector = {name for name in vision if re.match(case.projector, name)}
    assert 0 < len(projector) < len(vision) < len(named)
    agent.freeze(vision=True, projector=False)
    before, optimizer = weights_of(agent), optimizer_of(agent)
    loss_of(agent, rollout).backward()
    optimizer.step()
    for name, parameter in named.items():
        if re.match(case.unused, name):
            continue
        frozen = name in vision - projector
        assert (parameter.grad is None) == frozen, name
        assert torch.equal(parameter, before[f"model.{name}"]) == frozen, name
    assert {id(p) for p in agent.parameter_groups()["vision"]} == {id(named[name]) for name in projector}
    agent.freeze(vision=False, projector=True)
    assert {name for name in named if not named[name].requires_grad} == vision


def test_some_tokens_are_never_sampled(agent: VLMAgent, rollout: Rollout, case: Case) -> None:
    """Even by a policy that wants nothing else; but whatever answers are made of may be."""
    family = agent.family
    tokenizer, banned = family.processor.tokenizer, set(family.banned_tokens.tolist())
    head = family.model.get_output_embeddings()
    unwanted = tokenizer.convert_tokens_to_ids(list(case.never))
    assert None not in unwanted
    assert set(unwanted) <= banned
    assert set(range(len(tokenizer), head.weight.shape[0])) <= banned
    assert max(banned) < head.weight.shape[0]
    assert family.end_tokens == tuple(sorted(tokenizer.convert_tokens_to_ids(list(case.end))))
    assert not set(family.end_tokens) & banned
    assert not set(tokenizer.encode("<think>a</think><answer>[1, 2]</answer>\n", add_special_tokens=False)) & banned
    hidden, _ = agent.family_policy.hidden_states(rollout)
    direction = hidden.detach().mean(dim=0)
    with torch.no_grad():
        head.weight = nn.Parameter(head.weight.clone())
        head.weight[unwanted] = 100 * direction / direction.norm()
    assert np.isin(head(hidden).argmax(dim=-1).numpy(), unwanted).mean() > 0.5
    logits = agent.family_policy.logits(hidden)
    assert (torch.isneginf(logits).sum(dim=-1) == len(banned)).all()
    assert torch.isneginf(logits[:, unwanted]).all()
    sampled = agent.rollout(prompts(case)[-3:]).completions
    assert not np.isin(np.concatenate([completion.token_ids for completion in sampled]), list(banned)).any()


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch, folder: Path, case: Case) -> ProcessorMixin:
    """The published processor, around the same tokenizer and image processor."""
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # only for videos
    processor = processor_of(folder)
    videos = (
        {} if case.processor in (Idefics3Processor, PixtralProcessor, Gemma3Processor) else {"video_processor": None}
    )
    sounds = {"feature_extractor": None} if case.processor is Gemma4Processor else {}
    parts = {"image_processor": processor.image_processor, "tokenizer": processor.tokenizer, **sounds}
    return published_processor(case.processor, **parts, **videos, **case.processor_arguments)


def as_published(
    processor: ProcessorMixin, template: str, observation: Observation, conversation: list[dict[str, Any]]
) -> dict[str, Any]:
    """What a published processor makes of messages with an observation's images."""
    text = ProcessorMixin.apply_chat_template(
        processor, conversation, chat_template=template, add_generation_prompt=True
    )
    images = list(observation["images"])
    by_prompt = Gemma3Processor | Gemma4Processor | Idefics3Processor | SmolVLMProcessor | LlavaOnevisionProcessor
    nested = [images] if isinstance(processor, by_prompt) else images
    return dict(processor(text=[text], return_tensors="pt", **({"images": nested} if images else {})))


def test_prompts_are_those_of_the_published_processor(agent: VLMAgent, case: Case, published: ProcessorMixin) -> None:
    """Tokens and pixels, for one image, several, and none; before texts, between them, and in earlier turns."""
    family, text_alone = agent.family, prompts(case)[-1]
    asked = [{"role": "user", "content": [{"type": "text", "text": text_alone["prompt"]}]}]
    for observation, conversation in [*conversations(case), (text_alone, asked)]:
        expected = as_published(published, family.processor.chat_template, observation, conversation)
        prompt = family.encode(observation)
        assert prompt.input_ids.tolist() == expected["input_ids"][0].tolist()
        assert prompt.position_ids.shape[1] == len(prompt.input_ids)
        for name, tensor in prompt.images.items():
            assert torch.equal(tensor.reshape(expected[name].shape), expected[name]), name
        left_out = (
            expected.keys()
            - prompt.images.keys()
            - {"input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids"}
        )
        assert left_out <= {"pixel_attention_mask"}
        assert all(expected[name].all() for name in left_out)


def test_the_published_processor_is_loaded_from_its_files(
    agent: VLMAgent, folder: Path, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torchvision too, which whole processors want for videos; and it reads prompts as the family does."""
    monkeypatch.setattr(processing_smolvlm, "num2words", str)  # only for videos
    for file in folder.iterdir():
        if file.suffix in {".json", ".jinja", ".txt"}:
            shutil.copyfile(file, tmp_path / file.name)
    if not (tmp_path / "processor_config.json").exists():
        settings = {"processor_class": case.processor.__name__, **case.processor_arguments}
        (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    if case.processor is PixtralProcessor and not is_torchvision_available():
        with pytest.raises(ConfigError, match="transformers cannot load the published processor here"):
            PublishedProcessor(tmp_path)
        return
    processor = PublishedProcessor(tmp_path)
    for observation in [*prompts(case)[1::2], prompts(case)[-1], *(one for one, _ in conversations(case))]:
        ids, inputs = processor.read(observation)
        prompt = agent.family.encode(observation)
        assert ids.tolist() == prompt.input_ids.tolist()
        for name, tensor in prompt.images.items():
            assert torch.equal(tensor.reshape(inputs[name].shape), inputs[name]), name


def test_there_is_one_image_token_for_each_feature(agent: VLMAgent, case: Case) -> None:
    model = agent.family.model
    for observation in prompts(case)[1::2]:
        prompt = agent.family.encode(observation)
        features = model.get_image_features(**prompt.images).pooler_output
        count = sum(one.shape[:-1].numel() for one in features)
        assert (prompt.input_ids == model.config.image_token_id).sum() == count


def test_image_token_counts(agent: VLMAgent, case: Case) -> None:
    for (height, width), count in case.counts.items():
        prompt = agent.family.encode({"images": (np.zeros((height, width, 3), np.uint8),), "prompt": "Hello"})
        assert (prompt.input_ids == agent.family.model.config.image_token_id).sum() == count


def test_answers_are_read_back_as_they_were_written(agent: VLMAgent) -> None:
    family = agent.family
    written = "<think>The star, at [1, 2].</think>\n<answer>[1,2,30,400]</answer>"
    agent.sampling = replace(agent.sampling, max_new_tokens=100)
    rollout = agent.imitate([{"images": (), "prompt": "Where?"}], [written])
    ids = rollout.completions[0].token_ids
    assert ids[-1] in family.end_tokens
    assert family.decode(ids) == written
    text = family.processor.tokenizer.decode(rollout.prompts[0].input_ids)
    assert text == family.chat({"images": (), "prompt": "Where?"})


def test_control_tokens_in_a_prompts_own_text_are_refused(agent: VLMAgent, case: Case) -> None:
    """A mark is none where it is the place of an image; in a text without images it is."""
    shown, others = (image((64, 64)),), [token for token in case.never if token != IMAGE_MARK]
    for token in others[:3]:
        refused = re.escape(f"must not contain control tokens: {token}")
        with pytest.raises(PromptError, match=f"the prompt's own text {refused}"):
            agent.encode([{"images": shown, "prompt": f"Locate {token} it."}])
        turns: tuple[Turn, ...] = ({"role": "system", "text": f"Be{token} brief."},)
        with pytest.raises(PromptError, match=rf"turn 1 \(system\) {refused}"):
            agent.encode([{"images": shown, "prompt": "Locate it: <image>", "turns": turns}])
    text_alone: Observation = {"images": (), "prompt": f"What is {IMAGE_MARK}?"}
    if IMAGE_MARK in case.never:
        with pytest.raises(PromptError, match="must not contain control tokens: <image>"):
            agent.encode([text_alone])
    else:
        assert f"What is {IMAGE_MARK}?" in agent.family.chat(text_alone)
    with pytest.raises(PromptError, match="the prompt has 2 <image> marks for 1 images"):
        agent.encode([{"images": shown, "prompt": "<image> or <image>"}])


def test_the_convention_of_coordinates(folder: Path, case: Case) -> None:
    assert coordinate_space(folder) == case.coordinates
    if not case.processor.__name__.startswith("Qwen"):
        with pytest.raises(ModelError, match=r"does not size images as Qwen2\.5-VL does"):
            resize_rule(folder)
