"""Chat templates for observations: turns, places of images and videos, and template switches."""

from __future__ import annotations

import difflib
import inspect
import itertools
import re
import warnings
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Final, Literal, get_args

import jinja2
from transformers import PreTrainedTokenizerBase

from vlmenv.core.errors import ConfigError
from vlmenv.core.rollout import IMAGE_MARK, ROLES, Observation, Role, Turn, count_marks, named_images
from vlmenv.core.video import VIDEO_MARK

Message = dict[str, Any]
"""A turn in the form of chat templates: `role`, and `content` in parts or as a text."""
Form = Literal["parts", "text"]
_FORMS: Final[tuple[Form, ...]] = get_args(Form)

_WORDS: Final = ("first-probe-text", "second-probe-text", "third-probe-text")
"""Texts that no template contains. They show in a rendering what the template did with its turns."""


class ChatTemplate:
    """A chat template in Jinja, as in published checkpoints.

    Args:
        tokenizer: Renders the template, and provides its special tokens.
        source: The template's text.
        image_token: The template's text for an image.
        switches: Values of the template's own variables, as `enable_thinking`.
        video_mark: The template's text for a video. Default: it takes no videos.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str,
        image_token: str,
        switches: Mapping[str, Any],
        video_mark: str | None = None,
    ) -> None:
        self._tokenizer, self._source, self._image_token, self._switches = tokenizer, source, image_token, switches
        self._video_mark = video_mark

    def render(self, observation: Observation) -> str:
        """The chat-formatted prompt, with one `image_token` for each image, ready for the answer.

        Raises:
            ValueError: Marks and images differ in number, or the template has no place for a turn or an image; so for
                videos.
        """
        text = self._render(self.conversation(observation))
        if (written := text.count(self._image_token)) != len(observation["images"]):
            raise ValueError(f"the chat template puts {written} marks for {len(observation['images'])} images")
        videos = len(observation.get("videos", ()))
        if videos and (written := text.count(self._video_mark or "")) != videos:
            raise ValueError(f"the chat template puts {written} marks for {videos} videos")
        return text

    def after_answer(self, observation: Observation) -> str:
        """What the template writes after the last assistant turn of a conversation, with a mark for each image there.

        It does not depend on what the assistant wrote.

        Raises:
            ValueError: As for `render`.
        """
        word = "answer-probe-text"
        while word in observation["prompt"]:
            word += "-"
        probe: Turn = {"role": "assistant", "text": word}
        turns = tuple(probe if turn["role"] == "assistant" else turn for turn in observation["turns"])
        return self.render({**observation, "turns": turns}).rpartition(word)[2]

    def conversation(self, observation: Observation) -> list[Message]:
        """An observation as messages with the parts of images and videos in their places.

        Raises:
            ValueError: Marks and images differ in number, or the template has no place for a turn; so for videos.
        """
        turns, marked, first = observation.get("turns", ()), list[str](), list[Message]()
        for mark, shown in ((IMAGE_MARK, len(observation["images"])), (VIDEO_MARK, len(observation.get("videos", ())))):
            marks = count_marks(observation["prompt"], turns, mark) if shown else 0
            if marks not in (0, shown):
                raise ValueError(f"the prompt has {marks} {mark} marks for {shown} {_kind(mark)}s")
            marked += [mark] if marks else []
            first += [] if marks else [{"type": _kind(mark)}] * shown
        self._check_roles(turns)
        numbers = itertools.count(1)
        asked: Turn = {"role": "user", "text": observation["prompt"]}
        messages = [self._message(turn, marked, numbers) for turn in (*turns, asked)]
        messages[-1]["content"] = [*first, *messages[-1]["content"]]
        return messages

    @cached_property
    def forms(self) -> dict[Role, Form]:
        """The form of earlier turns that the template takes, by role. A role that it leaves out is missing.

        Published templates differ: some write the text parts of a system turn, some its content as it is, and some
        raise an error.
        """
        other, probe = _WORDS[:2]
        conversations: dict[Role, list[Turn]] = {
            "system": [{"role": "system", "text": probe}],
            "user": [{"role": "user", "text": probe}, {"role": "assistant", "text": other}],
            "assistant": [{"role": "user", "text": other}, {"role": "assistant", "text": probe}],
        }
        found: dict[Role, Form] = {}
        for role, turns in conversations.items():
            if form := next((form for form in _FORMS if self._shows(turns, form)), None):
                found[role] = "parts" if role == "user" else form
        return found

    @cached_property
    def keeps_places(self) -> bool:
        """Whether an image between two texts keeps its place; some templates write all images first."""
        content = [_text(_WORDS[0]), {"type": "image"}, _text(_WORDS[1])]
        text = self._render([{"role": "user", "content": content}])
        kept = self._image_token in text.partition(_WORDS[0])[2].partition(_WORDS[1])[0]
        if not kept:
            warnings.warn(
                f"the chat template moves images to the front of their turn: {IMAGE_MARK} marks between texts become "
                "'image 1', 'image 2' and so on",
                RuntimeWarning,
                stacklevel=2,
            )
        return kept

    def _message(self, turn: Turn, marked: Sequence[str], numbers: itertools.count[int]) -> Message:
        """A turn as a message, with a part in the place of each of the marks."""
        role, text = turn["role"], turn["text"]
        pieces = re.split(f"({'|'.join(marked)})", text) if marked and role != "assistant" else [text]
        if len(pieces) == 1:
            return {"role": role, "content": text if self.forms.get(role) == "text" else [_text(text)]}
        if self.forms.get(role) == "text":
            raise ValueError(f"the chat template takes no image in a {role} turn")
        if self.keeps_places:
            parts = [{"type": _kind(one)} if one in marked else _text(one) for one in pieces if one]
            return {"role": role, "content": parts}
        images = text.count(IMAGE_MARK)
        return {"role": role, "content": [*[{"type": "image"}] * images, _text(named_images(text, numbers))]}

    def _check_roles(self, turns: Sequence[Turn]) -> None:
        for place, turn in enumerate(turns):
            if turn["role"] not in ROLES:
                raise ValueError(f"turn {place + 1} has the role {turn['role']!r}; known: {', '.join(ROLES)}")
            if turn["role"] == "system" and place:
                raise ValueError(f"turn {place + 1} is a system turn, which only the first can be")
            if turn["role"] not in self.forms:
                raise ValueError(f"the chat template leaves {turn['role']} turns before the prompt out")

    def _shows(self, turns: Sequence[Turn], form: Form) -> bool:
        """Whether a rendering has the second probe's text once, and no list of parts as Python writes it.

        User turns have parts in either form: they may contain images.
        """
        messages: list[Message] = [{"role": turn["role"], "content": [_text(turn["text"])]} for turn in turns]
        for message in messages:
            if message["role"] != "user" and form == "text":
                message["content"] = message["content"][0]["text"]
        try:
            text = self._render([*messages, {"role": "user", "content": [_text(_WORDS[2])]}])
        except (ValueError, TypeError):
            return False
        return text.count(_WORDS[1]) == 1 and "'text'" not in text and _WORDS[2] in text

    def _render(self, messages: list[Message]) -> str:
        try:
            text = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._source,
                tokenize=False,
                add_generation_prompt=True,
                **self._switches,
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template cannot write the prompt: {error}") from error
        assert isinstance(text, str)
        return text


def check_switches(switches: Mapping[str, Any], source: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError if the template does not read a switch, which would then change nothing."""
    names = {value for _, kind, value in jinja2.Environment().lex(source) if kind == "name"}
    ours = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in switches:
        if name in ours:
            raise ConfigError(f"chat_template_kwargs must not contain '{name}', which vlmenv sets itself")
        if name not in names:
            nearest = difflib.get_close_matches(name, names, n=1)
            hint = f". Did you mean '{nearest[0]}'?" if nearest else ": leave it out"
            raise ConfigError(f"the model's chat template never reads '{name}' of chat_template_kwargs{hint}")


def _kind(mark: str) -> str:
    """The type of the part that a mark is the place of."""
    return mark[1:-1]


def _text(text: str) -> Message:
    return {"type": "text", "text": text}
