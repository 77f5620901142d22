"""`vlmenv train`: builds environments, agent and algorithm from options, and trains."""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list
from rich.console import Console

from vlmenv.agents.engines.teacher import ServerTeacher
from vlmenv.agents.fast_paths import FastPath, fast_paths, written
from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import Algorithm, Trainer, find_algorithm
from vlmenv.algos.registry import name_of
from vlmenv.building import (
    DTYPES,
    adapt,
    advice_on_cuda,
    advice_on_sampling,
    check_device,
    check_engine,
    limits_of,
    load_for_training,
    load_teacher,
    meet_teacher,
    report_broken_rows,
    report_untaught,
    task_arguments,
)
from vlmenv.core.console import open_console, say
from vlmenv.core.errors import ConfigError, DataError
from vlmenv.core.urls import is_server
from vlmenv.doctor.forecast import forecast_here
from vlmenv.envs.data.dataset import adopt_images, checked_once
from vlmenv.envs.data.source import has_images
from vlmenv.envs.making import make_envs
from vlmenv.envs.mixed import MixedVectorEnv, by_task
from vlmenv.envs.selfcheck import CHECKED, describe, self_check
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.options.command_line import Asked, parse_with_files
from vlmenv.options.fields import flatten, options_of
from vlmenv.options.mixing import parts_of
from vlmenv.options.train import SINGLE, TrainConfig, default_config
from vlmenv.processes import Processes, leave, meet, processes_of
from vlmenv.processes.failures import shared_failure
from vlmenv.processes.stopping import StoppedError, Stopping
from vlmenv.runs.by_task import Envs, told_of
from vlmenv.runs.checkpoints import Found, find_checkpoint, load_checkpoint
from vlmenv.runs.fitting import fit_answers, fit_engine, fit_prompts
from vlmenv.runs.keeping import Keeping
from vlmenv.runs.lengths import Lengths
from vlmenv.runs.lock import locked
from vlmenv.runs.loop import TrainingLoop, compare, evaluate_now, look_first, measured_before
from vlmenv.runs.models import with_checkpoint, with_teacher
from vlmenv.runs.output import lasting_output
from vlmenv.runs.record import asked_yaml, print_dry_run, resolved_yaml, sections_yaml
from vlmenv.runs.resuming import DataSets, changes, check_data_changed, facts
from vlmenv.runs.room import check_room, room
from vlmenv.runs.run_folder import RunFolder
from vlmenv.runs.tracking import THROUGH_ACCELERATE, Tracking, find_tracker


def parse(args: Sequence[str], program: str) -> Asked:
    """The options of a command line."""
    return parse_with_files(args, default_config, program)


@dataclass(frozen=True)
class Parts:
    """Parts of a run that the caller has made; the others are made from the options."""

    envs: VisualTaskVectorEnv | None = None
    """environments to train in"""
    held_out: VisualTaskVectorEnv | None = None
    """environments to measure in"""
    agent: VLMAgent | None = None
    """trained in place, and left open"""
    algorithm: Algorithm | None = None


def run(asked: Asked, parts: Parts | None = None) -> Path:
    """Trains, and returns the run's folder.

    Args:
        asked: The options.
        parts: What is used in place of what the options say.
    """
    with lasting_output(), ExitStack() as opened:
        return _run(_with_parts(asked, parts or Parts()), parts or Parts(), opened)


def _with_parts(asked: Asked, parts: Parts) -> Asked:
    """The options as they would be for the parts that are given, so that the record tells of those.

    Raises:
        ConfigError: The parts do not go together.
    """
    config: TrainConfig[Any] = asked.config
    names = list(asked.names)
    if (algorithm := parts.algorithm) is not None:
        config = replace(config, algo=name_of(algorithm), algorithm=algorithm.config)
        names += list(options_of(algorithm.config))
    if parts.agent is not None:
        config = replace(config, model=str(parts.agent.base), pixels=parts.agent.pixels)
    if config.mixing.mix and "env" in asked.names:
        raise ConfigError(SINGLE)
    if config.mixing.mix and not (parts.envs is None and parts.held_out is None):
        raise ConfigError("mix makes the environments of its tasks: give no environments of your own beside it")
    if (envs := parts.envs) is not None:
        groups = envs.num_envs // envs.group_size
        if envs.group_size != config.algorithm.group_size:
            raise ConfigError(
                f"the environments show each sample {envs.group_size} times, but group_size is "
                f"{config.algorithm.group_size}: make them with group_size={config.algorithm.group_size}"
            )
        name = envs.spec.id if envs.spec is not None else type(envs.task).__name__
        config = replace(config, env=name, batches=replace(config.batches, prompts_per_step=groups))
        names.append("prompts_per_step")
    return replace(asked, config=config, names=tuple(names))


