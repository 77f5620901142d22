"""Questions of several turns: an answer may ask to see more before it answers."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

from vlmenv.core.answers import Answer
from vlmenv.core.formats import AnswerFormat
from vlmenv.envs.data.source import Sample
from vlmenv.envs.episodes import Reply
from vlmenv.envs.vqa import VQAEnv

_LONGEST: Final = 1000
"""Characters of an answer that may be a request."""


class AskingEnv(VQAEnv):
    """As `VLM-VQA-v0`, but an answer may be a request, whose image is the next turn's.

    With `max_turns=1` nothing can be asked for, as a control. `turn_terms` are the costs of requests, and metrics too.
    """

    request: ClassVar[str]
    """An example of a request in JSON, for `{request}` in the prompt."""
    again: ClassVar[str]
    """Words for one more request, after "Answer, or"."""
    needs_image: ClassVar[bool] = True

    def __init__(self, *, prompt_template: str | None = None, max_turns: int | None = None, **kwargs: Any) -> None:
        if prompt_template is None and max_turns == 1:
            prompt_template = VQAEnv.prompt_template
        super().__init__(prompt_template=prompt_template, max_turns=max_turns, **kwargs)

    @abstractmethod
    def bring(self, sample: Sample, text: str) -> Reply | None:
        """The image that an answer asks for, with words for it. None: it asks for nothing, or for nothing there is."""

    @abstractmethod
    def write_request(self, sample: Sample, texts: Sequence[str]) -> str | None:
        """A right request in JSON after some answers. None: it is time to answer."""

    def respond(self, sample: Sample, texts: Sequence[str]) -> Reply | None:
        brought = None if self.max_turns == 1 else self.bring(sample, texts[-1])
        if brought is None:
            return None
        advice = "Answer now." if len(texts) + 1 >= self.max_turns else f"Answer, or {self.again}."
        return Reply(f"{brought.text} {advice}", brought.images)

    def measure(self, text: str, target: Answer, terms: Mapping[str, float]) -> dict[str, float]:
        return super().measure(text, target, terms) | {name: terms[name] for name in self.turn_terms if name in terms}

    def write_turn(self, sample: Sample, texts: Sequence[str]) -> str:
        """The right requests first, as far as there are turns for them; then the answer."""
        request = None if len(texts) + 1 >= self.max_turns else self.write_request(sample, texts)
        if request is None:
            return super().write_turn(sample, texts)
        return self.answer_format.write(request, sample.rationale)

    def _filled(self, template: str) -> str:
        return super()._filled(template.replace("{request}", self.answer_format.answer_only(self.request)))


def read_request(text: str, key: str, answer_format: AnswerFormat) -> str | None:
    """The answer in a completion, if it has the key of a request; else None. JSON alone needs no tags around it."""
    content = answer_format.extract(text)
    if content is None and text.lstrip().startswith("{"):
        content = text
    return content if content is not None and len(content) <= _LONGEST and key in content.lower() else None


def read_number(content: str, key: str) -> int | None:
    """The whole number under a key of a request, alone in a list or not; None if there is none, or several differ."""
    number = r"(0|[1-9][0-9]{0,3})(?:\.0)?"
    named = rf"(?:[\"'“”]{key}[\"'“”]|(?<=\{{){key})\s*:\s*"
    values = rf"(?:\[\s*{number}\s*\]|[\"']?(?:(?:image|page) )?{number}(?![\w.]))"
    found = {one or other for one, other in re.findall(named + values, content, re.IGNORECASE)}
    return int(found.pop()) if len(found) == 1 else None
