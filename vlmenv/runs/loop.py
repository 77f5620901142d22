"""The loop around the trainer: measures, logs, saves, and rescues what an early end leaves."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from vlmenv.algos import NonFiniteError, StepResult, Trainer
from vlmenv.building import report_skipped
from vlmenv.core.console import say, warn
from vlmenv.core.errors import DataError, PromptError, SampleError, TrainingError, VLMEnvError
from vlmenv.core.rollout import unbatch
from vlmenv.envs.mixed import MixedVectorEnv, by_task
from vlmenv.envs.rewards.workers import LOSSES
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import Evaluation, as_json, metrics_table, play, write_evaluation
from vlmenv.options.train import TrainConfig
from vlmenv.processes.failures import FAILED_ON_ALL_RANKS, failed_on_all_ranks, shared_failure
from vlmenv.processes.stopping import Stopping
from vlmenv.runs.by_task import (
    Envs,
    answers_to,
    differences_by_task,
    evaluate_tasks,
    history_of,
    picture_of,
    read_tasks,
    told_of,
)
from vlmenv.runs.checkpoints import prune, save_best, save_checkpoint
from vlmenv.runs.keeping import Keeping
from vlmenv.runs.nonfinite import write_nonfinite
from vlmenv.runs.pictures import draw_curve, draw_samples
from vlmenv.runs.progress import TrainingProgress
from vlmenv.runs.run_folder import RunFolder
from vlmenv.runs.tracking import Tracking
from vlmenv.runs.watch import CONCERNS, collapse, concerns, drift, first_concerns


def measured_before(
    trainer: Trainer,
    envs: Envs | None,
    config: TrainConfig[Any],
    run: RunFolder,
    console: Console,
    stopping: Stopping,
    keeping: Keeping,
) -> Evaluation | None:
    """What the model can do before training; a resumed run has it in its folder. A damaged one is measured again."""
    if envs is not None and config.resume is not None and (run.path / "before" / "metrics.json").is_file():
        try:
            return read_tasks(run.path / "before", envs)
        except (DataError, OSError) as error:
            say(f"warning: {error}; the model before training is measured again", console)
    before = evaluate_now(trainer, envs, config, "before training", console, stopping)
    if before is not None and trainer.accelerator.is_main_process:
        write_evaluation(before, run.path / "before")
        keeping.evaluation(before)
        keeping.report()
    return before


FIRST_SAMPLES, FIRST_GROUP = 8, 2
"""Samples of each task of the look at a model before training, and completions of each."""


def look_first(trainer: Trainer, envs: Envs, config: TrainConfig[Any], run: RunFolder, console: Console) -> None:
    """Warns if the model's answers to a few samples give nothing to learn from, before time is spent on them.

    All ranks answer the same samples, of each task. Training is the same bit for bit as without.
    """
    if trainer.algorithm.imitates:
        return
    trainer.sync()
    for name, own in by_task(envs).items():
        _look_at(name, own, trainer, config, run, console)


def _look_at(
    name: str,
    envs: VisualTaskVectorEnv,
    trainer: Trainer,
    config: TrainConfig[Any],
    run: RunFolder,
    console: Console,
) -> None:
    """Looks at the answers to one task."""
    agent, state = trainer.agent, trainer.agent.rng_state()
    group = 1 if envs.task.unrepeatable else FIRST_GROUP
    looking = VisualTaskVectorEnv(lambda: envs.task, FIRST_SAMPLES * group, group_size=group)
    held = trainer.processes.gathered() if agent.generates_itself else nullcontext()
    turns = agent.generating(envs.max_turns)
    with closing(looking), held, shared_failure(trainer.accelerator), turns, trainer.processes.autocast():
        try:
            observations, _ = looking.reset(seed=config.seed)
            rollout = agent.rollout(observations)
            played = play(agent, looking, unbatch(observations), rollout)
        except (SampleError, PromptError):
            return  # training refuses or replaces the sample when it comes to it
        finally:
            agent.set_rng_state(state)
            trainer.forget_images()
    readable = [prediction is not None for prediction in played.infos["prediction"]]
    truncated = [one.finish_reason == "length" for one in rollout.completions]
    if trainer.accelerator.is_main_process:
        for kind, message in first_concerns(rollout.texts, readable, truncated, played.rewards.tolist()):
            run.write_warning(0, f"{told_of(name)}{message}", f"first {kind}")
            warn(f"{told_of(name)}{message}", console)


def evaluate_now(
    trainer: Trainer,
    envs: Envs | None,
    config: TrainConfig[Any],
    title: str,
    console: Console,
    stopping: Stopping,
) -> Evaluation | None:
    """Measures the present weights; None without environments to measure in.

    Raises:
        StoppedError: A signal came meanwhile.
    """
    if envs is None:
        return None
    trainer.sync()
    limit = config.measuring.eval_limit
    return evaluate_tasks(trainer, envs, limit, title=title, console=console, check=stopping.check)


@dataclass
class TrainingLoop:
    """A trainer on its way, each step of which is written as it is done."""

    trainer: Trainer
    envs: Envs
    held_out: Envs | None
    config: TrainConfig[Any]
    run: RunFolder
    tracking: Tracking
    console: Console
    before: Evaluation | None
    """what the model could do before training, where that was measured"""
    stopping: Stopping
    keeping: Keeping
    facts: Mapping[str, Any] = field(default_factory=dict)
    """what checkpoints keep for resuming to compare"""
    last: StepResult | None = None
    """the last step that was finished"""
    saved: int = 0
    """the last step after which a checkpoint was written, or could not be"""
    measured: dict[int, Evaluation] = field(default_factory=dict)
    """what the model could do after the last step after which that was measured on the way"""

    def __post_init__(self) -> None:
        self.history = self.run.history(self.trainer.step)
        self.saved = self.trainer.step
        self.saved_at = time.monotonic()
        self.lost = LOSSES.snapshot()
        self.warned = {kind for kind in CONCERNS if self.run.warned(kind)}

    def __call__(self) -> None:
        """Runs the trainer to its end.

        Where an error or a signal ends this early, the state after the last finished step is saved all the same.
        """
        try:
            with TrainingProgress(self.console, self.config.trainer.steps) as bar:
                for result in self.trainer.train(self.config.seed):
                    self._take(result)
                    bar.show(result.step, result.metrics)
                    if self.stopping.requested():
                        break
            self._finish()
        except BaseException as error:
            self._rescue(error)
            if isinstance(error, NonFiniteError):
                raise self._explained(error) from error
            raise
        if self.stopping.requested():  # of all ranks, as each goes on to measure with the others
            self.stopping.end_process()

    def _take(self, result: StepResult) -> None:
        """Writes a step down, and saves what is due after it."""
        config, step, steps = self.config, result.step, self.config.trainer.steps
        every = config.logging.log_samples
        self.last = result
        result.rollouts.records = self.trainer.processes.collect(result.rollouts.records)
        self.keeping.completions(step, result.rollouts.records)
        result.metrics |= self._losses() | {"memory/peak": peak_memory()}
        if config.measuring.eval_every and step % config.measuring.eval_every == 0:
            result.metrics |= self._keep_best()
        with shared_failure(self.trainer.accelerator):
            self.history.append(result.metrics)
            if self.trainer.accelerator.is_main_process:
                self.run.write_step(result)
                self._watch(result)
            samples = every > 0 and (step % every == 0 or step in (1, steps))
            self.tracking.log(result, {name: one.task for name, one in by_task(self.envs).items()}, samples=samples)
        if self.measured.get(step) is not None:
            self.keeping.report()
        if self._is_due(step):
            self._save()
            self._prune()
        self._check_collapse()

    def _losses(self) -> dict[str, float]:
        """Scoring processes that others have ended since the last step, and answers without a verdict; of all ranks."""
        lost, self.lost = LOSSES.since(self.lost), LOSSES.snapshot()
        if not any(self.trainer.processes.collect([bool(LOSSES.processes or LOSSES.answers)])):
            return {}
        rows = self.trainer.processes.collect([(lost.processes, lost.answers)])
        processes, answers = (float(sum(counts)) for counts in zip(*rows, strict=True))
        return {"score/lost_processes": processes, "score/unscored": answers}

    def _is_due(self, step: int) -> bool:
        """True if a checkpoint is to be written, by the number of steps or by the time since the last."""
        logging, minutes = self.config.logging, self.config.logging.minutes
        if logging.checkpoint_every and step % logging.checkpoint_every == 0:
            return True
        late = bool(minutes) and time.monotonic() - self.saved_at >= 60 * minutes
        return minutes > 0 and step < self.config.trainer.steps and self.trainer.processes.broadcast(late)

    def _check_collapse(self) -> None:
        """Raises TrainingError if training has collapsed and is to end then."""
        if self.config.measuring.stop_on_collapse and (what := collapse(self.history)) is not None:
            error = TrainingError(f"step {len(self.history)}: training has collapsed: {what}")
            error.add_note(FAILED_ON_ALL_RANKS)  # all ranks have the same history
            raise error

    def _watch(self, result: StepResult) -> None:
        """Warns of what goes wrong: of each kind once, but of a drift after every evaluation."""
        imitates = self.trainer.algorithm.imitates  # completions are the truth, and tell nothing of the model
        for kind, message in () if imitates else concerns(self.history):
            if kind not in self.warned:
                self.warned.add(kind)
                self._warn(result.step, message, kind)
        metric = next((name.removeprefix("eval/") for name in result.metrics if name.startswith("eval/")), None)
        if metric is None:
            return
        before = None if self.before is None else self.before.metrics[metric].value
        if (drifting := drift(self.history, before, metric)) is not None:
            self._warn(result.step, drifting, "drift")

    def _warn(self, step: int, message: str, kind: str) -> None:
        self.run.write_warning(step, message, kind)
        warn(f"step {step}: {message}", self.console)

    def _save(self) -> None:
        self.saved = self.trainer.step  # once is enough, whatever becomes of it
        save_checkpoint(self.trainer, self.run, self.facts)
        self.saved_at = time.monotonic()

    def _prune(self) -> None:
        if self.trainer.accelerator.is_main_process:
            prune(self.run, self.config.logging.kept)

    def _keep_best(self) -> dict[str, float]:
        """Measures the model, and saves it where it is better than any before by the first of the metrics."""
        trainer, run = self.trainer, self.run
        evaluation = evaluate_now(
            trainer, self.held_out, self.config, f"step {trainer.step}", self.console, self.stopping
        )
        assert evaluation is not None
        self.measured = {trainer.step: evaluation}
        with shared_failure(trainer.accelerator):
            if trainer.accelerator.is_main_process:
                write_evaluation(evaluation, run.evaluation(trainer.step))
                self.keeping.evaluation(evaluation)
        self._save_if_best(evaluation, "best", next(iter(evaluation.metrics)))
        for task in self.envs.tasks if isinstance(self.envs, MixedVectorEnv) else ():
            first = next(metric for metric in evaluation.metrics if metric.startswith(f"{task}/"))
            self._save_if_best(evaluation, f"best-{task}", first)
        return {f"eval/{metric}": value for metric, value in evaluation.values().items()}

    def _save_if_best(self, evaluation: Evaluation, folder: str, metric: str) -> None:
        """Saves the model into a folder if it is better than any before by a metric."""
        trainer, run, value = self.trainer, self.run, evaluation.metrics[metric].value
        if not trainer.processes.broadcast(value > run.best(folder).get("value", float("-inf"))):
            return
        save_best(trainer, run, folder)
        with shared_failure(trainer.accelerator):
            if trainer.accelerator.is_main_process:
                run.write_json(f"{folder}.json", {"step": trainer.step, "metric": metric, "value": value})

    def _finish(self) -> None:
        """Saves the state after the last step, and draws the curve so far."""
        if self.saved < self.trainer.step:
            self._save()
        self._prune()
        self._draw()
        sizes = [one.task.source.size for one in by_task(self.envs).values()]
        total = None if None in sizes else sum(size or 0 for size in sizes)
        report_skipped(self.trainer.collector.skipped() or {}, total, self.console)
        if self.trainer.step < self.config.trainer.steps:
            self.keeping.report()
            self._say_how_to_go_on()

    def _rescue(self, error: BaseException) -> None:
        """Saves what can be saved of training that an error ends. What fails in this is told, and hides nothing."""
        work: dict[str, Callable[[], object]] = {"the curve": self._draw, "the tracker's log": self._fail_tracking}
        work["the report"] = self.keeping.report
        if self.trainer.is_between_steps and failed_on_all_ranks(error, self.trainer.accelerator):
            work = {f"the state after step {self.trainer.step}": self._save_last} | work
        if isinstance(error, NonFiniteError):
            work["the batch"] = lambda: write_nonfinite(self._nonfinite(error), error)
        for name, do in work.items():
            try:
                do()
            except Exception as second:
                told = str(second) if isinstance(second, VLMEnvError) else f"{type(second).__name__}: {second}"
                self._say(f"{name} could not be written either: {told}")
        if self.trainer.step:
            self._say_how_to_go_on()

    def _save_last(self) -> None:
        """Saves the state after the last finished step, with its lines."""
        if self.saved == self.trainer.step:
            return
        with shared_failure(self.trainer.accelerator):
            if self.trainer.accelerator.is_main_process and self.last is not None:
                self.run.write_step(self.last)
        self._save()

    def _draw(self) -> None:
        if self.trainer.accelerator.is_main_process and self.history:
            title = f"{self.run.path.name}: {self.config.task_name}, {self.config.algo}"
            draw_curve(self.run.path / "curve.png", self.history, self.run.warned(), title)
            for name in self.envs.tasks if isinstance(self.envs, MixedVectorEnv) else ():
                file = self.run.path / picture_of(name, "curve.png")
                draw_curve(file, history_of(self.history, name), self.run.warned(), f"{self.run.path.name}: {name}")

    def _fail_tracking(self) -> None:
        self.tracking.close(failed=True)

    def _nonfinite(self, error: NonFiniteError) -> Path:
        """The folder for this process's part of what could not be learnt from."""
        accelerator, folder = self.trainer.accelerator, self.run.nonfinite(error.step)
        return folder if accelerator.num_processes == 1 else folder / f"process-{accelerator.process_index}"

    def _explained(self, error: NonFiniteError) -> TrainingError:
        """The error with what to look at and how to go on."""
        saved = self.run.checkpoints()
        begin = f"go on from {saved[-1]}" if saved else "start over"
        start = f"{begin} with: vlmenv train --resume {self.run.path}"
        return TrainingError(
            f"step {error.step}: {error}. What it could not learn from is in {self._nonfinite(error)}. "
            f"Once the cause is gone, {start}. What may help, such as a lower lr, another precision or a larger "
            f"max_skipped, can be set in {self.run.path / 'config.yaml'}"
        )

    def _say_how_to_go_on(self) -> None:
        if not (saved := self.run.checkpoints()):
            self._say(f"ended early, without a checkpoint. Start over with: vlmenv train --resume {self.run.path}")
            return
        self._say(
            f"ended early; {saved[-1]} holds the state after step {self.run.step_of(saved[-1])}. "
            f"Go on with: vlmenv train --resume {self.run.path}{self._alike()}"
        )

    def _alike(self) -> str:
        return ", launched as this run was" if self.trainer.accelerator.num_processes > 1 else ""

    def _say(self, message: str) -> None:
        with suppress(OSError):  # what is printed may go to the disk that is full
            say(message, self.console)


def peak_memory() -> float:
    """Largest memory of this rank so far, in GiB: what tensors on its GPU take, or without one the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def compare(
    config: TrainConfig[Any],
    run: RunFolder,
    envs: Envs,
    before: Evaluation,
    after: Evaluation,
    console: Console,
    keeping: Keeping,
) -> None:
    """Shows and writes what changed."""
    for name, own in by_task(envs).items():
        if not own.task.unrepeatable:  # else before and after have no sample in common
            file = run.path / picture_of(name, "samples.png")
            draw_samples(file, own, answers_to(before, name), answers_to(after, name))
    write_evaluation(after, run.path / "after")
    keeping.evaluation(after)
    changes = differences_by_task(envs, before.answers, after.answers)
    told = {"before": before.as_json(), "after": after.as_json(), "change": as_json(changes)}
    run.write_json("evaluation.json", told)
    measuring = config.measuring
    held_out = config.data.dataset is None or measuring.eval_dataset is not None or measuring.eval_split is not None
    what = f"{len(after.answers)} {'held-out' if held_out else 'training'} samples, greedy answers"
    console.print(metrics_table(what, {"before": before, "after": after}, changes, console.width))
