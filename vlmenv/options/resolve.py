"""Merges files, flags and keyword arguments into one set of options.

Each source replaces values of those before it: the defaults, the preset of the algorithm, the recipe, the file of
`--config`, the command line. docs/options.md describes the rules.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, get_args

from vlmenv.algos.registry import ALGORITHMS, SHARED, find_algorithm
from vlmenv.core.errors import ConfigError
from vlmenv.options.fields import Option, convert, options_of, plain, value_of
from vlmenv.options.names import own_name, unknown_option
from vlmenv.options.train import RIVALS, default_config

RECORD: Final = "record"
"""Part of a resolved.yaml with the origin of a run. It has no options."""
NAMING: Final = ("config", "recipe", "resume", "dry_run", "data_changed")
"""Options that name files of options or a mode of running, and so cannot be in a file."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Options from one place."""

    place: str
    """a file's path, or "" for flags and keyword arguments"""
    values: Mapping[str, Any]
    """by option name; a mapping under the name of an algorithm is its group"""


@dataclass(slots=True)
class Merged:
    """The merged layers, for one algorithm."""

    config: Any
    """the defaults, with the algorithm's preset"""
    values: dict[str, Any] = field(default_factory=dict)
    """the values of the layers, by option name, converted to the right types"""
    notes: list[str] = field(default_factory=list)
    """renamed and unused options, a line each"""


def merge(layers: Sequence[Layer], default: Callable[[str], Any] = default_config) -> Merged:
    """Merges layers of options for the algorithm that the strongest layer with `algo` names.

    Args:
        layers: From the weakest to the strongest.
        default: Returns the defaults of all options for an algorithm.

    Raises:
        ConfigError: An option is unknown, has another type, or does not go with another of its layer.
    """
    algo = next((str(one.values["algo"]) for one in reversed(layers) if one.values.get("algo") is not None), "grpo")
    merged = Merged(default(algo))
    known = options_of(merged.config)
    for layer in layers:
        given = _chosen(layer, algo, known, merged.notes)
        if RECORD in layer.values and given.get("mix"):
            given.pop("env", None)  # a resolved.yaml holds all options, also the one that a mix does not use
        displace(merged.values, {name for name, value in given.items() if value is not None}, layer.place)
        for name, value in given.items():
            if value is not None or type(None) in get_args(known[name].type):  # otherwise null stands for the default
                merged.values[name] = convert(value, known[name].type, name, layer.place)
    return merged


def _chosen(layer: Layer, algo: str, known: Mapping[str, Option], notes: list[str]) -> dict[str, Any]:
    """The options of a layer that apply to an algorithm; notes get a line on the others.

    Raises:
        ConfigError: An option is unknown, given twice, or has no place in a file.
    """
    values, groups = _parted(layer, known, notes)
    own = str(layer.values.get("algo") or algo)  # whose options stand outside of groups
    of_own = {name: values.pop(name) for name in list(values) if name not in known or _is_algorithms(known[name])}
    _check_known(layer.place, of_own, own, known)
    asked = _asked(of_own, own) if own != algo else of_own
    carried = {name: value for name, value in asked.items() if own == algo or name in _shared(own, algo)}
    _pass_over(notes, layer.place, own, algo, [name for name in asked if name not in carried])
    group = groups.pop(algo, {})
    for other, content in groups.items():
        _pass_over(notes, layer.place, other, algo, content)
    _check_known(layer.place, group, algo, known)
    if twice := sorted(carried.keys() & group.keys()):
        raise ConfigError(f"{_start(layer.place)}{', '.join(twice)} stand both in the group {algo} and outside of it")
    if layer.place and (misplaced := [name for name in NAMING if values.get(name)]):
        raise ConfigError(
            f"{layer.place}: '{misplaced[0]}' has no place in a file of options: give it on the command line"
        )
    return {name: value for name, value in values.items() if name not in NAMING or not layer.place} | carried | group


