"""Model folders: finding and reading them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor, distributed
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoModelForImageTextToText,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from vlmenv.agents.engines.ranks import broadcast_from_main
from vlmenv.agents.families.base import read_json
from vlmenv.agents.remainders import REMAINDERS, exact_weights
from vlmenv.agents.untrainable import read_config, refuse_untrainable
from vlmenv.core.errors import ModelError
from vlmenv.core.names import SHIPPED, hub_name

ADAPTER_CONFIG: Final = "adapter_config.json"
"""The file of peft's that makes a folder one of adapters."""
_IN_CACHE = re.compile(r"models--([^/]+)--([^/]+)/snapshots/[^/]+/?$")
_DOWNLOADED = ["*.json", "*.jinja", "*.txt", "*.model", "*.safetensors", "LICENSE*", "NOTICE*", "README.md"]


def find_model(name_or_path: str | Path) -> Path:
    """Finds the folder of a model. A model on the Hugging Face hub is downloaded.

    Args:
        name_or_path: A name of `SHIPPED`, a folder, or a name on the hub, with `@REVISION` if not its main branch is
            meant. Adapters stand for the model that they were trained on; `find_adapter` finds the adapters themselves.

    Raises:
        ModelError: There is neither such a folder nor such a name on the hub, or the model cannot be trained.
    """
    folder = _find(name_or_path)
    if (folder / ADAPTER_CONFIG).is_file():
        folder = _base_of(folder)
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: not a model folder, config.json is missing")
    refuse_untrainable(folder)
    return folder


def find_adapter(name_or_path: str | Path) -> Path | None:
    """The folder of adapters that a model's name stands for, in peft's format; None for a whole model.

    Raises:
        ModelError: There is no such model.
    """
    folder = _find(name_or_path)
    return folder if (folder / ADAPTER_CONFIG).is_file() else None


def _find(name_or_path: str | Path) -> Path:
    if name_or_path in SHIPPED:
        return Path(str(files("vlmenv.agents") / str(name_or_path).replace("-", "_")))
    folder = Path(name_or_path)
    if folder.is_dir():
        return folder.absolute()
    if (named := hub_name(str(name_or_path))) is None:
        raise ModelError(f"{name_or_path}: no such model folder")
    return _download(*named)


def _base_of(adapter: Path) -> Path:
    """The folder of the model that adapters were trained on."""
    named = str(read_json(adapter / ADAPTER_CONFIG).get("base_model_name_or_path") or "")
    place = f"{adapter}: the adapter's base model"
    hint = f"Write the folder of that model into {ADAPTER_CONFIG} as base_model_name_or_path"
    if not named:
        raise ModelError(f"{place} is not named. {hint}")
    beside = adapter / named
    try:
        base = _find(beside if beside.is_dir() else named)
    except ModelError as error:
        raise ModelError(f"{place} is not found: {error}. {hint}") from error
    if (base / ADAPTER_CONFIG).is_file():
        raise ModelError(f"{place}, {base}, is an adapter itself: merge that one by `vlmenv export --merged` first")
    return base


@functools.cache
def _download(name: str, revision: str | None) -> Path:
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_DOWNLOADED))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: no such model folder, and the download from the Hugging Face hub failed "
            f"({type(error).__name__}); check the name and the connection"
        ) from error


def public_name(folder: Path) -> str:
    """The name of a model for others: that on the Hugging Face hub if it is in the hub's cache, else its folder."""
    if (found := _IN_CACHE.search(folder.as_posix())) is not None:
        return "/".join(found.groups())
    return next((name for name in SHIPPED if folder == _find(name)), str(folder))


