"""Reinforcement learning for vision-language models, in Gymnasium's style.

Importing this package registers the environments, `gymnasium.make("VLM-REC-v0")`, and nothing heavy: no torch, no
transformers. What needs them, such as `vlmenv.train`, is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

import vlmenv.core.platforms  # noqa: F401 (first of all: it refuses systems that vlmenv does not run on)
from vlmenv.envs.registration import register_task

if TYPE_CHECKING:
    from vlmenv.agents.families import register_family
    from vlmenv.algos import register_algorithm
    from vlmenv.api import Run, evaluate, train
    from vlmenv.building import register_engine
    from vlmenv.envs import register_reward
    from vlmenv.runs.tracking import register_tracker

__version__ = "0.1.0"
__all__ = [
    "Run",
    "__version__",
    "evaluate",
    "register_algorithm",
    "register_engine",
    "register_family",
    "register_reward",
    "register_task",
    "register_tracker",
    "train",
]

_PLACES: Final = {
    "Run": "vlmenv.api",
    "evaluate": "vlmenv.api",
    "train": "vlmenv.api",
    "register_algorithm": "vlmenv.algos",
    "register_engine": "vlmenv.building",
    "register_family": "vlmenv.agents.families",
    "register_reward": "vlmenv.envs",
    "register_tracker": "vlmenv.runs.tracking",
}


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name]), name)
    raise AttributeError(f"module 'vlmenv' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)


register_task("VLM-REC-v0", "vlmenv.envs.rec:RECEnv")
register_task("VLM-OVD-v0", "vlmenv.envs.ovd:OVDEnv")
register_task("VLM-Math-v0", "vlmenv.envs.math_reasoning:MathEnv")
register_task("VLM-Caption-v0", "vlmenv.envs.captioning:CaptionEnv")
register_task("VLM-VQA-v0", "vlmenv.envs.vqa:VQAEnv")
register_task("VLM-Count-v0", "vlmenv.envs.counting:CountEnv")
register_task("VLM-Point-v0", "vlmenv.envs.pointing:PointEnv")
register_task("VLM-GUI-v0", "vlmenv.envs.gui:GUIEnv")
register_task("VLM-OCR-v0", "vlmenv.envs.ocr:OCREnv")
register_task("VLM-Seg-v0", "vlmenv.envs.segmentation:SegmentEnv")
register_task("VLM-Zoom-v0", "vlmenv.envs.zoom:ZoomEnv")
register_task("VLM-Search-v0", "vlmenv.envs.search:SearchEnv")
register_task("VLM-VideoQA-v0", "vlmenv.envs.video_qa:VideoQAEnv")
register_task("VLM-Chart-v0", "vlmenv.envs.charts:ChartEnv")
register_task("VLM-Temporal-v0", "vlmenv.envs.temporal:TemporalEnv")
