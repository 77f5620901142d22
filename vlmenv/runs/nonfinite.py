"""Files about a batch with non-finite gradients or losses."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from PIL import Image as PILImage
from torch import Tensor

from vlmenv.algos.faults import NonFiniteError


def write_nonfinite(folder: Path, error: NonFiniteError) -> None:
    """Writes summary.json, completions.jsonl and the images of the prompts.

    The summary names the parameters with non-finite values or gradients. A line of completions.jsonl is a record as in
    rollouts.jsonl, with more fields: `images` (files of the folder), `token_ids`, and per token `logprobs` under the
    present weights and the tensors of `Batch`, such as `advantages`. Non-finite numbers are written as NaN and
    Infinity, which Python's json reads.

    Args:
        folder: Folder to write; an older one is replaced.
        error: The error with the batch.

    Raises:
        OSError: The files cannot be written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "images").mkdir(parents=True)
    summary = {"step": error.step, "error": str(error), "weights": error.weights, "gradients": error.gradients}
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    with (folder / "completions.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in _rows(folder, error))


def _rows(folder: Path, error: NonFiniteError) -> Iterator[dict[str, Any]]:
    """Records of the completions. Each image is written once."""
    batch, known = error.batch, dict[int, str]()
    by_token = {field.name: getattr(batch, field.name) for field in fields(batch)} | {"logprobs": error.logprobs}
    tensors = {name: value for name, value in by_token.items() if isinstance(value, Tensor)}
    for i, (record, completion) in enumerate(zip(error.rollouts.records, batch.rollout.completions, strict=True)):
        for image in error.rollouts.images[i] if error.rollouts.images else ():
            if id(image) not in known:
                known[id(image)] = f"images/{len(known)}.png"
                PILImage.fromarray(image).save(folder / known[id(image)])
        yield {
            **record,
            "images": [known[id(image)] for image in error.rollouts.images[i]] if error.rollouts.images else [],
            "token_ids": completion.token_ids.tolist(),
            **{name: _row(value, i, len(completion.token_ids)) for name, value in tensors.items()},
        }


def _row(tensor: Tensor, i: int, length: int) -> Any:
    """Row i of a tensor [N], [N, 1] or [N, L], without padding."""
    return tensor[i].tolist() if tensor.ndim == 1 else tensor[i, :length].tolist()
