"""Low-rank adapters (LoRA, arXiv 2106.09685), by peft. The model's own weights stay unchanged."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from vlmenv.agents.checkpoints import ADAPTER_CONFIG, put_back, read_tensors
from vlmenv.agents.families.base import read_json
from vlmenv.agents.lazy_weights import LazyWeights
from vlmenv.agents.quantization import quantized_layers
from vlmenv.compat.peft import (
    LAYERS,
    adapted_layers,
    is_adapter,
    layer_of,
    matrices,
    matrix_names,
    own_name,
    plain_name,
    published_name,
    scale,
    set_dropout,
)
from vlmenv.compat.torch import FakeTensor
from vlmenv.core.errors import ConfigError, ModelError

_log = logging.getLogger(__name__)

ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"
_UNSUPPORTED: Final = {
    "use_dora": "DoRA",
    "modules_to_save": "modules that are saved whole (modules_to_save)",
    "target_parameters": "adapters on bare parameters (target_parameters)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "layer_replication": "replicated layers (layer_replication)",
    "lora_bias": "biases in the adapters (lora_bias)",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "use_qalora": "QA-LoRA",
    "arrow_config": "Arrow",
}
"""Settings of peft's that change what adapters are or do, by name."""
_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations of peft's that change the base model's weights."""


class LoRA:
    """The float32 adapters of a model, whose own weights are frozen.

    Dropout acts only in passes with gradient. So it is off in rollouts and in reference log-probabilities, and
    importance ratios compare a policy with dropout to one without. Keep it at 0 where ratios matter.

    Args:
        model: The model, which is changed in place. Torch's global random state initialises the adapters.
        config: Peft's configuration of the adapters.

    Raises:
        ConfigError: Peft is not installed.
    """

    def __init__(self, model: PreTrainedModel, config: Any) -> None:
        peft = _peft()
        self.config = config
        bare = nn.Module()  # without the configuration, by which peft moves adapters of some experts to fused weights
        for name, child in model.named_children():
            bare.add_module(name, child)
        peft.inject_adapter_in_model(config, bare)
        layers = adapted_layers(model)
        self._layers = list(layers.values())
        self._scales = {name: scale(layer) for name, layer in layers.items()}
        self._quantized = quantized_layers(model)
        self._base = {} if model.device.type == "meta" else _base_weights(model)
        self._start: dict[nn.Parameter, Tensor] | None = None
        for layer in self._layers:
            for part in matrices(layer):
                part.float()
            if config.lora_dropout:
                set_dropout(layer, GradientDropout(config.lora_dropout))

    @classmethod
    def new(cls, model: PreTrainedModel, targets: list[str], rank: int, alpha: int, dropout: float) -> LoRA:
        """New adapters, which change nothing at first.

        Args:
            model: See the class.
            targets: Names of the linear layers to adapt.
            rank: Rank of the adapters, at least 1.
            alpha: Scale of the adapters, at least 1: their output is multiplied by alpha / rank.
            dropout: Share of the adapters' inputs that is set to 0, from 0 to below 1.

        Raises:
            ConfigError: A number is out of range, or peft is not installed.
        """
        if rank < 1 or alpha < 1 or not 0 <= dropout < 1:
            raise ConfigError(
                "LoRA needs rank and alpha of at least 1, and dropout from 0 to below 1, "
                f"not rank={rank}, alpha={alpha}, dropout={dropout}"
            )
        return cls(model, _peft().LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets))

    @classmethod
    def from_folder(cls, model: PreTrainedModel, folder: Path) -> LoRA:
        """Adapters in peft's format, which are trained further with their own rank, scale and layers.

        Args:
            model: See the class. It is the model that they were trained on.
            folder: Folder of the adapters.

        Raises:
            ConfigError: Peft is not installed.
            ModelError: They cannot be read, are of another kind, or do not fit the model.
        """
        settings = read_json(folder / ADAPTER_CONFIG)
        _check_kind(folder, settings)
        peft = _peft()
        try:
            config = peft.LoraConfig.from_pretrained(str(folder))
            config.inference_mode, config.init_lora_weights = False, True
            lora = cls(model, config)
        except (ValueError, TypeError, KeyError, OSError) as error:
            raise ModelError(f"{folder}: the adapters do not fit the model: {error}") from error
        lora.begins_elsewhere = True
        if model.device.type == "meta" or any(isinstance(one, FakeTensor) for one in model.parameters()):
            return lora  # shapes alone are asked for
        own = {name: tensor for name, tensor in model.state_dict().items() if is_adapter(name)}
        put_back(folder, lambda: lora.read(folder), own)
        lora._tell_quantization(folder)
        return lora

    begins_elsewhere = False
    """True if training begins with adapters that change the model"""

    def _tell_quantization(self, folder: Path) -> None:
        """Logs a line if adapters were trained over a base of other bits."""
        _, metadata = read_tensors(folder / ADAPTER_WEIGHTS)
        before, now = (one.get("quantize", "none") for one in (metadata, self._base))
        if before != now and os.environ.get("RANK", "0") == "0":
            _log.warning("%s: trained over a base with quantisation %s; it is %s here", folder, before, now)

    @property
    def numbers(self) -> tuple[int, int, float]:
        """Rank, alpha and dropout."""
        return int(self.config.r), int(self.config.lora_alpha), float(self.config.lora_dropout)

    def keep_start(self) -> None:
        """Keeps a copy of the adapters as they are, for `as_at_start`."""
        self._start = {part: part.detach().clone() for layer in self._layers for part in _adapters(layer)}

    @contextmanager
    def as_at_start(self) -> Iterator[None]:
        """Puts the adapters back to where training began within the context: off, or as `keep_start` found them."""
        if self._start is None:
            with self.switched_off():
                yield
            return
        now = {part: part.data for part in self._start}
        try:
            for part, start in self._start.items():
                part.data = start
            yield
        finally:
            for part, present in now.items():
                part.data = present

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

    def merged(self, state: Mapping[str, Tensor]) -> LazyWeights:
        """The model's weights with the adapters merged into them, each made when it is asked for.

        It merges in float32, on the device of the base's weight. The result is rounded once, to the type of the base's
        weight. Quantised weights are dequantised.

        Args:
            state: The model's state, adapters included. Weights are made from it, so it must not be freed before.
        """
        shown, makers = dict[str, Tensor](), dict[str, Callable[[], Tensor]]()
        for name, tensor in state.items():
            quantized = self._quantized.get(name)
            if is_adapter(name) or name.removesuffix("scales") + "weight" in self._quantized:
                continue
            plain = plain_name(name)
            shown[plain] = tensor
            if quantized is not None or layer_of(name) is not None:
                shown[plain] = torch.empty_like(tensor, device="meta") if quantized is None else quantized.outline
                makers[plain] = partial(self._dense, name, state)
        return LazyWeights(shown, makers)

    def _dense(self, name: str, state: Mapping[str, Tensor]) -> Tensor:
        """A weight, dequantised and merged."""
        quantized, layer = self._quantized.get(name), layer_of(name)
        base = state[name] if quantized is None else quantized.dense(quantized.dtype)
        if layer is None:
            return base
        down, up = (state[one].float() for one in matrix_names(layer))
        return (base.float() + self._scales[layer] * (up @ down)).to(base)

    def save(self, folder: Path, state: Mapping[str, Tensor], base: str, dtype: torch.dtype = torch.float32) -> None:
        """Writes the adapters in peft's format.

        Args:
            folder: Folder to write into.
            state: The model's state, adapters included.
            base: Name or folder of the model that was adapted.
            dtype: Data type on disk.
        """
        self.config.base_model_name_or_path = base
        self.config.save_pretrained(str(folder))
        file = folder / ADAPTER_CONFIG
        settings = {name: _ordered(value) for name, value in read_json(file).items()}
        file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tensors = {published_name(name): state[name].to(dtype).contiguous() for name in state if is_adapter(name)}
        save_file(tensors, folder / ADAPTER_WEIGHTS, {"format": "pt", **self._base})

    def read(self, folder: Path) -> dict[str, Tensor]:
        """Reads adapters from peft's format.

        Args:
            folder: Folder of the adapters.

        Returns:
            The adapters by their names in the model's state, in float32.

        Raises:
            ModelError: They cannot be read, have another rank or alpha, or were trained on other weights.
        """
        try:
            theirs = read_json(folder / ADAPTER_CONFIG)
        except OSError as error:
            raise ModelError(f"{folder}: the adapter's configuration cannot be read: {error}") from error
        for name, ours in {"r": self.config.r, "lora_alpha": self.config.lora_alpha}.items():
            if theirs.get(name) != ours:
                raise ModelError(f"{folder}: the adapter has {name}={theirs.get(name)}, the agent's {name}={ours}")
        tensors, metadata = read_tensors(folder / ADAPTER_WEIGHTS)
        if metadata.get("base_dtype") == self._base["base_dtype"] and metadata.get("base") != self._base["base"]:
            raise ModelError(
                f"{folder}: the adapter was trained on other weights than those of "
                f"{theirs.get('base_model_name_or_path')} here: put the model that it was trained on there"
            )
        return {own_name(name): tensor.float() for name, tensor in tensors.items()}


def _peft() -> Any:
    # Peft imports bitsandbytes where it is, which misses a kernel that is of no use here.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        import peft
    except ImportError as error:
        raise ConfigError('LoRA needs the extra "lora": pip install "vlmenv[lora]"') from error
    if problem := LAYERS.problem():
        raise ConfigError(f'this release of peft cannot be used ({problem}): pip install "vlmenv[lora]"')
    return peft


def _check_kind(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises ModelError if adapters are of a kind that cannot be trained further."""
    kind = str(settings.get("peft_type"))
    other = [] if kind == "LORA" else [f"of type {kind}"]
    other += [text for name, text in _UNSUPPORTED.items() if settings.get(name)]
    if settings.get("bias", "none") != "none":
        other.append(f"trained biases (bias={settings['bias']})")
    begun = str(settings.get("init_lora_weights")).lower()
    other += [f"adapters by {begun}, which changes the base model" for name in _CHANGES_BASE if begun.startswith(name)]
    if other:
        raise ModelError(
            f"{folder}: only plain LoRA adapters can be trained further, not {other[0]}: merge them into their model "
            "with peft (`merge_and_unload`), save that, and give its folder"
        )