def load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the model of a folder. In float32 a checkpoint's weights are those in training, bit for bit.

    Raises:
        ModelError: Weights cannot be read, or some are missing.
    """
    exact = dtype == torch.float32 and (folder / REMAINDERS).is_dir()
    options: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    config = read_config(folder)
    try:
        loaded: Any = _exact(folder, config, options) if exact else _stored(folder, config, options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model's weights cannot be read: {error}") from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{folder}: {len(missing)} of the model's weights are missing, {missing[0]} among them")
    assert isinstance(model, PreTrainedModel)
    return model


def _stored(folder: Path, config: PreTrainedConfig, options: Mapping[str, Any]) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, config=config, **options)


def _exact(folder: Path, config: PreTrainedConfig, options: Mapping[str, Any]) -> Any:
    """The model with what its files of weights have rounded away."""
    kind: Any = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(config)]
    loaded = kind.from_pretrained(None, config=config, state_dict=exact_weights(folder), **options)
    loaded[0].config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        loaded[0].generation_config = GenerationConfig.from_pretrained(folder)
    return loaded


def weight_names(folder: Path) -> set[str]:
    """Names of the weights in a folder's safetensors files."""
    return set(stored_weights(folder))


def stored_weights(folder: Path) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Data types and shapes of the weights in a folder's safetensors files, by name; nothing else is read.

    Raises:
        ModelError: A file cannot be read.
    """
    found: dict[str, tuple[torch.dtype, list[int]]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as stream:
                for name in stream.keys():  # noqa: SIM118
                    part = stream.get_slice(name)
                    found[name] = _DTYPES.get(part.get_dtype(), torch.float32), list(part.get_shape())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{file}: the weights cannot be read: {error}") from error
    return found


_DTYPES: Final = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Data types of weights by safetensors' names."""


def read_tensors(file: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Reads tensors and metadata of a safetensors file.

    Raises:
        ModelError: The file cannot be read.
    """
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in sorted(opened.keys())}, opened.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: the weights cannot be read: {error}") from error


@torch.no_grad()
def put_back(folder: Path, read: Callable[[], Mapping[str, Tensor]], state: Mapping[str, Tensor]) -> None:
    """Copies weights into a state of the same names.

    If the state is sharded, this is a collective: the main rank alone reads the weights, and sends each to the others.

    Args:
        folder: Folder of the weights, for the error message.
        read: Reads the complete weights.
        state: Tensors to overwrite, or this rank's shards of them.

    Raises:
        ModelError: Names or shapes differ, or the weights cannot be read. Nothing is copied then.
    """
    weights: dict[str, Tensor] = {}

    def find() -> None:
        weights.update(read())
        _check_fit(folder, weights, state)

    sharded = any(isinstance(tensor, DTensor) for tensor in state.values())
    broadcast_from_main(find) if sharded else find()
    for name, tensor in state.items():
        if sharded:
            tensor.copy_(_shared_like(sent_from_main(weights.get(name), tensor, tensor.device), tensor))
        else:
            tensor.copy_(weights[name])


def _check_fit(folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Raises ModelError unless weights have the names and shapes of a state."""
    unlike = sorted(weights.keys() ^ state.keys())
    unlike += [name for name in weights.keys() & state.keys() if weights[name].shape != state[name].shape]
    if unlike:
        raise ModelError(
            f"{folder}: the checkpoint does not fit this agent: {len(unlike)} weights are in only one of the two or "
            f"have another shape, {unlike[0]} among them"
        )


def sent_from_main(weight: Tensor | None, like: Tensor, device: torch.device) -> Tensor:
    """Sends a whole weight from the main rank to all ranks. A collective.

    Args:
        weight: The weight on the main rank; None on others.
        like: A tensor of its shape and of the data type to send it in, which may be sharded.
        device: Device of the ranks' weights.
    """
    if weight is None:
        whole = torch.empty(like.shape, dtype=like.dtype, device=device)
    else:
        whole = weight.detach().to(device, like.dtype).contiguous()
    distributed.broadcast(whole, src=0)
    return whole


def _shared_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """A weight that all ranks have, or this rank's shard of it if the tensor is sharded."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
