"""Private parts of peft: the adapted layers that it makes, and the names of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
from torch import nn

from vlmenv.compat import Use
from vlmenv.compat.torch import without_modes

_PUBLISHED: Final = "base_model.model."
"""Prefix of names in adapter files."""
_NAME: Final = "default"
"""Peft's name of the only adapter."""


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The linear layers of a model that have adapters, by name."""
    import peft

    linear = peft.tuners.lora.Linear
    return {name: module for name, module in model.named_modules() if isinstance(module, linear)}


def matrices(layer: Any) -> tuple[nn.Linear, nn.Linear]:
    """The layers of an adapter: down to its rank, and up again."""
    return layer.lora_A[_NAME], layer.lora_B[_NAME]


def scale(layer: Any) -> float:
    """The factor of an adapter's output."""
    return float(layer.scaling[_NAME])


def set_dropout(layer: Any, dropout: nn.Module) -> None:
    """Replaces the dropout of an adapter's inputs."""
    layer.lora_dropout[_NAME] = dropout


def is_adapter(name: str) -> bool:
    """True if a weight belongs to an adapter."""
    return ".lora_" in name


def layer_of(name: str) -> str | None:
    """The name of the adapted layer whose own weight this is; None for other weights."""
    layer = name.removesuffix(".base_layer.weight")
    return None if layer == name else layer


def matrix_names(layer: str) -> Iterator[str]:
    """Names of the weights of `matrices` by the name of the layer."""
    return (f"{layer}.lora_{part}.{_NAME}.weight" for part in "AB")


def plain_name(name: str) -> str:
    """The name that a model's own weight has without adapters."""
    return name.replace(".base_layer.", ".")


def published_name(name: str) -> str:
    """The name of an adapter's weight in peft's files."""
    return _PUBLISHED + name.replace(f".{_NAME}.weight", ".weight")


def own_name(published: str) -> str:
    """The inverse of `published_name`."""
    return published.removeprefix(_PUBLISHED).removesuffix(".weight") + f".{_NAME}.weight"


def _check_layers() -> str | None:
    import peft

    config = peft.LoraConfig(r=1, lora_alpha=4, target_modules=["0"], init_lora_weights=False)
    with without_modes(), torch.device("cpu"), torch.random.fork_rng(devices=[]), torch.no_grad():
        model = nn.Sequential(nn.Linear(3, 2))
        peft.inject_adapter_in_model(config, model)
        ((name, layer),) = adapted_layers(model).items()
        set_dropout(layer, nn.Identity())
        state, inputs = model.state_dict(), torch.ones(1, 3)
        down, up = (state[one] for one in matrix_names(name))
        (base,) = (tensor for one, tensor in state.items() if layer_of(one) == name)
        right = nn.functional.linear(inputs, base + scale(layer) * (up @ down), layer.bias)
        alike = torch.allclose(layer(inputs), right) and [one.in_features for one in matrices(layer)] == [3, 1]
    return None if alike else "an adapted layer computes something else"


LAYERS: Final = Use("adapted layers", _check_layers, "adapters are refused")
USES: Final = (LAYERS,)
