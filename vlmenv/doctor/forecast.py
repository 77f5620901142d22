"""The prediction of memory as a table, for a card that need not be there, or for this machine."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from rich.console import Console
from rich.table import Table

from vlmenv.agents.families import weightless_family
from vlmenv.agents.pixels import prepared_folder
from vlmenv.building import task_arguments
from vlmenv.core.console import PlainTable, say
from vlmenv.core.errors import ConfigError
from vlmenv.core.rollout import Observation, unbatch
from vlmenv.doctor.prediction import Layout, Place, Prediction, card_bytes, gigabytes, predict, what_helps
from vlmenv.envs.making import make_envs
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.options.doctor import DoctorConfig
from vlmenv.options.train import TrainConfig
from vlmenv.processes import processes_of

_SAMPLES = 8
_LAYOUTS: dict[str, Layout] = {"whole copies": "ddp", "FSDP2": "fsdp2"}


def forecast_on_card(config: DoctorConfig[Any], console: Console) -> bool:
    """Prints the memory of training on a card by its name, and what helps if it does not fit.

    Returns:
        True if it fits.

    Raises:
        ConfigError: There is no such card, or as `measure`.
    """
    assert config.card is not None
    place = Place(card_bytes(config.card), config.sharding, config.ranks)
    envs = make_envs(config.env, _SAMPLES, **config.data.arguments(), **task_arguments(config))
    with console.status("counting the bytes of a training step"):
        observation = _longest(config, envs)
        found = predict(config, observation, place)
    envs.close()
    console.print(memory_table(found, f"{config.model} on {place.ranks} x {config.card}, {config.sharding}"))
    if not found.fits:
        _say_what_helps(config, observation, place, console)
    return found.fits


def forecast_here(
    config: TrainConfig[Any], envs: VisualTaskVectorEnv, accelerator: Accelerator, console: Console
) -> None:
    """Prints the memory of a run on this machine's device."""
    device, strategy = accelerator.device, processes_of(accelerator)
    place = Place.here(device, _LAYOUTS.get(strategy.name) or _zero(strategy), accelerator.num_processes)
    try:
        with console.status("counting the bytes of a training step"):
            found = predict(config, _longest(config, envs), place)
    except ConfigError as error:
        say(f"memory: not predicted: {error}", console)
        return
    what = "fits" if found.fits else "does not fit; `vlmenv doctor --card SIZE` with these options tells what helps"
    say(
        f"memory: {gigabytes(found.peak)} a process at its peak, of {gigabytes(place.memory)} {device.type}: {what}",
        console,
    )


def _zero(strategy: Any) -> Layout:
    stages: dict[int, Layout] = {1: "zero1", 2: "zero2", 3: "zero3"}
    return stages[strategy.stage]


def _longest(config: TrainConfig[Any], envs: VisualTaskVectorEnv) -> Observation:
    """The sample with the longest prompt, of a few."""
    family = weightless_family(prepared_folder(config.model, config.pixels), config.prompts.template_switches())
    observations = unbatch(envs.reset(seed=config.seed)[0])[:: envs.group_size][:_SAMPLES]
    return max(observations, key=lambda one: len(family.encode(one).input_ids))


def memory_table(found: Prediction, title: str) -> Table:
    """A table with a line per use and a column per moment, in GB."""
    table = PlainTable(title=title)
    table.add_column("GB a rank")
    for name in found.moments:
        table.add_column(name, justify="right")
    uses = dict.fromkeys(use for parts in found.moments.values() for use in parts)
    for use in uses:
        sizes = [parts.get(use, 0.0) for parts in found.moments.values()]
        if any(sizes):
            table.add_row(use, *(f"{size / 1e9:.2f}" if size else "" for size in sizes))
    table.add_section()
    table.add_row("together", *(f"{sum(parts.values()) / 1e9:.2f}" for parts in found.moments.values()))
    table.add_row("room for tensors", *[f"{found.place.usable / 1e9:.2f}"] * len(found.moments))
    return table


def _say_what_helps(config: DoctorConfig[Any], observation: Observation, place: Place, console: Console) -> None:
    """Prints the peak with one option after the other, up to the first with which it fits."""
    say("it does not fit. With these options, each beside those before it:", console)
    fits = False
    for name, found in what_helps(config, observation, place):
        fits = found.fits
        say(f"  {name:28} {gigabytes(found.peak)}{', which fits' if fits else ''}", console)
    if not fits:
        say(
            "no option of these is enough: take a larger card, more ranks with --sharding fsdp2, or a smaller model",
            console,
        )
