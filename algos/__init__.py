"""Reinforcement-learning algorithms and the trainer."""

from vlmenv.algos.advantages import gae, group_relative, leave_one_out, whiten
from vlmenv.algos.base import Algorithm, AlgorithmConfig, Credit, LossInputs, LossOutput, Scored, ratio_sums
from vlmenv.algos.faults import NonFiniteError
from vlmenv.algos.grpo import GRPO, PRESETS, GRPOConfig
from vlmenv.algos.losses import bounded, cispo, clipped_surrogate, divergence, is_clipped, sequence_ratio, token_ratio
from vlmenv.algos.opd import OPD, OPDConfig
from vlmenv.algos.papo import PAPO, PAPOConfig
from vlmenv.algos.ppo import PPO, PPOConfig
from vlmenv.algos.registry import ALGORITHMS, Registered, find_algorithm, register_algorithm
from vlmenv.algos.reinforce_plus_plus import ReinforcePlusPlus, ReinforcePlusPlusConfig
from vlmenv.algos.rloo import RLOO, RLOOConfig
from vlmenv.algos.sft import SFT, SFTConfig
from vlmenv.algos.trainer import StepResult, Trainer, TrainerConfig
from vlmenv.algos.vppo import VPPO, VPPOConfig

__all__ = [
    "ALGORITHMS",
    "GRPO",
    "OPD",
    "PAPO",
    "PPO",
    "PRESETS",
    "RLOO",
    "SFT",
    "VPPO",
    "Algorithm",
    "AlgorithmConfig",
    "Credit",
    "GRPOConfig",
    "LossInputs",
    "LossOutput",
    "NonFiniteError",
    "OPDConfig",
    "PAPOConfig",
    "PPOConfig",
    "RLOOConfig",
    "Registered",
    "ReinforcePlusPlus",
    "ReinforcePlusPlusConfig",
    "SFTConfig",
    "Scored",
    "StepResult",
    "Trainer",
    "TrainerConfig",
    "VPPOConfig",
    "bounded",
    "cispo",
    "clipped_surrogate",
    "divergence",
    "find_algorithm",
    "gae",
    "group_relative",
    "is_clipped",
    "leave_one_out",
    "ratio_sums",
    "register_algorithm",
    "sequence_ratio",
    "token_ratio",
    "whiten",
]
