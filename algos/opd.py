"""OPD: on-policy distillation. A teacher scores the student's own completions, token by token.

The reverse KL divergence, KL(student || teacher), is estimated at the sampled tokens, and is the negative
advantage of each token by itself (https://thinkingmachines.ai/blog/on-policy-distillation, arXiv 2306.13649). Unlike
imitation of the teacher's answers, it corrects the student where the student goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmenv.algos.base import Scored
from vlmenv.algos.grpo import GRPO, GRPOConfig, check_by_token
from vlmenv.algos.losses import bounded
from vlmenv.core.errors import require, require_weight


@dataclass(frozen=True)
class OPDConfig(GRPOConfig):
    """Hyperparameters of on-policy distillation, beside those of GRPO."""

    teacher: str | None = None
    """Model that teaches, in the forms of `model`, with the tokenizer of the trained model. It is held in memory, by
    each rank as a whole. Or the address of a server that `vlmenv serve` started with it."""
    reward_weight: float = 0.0
    """Weight of GRPO's advantages, from the rewards, beside the teacher's. 0: the rewards teach nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weight("reward_weight", self.reward_weight)
        check_by_token(self, "opd")
        names = ("most_rounds", "replay", "overlong_share", "scale", "per_term")
        given = [name for name in names if getattr(self, name) != getattr(GRPOConfig, name)]
        idle = bool(given) and not self.reward_weight
        told = f"{' and '.join(given)} {'is' if len(given) == 1 else 'are'} of rewards, which teach nothing here"
        require(not idle, f"{told}: give a reward_weight above 0, or leave {'it' if len(given) == 1 else 'them'} out")

    @property
    def equal_rewards_teach(self) -> bool:
        """True if rewards teach nothing, so that only the teacher does."""
        return not self.reward_weight or super().equal_rewards_teach


class OPD(GRPO):
    """OPD: the advantage of a token is the teacher's log-probability less the student's."""

    name: ClassVar[str] = "opd"
    wants_teacher: ClassVar[bool] = True

    def __init__(self, config: OPDConfig) -> None:
        super().__init__(config)
        self.config: OPDConfig = config

    def advantages(self, scored: Scored) -> Tensor:
        """Computes advantages of tokens, [N, L]."""
        assert scored.teacher_logprobs is not None
        gap = bounded(scored.old_logprobs - scored.teacher_logprobs)
        return self.config.reward_weight * super().advantages(scored) - gap
