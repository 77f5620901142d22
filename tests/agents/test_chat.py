"""Chat templates of other kinds than the published processors at hand have."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from vlmenv.agents.families import Processor, weightless_family
from vlmenv.agents.families.chat import ChatTemplate
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.core.errors import ConfigError, ModelError
from vlmenv.core.rollout import Observation, Turn

IMAGE = np.zeros((64, 64, 3), np.uint8)
PARTS = "{% for p in m.content %}{% if p.type == 'image' %}[IMG]{% else %}{{ p.text }}{% endif %}{% endfor %}"
EVERY = f"{{% for m in messages %}}<{{{{ m.role }}}}>{PARTS}{{% endfor %}}<assistant>"
RAW = EVERY.replace(PARTS, f"{{% if m.role == 'user' %}}{PARTS}{{% else %}}{{{{ m.content }}}}{{% endif %}}")
LAST = f"{{% set m = messages[-1] %}}<user>{PARTS}"
RAISING = "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + (
    f"<{{{{ m.role }}}}>{PARTS}{{% endfor %}}"
)
IMAGES_FIRST = (
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content if p.type == 'image' %}[IMG]{% endfor %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endfor %}"
)
SWITCHED = "{# hidden #}{{ 'quoted' }}{% if thinking %}think{% endif %}" + EVERY
EARLIER: tuple[Turn, ...] = (
    {"role": "system", "text": "Be brief."},
    {"role": "user", "text": "Is <image> red?"},
    {"role": "assistant", "text": "Yes, <image> is."},
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(find_model("builtin"))


def chat(tokenizer: PreTrainedTokenizerBase, source: str, **switches: Any) -> ChatTemplate:
    return ChatTemplate(tokenizer, source, "[IMG]", switches)


def test_an_image_of_an_earlier_turn_stays_there(tokenizer: PreTrainedTokenizerBase) -> None:
    """A mark in an assistant turn, which a model may have written, moves none."""
    shown: Observation = {"images": (IMAGE,) * 2, "prompt": "And <image>?", "turns": EARLIER}
    expected = "<system>Be brief.<user>Is [IMG] red?<assistant>Yes, <image> is.<user>And [IMG]?<assistant>"
    assert chat(tokenizer, EVERY).render(shown) == expected


def test_without_marks_images_precede_the_prompt(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = (EARLIER[0], {**EARLIER[1], "text": "Ready?"}, EARLIER[2])
    shown: Observation = {"images": (IMAGE,) * 2, "prompt": "", "turns": turns}
    assert (
        chat(tokenizer, EVERY)
        .render(shown)
        .endswith("<user>Ready?<assistant>Yes, <image> is.<user>[IMG][IMG]<assistant>")
    )


def test_a_mark_without_an_image_is_text(tokenizer: PreTrainedTokenizerBase) -> None:
    shown: Observation = {"images": (), "prompt": "What is <image>?", "turns": EARLIER}
    assert "<user>Is <image> red?" in chat(tokenizer, EVERY).render(shown)
    with pytest.raises(ValueError, match="the prompt has 2 <image> marks for 3 images"):
        chat(tokenizer, EVERY).render({**shown, "images": (IMAGE,) * 3})


@pytest.mark.parametrize(
    ("source", "forms"),
    [
        (EVERY, {"system": "parts", "user": "parts", "assistant": "parts"}),
        (RAW, {"system": "text", "user": "parts", "assistant": "text"}),
        (RAISING, {"user": "parts", "assistant": "parts"}),
        (LAST, {}),
    ],
    ids=["parts", "raw content", "system raises", "last turn alone"],
)
def test_what_a_template_does_with_turns_is_found_out(
    tokenizer: PreTrainedTokenizerBase, source: str, forms: dict[str, str]
) -> None:
    template = chat(tokenizer, source)
    assert template.forms == forms
    shown: Observation = {"images": (IMAGE,) * 2, "prompt": "And <image>?", "turns": EARLIER}
    if "system" in forms:
        written = "<system>Be brief.<user>Is [IMG] red?<assistant>Yes, <image> is.<user>And [IMG]?"
        assert template.render(shown).startswith(written)
    else:
        with pytest.raises(ValueError, match="the chat template leaves system turns before the prompt out"):
            template.render(shown)


@pytest.mark.parametrize(
    ("turns", "fault"),
    [
        (EARLIER[1:] + EARLIER[:1], "turn 3 is a system turn, which only the first can be"),
        (({"role": "tool", "text": "1"},), "turn 1 has the role 'tool'"),
    ],
)
def test_turns_that_no_template_is_given(
    tokenizer: PreTrainedTokenizerBase, turns: tuple[Turn, ...], fault: str
) -> None:
    with pytest.raises(ValueError, match=fault):
        chat(tokenizer, EVERY).render({"images": (), "prompt": "?", "turns": turns})


def test_an_image_in_a_turn_that_takes_text_alone_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    turns: tuple[Turn, ...] = ({"role": "system", "text": "As <image>."},)
    with pytest.raises(ValueError, match="the chat template takes no image in a system turn"):
        chat(tokenizer, RAW).render({"images": (IMAGE,), "prompt": "?", "turns": turns})


def test_a_template_that_moves_images_gets_words_in_their_places(tokenizer: PreTrainedTokenizerBase) -> None:
    template = chat(tokenizer, IMAGES_FIRST)
    shown: Observation = {"images": (IMAGE,) * 3, "prompt": "Or <image> and <image>?", "turns": EARLIER}
    with pytest.warns(RuntimeWarning, match="the chat template moves images to the front of their turn"):
        text = template.render(shown)
    assert text.endswith("<user>[IMG]Is image 1 red?<assistant>Yes, <image> is.<user>[IMG][IMG]Or image 2 and image 3?")
    assert template.render({"images": (IMAGE,), "prompt": "Who?"}) == "<user>[IMG]Who?"
    led: Observation = {"images": (IMAGE,) * 2, "prompt": "<image>Or <image>?"}
    assert template.render(led) == "<user>[IMG][IMG]Or image 2?"


def folder_with(tmp_path: Path, template: str) -> Path:
    for file in find_model("builtin").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    (tmp_path / "chat_template.jinja").write_text(template.replace("[IMG]", image))
    return tmp_path


@pytest.mark.slow
def test_switches_reach_the_template(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, SWITCHED)
    asked: Observation = {"images": (), "prompt": "?"}
    texts = [
        VLMAgent.from_pretrained(folder, chat_template_kwargs=switches).family.chat(asked)
        for switches in (None, {"thinking": False}, {"thinking": True})
    ]
    assert texts == ["quoted<user>?<assistant>"] * 2 + ["quotedthink<user>?<assistant>"]


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("thinkin", "never reads 'thinkin' of chat_template_kwargs. Did you mean 'thinking'?"),
        ("hidden", "never reads 'hidden' of chat_template_kwargs: leave it out"),
        ("quoted", "never reads 'quoted' of chat_template_kwargs: leave it out"),
        ("messages", "must not contain 'messages', which vlmenv sets itself"),
        ("tokenize", "must not contain 'tokenize', which vlmenv sets itself"),
    ],
)
def test_switches_that_would_change_nothing_are_refused(tmp_path: Path, name: str, fault: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(fault)):
        Processor.from_pretrained(folder_with(tmp_path, SWITCHED), {name: True})


def test_a_model_without_system_turns_is_refused(tmp_path: Path) -> None:
    weightless_family(find_model("builtin")).require_system_turns()
    with pytest.raises(ModelError, match="chat template has no system turn: leave out system_prompt"):
        weightless_family(folder_with(tmp_path, RAISING)).require_system_turns()


def test_what_a_model_is_shown() -> None:
    family = weightless_family(find_model("builtin"))
    shown: Observation = {"images": (IMAGE, np.zeros((64, 96, 3), np.uint8)), "prompt": "Is <image> like <image>?"}
    reading = family.read(shown)
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert reading.text == f"<|im_start|>user\nIs {image} like {image}?<|im_end|>\n<|im_start|>assistant\n"
    assert reading.image_tokens == (4, 6)
    assert reading.tokens == len(family.encode(shown).input_ids)