def _run(asked: Asked, parts: Parts, opened: ExitStack) -> Path:
    """Sets a run up and goes through it; `opened` closes what it leaves open."""
    config: TrainConfig[Any] = asked.config
    _check(config)
    run = _run_folder(config, opened)
    accelerator = _accelerator(config, run)
    console = open_console(quiet=not accelerator.is_main_process)
    found = _begun(config, run, accelerator, opened, console)
    for note in asked.notes:
        say(note, console)
    if parts.agent is None:
        config = with_checkpoint(config, console)
    config = with_teacher(config, console)
    config = _held(config, processes_of(accelerator, config.trainer.shard_within), console)
    check_engine(config, accelerator.device, accelerator.num_processes)
    for note in (*advice_on_cuda(config, accelerator.device), *advice_on_sampling(config, parts.agent)):
        say(note, console)
    envs, held_out, counted = _open_data(config, parts, accelerator, opened, console)
    _check_images(config, envs)
    config = _in_steps(config, None if config.mixing.mix else by_task(envs)[""].task.source.size)
    if config.dry_run:
        _show(config, parts, envs, held_out, run, accelerator, console)
        return run.path
    data = DataSets.of(envs, held_out)
    changed = _compared(config, found, data, accelerator, console)
    trainer = _make_trainer(config, parts, envs, accelerator, opened, console)
    for shown, lengths in counted:
        fit_engine(shown, lengths, trainer.agent, console)
    paths = fast_paths(cast(VLMAgent, trainer.agent).family_policy, DTYPES[config.batches.precision])
    if accelerator.is_main_process and config.resume is None:
        own = {name: lengths for name, one in by_task(envs).items() for shown, lengths in counted if shown is one}
        _record(config, asked.names, envs, held_out, own, paths, run, accelerator)
    with shared_failure(accelerator):
        if accelerator.is_main_process:
            check_room(cast(VLMAgent, trainer.agent), config, run, console)
    kept = facts(config, data, run, accelerator.num_processes) if accelerator.is_main_process else {}
    say(f"{config.task_name}, {config.algo}, model {config.model}; writing to {run.path}", console)
    say(written(paths), console)
    _go_through(trainer, envs, held_out, config, run, found, changed, kept, console, opened)
    if parts.agent is None:
        trainer.agent.close()  # before the processes part: vLLM has a group of its own among them
    leave()
    return run.path


def _record(
    config: TrainConfig[Any],
    names: Sequence[str],
    envs: Envs,
    held_out: Envs | None,
    lengths: Mapping[str, Lengths],
    paths: list[FastPath],
    run: RunFolder,
    accelerator: Accelerator,
) -> None:
    """Makes the folder of a new run, and writes the options: those that were named, and all that are used."""
    identity = secrets.token_hex(8)
    if mix := sections_yaml(config, envs, held_out):
        config = replace(config, mixing=replace(config.mixing, mix_file=run.write_mix(mix)))
    resolved = resolved_yaml(config, envs, held_out, accelerator, identity, lengths, paths)
    run.create(asked_yaml(config, names, identity), resolved)


