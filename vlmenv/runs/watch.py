"""Detects signs that training goes wrong: reward hacking, nothing to learn, divergence, collapse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import numpy as np

FALL: Final = 0.1
"""Least fall of the held-out metric, as a share of its best value."""
FACTOR: Final = 1.5
"""Least factor by which lengths or box ratios have grown or shrunk."""
RISE: Final = 0.1
"""Least rise of the share of repetitions, or least fall of the share of well-formed answers."""
RECENT: Final = 5
"""Steps over which metrics are averaged: those of `concerns`, and in runs that have twice as many those of `drift`."""

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
    width = max(1, min(max(RECENT, len(history) // 10), len(history) // 2))  # half of a very short run at most
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


CONCERNS: Final = ("nothing to learn", "KL", "entropy", "length", "truncation")
"""The kinds of `concerns`."""
FLAT_STEPS: Final = 20
"""Steps in a row without a group of differing rewards after which nothing is learned."""
KL_BOUND: Final = 1.0
"""KL divergence from the reference, in nats per token, that is large; penalties usually keep it below 0.5."""
KL_COLLAPSE: Final = 10.0
"""KL divergence at which the policy has left the reference altogether."""
ENTROPY_LEFT: Final = 0.05
"""Least share of the entropy of the first steps that must be left where rewards have not risen."""
ENTROPY_GROWN: Final = 3.0
"""Factor of the entropy of the first steps, and nats per token, beyond which answers turn to noise."""
LENGTH_FACTOR: Final = 4.0
"""Factor by which the length of completions has grown or shrunk where rewards have not risen."""
REWARD_LEFT: Final = 0.1
"""Least share of the best mean reward that must be left."""


def concerns(history: History) -> Iterator[tuple[str, str]]:
    """Signs in the last steps that training goes wrong, with what to look at.

    Args:
        history: Metrics of each step from the first.

    Yields:
        A kind, one of `CONCERNS`, and a message.
    """
    recent = history[-RECENT:]
    flat = [metrics.get("reward/zero_std_groups", 0.0) for metrics in history[-FLAT_STEPS:]]
    if len(flat) == FLAT_STEPS and min(flat) >= 1:
        yield (
            "nothing to learn",
            f"in the last {FLAT_STEPS} steps all answers to a prompt got the same reward (mean "
            f"{_mean(recent, 'reward/mean'):.3g}), so that there is nothing to learn: look at the completions in "
            "rollouts.jsonl, at `vlmenv doctor`, and at easier or harder prompts or a higher temperature",
        )
    if len(history) < RECENT:
        return
    if (kl := _mean(recent, "policy/kl")) > KL_BOUND:
        yield (
            "KL",
            f"the KL divergence from the reference is {kl:.3g} nats per token: lower lr, or raise beta, and compare "
            "completions of first and last steps",
        )
    if len(history) >= 2 * RECENT and not _mean(recent, "reward/mean") > _mean(history[:RECENT], "reward/mean"):
        yield from _strayed(history)
    if (truncated := _mean(recent, "completion/truncated")) > TRUNCATED:
        yield (
            "truncation",
            f"{truncated:.0%} of the completions are truncated: raise max_new_tokens, or ask for shorter answers",
        )


def _strayed(history: History) -> Iterator[tuple[str, str]]:
    """Concerns about entropy and length, which may change as they like while rewards rise."""
    first, last = (_mean(part, "policy/entropy") for part in (history[:RECENT], history[-RECENT:]))
    change = f"from {first:.3g} to {last:.3g} nats per token, and the reward has not risen"
    if last < ENTROPY_LEFT * first:
        yield "entropy", f"the entropy has fallen {change}: all answers become alike. Raise temperature, or lower lr"
    elif last > ENTROPY_GROWN * max(first, 1.0):
        yield (
            "entropy",
            f"the entropy has grown {change}: answers turn to noise. Lower lr, or raise beta",
        )
    first, last = (_mean(part, "completion/length") for part in (history[:RECENT], history[-RECENT:]))
    if first * LENGTH_FACTOR < last or last * LENGTH_FACTOR < first:
        yield (
            "length",
            f"completions had {first:.3g} tokens and have {last:.3g}, and the reward has not risen: look at them in "
            "rollouts.jsonl, and at what the reward terms make of length",
        )


READABLE: Final = 0.25
"""Least share of answers that must be readable before training."""
TRUNCATED: Final = 0.5
"""Largest share of truncated completions."""


def first_concerns(
    texts: Sequence[str], readable: Sequence[bool], truncated: Sequence[bool], rewards: Sequence[float]
) -> Iterator[tuple[str, str]]:
    """Signs in a few answers before training that there will be nothing to learn, with what to do.

    Args:
        texts: N completions.
        readable: [N], True for an answer that the task can parse.
        truncated: [N].
        rewards: [N].

    Yields:
        A kind and a message.
    """
    count = len(texts)
    if np.mean(truncated) > TRUNCATED:
        yield (
            "truncation",
            f"{sum(truncated)} of the model's first {count} completions are truncated: raise max_new_tokens, or ask "
            "for shorter answers",
        )
    if np.mean(readable) < READABLE:
        yield (
            "unreadable",
            f"{sum(readable)} of the model's first {count} answers can be read, so that nearly all rewards will be 0; "
            f"one is {texts[0][:80]!r}. Choose a prompt_template or answer_format that the model follows, or train it "
            "by sft first; `vlmenv doctor` tells more",
        )
    elif np.ptp(rewards) == 0:
        yield (
            "rewards",
            f"the model's first {count} answers all have the reward {rewards[0]:.3g}, from which nothing is learned: "
            "choose other rewards, harder or easier samples, or a higher temperature; `vlmenv doctor` tells more",
        )


def collapse(history: History) -> str | None:
    """Why training has collapsed, in words; None if it has not.

    Args:
        history: Metrics of each step from the first.
    """
    if len(history) < 2 * RECENT:
        return None
    if (kl := _mean(history[-RECENT:], "policy/kl")) > KL_COLLAPSE:
        return f"the KL divergence from the reference is {kl:.3g} nats per token"
    rewards = np.array([metrics.get("reward/mean", np.nan) for metrics in history])
    means = np.convolve(rewards, np.full(RECENT, 1 / RECENT), "valid")
    if np.nanmax(means, initial=0.0) > 0 and means[-1] < REWARD_LEFT * np.nanmax(means):
        return f"the mean reward was {np.nanmax(means):.3g} and is {means[-1]:.3g}"
    return None
