"""Low-rank adapters (LoRA, arXiv 2106.09685), by peft. The model's own weights stay unchanged."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import PreTrainedModel

from vlmenv.agents.checkpoints import read_tensors
from vlmenv.agents.families.base import read_json
from vlmenv.core.errors import ConfigError, ModelError

_PUBLISHED = "base_model.model."
"""Peft's prefix of names in adapter files."""


class LoRA:
    """The float32 adapters of a model, whose own weights are frozen.

    Dropout acts only in passes with gradient. So it is off in rollouts and in reference log-probabilities, and
    importance ratios compare a policy with dropout to one without. Keep it at 0 where ratios matter.

    Args:
        model: The model, which is changed in place. Torch's global random state initialises the adapters.
        targets: Names of the linear layers to adapt.
        rank: Rank of the adapters, at least 1.
        alpha: Scale of the adapters, at least 1: their output is multiplied by alpha / rank.
        dropout: Share of the adapters' inputs that is set to 0, from 0 to below 1.

    Raises:
        ConfigError: A number is out of range, or peft is not installed.
    """

    def __init__(self, model: PreTrainedModel, targets: list[str], rank: int, alpha: int, dropout: float) -> None:
        if rank < 1 or alpha < 1 or not 0 <= dropout < 1:
            raise ConfigError(
                "LoRA needs rank and alpha of at least 1, and dropout from 0 to below 1, "
                f"not rank={rank}, alpha={alpha}, dropout={dropout}"
            )
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.lora import Linear
        except ImportError as error:
            raise ConfigError('LoRA needs the extra "lora": pip install "vlmenv[lora]"') from error
        self.config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets)
        inject_adapter_in_model(self.config, model)
        self._layers = [module for module in model.modules() if isinstance(module, Linear)]
        for layer in self._layers:
            for part in (layer.lora_A, layer.lora_B):
                part.float()
            if dropout:
                layer.lora_dropout["default"] = GradientDropout(dropout)

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Switches the adapters off within the context."""
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)

    def merged(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Merges the adapters into the model's weights.

        It merges layer by layer, onto the CPU: the accelerator never holds more than one merged layer.

        Args:
            state: The model's state, adapters included.
        """
        result = {}
        for name, tensor in state.items():
            if is_adapter(name):
                continue
            layer = name.removesuffix(".base_layer.weight")
            if layer != name:
                down, up = (state[f"{layer}.lora_{part}.default.weight"].float() for part in "AB")
                tensor = (tensor.float() + (self.config.lora_alpha / self.config.r) * (up @ down)).to(tensor).cpu()
            result[name.replace(".base_layer.", ".")] = tensor
        return result

    def save(self, folder: Path, state: Mapping[str, Tensor], base: Path) -> None:
        """Writes the adapters in peft's format.

        Args:
            folder: Folder to make.
            state: The model's state, adapters included.
            base: Folder of the model that was adapted.
        """
        self.config.base_model_name_or_path = str(base)
        self.config.save_pretrained(str(folder))
        tensors = {_published_name(name): tensor.contiguous() for name, tensor in state.items() if is_adapter(name)}
        save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt", "base": _fingerprint(state)})

    def read(self, folder: Path, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Reads adapters from peft's format.

        Args:
            folder: Folder that `save` wrote.
            state: The model's state, adapters included.

        Returns:
            The adapters by their names in the model's state.

        Raises:
            ModelError: They cannot be read, have another rank or alpha, or were trained on other weights.
        """
        try:
            theirs = read_json(folder / "adapter_config.json")
        except OSError as error:
            raise ModelError(f"{folder}: the adapter's configuration cannot be read: {error}") from error
        for name, ours in {"r": self.config.r, "lora_alpha": self.config.lora_alpha}.items():
            if theirs.get(name) != ours:
                raise ModelError(f"{folder}: the adapter has {name}={theirs.get(name)}, the agent's {name}={ours}")
        tensors, metadata = read_tensors(folder / "adapter_model.safetensors")
        if metadata.get("base") != _fingerprint(state):
            raise ModelError(
                f"{folder}: the adapter was trained on other weights or in another precision: load it onto "
                f"{theirs.get('base_model_name_or_path')}, not onto weights that it is merged into already"
            )
        return {_own_name(name): tensor for name, tensor in tensors.items()}


class GradientDropout(nn.Dropout):
    """Dropout in passes with gradient, in both modes of the model."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, training=torch.is_grad_enabled())


def is_adapter(name: str) -> bool:
    """True if a weight belongs to an adapter."""
    return ".lora_" in name


def _published_name(name: str) -> str:
    return _PUBLISHED + name.replace(".default.weight", ".weight")


def _own_name(published: str) -> str:
    return published.removeprefix(_PUBLISHED).removesuffix(".weight") + ".default.weight"


def _fingerprint(state: Mapping[str, Tensor]) -> str:
    """Identifies the weights beneath the adapters: SHA-256 of the first row of each matrix.

    All rows would take too long.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted((name.replace(".base_layer.", "."), tensor) for name, tensor in state.items()):
        if tensor.ndim == 2 and not is_adapter(name):
            row = tensor[0]
            whole = row.full_tensor() if isinstance(row, DTensor) else row
            digest.update(whole.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