def _go_through(
    trainer: Trainer,
    envs: Envs,
    held_out: Envs | None,
    config: TrainConfig[Any],
    run: RunFolder,
    found: Found,
    changed: dict[str, Any],
    kept: dict[str, Any],
    console: Console,
    opened: ExitStack,
) -> None:
    """Measures, trains and measures again; on from a checkpoint, if one was found.

    Raises:
        StoppedError: The process is to stop.
    """
    tracking = Tracking(trainer.accelerator, config.logging.tracker, run, flatten(config), step=found.step)
    opened.callback(tracking.close)  # if this ends early
    stopping = opened.enter_context(Stopping(trainer.accelerator))
    keeping = Keeping(run, envs, held_out, config.trainer.steps, console, active=trainer.accelerator.is_main_process)
    try:
        if config.resume is None:
            look_first(trainer, envs, config, run, console)
        before = measured_before(trainer, held_out, config, run, console, stopping, keeping)
        if config.resume is not None:
            _go_on(trainer, run, found, changed, console)
        training = TrainingLoop(
            trainer, envs, held_out, config, run, tracking, console, before, stopping, keeping, kept
        )
        training()
        after = training.measured.get(trainer.step)
        after = after or evaluate_now(trainer, held_out, config, "after training", console, stopping)
    except StoppedError:
        say(f"stopped while measuring. Go on with: vlmenv train --resume {run.path}", console)
        stopping.end_process()
        raise
    if trainer.accelerator.is_main_process and held_out is not None and before is not None and after is not None:
        compare(config, run, held_out, before, after, console, keeping)
        tracking.compare(before.values(), after.values(), trainer.step)
    tracking.close()  # before the processes part
    seen = f"; look at {run.path / 'report.html'} in a browser" if keeping.report() else ""
    say(f"model, metrics and pictures are in {run.path}{seen}", console)


def _check(config: TrainConfig[Any]) -> None:
    """Raises ConfigError for what is wrong with the options, before anything is made."""
    check_device(config.device)
    if config.batches.precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise ConfigError("precision fp16 needs a CUDA GPU: take fp32 or bf16")
    if config.trainer.optimizer == "adamw_offload" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise ConfigError("optimizer adamw_offload moves state to the CPU, where this model is already: take adamw")
    find_tracker(config.logging.tracker)
    if getattr(config.algorithm, "teacher", "") is None:
        raise ConfigError(f"{config.algo} needs a teacher: give its model, as in --teacher runs/teacher")
    check_data_changed(config)


def _open_data(
    config: TrainConfig[Any], parts: Parts, accelerator: Accelerator, opened: ExitStack, console: Console
) -> tuple[Envs, Envs | None, list[tuple[VisualTaskVectorEnv, Lengths]]]:
    """The environments to train in and those to measure in, and the lengths of the prompts of those with a data set.

    Prints what is wrong with their rows and answers. Environments that are made here are closed with `opened`.
    """
    measuring = config.measuring
    look = accelerator.is_main_process  # for images, whose disk may be slow
    with console.status("reading the data"), shared_failure(accelerator), checked_once(look=look) as images:
        envs = parts.envs or _training_envs(config, accelerator)
        held_out: Envs | None = None if measuring.eval_limit == 0 else parts.held_out
        if measuring.eval_limit > 0 and held_out is None and parts.envs is None:
            held_out = _evaluation_envs(config)
    for made, given in ((envs, parts.envs), (held_out, parts.held_out)):
        if made is not None and made is not given:
            opened.callback(made.close)
    (images,) = broadcast_object_list([images])
    for own in () if look else (*by_task(envs).values(), *by_task(held_out).values()):
        adopt_images(own.task.source, images)
    alone = {name: part.config for name, part in parts_of(config).items()} or {"": config}
    found: list[tuple[VisualTaskVectorEnv, Lengths | None]] = []
    for name, shown in by_task(envs).items():
        found += _fitted(name, alone[name], parts, shown, by_task(held_out).get(name), accelerator, console)
    return envs, held_out, [(shown, lengths) for shown, lengths in found if lengths is not None]


def _check_images(config: TrainConfig[Any], envs: Envs) -> None:
    """Raises DataError if images are to be masked and no row of the data sets has one, or a video."""
    sources = [own.task.source for own in by_task(envs).values()]
    if config.masks_images and not any(has_images(source) for source in sources):
        what = "visual_dependence_every" if config.trainer.visual_dependence_every is not None else config.algo
        raise DataError(f"none of the samples has an image: {what} has nothing to mask")


