"""A reward for answers that rest on a complete description."""

from __future__ import annotations

from vlmenv.core.answers import Caption
from vlmenv.envs.captioning import answer_reward, described_keywords_reward


def grounded_answer(text: str, target: Caption) -> float:
    """1 for a right answer after a description with all key words; else 0."""
    return answer_reward(text, target) if described_keywords_reward(text, target) == 1 else 0.0
