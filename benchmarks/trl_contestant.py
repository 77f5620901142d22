"""TRL's GRPOTrainer as a contestant: the same model, prompts and numbers of tokens as ours.

What it does is TRL's own, from the rows of a data set to the optimiser step; left out are its dataloader, callbacks
and logging, which cost it time. Its options are the fastest that it documents for this machine: no gradient
checkpointing (its default trades time for memory), no padding to multiples, no reference model. Its buffer for
logits is cut to the vocabulary's width here; TRL 1.16 makes it 32,768 wide, most of which a small vocabulary never
touches.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
from common import LR, Case, rewards, seconds_of
from datasets import Dataset
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin
from transformers.models.gemma3.processing_gemma3 import Gemma3Processor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import utils as trl_utils

from vlmenv.agents.families import Family
from vlmenv.core.rollout import Observation


def without_videos(published: type[ProcessorMixin], family: Family) -> ProcessorMixin:
    """A published processor without its video part, which would need torchvision."""

    class ForImages(published):  # type: ignore[misc, valid-type]
        def __init__(
            self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None
        ) -> None:
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)
            for name, token in NAMED.items():
                for part in (self, tokenizer):
                    setattr(part, f"{name}_token", token)
                    setattr(part, f"{name}_token_id", tokenizer.convert_tokens_to_ids(token))
            if published is Gemma3Processor:
                features = "<|image_pad|>" * family.model.config.mm_tokens_per_image
                self.full_image_sequence = f"\n\n<|vision_start|>{features}<|vision_end|>\n\n"
                self.image_token, self.image_token_id = self.boi_token, self.boi_token_id  # the mark, not a feature

    parts = family.processor
    parts.tokenizer.padding_side = "left"  # as TRL wants it
    return ForImages(parts.image_processor, parts.tokenizer, chat_template=parts.chat_template)


NAMED = {
    **{name: f"<|{name}_pad|>" for name in ("image", "video")},
    **{name: f"<|{name}|>" for name in ("vision_start", "vision_end")},
    "boi": "<|vision_start|>",
    "eoi": "<|vision_end|>",
}
"""Tokens by the names that the published processors give them."""
PROCESSORS = {
    "gemma3": Gemma3Processor,
    "qwen3_vl": Qwen3VLProcessor,
    "qwen3_5": Qwen3VLProcessor,
    "qwen2_5_vl": Qwen2_5_VLProcessor,
}


class TRL:
    """TRL's trainer.

    Args:
        model: To be trained; none that another contestant trains.
        family: Of that model, with a processor of its own.
        prompts: That are asked.
        case: How.
        as_on_gpus: Whether to apply the head to the completions' tokens alone, as TRL 1.16 does on GPUs; on CPUs it
            applies it to the prompts' too.
        options: More of `GRPOConfig`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        family: Family,
        prompts: Sequence[Observation],
        case: Case,
        *,
        as_on_gpus: bool = False,
        **options: Any,
    ) -> None:
        self.case = case
        self._as_on_gpus = as_on_gpus
        self._generating = 0.0
        self.inputs: dict[str, Any] = {}
        rows = [one for one in prompts for _ in range(case.group_size)]
        self._rows = [
            {
                "prompt": [{"role": "user", "content": row["prompt"]}],
                "images": [Image.fromarray(image) for image in row["images"]],
                "reward": reward,
            }
            for row, reward in zip(rows, rewards(case).tolist(), strict=True)
        ]
        self.trainer = GRPOTrainer(
            model=model,
            reward_funcs=_given_rewards,
            args=_options(family, case, options),
            train_dataset=Dataset.from_dict({"prompt": ["not used: the rows are handed over"]}),
            processing_class=without_videos(PROCESSORS[model.config.model_type], family),
        )
        vocabulary = model.get_output_embeddings().weight.shape[0]
        trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE = min(vocabulary, trl_utils._CHUNKED_LOGPROB_CHUNK_SIZE)
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.model.train()
        self._time_generation()

    def step(self) -> dict[str, float]:
        self._generating = 0.0
        rollout = seconds_of(self.prepare)
        update = seconds_of(self.update)
        return {"step": rollout + update, "rollout": rollout, "generate": self._generating, "update": update}

    def prepare(self) -> None:
        """From rows to inputs of the loss: generates and scores."""
        self.inputs = self.trainer._prepare_inputs(self._rows)

    @torch.no_grad()
    def logprobs(self) -> Tensor:
        """As TRL computes `old_per_token_logps`, where it needs them."""
        inputs = self.inputs
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        names = ("pixel_values", "image_grid_thw", "mm_token_type_ids", "token_type_ids", "num_images")
        given = {name: inputs[name] for name in names if name in inputs}
        with self._head():
            found, _, _ = self.trainer._get_per_token_logps_and_entropies(
                self.trainer.model, ids, mask, inputs["completion_ids"].shape[1], batch_size=len(ids), **given
            )
        return found

    def update(self) -> None:
        self.backward()
        trainer = self.trainer
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.model.zero_grad()

    def backward(self) -> float:
        """Forward and backward pass; the loss."""
        with self._head():
            loss = self.trainer.compute_loss(self.trainer.model, self.inputs)
        self.trainer.accelerator.backward(loss)
        return float(loss.detach())

    def answer(self, completions: list[list[int]]) -> None:
        """Prepares inputs with given completions in place of generated ones."""
        generate = self.trainer._generate_single_turn
        self.trainer._generate_single_turn = lambda *_, **__: (completions, None)
        self.prepare()
        self.trainer._generate_single_turn = generate

    @contextmanager
    def _head(self) -> Iterator[None]:
        """What TRL asks to know which tokens to apply the head to says yes; its kernels ask for themselves."""
        uses_triton = trl_utils._use_triton
        if self._as_on_gpus:
            trl_utils._use_triton = lambda device: True
        yield
        trl_utils._use_triton = uses_triton

    def _time_generation(self) -> None:
        generate: Callable[..., Any] = self.trainer._generate_single_turn

        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = generate(*args, **kwargs)  # ids as lists: a GPU has been waited for
            self._generating += time.perf_counter() - started
            return result

        self.trainer._generate_single_turn = timed


def _options(family: Family, case: Case, more: dict[str, Any]) -> GRPOConfig:
    return GRPOConfig(
        **{
            "output_dir": tempfile.mkdtemp(prefix="trl-"),
            "report_to": "none",
            "per_device_train_batch_size": case.count,
            "num_generations": case.group_size,
            "max_completion_length": case.new_tokens,
            "learning_rate": LR,
            "gradient_checkpointing": False,
            "log_multimodal": False,
            # The end tokens are among them: all completions are as long as they may be, as ours are.
            "generation_kwargs": {"suppress_tokens": np.asarray(family.banned_tokens).tolist()},
            "use_cpu": True,
            "bf16": False,
        }
        | more
    )


def _given_rewards(reward: list[float], **_: Any) -> list[float]:
    return reward