def _fitted(
    name: str,
    config: TrainConfig[Any],
    parts: Parts,
    envs: VisualTaskVectorEnv,
    held_out: VisualTaskVectorEnv | None,
    accelerator: Accelerator,
    console: Console,
) -> list[tuple[VisualTaskVectorEnv, Lengths | None]]:
    """Leaves out or refuses what the model cannot take of a task's data, and prints what is wrong with them."""
    measuring = config.measuring
    if name:
        say(f"{name}:", console)
    firsts = [(envs, None)] if held_out is None else [(envs, None), (held_out, measuring.eval_limit)]
    found = [
        (shown, fit_prompts(config, shown, accelerator, console, agent=parts.agent, first=first))
        for shown, first in firsts
    ]
    if config.imitates:
        fit_answers(config, envs, accelerator, console, agent=parts.agent)
    report_broken_rows(envs, console)
    report_untaught(config, console)
    if held_out is not None and not (measuring.eval_dataset is None and measuring.eval_split is None):
        report_broken_rows(held_out, console)
    if accelerator.is_main_process and (misjudged := self_check(envs.task, imitated=config.imitates)):
        say(f"warning: {told_of(name)}{describe(misjudged, CHECKED)}", console)
    return found


def _show(
    config: TrainConfig[Any],
    parts: Parts,
    envs: Envs,
    held_out: Envs | None,
    run: RunFolder,
    accelerator: Accelerator,
    console: Console,
) -> None:
    """Prints what a run would do and take, on the main rank."""
    with shared_failure(accelerator):
        if accelerator.is_main_process:
            disk = _room_of_shapes(config, parts, run)
            print_dry_run(config, envs, held_out, run, accelerator, disk, console)
            for name, own in by_task(envs).items():
                if name:
                    say(f"{name}:", console)
                forecast_here(config, own, accelerator, console)


def _room_of_shapes(config: TrainConfig[Any], parts: Parts, run: RunFolder) -> str:
    """What a run would take on its disk, without loading its model."""
    agent = VLMAgent.weightless(config.model)
    dtype = torch.bfloat16 if config.adaptation.weights == "bf16" else torch.float32
    agent.family.model.to(dtype=dtype)  # type: ignore[call-arg]  # transformers wraps it without its arguments
    adapt(agent, config.adaptation)
    if (parts.algorithm or find_algorithm(config.algo).make(config.algorithm)).wants_values:
        agent.add_value_head()
    told, fits = room(agent, config, run)
    return told if fits else f"{told}: this is too little"


def _make_trainer(
    config: TrainConfig[Any],
    parts: Parts,
    envs: Envs,
    accelerator: Accelerator,
    opened: ExitStack,
    console: Console,
) -> Trainer:
    """The trainer with its agent and algorithm. An agent that is loaded here is closed with `opened`."""
    gets_shards = not accelerator.is_main_process and processes_of(accelerator).gives_shards
    agent = parts.agent or load_for_training(config, accelerator.device, gets_shards=gets_shards, syncs=False)
    if parts.agent is None:
        opened.callback(agent.close)
    agent.sleep()  # until the first hand-over: the reference and the shards are made where the engine would be
    algorithm = parts.algorithm or find_algorithm(config.algo).make(config.algorithm)
    torch.manual_seed(config.seed)  # which new adapters are drawn from
    for note in adapt(agent, config.adaptation, config.batches.precision):
        say(note, console)
    agent.check_saving()
    agent.limits = limits_of(config)
    if algorithm.wants_values:
        agent.add_value_head()
    teacher = None
    if algorithm.wants_teacher:
        teacher = _teacher(config.algorithm.teacher, config, agent, console, opened)
    return Trainer(agent, envs, algorithm, config.trainer, accelerator, teacher)


def _teacher(
    name: str, config: TrainConfig[Any], agent: VLMAgent, console: Console, opened: ExitStack
) -> VLMAgent | ServerTeacher:
    """The teacher of an algorithm that wants one, on a server or in memory."""
    if is_server(name):
        say(f"the teacher is at {name}", console)
        served = meet_teacher(name, config, agent)
        opened.callback(served.close)
        return served
    return load_teacher(name, config, agent, agent.device)