def _parted(layer: Layer, known: Collection[str], notes: list[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """A layer's options by the names that they have here, and the groups of algorithms in it."""
    values: dict[str, Any] = {}
    groups: dict[str, dict[str, Any]] = {}
    every = set(known) | {name for one in ALGORITHMS.values() for name in options_of(one.preset)}
    for name, value in layer.values.items():
        if name == RECORD and layer.place:
            continue
        if isinstance(value, Mapping) and (name in ALGORITHMS or ":" in name):
            groups[name] = _renamed(value, every, layer.place, notes)
        else:
            values[name] = value
    return _renamed(values, every, layer.place, notes), groups


def _renamed(values: Mapping[str, Any], known: Collection[str], place: str, notes: list[str]) -> dict[str, Any]:
    """Options with their aliases replaced."""
    renamed: dict[str, Any] = {}
    for name, value in values.items():
        own = own_name(name, known)
        if own in renamed:
            raise ConfigError(f"{_start(place)}'{name}' and '{own}' are one option: leave one of them out")
        if own != name.replace("-", "_"):
            notes.append(f"{_start(place)}'{name}' is '{own}' here")
        renamed[own] = value
    return renamed


def _is_algorithms(option: Option) -> bool:
    return option.path[0] == "algorithm"


def _asked(values: Mapping[str, Any], algo: str) -> dict[str, Any]:
    """Options of an algorithm without those that have its defaults: a run's file holds all, asked for or not."""
    preset = find_algorithm(algo).preset
    return {name: value for name, value in values.items() if plain(getattr(preset, name)) != value}


def _shared(own: str, algo: str) -> set[str]:
    """The options with one meaning that two algorithms both have."""
    return set(find_algorithm(own).preset.shared()) & set(find_algorithm(algo).preset.shared())


def _pass_over(notes: list[str], place: str, own: str, algo: str, names: Iterable[str]) -> None:
    if listed := ", ".join(names):
        notes.append(f"{_start(place)}options of {own} are not used, as {algo} is asked for: {listed}")


def _check_known(place: str, names: Iterable[str], algo: str, known: Mapping[str, Option]) -> None:
    """Raises ConfigError unless names are options of an algorithm."""
    general = [name for name, option in known.items() if not _is_algorithms(option)]
    own = options_of(find_algorithm(algo).preset) if "algo" in known else {}
    for name in names:
        if name not in own and name not in general:
            raise ConfigError(f"{_start(place)}{unknown_of(name, algo, [*general, *own])}")


def unknown_of(name: str, algo: str, known: Iterable[str]) -> str:
    """A message about a name that no option has, or only one of another algorithm."""
    owners = [one for one, registered in ALGORITHMS.items() if name in options_of(registered.preset)]
    if owners and "algo" in known:
        return f"{algo} has no option '{name}', which {', '.join(owners)} {'have' if len(owners) > 1 else 'has'}"
    return unknown_option(name, known)


def displace(values: dict[str, Any], given: Collection[str], place: str = "") -> None:
    """Removes options that rivals in a stronger layer replace.

    Raises:
        ConfigError: Both of a pair are given in the stronger layer.
    """
    for pair in RIVALS:
        if set(given).issuperset(pair):
            raise ConfigError(f"{_start(place)}{' and '.join(pair)} were both given: leave one of them out")
        for name, rival in (pair, pair[::-1]):
            if rival in given:
                values.pop(name, None)


def _start(place: str) -> str:
    return f"{place}: " if place else ""


def grouped(config: Any, names: Iterable[str]) -> dict[str, Any]:
    """Options of a configuration as a file holds them: those of its algorithm alone in a group of its name.

    Args:
        config: The configuration.
        names: Which options; the others are left out.
    """
    known = options_of(config)
    result: dict[str, Any] = {}
    group: dict[str, Any] = {}
    for name in names:
        target = group if _is_algorithms(known[name]) and name not in SHARED else result
        target[name] = plain(value_of(config, known[name]))
    return result | ({config.algo: group} if group else {})
