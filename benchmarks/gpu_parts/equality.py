"""Shared prompts against plain rows: log-probabilities and gradients on the device, and both against the CPU's."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from common import Case, Way, family_without_end, gradient_of, new_agent, new_model, observations, processor_for
from torch import Tensor

from gpu_parts.context import Context, head, row
from vlmenv.agents.families import Family
from vlmenv.agents.trials import largest_difference
from vlmenv.core.rollout import Completion, Rollout

TOKENS, GROUP, PROMPTS, ANSWER = 300, 4, 2, 24
CPU = torch.device("cpu")
_ALIKE = 1e-4
"""Share up to which two orders of float32 sums differ."""
_TIMES = 2
"""How many times as far from float32 shared prompts may be as plain rows, which both round to bfloat16."""

Numbers = tuple[Tensor, Tensor]
"""log-probabilities and gradient"""


def equality(context: Context) -> Iterator[str]:
    yield (
        "The truth is that of plain rows on the CPU in float32. The first number is of log-probabilities, as the "
        "largest difference, the second of the gradient, as a share of its largest number. Equal: shared prompts are "
        f"within {_ALIKE:.0e} of the truth, or not {_TIMES} times as far from it as plain rows are."
    )
    yield from head("model", "passes", "shared to truth", "plain to truth", "shared to plain", "equal")
    for size in context.args.small:
        case = Case(size, TOKENS, GROUP, PROMPTS, ANSWER)
        truth = numbers(case, "plain", CPU, None)
        for dtype in (None, torch.bfloat16):
            shared, plain = (numbers(case, way, context.device, dtype) for way in ("shared", "plain"))
            yield line(size, dtype, truth, shared, plain)


def line(size: str, dtype: torch.dtype | None, truth: Numbers, shared: Numbers, plain: Numbers) -> str:
    """A row of the table."""
    pairs = [(shared, truth), (plain, truth), (shared, plain)]
    found = [apart(*pair) for pair in pairs]
    equal = all(own <= max(_ALIKE, _TIMES * other) for own, other in zip(found[0], found[1], strict=True))
    cells = [" / ".join(f"{one:.1e}" for one in both) for both in found]
    passes = "float32" if dtype is None else f"{str(dtype).removeprefix('torch.')} autocast"
    return row(size, passes, *cells, "yes" if equal else "**no**")


def apart(found: Numbers, right: Numbers) -> tuple[float, float]:
    return float((found[0] - right[0]).abs().max()), largest_difference(found[1:], right[1:])


def numbers(case: Case, way: Way, device: torch.device, dtype: torch.dtype | None) -> Numbers:
    """Log-probabilities of completions that are always the same, and the gradient of their weighted sum."""
    family = family_without_end(new_model(case.size).to(device), processor_for(case.size))
    agent = new_agent(family, way, case.new_tokens)
    prompts, index = agent.encode([one for one in observations(family, case) for _ in range(case.group_size)])
    rollout = Rollout(prompts, index, completions(family, case), 1.0)
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        values = agent.logprobs(rollout).values
    push = torch.randn(values.shape, generator=torch.Generator().manual_seed(0))
    (values * push.to(device)).sum().backward()
    return values.detach().float().cpu(), gradient_of(family.model).float().cpu()


def completions(family: Family, case: Case) -> list[Completion]:
    """Random tokens of those that are sampled."""
    allowed = np.setdiff1d(np.arange(family.model.config.get_text_config().vocab_size), family.banned_tokens)
    tokens = np.random.default_rng(0).choice(allowed, (case.count, case.new_tokens))
    return [Completion("", one, np.zeros(case.new_tokens, np.float32), "length") for one in tokens]
