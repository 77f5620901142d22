"""Logits of models by whatever transformers is on the path, which another process looks at.

Arguments: a JSON file of jobs, each with `folder`, `adapter` and `weights` (or null), `inputs` and `out`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file


def logits(job: dict[str, str]) -> torch.Tensor:
    kind = transformers.AutoModelForImageTextToText
    loaded, report = kind.from_pretrained(job["folder"], dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"], report
    if job["adapter"]:
        import peft

        loaded = peft.PeftModel.from_pretrained(loaded, job["adapter"])
    if job["weights"]:
        loaded.load_state_dict(load_file(job["weights"]))
    inputs = load_file(job["inputs"])
    if transformers.__version__.startswith("4."):
        inputs.pop("mm_token_type_ids", None)
    with torch.no_grad():
        return loaded.eval()(**inputs).logits


def main() -> None:
    for job in json.loads(Path(sys.argv[1]).read_text()):
        save_file({"logits": logits(job).contiguous()}, job["out"])


if __name__ == "__main__":
    main()
