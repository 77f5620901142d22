from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import cut_text, cut_vision, save_random_model
from small_models import invent
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.utils import is_torchvision_available

from vlmenv.agents.families import FAMILIES, coordinate_space, family_of, resize_rule
from vlmenv.agents.families.base import Processor
from vlmenv.agents.families.internvl import InternVL
from vlmenv.agents.families.qwen3_vl import Qwen3VL
from vlmenv.agents.vlm import Sampling, VLMAgent, find_model
from vlmenv.core.coordinates import CoordinateSpace
from vlmenv.core.errors import ModelError, PromptError
from vlmenv.envs.data.images import resized


@pytest.mark.slow
def test_published_image_token_counts_are_met(published_folder: Path) -> None:
    agent = VLMAgent.from_pretrained(published_folder)
    family = agent.family
    expected = {"qwen2_5_vl": (391, (1, 34, 46)), "qwen3_vl": (300, (1, 30, 40))}[family.model_type]
    prompt = family.encode({"images": (np.zeros((480, 640, 3), np.uint8),), "prompt": "Hello"})
    assert int((prompt.input_ids == family.model.config.image_token_id).sum()) == expected[0]
    assert tuple(prompt.images["image_grid_thw"][0].tolist()) == expected[1]


@pytest.mark.slow
def test_prompts_equal_the_published_templates_expanded_as_text(published_folder: Path) -> None:
    family = VLMAgent.from_pretrained(published_folder).family
    observation = {"images": (np.zeros((112, 112, 3), np.uint8),), "prompt": "Where is <it>?"}
    tokens = int(family.encode(observation).images["image_grid_thw"].prod()) // 4
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" if family.model_type == "qwen2_5_vl" else ""
    pads = "<|image_pad|>" * tokens
    text = (
        f"{system}<|im_start|>user\n<|vision_start|>{pads}<|vision_end|>Where is <it>?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert family.encode(observation).input_ids.tolist() == family.processor.tokenizer.encode(text)


def test_positions_of_an_image_are_its_grid(builtin: VLMAgent) -> None:
    """By hand: text counts on alike, an image of 2 x 3 features spreads over height and width (M-RoPE)."""
    prompt = builtin.family.encode({"images": (np.zeros((64, 96, 3), np.uint8),), "prompt": "Hello"})
    start = int(np.flatnonzero(prompt.input_ids == builtin.family.model.config.image_token_id)[0])
    time, height, width = prompt.position_ids[:, start : start + 6].tolist()
    assert time == [start] * 6
    assert height == [start] * 3 + [start + 1] * 3
    assert width == [start, start + 1, start + 2] * 2
    after = prompt.position_ids[:, start + 6 :]
    assert after[0].tolist() == list(range(start + 3, start + 3 + after.shape[1]))
    assert (after == after[0]).all()


@pytest.mark.slow
def test_end_tokens_are_the_generation_configurations(published_folder: Path) -> None:
    assert VLMAgent.from_pretrained(published_folder).family.end_tokens == (151643, 151645)


def test_without_torchvision_the_parts_are_loaded() -> None:
    processor = Processor.from_pretrained(find_model("builtin"))
    assert type(processor.image_processor).__name__.endswith("" if is_torchvision_available() else "Pil")
    assert ("torchvision" in sys.modules) == is_torchvision_available()


def test_with_torchvision_the_whole_processor_gives_the_same_prompts(builtin: VLMAgent) -> None:
    if not is_torchvision_available():
        pytest.skip("torchvision is not installed")
    from transformers import AutoImageProcessor

    image = np.random.default_rng(0).integers(256, size=(96, 64, 3), dtype=np.uint8)
    pillow = AutoImageProcessor.from_pretrained(find_model("builtin"), backend="pil")(
        images=[image], return_tensors="pt"
    )
    whole = builtin.family.processor.image_processor(images=[image], return_tensors="pt")
    torch.testing.assert_close(pillow["pixel_values"], whole["pixel_values"], atol=0.02, rtol=0)
    assert torch.equal(pillow["image_grid_thw"], whole["image_grid_thw"])


def test_how_a_model_writes_coordinates(tmp_path: Path) -> None:
    assert coordinate_space(find_model("builtin")) is CoordinateSpace.ORIGINAL
    for model_type, expected in (("qwen2_5_vl", "resized"), ("qwen3_vl", "norm1000")):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert coordinate_space(tmp_path) == expected
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelError, match="configuration cannot be read"):
        coordinate_space(tmp_path)


