"""Data types in which a model's weights are held.

Bytes of memory per parameter, without activations:

| | weight | gradient | AdamW |
|---|---|---|---|
| trained, float32 | 4 | 4 | 8 |
| trained, bfloat16 (`hold_all`) | 2 | 2 | 4 |
| frozen, float32 | 4 | | |
| frozen, bfloat16 (`hold_frozen`) | 2 | | |
| frozen, int8 or nf4 (`vlmenv.agents.quantization`) | 1.01 or .56 | | |
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from vlmenv.compat.peft import is_adapter

NARROW: Final = torch.bfloat16


class WideEmbedding(nn.Embedding):
    """A bfloat16 embedding whose outputs are float32, so that what is added to them is not rounded."""

    def forward(self, input: Tensor) -> Tensor:
        """Embeds token ids [...] as float32 [..., H]."""
        return super().forward(input).float()


def tied_names(model: nn.Module) -> set[str]:
    """Names of weights that are the same tensor as one that has another name before."""
    every = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return every - {name for name, _ in model.named_parameters()}


def hold_frozen(model: PreTrainedModel) -> int:
    """Holds frozen weights in bfloat16 where that changes no result under autocast to bfloat16; others in float32.

    These are the weights of linear layers and of the token embedding, if bfloat16 holds their values, as it does for
    weights that were published in it. Norms and positions stay float32, because autocast does not cast them; so do
    convolutions, whose data type some models take for that of their features.

    Returns:
        The number of parameters that stay float32 because bfloat16 would round them.
    """
    candidates = set(_narrowable(model))
    narrow = {parameter for parameter in candidates if _is_narrow(parameter)}
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter.is_floating_point():
            parameter.data = parameter.data.to(NARROW if parameter in narrow else torch.float32)
    embedding = _embedding(model)
    if embedding is not None and embedding.weight in narrow:
        embedding.__class__ = WideEmbedding
    return sum(parameter.numel() for parameter in candidates - narrow)


def hold_all(model: PreTrainedModel) -> None:
    """Holds all weights in bfloat16, but for adapters. The residual stream is bfloat16 too."""
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not is_adapter(name):
            parameter.data = parameter.data.to(NARROW)


def narrow_copies(model: PreTrainedModel, *, empty: bool = False) -> dict[int, nn.Parameter]:
    """Frozen copies, by the id of the parameter, of weights that autocast rounds to bfloat16 anyway.

    They serve a model whose weights are never saved. The token embedding is among them only if nothing is rounded.
    With `empty` they have no values.
    """
    embedding = _embedding(model)
    kept = None if embedding is None else embedding.weight
    chosen = {one for one in _narrowable(model, frozen=False) if one is not kept or _is_narrow(one)}
    wide = {id(one): one.detach().to("meta") if empty else one.detach() for one in chosen}
    return {key: nn.Parameter(one.to(NARROW, copy=True), requires_grad=False) for key, one in wide.items()}


def widen_embedding(model: PreTrainedModel, like: PreTrainedModel) -> None:
    """Makes a model's token embedding give the data type that the embedding of another model gives."""
    own, other = _embedding(model), _embedding(like)
    if own is not None and other is not None and own.weight.dtype == NARROW != other.weight.dtype:
        own.__class__ = WideEmbedding


def _narrowable(model: PreTrainedModel, *, frozen: bool = True) -> Iterator[nn.Parameter]:
    """The weights that layers under autocast cast to its type, and that of the token embedding."""
    embedding = _embedding(model)
    scaled = None if embedding is not None else model.get_input_embeddings().weight  # may be the head's too
    for module in model.modules():
        if isinstance(module, nn.Linear) or module is embedding:
            for parameter in module.parameters(recurse=False):
                if parameter.is_floating_point() and not ((frozen and parameter.requires_grad) or parameter is scaled):
                    yield parameter


def _embedding(model: PreTrainedModel) -> nn.Embedding | None:
    """The token embedding, if it only looks up."""
    found = model.get_input_embeddings()
    return found if type(found) in (nn.Embedding, WideEmbedding) else None  # type: ignore[return-value]


def _is_narrow(weight: Tensor) -> bool:
    """True if bfloat16 holds the values. Of shapes alone this is unknown, and the main rank tells it."""
    weight = weight.detach()
    return weight.is_meta or weight.dtype == NARROW or torch.equal(weight.to(NARROW).to(weight.dtype), weight)
