"""Rewards: pure functions of a completion's text and the truth, one file per kind.

They take any text, never raise, and run in time linear in its length, so that they also serve as
reward functions of another trainer.
"""

from vlmenv.envs.rewards.registry import register_reward

__all__ = ["register_reward"]
