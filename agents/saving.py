"""Writing of model folders. What training does not change stays as it came, byte for byte."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedConfig

from vlmenv.agents.checkpoints import stored_weights
from vlmenv.agents.families import Family
from vlmenv.agents.families.base import read_json
from vlmenv.agents.lazy_weights import LazyWeights, outlines
from vlmenv.agents.remainders import REMAINDERS, remainder
from vlmenv.agents.untrainable import read_config
from vlmenv.agents.weights import tied_names
from vlmenv.compat.transformers import convert_back
from vlmenv.core.errors import CheckpointError
from vlmenv.core.sampling import Sampling

GENERATION: Final = "generation_config.json"
BASE_GENERATION: Final = "generation_config.base.json"
"""The base model's own settings, which are not those of training."""
_LARGEST: Final = "5GB"
"""Largest file of weights."""
_KEPT_SUFFIXES: Final = {".json", ".jinja", ".txt", ".model", ".tiktoken"}
_KEPT_NAMES: Final = ("LICENSE", "LICENCE", "NOTICE", "COPYING")
_OWN: Final = {"manifest.json", "adapter_config.json", "trainer_state.json", GENERATION}
"""Files of a folder that tell of its own training."""
_DTYPE: Final = re.compile(r'("(?:torch_dtype|dtype)"\s*:\s*)"[a-z0-9]+"')
_TOKENS: Final = ("bos_token_id", "pad_token_id", "decoder_start_token_id")


