"""Reinforcement learning for vision-language models, in Gymnasium's style.

Importing this package registers the environments, `gymnasium.make("VLM-REC-v0")`, and nothing heavy:
no torch, no transformers.
"""

from vlmenv.envs.registration import register_task

__version__ = "0.1.0"
__all__ = ["__version__", "register_task"]

register_task("VLM-REC-v0", "vlmenv.envs.rec:RECEnv")
register_task("VLM-OVD-v0", "vlmenv.envs.ovd:OVDEnv")
register_task("VLM-Math-v0", "vlmenv.envs.math_reasoning:MathEnv")
register_task("VLM-Caption-v0", "vlmenv.envs.captioning:CaptionEnv")
register_task("VLM-VQA-v0", "vlmenv.envs.vqa:VQAEnv")
