"""PAPO: GRPO or DAPO with a loss for perception (arXiv 2507.06448).

A policy that looks at an image gives other probabilities without it. So the implicit perception loss raises the
divergence between the policy that sees the image and the same policy that sees a masked one. It has no upper bound;
double entropy loss keeps both policies sure of what was sampled.

The loss is the paper's equation, with a gradient through both policies. The authors' code differs by default: it keeps
the masked policy's log-probabilities from before the update (`RECOMPUTE_AUG_LOG_PROBS` is off), without gradient.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmenv.algos.base import LossInputs, LossOutput
from vlmenv.algos.grpo import GRPO, GRPOConfig
from vlmenv.algos.losses import is_dependence_bounded, visual_dependence
from vlmenv.core.errors import require_weight


@dataclass(frozen=True)
class PAPOConfig(GRPOConfig):
    """Hyperparameters of PAPO, beside those of GRPO."""

    perception_weight: float = 0.01
    """Weight of the implicit perception loss, gamma: the KL divergence (k3) from the policy with masked images."""
    entropy_loss: float = 0.0
    """Weight of the entropy of the policy that sees the image, eta_1, which is lowered."""
    masked_entropy_loss: float = 0.0
    """Weight of the entropy of the policy that sees the masked image, eta_2, which is lowered."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("perception_weight", "entropy_loss", "masked_entropy_loss"):
            require_weight(name, getattr(self, name))


class PAPO(GRPO):
    """PAPO: the loss of GRPO, less the divergence from the policy with masked images."""

    name: ClassVar[str] = "papo"
    learns_masked: ClassVar[bool] = True

    def __init__(self, config: PAPOConfig) -> None:
        super().__init__(config)
        self.config: PAPOConfig = config

    def loss(self, inputs: LossInputs) -> LossOutput:
        """Adds the two losses. Entropies are estimated from the sampled tokens, as in the authors' code."""
        config, output = self.config, super().loss(inputs)
        assert inputs.masked_logprobs is not None
        perception = visual_dependence(inputs.logprobs, inputs.masked_logprobs)
        entropies = config.entropy_loss * inputs.logprobs + config.masked_entropy_loss * inputs.masked_logprobs
        per_token: Tensor = -config.perception_weight * perception - entropies
        far = is_dependence_bounded(inputs.logprobs, inputs.masked_logprobs)[inputs.mask]
        sums = {
            "policy/perception": perception.detach()[inputs.mask].sum(),
            "policy/perception_bounded": far.float().sum(),
        }
        return LossOutput(output.loss + (inputs.weights * per_token).sum(), output.sums | sums)
