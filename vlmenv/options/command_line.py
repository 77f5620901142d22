"""Options from the command line, with the files of options that it names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from vlmenv.core.errors import ConfigError
from vlmenv.core.loading import import_modules
from vlmenv.options.fields import options_of
from vlmenv.options.files import as_arguments, packaged_file, read_options
from vlmenv.options.mixing import MIX
from vlmenv.options.parsing import names_of, parse, renamed, single_value, values_of
from vlmenv.options.resolve import RECORD, Layer, displace, merge, unknown_of

BESIDE_RESUME: Final = (
    *("steps", "epochs", "eval_limit", "eval_every", "checkpoint_every", "checkpoint_minutes", "keep", "tracker"),
    *("log_samples", "device", "micro_batch_size", "micro_batch_tokens", "stop_on_collapse", "data_changed", "dry_run"),
)
"""Options that may be given beside `--resume`."""


@dataclass(frozen=True, slots=True)
class Asked:
    """Options from a command line."""

    config: Any
    names: tuple[str, ...]
    """the options given by files, flags or keyword arguments; all others have their defaults"""
    notes: tuple[str, ...] = ()
    """renamed and unused options, a line each"""


def parse_with_files(args: Sequence[str], default: Callable[[str], Any], program: str) -> Asked:
    """Parses a command line whose `--recipe`, `--config` or `--resume` name files of options.

    Args:
        args: The arguments after the command's name.
        default: Returns the defaults of all options for an algorithm.
        program: Name in help and errors.

    Raises:
        ConfigError: A file cannot be read, an option is unknown, or options do not go together.
        SystemExit: Help was requested, or a value cannot be read.
    """
    layers = _file_layers(args)
    import_modules(dict.fromkeys([*(name for one in layers for name in listed(one)), *values_of(args, "import")]))
    algos = values_of(args, "algo")[-1:]
    merged = merge([*layers, *(Layer("", {"algo": algo}) for algo in algos)], default)
    known, algo = options_of(merged.config), getattr(merged.config, "algo", "")
    args = renamed(args, known, merged.notes.append, lambda name, names: unknown_of(name, algo, names))
    given = names_of(args)
    given |= {name.removeprefix("no_") for name in given}
    displace(merged.values, given)
    config = parse([*as_arguments(merged.values), *args], merged.config, program)
    names = tuple(name for name in known if name in merged.values or name in given)
    return Asked(config, names, tuple(merged.notes))


def listed(layer: Layer) -> list[str]:
    """The modules that a layer imports."""
    value = layer.values.get("import") or []
    return [value] if isinstance(value, str) else list(value)


def _file_layers(args: Sequence[str]) -> list[Layer]:
    """The files of options that flags name, from the weakest to the strongest."""
    if folder := single_value(args, "resume"):
        return _resumed(args, Path(folder))
    recipe, config = single_value(args, "recipe"), single_value(args, "config")
    return file_layers(recipe, None if config is None else Path(config))


def file_layers(recipe: str | None, config: Path | None) -> list[Layer]:
    """The options of a recipe and of a file, from the weakest to the strongest.

    Raises:
        ConfigError: There is no such recipe, or a file cannot be read.
    """
    paths = [*([packaged_file("recipe", recipe)] if recipe else []), *([config] if config else [])]
    return [Layer(str(path), read_options(path)) for path in paths]


def _resumed(args: Sequence[str], folder: Path) -> list[Layer]:
    if other := sorted({one.removeprefix("no_") for one in names_of(args)} - {"resume", *BESIDE_RESUME}):
        raise ConfigError(
            f"a run is resumed with its own options, not with {', '.join(other)}. Beside --resume may stand "
            f"{', '.join(BESIDE_RESUME)}; others can be edited in {folder / 'config.yaml'}"
        )
    return run_layers(folder)


def run_layers(folder: Path) -> list[Layer]:
    """The options of a run: its resolved.yaml, then its config.yaml, which may have been edited since.

    Raises:
        ConfigError: The folder is not a run's, or its options are gone.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(
            f"{folder} is no folder of a run: it holds no config.yaml. A run that was killed before that was written "
            "has nothing to go on from: give its command again"
        )
    files = [file for name in ("resolved.yaml", "config.yaml") if (file := folder / name).is_file()]
    layers = [Layer(str(file), read_options(file)) for file in files]
    if (resolved := next((one for one in layers[:-1]), None)) is not None and RECORD not in resolved.values:
        raise ConfigError(
            f"{resolved.place} is cut off: its last part, the {RECORD}, is missing. Put the file back, or remove it to "
            "resume with what config.yaml says and the defaults of this version"
        )
    layers = [_with_mix(layer, folder) for layer in layers]
    if not any(layer.values for layer in layers):
        raise ConfigError(f"{folder / 'config.yaml'} is empty: put the run's options back, or start a new run")
    return layers


def _with_mix(layer: Layer, folder: Path) -> Layer:
    """A layer of a run's folder, which may have been moved since it named its own file of the tasks of a mix."""
    named = layer.values.get("mix_file")
    if named is None or Path(str(named)).is_file() or not (folder / MIX).is_file():
        return layer
    return replace(layer, values={**layer.values, "mix_file": str(folder / MIX)})