def _held(config: TrainConfig[Any], processes: Processes, console: Console) -> TrainConfig[Any]:
    """The options with weights in float32 if the ranks take no others.

    Raises:
        ConfigError: Others are asked for by name.
    """
    options = config.adaptation
    if processes.takes_any_dtype:
        return config
    if options.weights == "bf16" or options.quantize is not None or config.trainer.optimizer != "adamw":
        raise ConfigError(
            f"{processes.name} takes float32 weights and optimizer adamw: leave out weights, quantize and optimizer, "
            "or launch with FSDP2 (docs/distributed.md)"
        )
    if options.weights == "auto" and config.batches.precision == "bf16":
        say(f"frozen weights are fp32 under {processes.name}; FSDP2 holds them in bf16", console)
    return replace(config, adaptation=replace(options, weights="fp32"))


def _run_folder(config: TrainConfig[Any], opened: ExitStack) -> RunFolder:
    """The run's folder. One that is named by the time is made by the main rank, so that no other run takes it."""
    state = meet(cpu=config.device == "cpu", limit=_time_limit(config))
    if config.logging.output is not None:
        _check_name(config.logging.output)
    found: Path | OSError = (
        config.resume or config.logging.output or RunFolder.default_path(config.task_name, config.algo)
    )
    if state.is_main_process and not (config.resume or config.logging.output or config.dry_run):
        try:
            found = RunFolder.make_default(config.task_name, config.algo)
            opened.callback(_remove_empty, found)
        except OSError as error:
            found = error
    (found,) = broadcast_object_list([found])
    if isinstance(found, OSError):
        raise found
    return RunFolder(found)


