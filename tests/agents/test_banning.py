"""Tokens that vLLM never samples, with the kind of its runners that GPUs use.

It does not run on CPUs: here vLLM's own functions load the class, and it is called as that runner would. The other kind
runs in test_vllm.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vlmenv.agents.engines.settings import engine_settings
from vlmenv.agents.vlm import VLMAgent

pytestmark = pytest.mark.vllm
CPU = torch.device("cpu")


@pytest.fixture
def processors(builtin: VLMAgent) -> list[Any]:
    """Those that vLLM's second kind of runner makes of what it is told, once the requests' settings can be checked."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample.logits_processor import (
        LogitsProcRequestState,
        build_custom_logits_processors,
        build_custom_logits_processors_params_validator,
    )

    sizes = {"max_length": 64, "max_images": 1, "max_videos": 0, "memory_share": 0.4, "tensor_parallel": 1}
    told = engine_settings(builtin.folder, builtin.family, CPU, dtype=torch.float32, transfer="nccl", **sizes)
    names = told["logits_processors"]
    build_custom_logits_processors_params_validator(names)(SamplingParams())
    states = SimpleNamespace(**dict.fromkeys(LogitsProcRequestState.__dataclass_fields__) | {"device": CPU})
    config = SimpleNamespace(additional_config=told["additional_config"])
    return build_custom_logits_processors(config, states, False, names)


def test_the_runner_of_gpus_bans_them(builtin: VLMAgent, processors: list[Any]) -> None:
    """Their probability is 0, and the others keep their logits."""
    from vllm import SamplingParams
    from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

    (processor,) = processors
    assert processor.add_request(0, SamplingParams())  # else its logits may go unprocessed
    processor.apply_staged_writes()
    logits = torch.randn(3, builtin.family.model.config.get_text_config().vocab_size)
    context = LogitsContext(**dict.fromkeys(LogitsContext.__dataclass_fields__))
    with torch.inference_mode():
        processed = processor.apply(logits.clone(), context)
    banned = builtin.family.banned_tokens
    others = np.delete(np.arange(logits.shape[1]), banned)
    assert len(banned) > 0
    assert (processed.log_softmax(dim=-1)[:, banned] == -torch.inf).all()
    assert torch.equal(processed[:, others], logits[:, others])
