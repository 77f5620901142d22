"""Models with planted faults, and an engine that runs without vLLM."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vlmenv.agents.checkpoints import weight_names
from vlmenv.agents.engines.base import Engine, Request
from vlmenv.agents.engines.checks import check_names, check_prompt
from vlmenv.agents.families import Family
from vlmenv.agents.sampling import Sampled, Sampling, sample
from vlmenv.agents.vlm import VLMAgent, find_model
from vlmenv.agents.weights import tied_names
from vlmenv.core.rollout import Prompt
from vlmenv.doctor import DoctorConfig, Finding, examine
from vlmenv.options.fields import replaced


def examined(**options: Any) -> dict[str, Finding]:
    """What the doctor finds, by the checks' names."""
    findings = examine(replaced(DoctorConfig(device="cpu"), options), torch.device("cpu"))
    return {one.check: one for one in findings}


def failed(findings: Mapping[str, Finding]) -> set[str]:
    return {name for name, one in findings.items() if one.passed is False}


def unchecked(findings: Mapping[str, Finding]) -> set[str]:
    return {name for name, one in findings.items() if one.passed is None}


def copied(
    folder: Path, image_processor: Mapping[str, Any] | None = None, template: tuple[str, str] = ("", "")
) -> Path:
    """A copy of the built-in model with other settings of the image processor, and a text in its chat template."""
    shutil.copytree(find_model("builtin"), folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | dict(image_processor or {})))
    chat = folder / "chat_template.jinja"
    text = chat.read_text()
    assert template[0] in text
    chat.write_text(text.replace(*template) if template[0] else text)
    return folder


SMALLER = {"size": {"shortest_edge": 1024, "longest_edge": 4096}}
"""Of an image processor: half the sides of the built-in samples."""
OTHER_ROLE = ("assistant", "robot")
"""Of a chat template."""


class CopyEngine(Engine):
    """A copy of the policy in transformers, which reads images by the files of its own folder."""

    def __init__(self, folder: Path, family: Family, **options: Any) -> None:
        self.copy = VLMAgent.from_pretrained(folder)
        self.max_length = self.copy.max_length
        self._names = weight_names(folder) - tied_names(family.model)

    def generate(
        self, requests: Sequence[Request], index: NDArray[np.int64], sampling: Sampling, rng: np.random.Generator
    ) -> list[Sampled]:
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        prompts = [self._read(request) for request in requests]
        for request, prompt in zip(requests, prompts, strict=True):
            check_prompt(request, prompt.input_ids.tolist())
        return sample(self.copy.family_policy, prompts, index, sampling, generator)

    def _read(self, request: Request) -> Prompt:
        """The prompt with each image's mark in its own number of tokens, as vLLM makes it."""
        family = self.copy.family
        return family._encoded_chat(family.processor.tokenizer.decode(request.token_ids), request.images)

    def sync(self, weights: Mapping[str, torch.Tensor], *, vision: tuple[int, ...] | None = None) -> None:
        check_names(weights, self._names)
        self.copy.family.model.load_state_dict(weights, strict=False)  # but for those of a second name

    def checksums(self) -> dict[str, dict[str, str]]:
        """As of vLLM's weights."""
        weights = self.copy.family.model.named_parameters()
        return {"": {name: hashlib.sha256(one.detach().numpy().tobytes()).hexdigest() for name, one in weights}}

    def clear(self) -> None:
        for weight in self.copy.family.model.parameters():
            weight.data.zero_()

    def close(self) -> None:
        del self.copy
