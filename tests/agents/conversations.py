"""Episodes of several turns, with images in later turns."""

from __future__ import annotations

import numpy as np

from vlmenv.agents.vlm import VLMAgent
from vlmenv.core.rollout import Observation, Rollout

TURNS = [3, 1, 2, 3, 2, 1]
"""Turns of each episode; the first three are a group, and so are the next two."""


def image(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=(height, width, 3), dtype=np.uint8)


def first() -> list[Observation]:
    a: Observation = {"images": (image(0, 64, 96),), "prompt": "<image>What is it?"}
    b: Observation = {"images": (image(1, 64, 64), image(2, 40, 96)), "prompt": "<image><image>Which?"}
    return [a, a, a, b, b, {"images": (), "prompt": "How many?"}]


def after(before: Observation, text: str, reply: str, *images: np.ndarray) -> Observation:
    """The conversation after an answer and the environment's reply to it."""
    turns = (
        *before.get("turns", ()),
        {"role": "user", "text": before["prompt"]},
        {"role": "assistant", "text": text},
    )
    return {"images": (*before["images"], *images), "prompt": "<image>" * len(images) + reply, "turns": turns}


def later_images(row: int, turn: int) -> list[np.ndarray]:
    """Those that a turn shows: the second in rows 0, 2 and 3, the third in rows 0 and 3."""
    return [image(10 * turn + row, 64, 64)] if row in (0, 3, turn) else []


def episodes(agent: VLMAgent, *, greedy: bool = False) -> tuple[Rollout, list[Rollout]]:
    """Ragged episodes, whose later turns have `later_images`. The last rollout, and those of all turns."""
    agent.seed(0)
    observations = first()
    rollouts = [agent.rollout(observations, greedy=greedy)]
    for turn in (2, 3):
        shown = [
            after(one, text, f"Turn {turn}.", *later_images(row, turn))
            for row, (one, text) in enumerate(zip(observations, rollouts[-1].texts, strict=True))
        ]
        observations = [
            new if TURNS[row] >= turn else old for row, (old, new) in enumerate(zip(observations, shown, strict=True))
        ]
        going = [one if TURNS[row] >= turn else None for row, one in enumerate(observations)]
        rollouts.append(agent.proceed(rollouts[-1], going, greedy=greedy))
    return rollouts[-1], rollouts
