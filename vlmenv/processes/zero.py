"""Ranks with shards of gradients, optimizer state and, at stage 3, weights, by DeepSpeed's ZeRO (arXiv 1910.02054).

This uses DeepSpeed's engine directly, because accelerate's wrapper takes an optimizer step with every backward pass.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor

from vlmenv.agents.base import Agent, Reference
from vlmenv.compat import deepspeed as compat
from vlmenv.core.errors import ConfigError, TrainingError
from vlmenv.processes.base import Sharded


class ZeRO(Sharded):
    """Ranks with shards by ZeRO. As with the other strategies, weights are float32 and passes run under autocast.

    Args:
        accelerator: Device, precision and ranks.
        options: DeepSpeed's options under `zero_optimization`.

    Attributes:
        stage: Stage of ZeRO, from 1 to 3.
    """

    name: ClassVar[str] = "ZeRO"
    takes_any_dtype: ClassVar[bool] = False
    samples_ahead: ClassVar[bool] = False  # it has never been run so

    def __init__(self, accelerator: Accelerator, options: Mapping[str, Any]) -> None:
        super().__init__(accelerator)
        self._options, self.stage = options, options["stage"]
        self.shards_weights = self.stage == 3
        self._bf16 = accelerator.mixed_precision == "bf16"

    def _prepare_shards(
        self, agent: Agent, reference: Reference | None, optimizer: Callable[[], torch.optim.Optimizer]
    ) -> torch.optim.Optimizer:
        if self.accelerator.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        import deepspeed

        config = {
            "train_micro_batch_size_per_gpu": 1,  # required, but without effect here
            "gradient_accumulation_steps": 1,
            "zero_optimization": self._options,
            "zero_allow_untested_optimizer": True,
            "steps_per_print": None,
        }
        if self._bf16:
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
        plain = optimizer()
        self._engine, *_ = deepspeed.initialize(model=agent.policy, optimizer=plain, config=config)
        if missing := compat.missing_parts(self._engine, self.stage):
            raise ConfigError(
                f"DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}, which vlmenv needs: install a release "
                "that vlmenv is tested with, or launch with FSDP2 (docs/distributed.md)"
            )
        self._policy, agent.policy = agent.policy, self._engine
        return plain

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.accelerator.device.type, torch.bfloat16, enabled=self._bf16)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        with self._gathered(), compat.without_hooks(self._engine):
            yield

    def _gathered(self, writer: int | None = None) -> AbstractContextManager[None]:
        from deepspeed import zero

        context: AbstractContextManager[None] = zero.GatheredParameters(list(self._policy.parameters()), writer)
        return context

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss * self.accelerator.num_processes)  # DeepSpeed averages over ranks

    def step(self, max_norm: float, *, learn: bool) -> float:
        if not learn:
            raise TrainingError("the loss is not finite, and DeepSpeed cannot skip a step for that")
        return compat.step(self._engine, max_norm)

    def weights(self) -> Mapping[str, Tensor] | None:
        if self.stage < 3:
            return None
        with self._gathered():
            if not self.accelerator.is_main_process:
                return {}
            copies: dict[int, Tensor] = {}  # tied weights stay one tensor
            state = self._policy.state_dict()
            return {name: copies.setdefault(t.data_ptr(), t.to("cpu", copy=True)) for name, t in state.items()}

    def shared_state(self) -> dict[str, Any]:
        return {}

    def rank_state(self) -> dict[str, Any]:
        plain = self._engine.optimizer.optimizer
        rates = [group["lr"] for group in plain.param_groups]
        parts = compat.flat_shards(self._engine, self.stage)
        return {"optimizer": {"lr": rates, "state": [dict(plain.state[share]) for share in parts]}}

    def load(self, folder: Path, shared: dict[str, Any], own: dict[str, Any]) -> None:
        if self.stage < 3:
            self.agent.load(folder)
        else:
            with self._gathered(writer=0):
                self.agent.load(folder)
        plain, state = self._engine.optimizer.optimizer, own["optimizer"]
        compat.read_shards(self._engine)
        for group, rate in zip(plain.param_groups, state["lr"], strict=True):
            group["lr"] = rate
        for share, kept in zip(compat.flat_shards(self._engine, self.stage), state["state"], strict=True):
            plain.state[share] = {name: value.to(share.device) for name, value in kept.items()}
