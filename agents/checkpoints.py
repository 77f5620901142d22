"""Model folders: finding, reading and writing them."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import AutoModelForImageTextToText, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from vlmenv.agents.families import Family
from vlmenv.core.errors import ModelError
from vlmenv.core.names import BUILTIN, hub_name


def find_model(name_or_path: str | Path) -> Path:
    """Finds the folder of a model. A model on the Hugging Face hub is downloaded.

    Args:
        name_or_path: `"builtin"`, a folder, or a name on the hub, with `@REVISION` if not its main branch is meant.

    Raises:
        ModelError: There is neither such a folder nor such a name on the hub.
    """
    if name_or_path == BUILTIN:
        return Path(str(files("vlmenv.agents") / "builtin"))
    folder = Path(name_or_path)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder}: not a model folder, config.json is missing")
        return folder.absolute()
    if (named := hub_name(str(name_or_path))) is None:
        raise ModelError(f"{name_or_path}: no such model folder")
    return _download(*named)


@functools.cache
def _download(name: str, revision: str | None) -> Path:
    try:
        return Path(
            snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.jinja", "*.txt", "*.safetensors"])
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{name}: no such model folder, and the download from the Hugging Face hub failed "
            f"({type(error).__name__}); check the name and the connection"
        ) from error


def load_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Loads the model of a folder.

    Raises:
        ModelError: Weights cannot be read, or some are missing.
    """
    try:
        loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder}: the model's weights cannot be read: {error}") from error
    model, report = loaded
    if report["missing_keys"]:
        missing = sorted(report["missing_keys"])
        raise ModelError(f"{folder}: {len(missing)} of the model's weights are missing, {missing[0]} among them")
    assert isinstance(model, PreTrainedModel)
    return model


def write_model(folder: Path, family: Family, state: dict[str, Tensor]) -> None:
    """Writes a model's configuration and weights, large models in several files."""
    model, generation = family.model, family.model.generation_config
    # Transformers loads some published generation settings that it refuses to save.
    model.generation_config = GenerationConfig(eos_token_id=list(family.end_tokens))
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.generation_config = generation


def published_weights(family: Family, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a model's weights to the names and shapes that `write_model` writes. Tied weights appear once."""
    tied = getattr(family.model, "all_tied_weights_keys", {})
    own = {name: tensor.detach() for name, tensor in state.items() if name not in tied}
    published: dict[str, Tensor] = revert_weight_conversion(family.model, own)
    return published


def copy_processor(source: Path, folder: Path) -> None:
    """Copies the files of a model folder without its configuration and weights."""
    for file in source.iterdir():
        kept = file.suffix in {".json", ".jinja", ".txt"} and not file.name.endswith(".index.json")
        if kept and file.name != "config.json":
            shutil.copyfile(file, folder / file.name)


def weight_names(folder: Path) -> set[str]:
    """Names of the weights in a folder's safetensors files."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stream:
            names.update(stream.keys())
    return names


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
def put_back(folder: Path, weights: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """Copies weights into a state of the same names, which may be sharded.

    Args:
        folder: Folder of the weights, for the error message.
        weights: The complete weights.
        state: Tensors to overwrite, or this rank's shards of them.

    Raises:
        ModelError: Names or shapes differ. Nothing is copied then.
    """
    unlike = sorted(weights.keys() ^ state.keys())
    unlike += [name for name in weights.keys() & state.keys() if weights[name].shape != state[name].shape]
    if unlike:
        raise ModelError(
            f"{folder}: the checkpoint does not fit this agent: {len(unlike)} weights are in only one of the two or "
            f"have another shape, {unlike[0]} among them"
        )
    for name, tensor in state.items():
        tensor.copy_(_shared_like(weights[name], tensor))


def _shared_like(weight: Tensor, tensor: Tensor) -> Tensor:
    """A weight, or this rank's shard of it if the tensor is sharded."""
    if not isinstance(tensor, DTensor):
        return weight
    whole = weight.to(tensor.device)  # every rank has read it: nothing is sent
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)