def _adapters(layer: Any) -> Iterator[nn.Parameter]:
    for part in matrices(layer):
        yield from part.parameters()


def _ordered(value: Any) -> Any:
    """A value of adapter_config.json; names of layers, which peft writes in any order, are sorted."""
    return sorted(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else value


class GradientDropout(nn.Dropout):
    """Dropout in passes with gradient, in both modes of the model."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.dropout(input, self.p, training=torch.is_grad_enabled())


def _base_weights(model: nn.Module) -> dict[str, str]:
    """Identifies the weights beneath the adapters: SHA-256 of the first row of each matrix, and their data type.

    All rows would take too long. Rows are rounded to bfloat16, so that it does not matter in which type a run holds
    the weights.
    """
    digest, quantized = hashlib.sha256(), quantized_layers(model)
    weights = {plain_name(name): (name, tensor) for name, tensor in model.state_dict().items()}
    for _, (name, tensor) in sorted(weights.items(), key=lambda item: item[0]):
        if isinstance(tensor, FakeTensor):  # weights without numbers
            continue
        layer = quantized.get(name)
        if layer is not None or (tensor.ndim == 2 and not is_adapter(name)):
            row = (tensor[0] if layer is None else layer.first_row).bfloat16()
            digest.update(row.cpu().view(torch.uint8).numpy().tobytes())
    kinds = sorted({layer.kind for layer in quantized.values()})
    return {"base": digest.hexdigest(), "base_dtype": "bfloat16"} | ({"quantize": kinds[0]} if kinds else {})
