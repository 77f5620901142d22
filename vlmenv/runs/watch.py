"""Tells when answers drift while a held-out metric falls: the marks of a reward that is gamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

FALL: Final = 0.1
"""Share of its best by which the held-out metric has to have fallen."""
FACTOR: Final = 1.5
"""By which lengths and box ratios have to have grown or shrunk."""
RISE: Final = 0.1
"""By which the share of repetitions has to have risen, or that of well-formed answers fallen."""

History = Sequence[dict[str, float]]
"""The metrics of each step from the first one on, those of evaluations, `eval/NAME`, in the steps that had one."""


def drift(history: History, before: float | None, metric: str) -> str | None:
    """What has to be told after the last step of a history, which had an evaluation; None where all is well.

    The answers are those of the last steps, against those around the step at which the metric was at its best: their
    length, the share of repeated tokens, the ratio of predicted to true boxes, and the share that is well-formed.

    Args:
        history: At least one step.
        before: The held-out metric before training; None where it was not measured.
        metric: Its name; more is better.
    """
    name = f"eval/{metric}"
    measured = {step: metrics[name] for step, metrics in enumerate(history, 1) if name in metrics}
    now = measured[len(history)]
    if before is not None:
        measured = {0: before} | measured
    best = max(measured, key=measured.__getitem__)
    if now >= measured[best] - FALL * abs(measured[best]):
        return None
    width = max(1, len(history) // 10)
    then = history[max(0, best - width) : best] if best else history[:width]
    changes = _changes(then, history[-width:])
    if not changes:
        return None
    return (
        f"answers drift while {metric} falls, which was {measured[best]:.3f} {_at(best)} and is {now:.3f}: "
        f"{', '.join(changes)}. The reward may be gamed: look at rollouts.jsonl"
    )


def _changes(then: History, now: History) -> list[str]:
    """What of the answers is not what it was, in words."""
    found = []
    for name in ("completion/length", "completion/box_ratio", "completion/repetition", "reward/format"):
        old, new = _mean(then, name), _mean(now, name)
        if name in ("completion/length", "completion/box_ratio"):
            differs = min(old, new) * FACTOR < max(old, new)
        else:
            differs = (new - old if name == "completion/repetition" else old - new) > RISE
        if differs:  # never where one is not a number
            found.append(f"{name.partition('/')[2]} {old:.3g} → {new:.3g}")
    return found


def _mean(history: History, name: str) -> float:
    values = [metrics[name] for metrics in history if name in metrics]
    return float(np.mean(values)) if values else float("nan")


def _at(step: int) -> str:
    return f"after step {step}" if step else "before training"
