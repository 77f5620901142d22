"""Checks that the engine has the trainer's weights: before an update, after it, and after its reversal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vlmenv.agents.checkpoints import weight_names
from vlmenv.agents.engines.checksums import UNREADABLE
from vlmenv.agents.engines.fingerprints import fingerprint
from vlmenv.agents.vlm import VLMAgent
from vlmenv.agents.weights import tied_names
from vlmenv.core.rollout import Rollout
from vlmenv.doctor.subject import Numbers, Seen, Subject, Unchecked

_TOLERANCES = {"fp32": (1e-4, 1e-3), "bf16": (0.05, 1.0), "fp16": (0.01, 0.2)}
"""Tolerated differences of log-probabilities: of their mean, and of a single token."""
_BITS, _SMALL = (18, 19, 20, 21, 22), 0.01
"""Bits of a float32's fraction to flip in every weight, from a 32nd to a half; and what zeros become."""
_MOVED, _POWER = 0.5, 10
"""Mean change of log-probabilities to aim for; and the least accepted one, as a multiple of the tolerance."""


def names(subject: Subject) -> Seen:
    """Compares the names of the trainer's weights with those of the model's folder."""
    agent = subject.agent
    tied = tied_names(agent.family.model)
    ours, theirs = set(agent._published_weights()), weight_names(agent.folder) - tied
    unknown, missing = sorted(ours - theirs), sorted(theirs - ours)
    if not unknown:
        return f"{len(ours)} weights" + (f"; {len(missing)} more in the folder are not used" if missing else ""), ""
    instead = f", which has {missing[0]}" if missing else ""
    return f"{len(unknown)} are not in the model's folder, {unknown[0]} among them{instead}", (
        "Engines and checkpoints would get weights with names that the published model does not have. Use a checkpoint "
        "in the published layout, or the version of transformers that it is for."
    )


def logprobs(subject: Subject) -> Seen:
    """Compares the sampler's log-probabilities with the trainer's."""
    subject.need_engine()
    subject.baseline = subject.ask_at_length()
    return _judged(
        subject,
        subject.baseline,
        "The trainer would learn from completions of another distribution. Give both the same weights and precision; "
        "with bf16, try --precision fp32, where they must agree.",
    )


def greedy(subject: Subject) -> Seen:
    """Checks that each token of a greedy completion is the trainer's most likely one."""
    subject.need_engine()
    rollout = subject.ask_at_length(greedy=True)
    behind = [_behind_likeliest(subject, rollout[np.array([i])]) for i in range(len(rollout))]
    alike, most = sum(not one.any() for one in behind), float(np.concatenate(behind).max())
    allowed = _TOLERANCES[subject.config.batches.precision][1]
    figure = f"{alike} of {len(rollout)} are the trainer's"
    if alike < len(rollout):
        figure += f"; a token is less likely than its likeliest by {most:.2g} (allowed {allowed:g})"
    if most <= allowed:
        return figure, ""
    return figure, "The engine's model or precision differs from the trainer's: see the line before."


def update(subject: Subject) -> Seen:
    """Checks that the engine takes an update: it samples the same prompts again after it."""
    rollout = _baseline(subject)
    undo, moved = _disturb(subject, rollout)
    try:
        subject.sync()
        figure, remedy = _judged(
            subject,
            subject.ask_at_length(),
            "The engine generates with old weights, or with a cache of old weights (of prompts or image features). Use "
            "a version of vLLM that docs/vllm.md names, or remove --engine.",
        )
        subject.took_update = True
    finally:
        undo()
    return f"{figure}; the update moved them by {moved:.2g}", remedy


def put_back(subject: Subject) -> Seen:
    """Checks that the engine takes the first weights again."""
    _baseline(subject)
    if not subject.took_update:
        raise Unchecked("the update was not taken over")
    subject.sync()
    return _judged(subject, subject.ask_at_length(), "As for the line before.")


def checksums(subject: Subject) -> Seen:
    """Checks that every weight takes an update bit for bit, however little it affects completions.

    All weights are changed. Then all weights that the trainer sends must have changed, and all of the engine's too. The
    engine's must be the same again if it takes the update after all of its weights were set to 0.
    """
    subject.need_engine()
    agent = subject.able
    published, held = _digests(agent), subject.checksums()
    undo = _flip([*agent.policy.parameters(), *agent.fixed_weights().values()], _BITS[-1])
    try:
        fixed = [name for name, digest in _digests(agent).items() if digest == published[name]]
        stale = _stale(subject, held)
    finally:
        undo()
    if fixed:
        subject.give_up("it is not given all weights")
        return f"{_listed(fixed)} of {len(published)} weights are handed over as they were before an update", (
            "The engine would generate with old weights, and checkpoints would hold them. Use the version of "
            "transformers that the model is for."
        )
    if stale:
        subject.give_up("it does not take over all weights")
        return f"{_listed(stale)} of the engine's {len(held)} weights are not those of the update, or not all of it", (
            "The engine would generate with old weights. Use a version of vLLM that docs/vllm.md names, or remove "
            "--engine."
        )
    if held:
        subject.sync()
    return f"{len(published)} weights change with the trainer's{_told_of(held)}", ""


