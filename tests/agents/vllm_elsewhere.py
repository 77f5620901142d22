"""Log-probabilities of a prompt by plain vLLM, which another process looks at.

vlmenv only mends torchvision where its build does not fit torch's.

Arguments: a JSON file of engines, each with `folder`, `adapters` (true: vLLM's `enable_lora`), `tower` (vLLM's
`enable_tower_connector_lora`), `inputs` and `asked`: answers in turn, each with `out` and `adapter` (or null). The
inputs hold `ids` [L] with a token for each image, and `image` [H, W, 3]. An engine keeps its process, so each has a
fork of this one, which has imported vLLM once.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


_LONGEST = 300
"""Seconds that an engine has."""


def start(engine: dict[str, Any]) -> Any:
    from vllm import LLM

    adapters = {"enable_lora": True, "enable_tower_connector_lora": engine["tower"]} if engine["adapters"] else {}
    return LLM(
        engine["folder"],
        dtype="float32",
        max_model_len=512,
        enforce_eager=True,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=64 << 20,
        limit_mm_per_prompt={"image": 1, "video": 0},
        **adapters,
    )


def logprobs(model: Any, inputs: dict[str, Any], adapter: str | None) -> dict[str, list[Any]]:
    """The prompt's tokens as vLLM expands them, and the log-probability of each after the first."""
    from PIL import Image
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    prompt = {
        "prompt_token_ids": inputs["ids"].tolist(),
        "multi_modal_data": {"image": Image.fromarray(inputs["image"])},
    }
    request = LoRARequest(adapter, 1 + abs(hash(adapter)) % 10_000, adapter) if adapter else None
    asked = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    (answer,) = model.generate([prompt], asked, lora_request=request, use_tqdm=False)
    found = answer.prompt_token_ids
    pairs = zip(found[1:], answer.prompt_logprobs[1:], strict=True)
    return {"ids": found, "logprobs": [by_token[token].logprob for token, by_token in pairs]}


def answer(engine: dict[str, Any]) -> None:
    from safetensors.numpy import load_file

    model, inputs = start(engine), load_file(engine["inputs"])
    for one in engine["asked"]:
        Path(one["out"]).write_text(json.dumps(logprobs(model, inputs, one["adapter"])))


def in_fork(engine: dict[str, Any]) -> None:
    """Answers in a fork. What fails there, or takes too long, is written beside the first answer."""
    if (child := os.fork()) != 0:
        os.waitpid(child, 0)
        return
    told = Path(engine["asked"][0]["out"]).with_suffix(".error")
    with told.open("w") as stream:
        faulthandler.dump_traceback_later(_LONGEST, exit=True, file=stream)
        try:
            answer(engine)
        except BaseException:
            stream.write(traceback.format_exc())
            stream.flush()
            os._exit(1)
        told.unlink()
        os._exit(0)


def main() -> None:
    os.environ.update(SETTINGS)
    from vlmenv.agents.engines.settings import inspect_in_process

    inspect_in_process()
    import vllm.entrypoints.llm  # noqa: F401

    for engine in json.loads(Path(sys.argv[1]).read_text()):
        in_fork(engine)


if __name__ == "__main__":
    main()
