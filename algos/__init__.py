"""Reinforcement-learning algorithms and the trainer."""

from collections.abc import Callable
from typing import Any, Final

from vlmenv.algos.base import Algorithm, AlgorithmConfig, Credit, LossInputs, LossOutput, Scored
from vlmenv.algos.faults import NonFiniteError
from vlmenv.algos.grpo import GRPO, PRESETS, GRPOConfig
from vlmenv.algos.ppo import PPO, PPOConfig
from vlmenv.algos.reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusConfig
from vlmenv.algos.rloo import RLOO, RLOOConfig
from vlmenv.algos.sft import SFT, SFTConfig
from vlmenv.algos.trainer import StepResult, Trainer, TrainerConfig

ALGORITHMS: Final[dict[str, tuple[Callable[[Any], Algorithm], AlgorithmConfig]]] = {
    **{name: (GRPO, config) for name, config in PRESETS.items()},
    "rloo": (RLOO, RLOOConfig()),
    "reinforce++": (ReinforcePlusPlus, ReinforcePlusPlusConfig()),
    "ppo": (PPO, PPOConfig()),
    "sft": (SFT, SFTConfig()),
}
"""By the name that `--algo` takes: the algorithm, and its options' defaults."""

__all__ = [
    "ALGORITHMS",
    "GRPO",
    "PPO",
    "PRESETS",
    "RLOO",
    "SFT",
    "Algorithm",
    "AlgorithmConfig",
    "Credit",
    "GRPOConfig",
    "LossInputs",
    "LossOutput",
    "NonFiniteError",
    "PPOConfig",
    "RLOOConfig",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusConfig",
    "SFTConfig",
    "Scored",
    "StepResult",
    "Trainer",
    "TrainerConfig",
]