def _digests(agent: VLMAgent) -> dict[str, int]:
    """Fingerprints of the weights that the trainer sends."""
    weights = agent._published_weights()
    return dict(zip(weights, fingerprint(weights.values()), strict=True))


def _stale(subject: Subject, before: Mapping[str, str]) -> list[str]:
    """Weights of the engine that an update does not change, or changes in part."""
    if not before:
        return []
    subject.sync()
    after = subject.checksums()
    subject.clear_engine()
    subject.sync()
    anew = subject.checksums()
    readable = [name for name, digest in before.items() if digest != UNREADABLE]
    return [name for name in readable if after.get(name) == before[name] or after.get(name) != anew.get(name)]


def _listed(names: Sequence[str]) -> str:
    return f"{len(names)} ({names[0]} among them)"


def _told_of(held: Mapping[str, str]) -> str:
    """The figure about an engine's weights if all of them changed."""
    if not held:
        return ""
    packed = sum(digest == UNREADABLE for digest in held.values())
    rest = f"; {packed} that vLLM has packed for the CPU cannot be read" if packed else ""
    return f", and {len(held) - packed} of the engine's with them{rest}"


def _baseline(subject: Subject) -> Rollout:
    subject.need_engine()
    if subject.baseline is None:
        raise Unchecked("nothing could be sampled before an update")
    return subject.baseline


def _judged(subject: Subject, rollout: Rollout, remedy: str) -> Seen:
    """Compares the sampler's log-probabilities with the trainer's, within the tolerance."""
    sampled = np.concatenate([one.logprobs for one in rollout.completions])
    gaps = np.abs(sampled - subject.scores(rollout))
    mean, most = float(gaps.mean()), float(gaps.max())
    allowed = _TOLERANCES[subject.config.batches.precision]
    figure = f"off by {mean:.1e} in the mean, {most:.1e} at most (allowed {allowed[0]:g} and {allowed[1]:g})"
    return figure, "" if mean <= allowed[0] and most <= allowed[1] else remedy


@torch.no_grad()
def _behind_likeliest(subject: Subject, rollout: Rollout) -> Numbers:
    """The difference of the trainer's largest log-probability and each token's."""
    policy = subject.agent.family_policy
    with subject.autocast():
        logprobs = torch.log_softmax(policy.logits(policy.hidden_states(rollout)[0]), dim=-1)
    tokens = torch.from_numpy(np.concatenate([one.token_ids for one in rollout.completions])).to(logprobs.device)
    return np.asarray((logprobs.amax(dim=-1) - logprobs.gather(-1, tokens[:, None])[:, 0]).cpu())


def _disturb(subject: Subject, rollout: Rollout) -> tuple[Callable[[], None], float]:
    """Changes every trained weight enough to see an effect.

    Returns:
        A function that reverses the change bit for bit; and the mean change of a rollout's log-probabilities.
    """
    before, parameters = subject.scores(rollout), subject.agent.parameters()
    for bit in _BITS:
        undo = _flip(parameters, bit)
        try:
            moved = float(np.abs(subject.scores(rollout) - before).mean())
        except BaseException:
            undo()
            raise
        strongest = bit == _BITS[-1] and moved > _POWER * _TOLERANCES[subject.config.batches.precision][0]
        if moved > _MOVED or strongest:
            return undo, moved
        undo()
    raise Unchecked("no change of the trained weights moves the log-probabilities enough to be seen")


def _flip(parameters: Sequence[Tensor], bit: int) -> Callable[[], None]:
    """Flips a bit of each weight in place, which changes it by a share of it. Returns a function that flips it back.

    Tensors of zeros, as in new adapters, become a small number.
    """
    number = int(np.float32(_SMALL * 2 ** (bit - _BITS[0])).view(np.int32))
    masks = [1 << bit if parameter.any() else number for parameter in parameters]

    @torch.no_grad()
    def flip() -> None:
        for parameter, mask in zip(parameters, masks, strict=True):
            parameter.view(torch.int32).bitwise_xor_(mask)

    flip()
    return flip
