from __future__ import annotations

import importlib

import gymnasium
import pytest
from accelerate import Accelerator
from conftest import ROOT

from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig


@pytest.mark.slow
def test_it_gives_the_trainers_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    module = importlib.import_module("custom_loop")
    by_hand = module.main(module.Args(steps=5, group_size=4, prompts=4, lr=1e-3))
    envs = gymnasium.make_vec("VLM-REC-v0", num_envs=16, group_size=4)
    config = TrainerConfig(steps=5, lr=1e-3, warmup_steps=0, lr_schedule="constant")
    trainer = Trainer(
        VLMAgent.from_pretrained("builtin"), envs, GRPO(GRPOConfig(group_size=4)), config, Accelerator(cpu=True)
    )
    by_trainer = [result.metrics["reward/mean"] for result in trainer.train(seed=0)]
    assert by_hand == pytest.approx(by_trainer, abs=1e-5)