@pytest.mark.slow
def test_the_model_sees_resized_images_as_they_are_shown(published_folder: Path) -> None:
    """The processor finds nothing left to resize, and the same pixels as if it had resized the image itself.

    With torchvision only on average, since its interpolation differs from Pillow's here and there.
    """
    rule = resize_rule(published_folder)
    processor = Processor.from_pretrained(published_folder).image_processor
    for height, width in ((96, 96), (480, 640), (301, 77)):
        image = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
        shown = resized(image, *rule.size(width, height))
        theirs, ours = processor(images=[image], return_tensors="pt"), processor(images=[shown], return_tensors="pt")
        grid = ours["image_grid_thw"][0, 1:] * processor.patch_size
        assert grid.tolist() == list(shown.shape[:2])
        difference = (ours["pixel_values"] - theirs["pixel_values"]).abs()
        assert (difference.mean() < 0.01) if is_torchvision_available() else (difference.max() < 1e-5)


def test_a_thought_that_the_template_opens_belongs_to_the_answer(tmp_path: Path) -> None:
    """As with Qwen3-VL's thinking models, whose prompts end with <think>."""
    shutil.copytree(find_model("builtin"), tmp_path, dirs_exist_ok=True)
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text().replace("assistant{{ '\\n' }}", "assistant{{ '\\n<think>' }}"))
    family = VLMAgent.from_pretrained(tmp_path).family
    assert family.opening == "<think>"
    answer = family.processor.tokenizer.encode("the star</think><answer>[1,2,3,4]</answer><|im_end|>")
    assert family.decode(np.array(answer)) == "<think>the star</think><answer>[1,2,3,4]</answer>"
    assert VLMAgent.from_pretrained("builtin").family.opening == ""


def test_a_template_that_leaves_images_out_is_refused(tmp_path: Path) -> None:
    shutil.copytree(find_model("builtin"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content[-1].text }}")
    with pytest.raises(PromptError, match="puts 0 marks for 1 images"):
        VLMAgent.from_pretrained(tmp_path).act([{"images": (np.zeros((64, 64, 3), np.uint8),), "prompt": "Hello"}])