def published_weights(family: Family, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Converts a model's weights to the names and shapes that `write_weights` writes. Tied weights appear once.

    Weights that are made when they are asked for stay so, if the conversion only renames them.
    """
    tied = tied_names(family.model)
    own = {name: tensor.detach() for name, tensor in outlines(state).items() if name not in tied}
    published = convert_back(family.model, own)
    if not isinstance(state, LazyWeights):
        return published
    makers = {id(own[name]): make for name, make in state.makers.items() if name in own}
    made = {name: makers[id(tensor)] for name, tensor in published.items() if id(tensor) in makers}
    if len(made) < len(makers):
        return published_weights(family, {name: tensor.cpu() for name, tensor in state.items()})
    return LazyWeights(published, made)


def is_of(family: Family, folder: Path) -> bool:
    """True if a folder's configuration describes a model: it was loaded from there, and has the sizes written there."""
    config = family.model.config
    return str(config.name_or_path) == str(folder) and _sizes(config) == _sizes(read_config(folder))


def _sizes(config: PreTrainedConfig) -> list[dict[str, int]]:
    """The whole numbers of a configuration's parts for text and images."""
    parts = (config.get_text_config(), config.vision_config)
    return [{name: value for name, value in part.to_dict().items() if type(value) is int} for part in parts]


def check_conversion(folder: Path, family: Family, state: Mapping[str, Tensor]) -> None:
    """Tries the conversion to published names without the numbers.

    Args:
        folder: The base model's folder.
        family: The model.
        state: Its weights, adapters merged, on whatever device.

    Raises:
        CheckpointError: Names or shapes would not be those of the base model's files.
    """
    empty = {name: torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for name, tensor in state.items()}
    try:
        found = {name: list(tensor.shape) for name, tensor in published_weights(family, empty).items()}
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
        raise CheckpointError(f"{folder}: this model's weights could not be saved: {error}") from error
    stored = {name: shape for name, (_, shape) in stored_weights(folder).items()} if is_of(family, folder) else found
    if unlike := sorted(name for name, shape in found.items() if stored.get(name) != shape):
        raise CheckpointError(
            f"{folder}: this model's weights could not be saved as they came: {len(unlike)} would get names or shapes "
            f"that its files do not have, {unlike[0]} among them. Use the release of transformers that the model is for"
        )


def write_weights(
    folder: Path, weights: Mapping[str, Tensor], base: Path | None, dtype: torch.dtype | None, *, exact: bool
) -> None:
    """Writes weights, those of large models in several files.

    Args:
        folder: Folder to write into.
        weights: The weights by published names.
        base: Folder of the base model; None for a model that was made in memory.
        dtype: Data type on disk. None: that of each weight in the base model's files; without these, its own.
        exact: Write what this rounds away too, so that `load_model` reads the weights bit for bit.
    """
    types = types_on_disk(weights, base, dtype)
    plan = split_torch_state_dict_into_shards(
        {name: torch.empty(one.shape, dtype=types[name], device="meta") for name, one in outlines(weights).items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=_LARGEST,
    )
    for file, names in plan.filename_to_tensors.items():
        stored, rest = dict[str, Tensor](), dict[str, Tensor]()
        for name in names:
            tensor = weights[name].cpu()
            stored[name] = tensor.to(types[name]).contiguous()
            rest |= remainder(name, tensor, stored[name]) if exact else {}
        save_file(stored, folder / file, {"format": "pt"})
        if rest:
            (folder / REMAINDERS).mkdir(exist_ok=True)
            save_file(rest, folder / REMAINDERS / file)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def types_on_disk(
    weights: Mapping[str, Tensor], base: Path | None, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """The data type of each weight on disk; numbers that are no floats keep theirs."""
    shown = outlines(weights)
    if base is None:
        return {name: (dtype if dtype and one.is_floating_point() else one.dtype) for name, one in shown.items()}
    stored, usual = {name: kind for name, (kind, _) in stored_weights(base).items()}, usual_type(base)
    return {
        name: (dtype or stored.get(name, usual)) if one.is_floating_point() else one.dtype
        for name, one in shown.items()
    }


def usual_type(folder: Path) -> torch.dtype:
    """The data type of most weights in a folder's files; float32 without any."""
    common = Counter(kind for kind, _ in stored_weights(folder).values()).most_common(1)
    return common[0][0] if common else torch.float32


def write_settings(folder: Path, base: Path, family: Family, sampling: Sampling, dtype: torch.dtype | None) -> None:
    """Writes all files of a model folder but the weights.

    Args:
        folder: Folder to write into.
        base: Folder of the base model, whose files are copied.
        family: The model, for the tokens that end an answer.
        sampling: Sampling in training, which generation_config.json gets.
        dtype: Data type of the weights if it was asked for.
    """
    for file in kept_files(base):
        shutil.copyfile(file, folder / file.name)
    if not is_of(family, base):
        family.model.config.save_pretrained(folder)
    text = (folder / "config.json").read_text(encoding="utf-8")
    if dtype is not None and any(kind != dtype for kind, _ in stored_weights(base).values()):
        text = _DTYPE.sub(rf'\1"{str(dtype).removeprefix("torch.")}"', text)
        (folder / "config.json").write_text(text, encoding="utf-8")
    own = base / GENERATION
    if own.is_file() and not (base / BASE_GENERATION).is_file():
        shutil.copyfile(own, folder / BASE_GENERATION)
    settings = generation_settings(read_json(own) if own.is_file() else {}, family, sampling)
    (folder / GENERATION).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def generation_settings(base: Mapping[str, Any], family: Family, sampling: Sampling) -> dict[str, Any]:
    """Settings with which `generate` samples as in training: no penalty of the base model's, the same end tokens."""
    kept = {name: base[name] for name in _TOKENS if base.get(name) is not None}
    ends = {"eos_token_id": list(family.end_tokens)}
    if sampling.temperature == 0:
        return kept | ends | {"do_sample": False}
    drawn = {"temperature": sampling.temperature, "top_k": sampling.top_k or 0, "top_p": sampling.top_p}
    return kept | ends | {"do_sample": True} | drawn


def kept_files(base: Path) -> Iterator[Path]:
    """Files of a model folder that training does not change: configuration, processor, licence."""
    for file in sorted(base.iterdir()):
        if not file.is_file() or file.name in _OWN or file.name.endswith(".index.json"):
            continue
        if file.suffix in _KEPT_SUFFIXES or file.name.upper().startswith(_KEPT_NAMES):
            yield file
