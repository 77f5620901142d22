"""GEM's Geometry3K as a Gymnasium environment of images and prompts, which vlmenv trains on."""

from __future__ import annotations

import os
from typing import Any

import datasets
import gymnasium
import numpy as np
from gem.envs.math_visual_env import MathVisualEnv


class Geometry(gymnasium.Env[Any, str]):
    """GEM's questions and its grading; its rows are those of a folder that `datasets` saved."""

    action_space = gymnasium.spaces.Text(100_000)

    def __init__(self) -> None:
        rows = datasets.load_from_disk(os.environ["GEOMETRY"])["train"]
        self.inner = MathVisualEnv(dataset=rows, use_mp=False)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        shown, info = self.inner.reset(seed=seed)
        images = [image.convert("RGB").resize((64, 64)) for image in shown["images"]]
        self.shown = {"images": tuple(map(np.asarray, images)), "prompt": shown["problem"].replace("<image>", "")}
        return self.shown, info

    def step(self, action: str) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        _, reward, _, _, info = self.inner.step(action)  # both of its ends are always true
        return self.shown, float(reward), True, False, info


gymnasium.register("Geometry3K-v0", Geometry)
