"""Algorithms, and the trainer that runs them."""

from vlmenv.algos.base import Algorithm, LossInputs, LossOutput
from vlmenv.algos.grpo import GRPO, GRPOConfig
from vlmenv.algos.trainer import StepResult, Trainer, TrainerConfig

ALGORITHMS = {GRPO.name: GRPO}
"""The algorithms by the names that `--algo` takes."""

__all__ = [
    "ALGORITHMS",
    "GRPO",
    "Algorithm",
    "GRPOConfig",
    "LossInputs",
    "LossOutput",
    "StepResult",
    "Trainer",
    "TrainerConfig",
]
