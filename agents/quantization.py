"""Linear layers whose frozen weights are held in 4 or 8 bits, as bases of adapters (QLoRA, arXiv 2305.14314).

Bytes per weight: nf4 takes 0.5625 (4 bits, and a float32 scale for each 64 weights), int8 takes 1 (and a float32 scale
for each row). A layer dequantises its weights in each pass, and again in the backward pass; it keeps no dense copy.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from vlmenv.agents.wide_gradients import WideLinear
from vlmenv.core.errors import ConfigError

if TYPE_CHECKING:
    from vlmenv.agents.families.base import Family

Quantization = Literal["nf4", "int8"]
_BLOCK: Final = 64
"""Weights with a common scale in nf4."""


class QuantizedLinear(nn.Linear):
    """A frozen linear layer with a weight in few bits. Bias and outputs are as those of the layer that it replaces.

    Args:
        layer: The layer to replace.
        kind: "nf4" (normal floats of 4 bits, in blocks of 64) or "int8" (symmetric integers, by rows).
        device: Device on which weights are quantised and kept.

    Attributes:
        weight: uint8 [O * I / 2] for nf4, int8 [O, I] for int8.
        scales: The bits of float32 scales as int32, which nothing casts: [O * I / 64] for nf4, [O] for int8.
        first_row: The first row of the weight before, by which adapters know their base.
        dtype: Data type of the weight before.

    Raises:
        ConfigError: The number of weights is no multiple of 64, or bitsandbytes is missing.
    """

    scales: nn.Parameter

    def __init__(self, layer: nn.Linear, kind: Quantization, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        dense = layer.weight.detach()
        self.dtype, self.first_row = dense.dtype, dense[0].cpu()
        packed, scales = _pack(dense.to(device), kind)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.scales = nn.Parameter(scales.view(torch.int32), requires_grad=False)
        self.bias = layer.bias
        if layer.bias is not None:
            layer.bias.requires_grad_(False)

    @property
    def outline(self) -> Tensor:
        """The weight before, on the device "meta"."""
        return torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The weight [O, I] that the layer multiplies with."""
        scales, shape = self.scales.view(torch.float32), (self.out_features, self.in_features)
        if self.kind == "int8":
            return (self.weight * scales[:, None]).to(dtype)
        bnb = _bnb()
        state = bnb.QuantState(scales, shape=torch.Size(shape), dtype=dtype, blocksize=_BLOCK, quant_type="nf4")
        return cast(Tensor, bnb.dequantize_4bit(self.weight, state))

    def forward(self, input: Tensor) -> Tensor:
        """Multiplies inputs [..., I] with the dense weight, under autocast in its data type."""
        device = input.device.type
        if torch.is_autocast_enabled(device):
            input = input.to(torch.get_autocast_dtype(device))
        return cast(Tensor, _Product.apply(input, self))  # type: ignore[no-untyped-call]

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.kind}"


class _Product(torch.autograd.Function):
    """The product with a layer's dense weight, which the backward pass makes anew."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(input.dtype)
        return nn.functional.linear(input, layer.dense(input.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dense(grad.dtype), None


def quantize(family: Family, kind: Quantization, device: torch.device, *, vision: bool) -> int:
    """Quantises the linear layers of a language model's blocks in place, one at a time.

    Args:
        family: The model.
        kind: See `QuantizedLinear`.
        device: Device of the quantised layers.
        vision: If true, also quantises those of the vision tower and its projectors.

    Returns:
        The number of layers.

    Raises:
        ConfigError: See `QuantizedLinear`.
    """
    count = 0
    parts = [family.language_model().get_submodule("layers")]
    parts += [family.vision_tower(), *family.projectors()] if vision else []
    for part in parts:
        for name, layer in list(part.named_modules()):
            if type(layer) in (nn.Linear, WideLinear):
                part.set_submodule(name, QuantizedLinear(layer, kind, device))
                count += 1
    return count


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLinear]:
    """The quantised layers of a model by the names of their weights."""
    return {f"{name}.weight": one for name, one in model.named_modules() if isinstance(one, QuantizedLinear)}


def _pack(weight: Tensor, kind: Quantization) -> tuple[Tensor, Tensor]:
    """Quantises a weight: its codes, and float32 scales."""
    if kind == "int8":
        scales = weight.float().abs().amax(dim=1).div_(127).clamp_(min=torch.finfo(torch.float32).tiny)
        return (weight.float() / scales[:, None]).round_().to(torch.int8), scales
    if math.prod(weight.shape) % _BLOCK:
        raise ConfigError(f"nf4 takes blocks of {_BLOCK} weights, and a layer of {tuple(weight.shape)} is no multiple")
    packed, state = _bnb().quantize_4bit(weight.contiguous(), blocksize=_BLOCK, quant_type="nf4")
    return packed.view(-1), state.absmax


def _bnb() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError as error:
        raise ConfigError('quantize nf4 needs the extra "quantize": pip install "vlmenv[quantize]"') from error
    return functional
