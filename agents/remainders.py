"""What float32 weights lose in a smaller data type, so that both files together hold them bit for bit.

Training keeps weights in float32. A checkpoint has them in the base model's own type, for other programs, and beside
that the difference of the bit patterns. With bfloat16 that is 16 bits, so that both take no more than float32 alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

REMAINDERS: Final = "float32"
"""Folder in a checkpoint: for each file of weights one of the same name, with those that were rounded."""


def rounded(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another data type. Halfway cases of bfloat16 round away from 0, so that remainders fit 16 bits."""
    if tensor.dtype == torch.float32 and dtype == torch.bfloat16:
        return ((tensor.contiguous().view(torch.int32) + (1 << 15)) >> 16).to(torch.int16).view(torch.bfloat16)
    return tensor.to(dtype)


def remainder(tensor: Tensor, stored: Tensor) -> Tensor | None:
    """The bits that a float32 tensor has lost in `stored`, int16 or int32; None if it has lost none."""
    if tensor.dtype != torch.float32 or stored.dtype == torch.float32:
        return None
    lost = tensor.contiguous().view(torch.int32) - stored.float().view(torch.int32)
    low, high = (int(end) for end in lost.aminmax()) if lost.numel() else (0, 0)
    if low == high == 0:
        return None
    return lost.to(torch.int16) if low >= -(1 << 15) and high < 1 << 15 else lost


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
        for name, lost in load_file(file).items():
            if name not in weights or weights[name].shape != lost.shape:
                raise RuntimeError(f"{file} does not belong to the weights beside it: {name} is unlike")
            weights[name] = (weights[name].float().view(torch.int32) + lost.int()).view(torch.float32)
    return weights
