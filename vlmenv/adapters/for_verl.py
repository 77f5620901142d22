"""verl and EasyR1: the functions that score for them, by the keys that `vlmenv data export` writes as the truth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vlmenv.adapters.task import completion_text, flat, judged


def verl_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None, **_: Any
) -> dict[str, float]:
    """verl's `custom_reward_function`: the weighted reward as `score`, and each term by its name.

    Args:
        data_source: Id of the task; the key has it too.
        solution_str: The completion.
        ground_truth: The key of the sample, from the row.
        extra_info: What else the row has; not needed.

    Raises:
        ConfigError: The key names no sample.
        RewardError: A term failed, or its value is not finite.
    """
    return flat(judged([completion_text(solution_str)], [ground_truth])[0], "score")


def easyr1_scores(reward_inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """EasyR1's batch reward function: for each answer the weighted reward as `overall`, and each term by its name.

    Args:
        reward_inputs: For each answer the completion as `response`, and the key of its sample as `ground_truth`.

    Raises:
        ConfigError: A key names no sample.
        RewardError: A term failed, or its value is not finite.
    """
    texts = [completion_text(one["response"]) for one in reward_inputs]
    return [flat(score, "overall") for score in judged(texts, [one["ground_truth"] for one in reward_inputs])]
