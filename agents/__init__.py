"""Agents: policies that look at observations and write answers."""

from vlmenv.agents.base import Agent, LogProbs, Reference
from vlmenv.agents.vlm import VLMAgent

__all__ = ["Agent", "LogProbs", "Reference", "VLMAgent"]
