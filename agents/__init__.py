"""Agents: policies that generate completions for observations."""

from vlmenv.compat.torchvision import mend_torchvision

mend_torchvision()  # before transformers imports it

from vlmenv.agents.base import Agent, LogProbs, Reference  # noqa: E402
from vlmenv.agents.families import Family, register_family  # noqa: E402
from vlmenv.agents.vlm import VLMAgent  # noqa: E402
from vlmenv.core.sampling import Sampling  # noqa: E402

__all__ = ["Agent", "Family", "LogProbs", "Reference", "Sampling", "VLMAgent", "register_family"]