def test_a_mixture_of_experts_is_of_the_family(tmp_path: Path, builtin: VLMAgent) -> None:
    """A random Qwen3-VL MoE: what it samples is what it scores."""
    shutil.copytree(find_model("builtin"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    published = builtin.family.model.config
    config = AutoConfig.for_model("qwen3_vl_moe")
    cut_text(config.text_config, published.text_config.vocab_size, *builtin.family.end_tokens, 0)
    config.text_config.num_experts, config.text_config.num_experts_per_tok = 4, 2
    config.text_config.moe_intermediate_size = 32
    cut_vision(config.vision_config)
    for name in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        setattr(config, name, getattr(published, name))
    save_random_model(config, tmp_path)
    agent = VLMAgent.from_pretrained(tmp_path, sampling=Sampling(max_new_tokens=6))
    image = np.random.default_rng(0).integers(256, size=(64, 96, 3), dtype=np.uint8)
    rollout = agent.rollout([{"images": (image,), "prompt": "Hello"}] * 3)
    again = agent.logprobs(rollout).values.detach().numpy()
    for completion, values in zip(rollout.completions, again, strict=True):
        np.testing.assert_allclose(completion.logprobs, values[: len(completion.logprobs)], atol=1e-5)


def test_a_missing_chat_template_is_named(tmp_path: Path) -> None:
    shutil.copytree(find_model("builtin"), tmp_path, dirs_exist_ok=True)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no chat template"):
        Processor.from_pretrained(tmp_path)


def test_the_marks_of_glms_answers_may_be_written_and_are_not_read(tmp_path: Path) -> None:
    """As GLM-4.1V was taught: an open thought, and marks around what counts of the answer."""
    invent("glm4v", tmp_path)
    family = VLMAgent.from_pretrained(tmp_path).family
    marked = "the star</think><answer><|begin_of_box|>[1,2,3,4]<|end_of_box|></answer>"
    ids = np.array(family.processor.tokenizer.encode(marked, add_special_tokens=False))
    assert not set(ids.tolist()) & set(family.banned_tokens.tolist())
    assert family.decode(ids) == "<think>the star</think><answer>[1,2,3,4]</answer>"


def test_an_image_that_is_not_cut_stands_alone(tmp_path: Path) -> None:
    invent("idefics3", tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings | {"do_image_splitting": False}))
    family = VLMAgent.from_pretrained(tmp_path).family
    prompt = family.encode({"images": (np.zeros((64, 96, 3), np.uint8),), "prompt": "Hello"})
    around, pads = "<fake_token_around_image>", "<image>" * 4
    text = f"<|im_start|>User:{around}<global-img>{pads}{around}Hello<end_of_utterance>\nAssistant:"
    assert family.processor.tokenizer.decode(prompt.input_ids) == text
    assert prompt.images["pixel_values"].shape == (1, 1, 3, 32, 32)


def test_a_tokenizer_of_another_family_is_refused(builtin: VLMAgent) -> None:
    family = InternVL(builtin.family.model, builtin.family.processor)
    with pytest.raises(ModelError, match="the tokenizer lacks <img>, </img>, which models of type internvl need"):
        family.modality_tokens()


def test_layers_that_see_a_part_of_the_past_are_refused(builtin: VLMAgent, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(find_model("builtin"))
    config.text_config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    with pytest.raises(ModelError, match="layers of sliding_attention; models of type qwen3_vl are known"):
        Qwen3VL(AutoModelForImageTextToText.from_config(config), builtin.family.processor)


@pytest.mark.parametrize(
    ("model_type", "need"),
    [
        ("llava", "a file, as its language model has full attention alone"),
        ("cohere2_vision", "a file, and for its layers with windows (sliding_attention) a mixer"),
        ("llama4", "a file, and for its layers with windows (chunked_attention) a mixer"),
        ("minicpmv4_6", "a file, and for its layers with states (linear_attention) a mixer"),
        ("lfm2_vl", "a file, and for its layers with states a mixer"),
        ("mllama", "its layers attend to images beside the prompt"),
        ("florence2", "its answers attend to the output of an encoder"),
        ("bert", "transformers has no model of this type that reads images and writes text"),
        ("qwen3_5_vl", "the installed transformers does not know the type either"),
    ],
)
def test_a_family_that_is_not_known_is_told_what_it_would_need(model_type: str, need: str) -> None:
    with pytest.raises(ModelError, match="are of no known family") as told:
        family_of(model_type)
    assert need in str(told.value)
    assert "Did you mean" not in str(told.value)
    assert all(name in str(told.value) for name in FAMILIES)


def test_what_a_family_would_need_follows_from_its_own_configuration() -> None:
    """A window may be set or not in models of one type."""
    for window, need in ((None, "full attention alone"), (4096, "layers with windows (sliding_attention)")):
        config = AutoConfig.for_model("idefics2")
        config.text_config.sliding_window = window
        with pytest.raises(ModelError, match="are of no known family") as told:
            family_of("idefics2", config)
        assert need in str(told.value)


def test_a_window_that_no_layer_type_tells_is_found(builtin: VLMAgent, tmp_path: Path) -> None:
    """As in configurations of Mistral, whose layers are all alike."""
    invent("mistral3", tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    settings["text_config"]["sliding_window"] = 16
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match="layers of sliding_attention; models of type mistral3 are known with"):
        VLMAgent.from_pretrained(tmp_path)
