"""Visual mathematics: figures, charts and counts, with symbolic comparison of answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from vlmenv.core.answers import Answer
from vlmenv.envs.data.figures import MathFigures
from vlmenv.envs.data.rows import Row
from vlmenv.envs.data.scenes import Split
from vlmenv.envs.data.source import Source
from vlmenv.envs.rewards.answers import AnswerAccuracy, read_answer
from vlmenv.envs.rewards.math import start_math
from vlmenv.envs.rewards.terms import RewardTerm
from vlmenv.envs.vqa import VQAEnv, accepted_texts


class MathAccuracy(AnswerAccuracy):
    """`AnswerAccuracy` that starts the computer algebra before the first answer."""

    def load(self) -> None:
        start_math()


def _only_answer(row: Row) -> str:
    """A row's answer. A list is refused: it does not say whether one of its items is enough."""
    texts = dict.fromkeys(accepted_texts(row))
    if len(texts) > 1:
        raise ValueError(
            f"the answer is the list {row.answer[:100]}, of which all or one may be meant: "
            f"write one text, as {', '.join(texts)!r} where all are; VLM-VQA-v0 takes lists of which one is enough"
        )
    return next(iter(texts))


class MathEnv(VQAEnv):
    """`VLM-Math-v0`: the answer is a number or an expression, LaTeX or plain, or the letter of a choice."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {**VQAEnv.terms, "accuracy": MathAccuracy()}
    default_rewards: ClassVar[Mapping[str, float]] = {"accuracy": 0.9, "format": 0.1}

    def builtin_source(self, split: Split) -> Source:
        return MathFigures(split)

    def read_target(self, row: Row) -> Answer:
        """The method that the row names. Otherwise `choice` for a letter, `numeric` with a tolerance, else `math`."""
        row = replace(row, answer=_only_answer(row), accepted=())
        answer = super().read_target(row)
        chosen = row.method not in ("", "default")
        if row.tolerance and not chosen:
            return read_answer(row.answer, "numeric", row.tolerance)
        return answer if chosen or answer.kind == "choice" else read_answer(row.answer, "math")
