"""Log-probabilities of a prompt by plain vLLM, which another process looks at.

vlmenv only mends torchvision where its build does not fit torch's.

Arguments: a JSON file of jobs, each with `folder`, `adapter` (or null), `tower` (vLLM's `enable_tower_connector_lora`),
`inputs` and `out`. The inputs hold `ids` [L] with a token for each image, and `image` [H, W, 3].
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def logprobs(job: dict[str, Any]) -> tuple[list[int], list[float]]:
    """The prompt's tokens as vLLM expands them, and the log-probability of each after the first."""
    from PIL import Image
    from safetensors.numpy import load_file
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    adapters = {"enable_lora": True, "enable_tower_connector_lora": job["tower"]} if job["adapter"] else {}
    model = LLM(
        job["folder"],
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        kv_cache_memory_bytes=256 << 20,
        limit_mm_per_prompt={"image": 1, "video": 0},
        **adapters,
    )
    inputs = load_file(job["inputs"])
    ids = inputs["ids"].tolist()
    prompt = {"prompt_token_ids": ids, "multi_modal_data": {"image": Image.fromarray(inputs["image"])}}
    request = LoRARequest("trained", 1, job["adapter"]) if job["adapter"] else None
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (answer,) = model.generate([prompt], asked, lora_request=request, use_tqdm=False)
    found = answer.prompt_token_ids
    pairs = zip(found[1:], answer.prompt_logprobs[1:], strict=True)
    return found, [by_token[token].logprob for token, by_token in pairs]


def main() -> None:
    os.environ.update(SETTINGS)
    from vlmenv.agents.engines.settings import inspect_in_process

    inspect_in_process()
    for job in json.loads(Path(sys.argv[1]).read_text()):
        ids, values = logprobs(job)
        Path(job["out"]).write_text(json.dumps({"ids": ids, "logprobs": values}))


if __name__ == "__main__":
    main()
