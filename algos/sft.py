"""SFT: supervised fine-tuning on the true answers, as a warm-up or a control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlmenv.algos.base import Algorithm, AlgorithmConfig, Credit, LossInputs, LossOutput, Scored
from vlmenv.core.errors import require


@dataclass(frozen=True)
class SFTConfig(AlgorithmConfig):
    """Hyperparameters of supervised fine-tuning."""

    group_size: int = 1
    """Completions per prompt: always 1, the true answer."""

    @classmethod
    def shared(cls) -> tuple[str, ...]:
        return tuple(name for name in super().shared() if name != "group_size")

    def __post_init__(self) -> None:
        AlgorithmConfig.__post_init__(self)
        require(
            self.group_size == 1, f"sft has one true answer per prompt: group_size must be 1, not {self.group_size}"
        )


class SFT(Algorithm):
    """SFT: the mean negative log-likelihood of the true answers' tokens."""

    name: ClassVar[str] = "sft"
    imitates: ClassVar[bool] = True

    def __init__(self, config: SFTConfig) -> None:
        self.config: SFTConfig = config

    def credit(self, scored: Scored) -> Credit:
        return Credit(scored.rewards.new_ones(len(scored.rewards), 1), scored.mask)

    def loss(self, inputs: LossInputs) -> LossOutput:
        return LossOutput(-(inputs.weights * inputs.logprobs).sum(), {})
