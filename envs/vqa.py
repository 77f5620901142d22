"""Visual question answering: choices, yes or no, numbers, words, over one image or several."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping
from typing import ClassVar, Final

from vlmenv.core.answers import Answer, AnswerKind
from vlmenv.core.errors import unknown_name
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.media import literal
from vlmenv.envs.data.questions import VisualQuestions
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.rewards.answers import accuracy_reward, accuracy_term, parse_reply, read_answers, reply_in
from vlmenv.envs.rewards.documents import anls_reward, list_reward, relaxed_reward
from vlmenv.envs.rewards.terms import RewardTerm
from vlmenv.envs.rewards.text import format_reward, length_reward

KINDS: Mapping[str, AnswerKind] = {
    "mcq": "choice",
    "choice": "choice",
    "yes_no": "yes_no",
    "numeric": "numeric",
    "exact": "exact",
    "math": "math",
    "edit": "edit",
    "all_match": "exact",
}
"""Values of a row's `accu_reward_method` that are kinds of answers."""
DOCUMENTS: Mapping[str, Callable[..., float]] = {"relaxed": relaxed_reward, "anls": anls_reward, "list": list_reward}
"""Terms for charts and documents, which rows may choose by `accu_reward_method`."""


def accepted_texts(row: Row, as_words: bool = False) -> list[str]:
    """The answers that a row accepts: the items of a list of texts, which may itself be text, or its answer.

    Args:
        row: A row of a data set.
        as_words: Whether answers are compared as words alone, so that letters are no choices, and one is enough.

    Raises:
        ValueError: The list may also mean that all of its items are required, or one of them is empty.
    """
    items = row.accepted or _written_list(row.answer)
    if not items:
        return [row.answer]
    if "" in items:
        raise ValueError(f"the answer {row.answer[:100]} lists an empty text: leave it out")
    texts = [item if isinstance(item, str) else json.dumps(item) for item in items]
    numbers = not any(isinstance(item, str) for item in items)
    if len({text.casefold() for text in texts}) > 1 and (numbers or (not as_words and _may_be_choices(row, texts))):
        any_of = f"the list of texts {json.dumps(texts)}" if numbers else "the list with accu_reward_method 'exact'"
        raise ValueError(
            f"the answer is the list {row.answer[:100]}, of which all or one may be meant: "
            f"write the text {', '.join(texts)!r} where all are, and {any_of} where one is enough"
        )
    return texts


def _may_be_choices(row: Row, texts: list[str]) -> bool:
    """Whether texts may be several right choices: letters, but without choices no small or repeated ones.

    Annotators of one text give these, as "k", "n", "k" in TextVQA.
    """
    letters = all(re.fullmatch(r"\W*[A-Za-z]\W*", text) for text in texts)
    if row.choices or KINDS.get(row.method) == "choice":
        return letters
    capitals = all(text == text.upper() for text in texts)
    return letters and capitals and len({*texts}) == len(texts) and row.method not in _OF_WORDS


_OF_WORDS: Final = ("exact", "all_match", "edit", "anls")


def _written_list(answer: str) -> list[str]:
    """The items of a list of texts that is written out, as tables in CSV have it; other lists may be mathematics."""
    if not (answer.startswith(('["', "['")) and answer.endswith(('"]', "']"))):
        return []
    try:
        items = json.loads(answer)
    except (ValueError, RecursionError):
        items = literal(answer)
    is_listed = isinstance(items, list) and all(isinstance(item, str) for item in items)
    return [item.strip() for item in items] if is_listed else []


class VQAEnv(VisualTaskEnv):
    """`VLM-VQA-v0`: the answer is a letter, yes or no, a number or words, as the row's truth is."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {
        "accuracy": accuracy_term,
        "format": format_reward,
        "length": length_reward,
        **DOCUMENTS,
    }
    row_terms: ClassVar[Mapping[str, str]] = {name: name for name in ("accuracy", *DOCUMENTS)}
    default_rewards: ClassVar[Mapping[str, float]] = {"accuracy": 1.0, "format": 0.1}
    prompt_template: ClassVar[str] = "Answer as {answer}\n{question}"
    needs_image: ClassVar[bool] = False
    unread: ClassVar[Collection[str]] = ("keywords", "pages")

    def builtin_source(self, split: Split) -> Source:
        return VisualQuestions(split)

    def read_target(self, row: Row) -> Answer:
        if row.method not in ("", "default", *KINDS, *self.row_terms):
            known = (*KINDS, *self.row_terms)
            raise ValueError(f"accu_reward_method: {unknown_name('kind of answer', row.method, known)}")
        if row.method == "list" and (items := row.accepted or _written_list(row.answer)):  # all of which are wanted
            return Answer("; ".join(map(str, items)), "exact")
        as_words = "anls" in self.rewards and self.rewards.keys().isdisjoint({"accuracy", "relaxed", "list", "judge"})
        return read_answers(accepted_texts(row, as_words), KINDS.get(row.method), row.tolerance, row.choices)

    def ignored_parts(self, row: Row, target: Answer) -> Collection[str]:
        return () if target.kind == "numeric" else ("tolerance",)

    def row_term(self, row: Row) -> str | None:
        """The term for charts and documents of this name. Otherwise `accu_reward_method` is the kind of the answer."""
        return self.row_terms.get(row.method)

    def measure(self, text: str, target: Answer, terms: Mapping[str, float]) -> dict[str, float]:
        """Metrics of one answer. If its row chose a term for charts and documents, that one is its accuracy."""
        answered = parse_reply(reply_in(text, self.answer_format), target)
        used = {name: terms[name] for name in ("judge", *DOCUMENTS) if name in terms and name in self.rewards}
        chosen = next((terms[name] for name in DOCUMENTS if name in terms and name not in self.rewards), None)
        return used | {
            "accuracy": accuracy_reward(text, target, self.answer_format) if chosen is None else chosen,
            "unparsable": float(answered is None),
            "format": format_reward(text, target, self.answer_format),
        }

    def write_answer(self, sample: Sample) -> str:
        return self.answer_format.write(sample.target.text, sample.rationale)