def _check_name(folder: Path) -> None:
    """Raises ConfigError for a name that YAML files and trackers cannot hold."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"output {folder}: the name is not UTF-8: give another --output") from error


def _time_limit(config: TrainConfig[Any]) -> timedelta | None:
    """How long a rank waits for the others. None: as long as PyTorch lets it."""
    minutes = config.batches.rank_timeout
    return None if minutes is None else timedelta(minutes=minutes)


def _remove_empty(folder: Path) -> None:
    """Removes a folder in which nothing has been written."""
    with suppress(OSError):
        folder.rmdir()
        folder.parent.rmdir()


def _begun(
    config: TrainConfig[Any], run: RunFolder, accelerator: Accelerator, opened: ExitStack, console: Console
) -> Found:
    """Locks the run's folder until the end, and finds the checkpoint to go on from.

    Raises:
        ConfigError: Another run writes there, or the folder of a new run holds one already.
        ModelError: The folder of a run to go on has no whole checkpoint among several.
    """
    found = Found(None, {}, [])
    with shared_failure(accelerator):
        if accelerator.is_main_process:
            if not config.dry_run:
                opened.enter_context(locked(run.path, lambda line: say(f"warning: {line}", console)))
            if config.resume is None:
                run.check_new()
            elif not config.dry_run:
                run.best()  # raises now what is wrong with its record
                found = find_checkpoint(run)
    (found,) = broadcast_object_list([found])
    for note in found.notes:
        say(f"warning: {note}", console)
    return cast(Found, found)


def _compared(
    config: TrainConfig[Any], found: Found, data: DataSets, accelerator: Accelerator, console: Console
) -> dict[str, Any]:
    """What has changed since the checkpoint that the run goes on from, which is printed; of the main rank."""
    changed: dict[str, Any] = {}
    with shared_failure(accelerator):
        if accelerator.is_main_process:
            changed, told = changes(config, found, data, accelerator.num_processes)
            for line in told:
                say(f"changed since step {found.step}: {line}", console)
    return dict(broadcast_object_list([changed])[0])


def _go_on(trainer: Trainer, run: RunFolder, found: Found, changed: dict[str, Any], console: Console) -> None:
    """Restores the checkpoint that the run goes on from, and records what has changed since."""
    for note in load_checkpoint(trainer, run, found):
        say(f"warning: {note}", console)
    if any(use.endswith("training") for use in changed.get("data", {})):
        trainer.forget_samples()
    if changed and trainer.accelerator.is_main_process:
        run.write_change(trainer.step, changed)
    say(f"going on after step {trainer.step}" if trainer.step else "no checkpoint yet: starting over", console)


def _accelerator(config: TrainConfig[Any], run: RunFolder) -> Accelerator:
    precision, tracker = config.batches.precision, config.logging.tracker
    limit = _time_limit(config)
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="no" if precision == "fp32" else precision,
        log_with=tracker if tracker in THROUGH_ACCELERATE else None,
        project_dir=run.path,
        kwargs_handlers=[_REPLICAS, *([] if limit is None else [InitProcessGroupKwargs(timeout=limit)])],
    )


# A rank whose rows happen to hold no image gives the vision tower no gradient. Views spare a copy of all gradients.
_REPLICAS = DistributedDataParallelKwargs(find_unused_parameters=True, gradient_as_bucket_view=True)


def _training_envs(config: TrainConfig[Any], accelerator: Accelerator) -> Envs:
    return _mixed(config, lambda own: _training_envs_of(own, accelerator))


def _evaluation_envs(config: TrainConfig[Any]) -> Envs:
    return _mixed(config, _evaluation_envs_of)


def _mixed(config: TrainConfig[Any], make: Callable[[TrainConfig[Any]], VisualTaskVectorEnv]) -> Envs:
    """The environments of a run: those of its task, or of each task of its mix.

    Raises:
        ConfigError: As `make`; its message begins with the task's name.
    """
    if not (parts := parts_of(config)):
        return make(config)
    made: dict[str, VisualTaskVectorEnv] = {}
    for name, part in parts.items():
        try:
            made[name] = make(part.config)
        except (ConfigError, DataError) as error:
            kind = ConfigError if isinstance(error, ConfigError) else DataError
            raise kind(f"{name}: {error}") from error
    return MixedVectorEnv(made, {name: part.weight for name, part in parts.items()})


def _training_envs_of(config: TrainConfig[Any], accelerator: Accelerator) -> VisualTaskVectorEnv:
    ranks, group_size, prompts = accelerator.num_processes, config.algorithm.group_size, config.batches.prompts_per_step
    if prompts % ranks:
        raise ConfigError(f"prompts_per_step={prompts} is not a multiple of {ranks} processes")
    return make_envs(
        config.env,
        prompts // ranks * group_size,
        group_size=group_size,
        shard=accelerator.process_index,
        num_shards=ranks,
        answers=config.imitates,
        revisit=config.batches.revisit,
        **config.data.arguments(),
        **task_arguments(config),
    )


def _in_steps(config: TrainConfig[Any], samples: int | None) -> TrainConfig[Any]:
    """The options with `steps` and `warmup_steps` in place of `epochs` and `warmup_share`."""
    trainer, batches = config.trainer, config.batches
    if batches.epochs is not None:
        if samples is None:
            raise ConfigError("epochs are passes over a data set, and the built-in samples have no end: give steps")
        trainer = replace(trainer, steps=math.ceil(batches.epochs * samples / batches.prompts_per_step))
    if batches.warmup_share is not None:
        trainer = replace(trainer, warmup_steps=round(batches.warmup_share * trainer.steps))
    return replace(config, trainer=trainer, batches=replace(batches, epochs=None, warmup_share=None))


def _evaluation_envs_of(config: TrainConfig[Any]) -> VisualTaskVectorEnv:
    data, measuring = config.data, config.measuring
    split = "eval" if data.dataset is None else measuring.eval_split
    if measuring.eval_dataset is None and data.dataset is not None:
        split = split or data.split
    measured_on = replace(
        data,
        dataset=measuring.eval_dataset or data.dataset,
        image_root=measuring.eval_image_root or data.image_root,
        boxes_in=measuring.eval_boxes_in or data.boxes_in,
        box_orientation=measuring.eval_box_orientation or data.box_orientation,
        split=split,
    )
    num_envs = min(64, config.batches.prompts_per_step * config.algorithm.group_size)
    return make_envs(config.env, num_envs, **measured_on.arguments(), **task_arguments(config))
