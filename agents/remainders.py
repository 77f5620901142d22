"""What float32 weights lose in a smaller data type, so that both files together hold them bit for bit.

Training keeps weights in float32, or all in bfloat16. A checkpoint has them in the base model's own type, for other
programs, and beside that the difference of the bit patterns. With bfloat16 that is 16 bits, so that both take no more
than float32 alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

REMAINDERS: Final = "float32"
"""Folder in a checkpoint: for each file of weights one of the same name, with those that were rounded."""
_HALF: Final = 1 << 15
_HALFWAY: Final = "/halfway"
_NOWHERE: Final = torch.empty(0, dtype=torch.int64)


def remainder(name: str, tensor: Tensor, stored: Tensor) -> dict[str, Tensor]:
    """What a tensor in float32 or bfloat16 has lost in `stored`, by names for a file; empty if it has lost nothing.

    It is the difference of the bit patterns: int16 if that suffices, as it does for bfloat16, else int32. Halfway
    cases that bfloat16 rounds down have a difference of 2**15, just out of range; their places are listed.
    """
    if not tensor.is_floating_point() or stored.dtype in (torch.float32, tensor.dtype):
        return {}
    lost = tensor.float().contiguous().view(torch.int32) - stored.float().view(torch.int32)
    low, high = (int(end) for end in lost.aminmax()) if lost.numel() else (0, 0)
    if low == high == 0:
        return {}
    if low < -_HALF or high > _HALF:
        return {name: lost}
    halfway = {name + _HALFWAY: (lost.flatten() == _HALF).nonzero()[:, 0]} if high == _HALF else {}
    return {name: lost.to(torch.int16)} | halfway


def exact_weights(folder: Path) -> dict[str, Tensor]:
    """A checkpoint's weights, those that were rounded in float32.

    Raises:
        OSError: A file cannot be read.
        RuntimeError: A remainder has another shape than its weight.
        safetensors.SafetensorError: A file is damaged.
    """
    weights: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        weights |= load_file(file)
    for file in sorted((folder / REMAINDERS).glob("*.safetensors")):
        rest = load_file(file)
        for name in (name for name in rest if not name.endswith(_HALFWAY)):
            lost = rest[name].int()
            if name not in weights or weights[name].shape != lost.shape:
                raise RuntimeError(f"{file} does not belong to the weights beside it: {name} is unlike")
            lost.view(-1)[rest.get(name + _HALFWAY, _NOWHERE)] = _HALF
            weights[name] = (weights[name].float().view(torch.int32) + lost).view(torch.float32)
    return weights
