"""Detects signs of reward hacking: completions drift while a held-out metric falls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

FALL: Final = 0.1
"""Least fall of the held-out metric, as a share of its best value."""
FACTOR: Final = 1.5
"""Least factor by which lengths or box ratios have grown or shrunk."""
RISE: Final = 0.1
"""Least rise of the share of repetitions, or least fall of the share of well-formed answers."""

History = Sequence[dict[str, float]]
"""Metrics of each step from the first; `eval/NAME` in the steps with an evaluation."""


def drift(history: History, before: float | None, metric: str) -> str | None:
    """Compares the completions of the last steps with those around the best step of the held-out metric.

    It compares length, share of repeated tokens, ratio of predicted to true boxes, and share of well-formed answers.

    Args:
        history: Metrics of at least one step. The last step has an evaluation.
        before: The held-out metric before training; None if it was not measured.
        metric: Name of the metric. Larger is better.

    Returns:
        A warning; None without a sign of reward hacking.
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
        f"completions drift while {metric} falls: it was {measured[best]:.3f} {_at(best)} and is {now:.3f} now; "
        f"{', '.join(changes)}. This may be reward hacking: look at rollouts.jsonl"
    )


def _changes(then: History, now: History) -> list[str]:
    """The changes of the completions, in words."""
    found = []
    for name in ("completion/length", "completion/box_ratio", "completion/repetition", "reward/format"):
        old, new = _mean(then, name), _mean(now, name)
        if name in ("completion/length", "completion/box_ratio"):
            differs = min(old, new) * FACTOR < max(old, new)
        else:
            differs = (new - old if name == "completion/repetition" else old - new) > RISE
        if differs:  # never if one is NaN
            found.append(f"{name.partition('/')[2]} {old:.3g} → {new:.3g}")
    return found


def _mean(history: History, name: str) -> float:
    values = [metrics[name] for metrics in history if name in metrics]
    return float(np.mean(values)) if values else float("nan")


def _at(step: int) -> str:
    return f"after step {step}" if step else "before training"
