"""`vlmenv train`: builds environments, agent and algorithm from options, and reports on the run."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Generic, Literal, Self, TypeVar

import torch
import tyro
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console

from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import ALGORITHMS, AlgorithmConfig, GRPOConfig, NonFiniteError, StepResult, Trainer, TrainerConfig
from vlmenv.algos.trainer import check_staleness
from vlmenv.building import (
    DTYPES,
    TaskConfig,
    check_device,
    check_engine,
    load_agent,
    make_envs,
    report_broken_rows,
    whole_names,
)
from vlmenv.core.errors import ConfigError, TrainingError, VLMEnvError, unknown_name
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import (
    DEFAULT_LIMIT,
    Evaluation,
    evaluate,
    metrics_table,
    read_evaluation,
    sample_count,
    write_evaluation,
)
from vlmenv.options.files import flatten, to_yaml
from vlmenv.processes import processes_of
from vlmenv.processes.stopping import Stopping
from vlmenv.processes.together import stopped_together, together
from vlmenv.runs.checkpoints import load_checkpoint, prune, save_best, save_checkpoint
from vlmenv.runs.nonfinite import write_nonfinite
from vlmenv.runs.pictures import draw_curve, draw_samples
from vlmenv.runs.progress import TrainingProgress
from vlmenv.runs.run_folder import RunFolder
from vlmenv.runs.tracking import TrackerName, Tracking, require_tracker
from vlmenv.runs.watch import drift

AlgorithmName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "ppo", "sft"]
_LOG_SAMPLES = 50  # steps

AlgorithmT = TypeVar("AlgorithmT", bound=AlgorithmConfig)


@dataclass(frozen=True)
class ModelConfig:
    """Which weights are trained, and how their gradients are found."""

    lora_rank: int | None = None
    """Train low-rank adapters (LoRA, arXiv 2106.09685) of this rank, and leave all else as it is."""
    lora_alpha: int | None = None
    """Their scale is alpha / rank; twice the rank where left out."""
    lora_dropout: float = 0.0
    """Share of an adapter's inputs that is dropped where gradients are found."""
    lora_vision: bool = False
    """Adapt the vision tower too."""
    freeze_vision: bool = False
    """Leave the vision tower as it is."""
    freeze_projector: bool = False
    """Leave what carries its features over to the language model as it is."""
    share_prefixes: bool = True
    """Compute the image and prompt of a group once and not for each completion: exact, and much faster."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of holding them: less memory, more time."""

    def __post_init__(self) -> None:
        lora = self.lora_alpha is not None or self.lora_dropout or self.lora_vision
        if self.lora_rank is None and lora:
            raise ConfigError("lora_alpha, lora_dropout and lora_vision go with lora_rank")
        if self.lora_rank is not None and (self.freeze_vision or self.freeze_projector):
            raise ConfigError("with lora_rank all but the adapters is frozen: leave out the options to freeze")

    def apply(self, agent: VLMAgent) -> None:
        """Prepares an agent for training."""
        agent.family_policy.share_prefixes = self.share_prefixes
        if self.lora_rank is not None:
            alpha = 2 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
            agent.add_lora(rank=self.lora_rank, alpha=alpha, dropout=self.lora_dropout, vision=self.lora_vision)
        if self.freeze_vision or self.freeze_projector:
            agent.freeze(vision=self.freeze_vision, projector=self.freeze_projector)
        if self.gradient_checkpointing:
            agent.enable_gradient_checkpointing()


@dataclass(frozen=True)
class TrainConfig(TaskConfig, Generic[AlgorithmT]):
    """Train a model by reinforcement learning; with no options, the built-in model on the built-in scenes."""

    recipe: str | None = None
    """Published recipe to take the options from, such as vlm_r1_rec; those of `config` and the command line win."""
    config: Path | None = None
    """YAML file of options; those on the command line win."""
    algo: AlgorithmName = "grpo"
    """Algorithm, or named variant of one; `vlmenv train --algo NAME --help` explains its options."""
    output: Path | None = None
    """Folder of the run; runs/DATE-TIME-ENV-ALGO where left out."""
    prompts_per_step: int = 16
    """Samples in a batch, each answered `group_size` times; over all processes together."""
    revisit: float = 1.0
    """Chance of showing a sample of the data set again all of whose answers earned the same when it was last shown, by
    which it is too easy or too hard to learn from."""
    epochs: float | None = None
    """Passes over the data set, in place of `steps`, where a step takes one batch. Where `most_rounds` lets a step take
    several, the steps stay as many, and pass over the data set more often."""
    warmup_share: float | None = None
    """Share of the steps over which the learning rate rises to its peak, in place of `warmup_steps`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic of forward and backward passes; weights are kept in fp32."""
    checkpoint_every: int | None = None
    """Save the model, and all that training needs to go on, every so many steps, and not only at the end."""
    keep: int | None = None
    """Checkpoints to keep, the newest; all of them where left out."""
    resume: Path | None = None
    """Go on with the run in this folder and with its own options, from its newest checkpoint if it has one yet."""
    eval_dataset: tuple[str, ...] | None = None
    """What to measure on before and after, with images as for `dataset`; the training data where left out."""
    eval_split: str | None = None
    """The split of a Hugging Face data set to measure on; that of the training data where both are left out."""
    eval_image_root: tuple[Path, ...] | None = None
    """As `image_root`, for `eval_dataset`; the same where left out."""
    eval_limit: int | None = None
    """Measure on at most so many samples, 512 where left out. 0 leaves the measuring out."""
    eval_every: int | None = None
    """Measure every so many steps too, keep the best model by the first of the metrics, and warn where answers drift
    (in length, repetition, boxes, format) while that metric falls."""
    tracker: TrackerName = "tensorboard"
    """Who is told of each step's metrics, and of samples: TensorBoard, in the run's folder, or Weights & Biases."""
    log_samples: int | None = None
    """Show the tracker a few samples, with their pictures, every so many steps, 50 where left out, and at the first
    step and the last; 0 for none."""
    adaptation: Annotated[ModelConfig, tyro.conf.arg(name="")] = field(default_factory=ModelConfig)
    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = field(default_factory=TrainerConfig)
    algorithm: Annotated[AlgorithmT, tyro.conf.arg(name="")] = field(default_factory=GRPOConfig)  # type: ignore[assignment]

    def located(self) -> Self:
        return dataclasses.replace(super().located(), eval_dataset=whole_names(self.eval_dataset))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts_per_step < 1:
            raise ConfigError(f"prompts_per_step must be at least 1, not {self.prompts_per_step}")
        for name in ("checkpoint_every", "keep", "eval_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, not {value}")
        if self.revisit < 1 and self.algorithm.group_size == 1:
            raise ConfigError("revisit compares the answers to a sample: it needs a group_size above 1")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs must be above 0, not {self.epochs}")
        if self.warmup_share is not None and not 0 <= self.warmup_share < 1:
            raise ConfigError(f"warmup_share is a share from 0 to below 1, not {self.warmup_share}")
        if self.eval_limit is not None and self.eval_limit < 0:
            raise ConfigError(f"eval_limit must not be negative, not {self.eval_limit}")
        if self.eval_every is not None and self.eval_limit == 0:
            raise ConfigError("eval_every needs samples to measure on: leave out eval_limit 0")
        if self.log_samples is not None and self.log_samples < 0:
            raise ConfigError(f"log_samples must not be negative, not {self.log_samples}")
        if self.log_samples and self.tracker == "none":
            raise ConfigError("log_samples is for a tracker, but tracker is none")
        if self.temperature == 0:
            raise ConfigError("temperature must be above 0: training needs varied answers")
        self._check_sampler()
        if self.eval_image_root is not None and self.eval_dataset is None:
            raise ConfigError("eval_image_root goes with eval_dataset")
        if self.dataset is None and not (self.eval_dataset is None and self.eval_split is None and self.split is None):
            raise ConfigError(
                "split, eval_dataset and eval_split go with dataset: the built-in samples have splits of their own"
            )

    def _check_sampler(self) -> None:
        """Raises ConfigError where options of what samples by other weights have no use."""
        names = ("correction", "correction_cap", "max_staleness")
        given = [name for name in names if getattr(self.trainer, name)]
        if given and self.algo == "sft":
            raise ConfigError(f"{' and '.join(given)} are of no use to sft, which learns from true answers")
        if getattr(self.algorithm, "replay", 0):  # of answers by earlier weights
            given = [name for name in given if name == "max_staleness"]
        if given and self.engine == "hf":
            raise ConfigError(f"{' and '.join(given)} go with an engine: the model itself samples from what it learns")
        if self.trainer.max_staleness and self.engine != "vllm-server":
            raise ConfigError("max_staleness 1 needs a server that answers meanwhile: engine vllm-server")


RIVALS: Final = (("steps", "epochs"), ("warmup_steps", "warmup_share"))
"""Options of which one takes the place of the other."""


def default_config(algo: str) -> TrainConfig[Any]:
    """The options' defaults for an algorithm.

    Raises:
        ConfigError: There is no such algorithm.
    """
    if algo not in ALGORITHMS:
        raise ConfigError(unknown_name("algorithm", algo, ALGORITHMS))
    return TrainConfig(algo=algo, algorithm=ALGORITHMS[algo][1])  # type: ignore[arg-type]


def run_training(config: TrainConfig[Any]) -> Path:
    """`vlmenv train`.

    Returns:
        The run's folder.
    """
    with ExitStack() as opened:
        return _run(config, opened)


def _run(config: TrainConfig[Any], opened: ExitStack) -> Path:
    """Sets a run up and goes through it; `opened` closes what it leaves open."""
    check_device(config.device)
    if config.precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise ConfigError("precision fp16 needs a CUDA GPU: take fp32 or bf16")
    require_tracker(config.tracker)
    run = _run_folder(config)
    accelerator = _accelerator(config, run)
    processes_of(accelerator)  # raises now what is wrong with them, and not when the model has been loaded
    check_engine(config, accelerator.device, accelerator.num_processes)
    check_staleness(config.trainer, accelerator)
    if accelerator.is_main_process and config.resume is None:
        run.check_new()
    console = Console(quiet=not accelerator.is_main_process)
    with console.status("reading the data"):
        envs = _training_envs(config, accelerator)
        held_out = None if config.eval_limit == 0 else _evaluation_envs(config)
    report_broken_rows(envs, console)
    if held_out is not None and not (config.eval_dataset is None and config.eval_split is None):
        report_broken_rows(held_out, console)
    config = _in_steps(config, envs.task.source.size)
    agent = load_agent(config, accelerator.device, engine_dtype=DTYPES[config.precision])
    opened.callback(agent.close)
    algorithm = ALGORITHMS[config.algo][0](config.algorithm)
    torch.manual_seed(config.seed)  # which new adapters are drawn from
    config.adaptation.apply(agent)
    if algorithm.wants_values:
        agent.add_value_head()
    trainer = Trainer(agent, envs, algorithm, config.trainer, accelerator)
    if accelerator.is_main_process and config.resume is None:
        run.create(to_yaml(config.located(), without=("recipe", "config", "output", "resume")))
    console.print(f"{config.env}, {config.algo}, model {config.model}; writing to {run.path}", highlight=False)
    last = run.checkpoints()[-1:] if config.resume is not None else []
    tracking = Tracking(accelerator, config.tracker, run, flatten(config), step=run.step_of(last[0]) if last else 0)
    before = _measured_before(trainer, held_out, config, run, console)
    if config.resume is not None:
        load_checkpoint(trainer, run)
        console.print(f"going on after step {trainer.step}" if trainer.step else "no checkpoint yet: starting over")
    training = _Training(trainer, envs, held_out, config, run, tracking, console, before)
    training()
    after = training.measured.get(trainer.step) or _evaluate(trainer, held_out, config, "after training", console)
    if accelerator.is_main_process and held_out is not None and before is not None and after is not None:
        _compare(config, run, held_out, before, after, console)
    console.print(f"model, metrics and pictures are in {run.path}", highlight=False)
    agent.close()  # before the processes part: vLLM has a group of its own among them
    accelerator.state.destroy_process_group()
    return run.path


def _run_folder(config: TrainConfig[Any]) -> RunFolder:
    """The run's folder; where it is named by the time, by that of the main process."""
    PartialState(cpu=config.device == "cpu")  # finds the other processes
    path = config.resume or config.output or RunFolder.default_path(config.env, config.algo)
    return RunFolder(Path(broadcast_object_list([path])[0]))


def _accelerator(config: TrainConfig[Any], run: RunFolder) -> Accelerator:
    return Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=run.path,
        # A process whose rows happen to hold no image gives the vision tower no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )


def _training_envs(config: TrainConfig[Any], accelerator: Accelerator) -> VisualTaskVectorEnv:
    processes, group_size = accelerator.num_processes, config.algorithm.group_size
    if config.prompts_per_step % processes:
        raise ConfigError(f"prompts_per_step={config.prompts_per_step} is not a multiple of {processes} processes")
    return make_envs(
        config.env,
        config.prompts_per_step // processes * group_size,
        group_size=group_size,
        shard=accelerator.process_index,
        num_shards=processes,
        answers=config.algo == "sft",
        revisit=config.revisit,
        **config.data_arguments(),
        **config.env_arguments(),
    )


def _in_steps(config: TrainConfig[Any], samples: int | None) -> TrainConfig[Any]:
    """The options with `steps` and `warmup_steps` in place of `epochs` and `warmup_share`."""
    trainer = config.trainer
    if config.epochs is not None:
        if samples is None:
            raise ConfigError("epochs are passes over a data set, and the built-in samples have no end: give steps")
        steps = math.ceil(config.epochs * samples / config.prompts_per_step)
        trainer = dataclasses.replace(trainer, steps=steps)
    if config.warmup_share is not None:
        trainer = dataclasses.replace(trainer, warmup_steps=round(config.warmup_share * trainer.steps))
    return dataclasses.replace(config, trainer=trainer, epochs=None, warmup_share=None)


def _evaluation_envs(config: TrainConfig[Any]) -> VisualTaskVectorEnv:
    split = "eval" if config.dataset is None else config.eval_split
    if config.eval_dataset is None and config.dataset is not None:
        split = split or config.split
    measured_on = config.eval_dataset or config.dataset
    roots = config.eval_image_root or config.image_root
    data = dataclasses.replace(config, dataset=measured_on, image_root=roots).data_arguments()
    num_envs = min(64, config.prompts_per_step * config.algorithm.group_size)
    return make_envs(config.env, num_envs, **(data | {"split": split}), **config.env_arguments())


def _measured_before(
    trainer: Trainer,
    envs: VisualTaskVectorEnv | None,
    config: TrainConfig[Any],
    run: RunFolder,
    console: Console,
) -> Evaluation | None:
    """What the model can do before training; a resumed run has it in its folder."""
    if envs is not None and config.resume is not None and (run.path / "before" / "metrics.json").is_file():
        return read_evaluation(run.path / "before", envs.task)
    before = _evaluate(trainer, envs, config, "before training", console)
    if before is not None and trainer.accelerator.is_main_process:
        write_evaluation(before, run.path / "before")
    return before


def _evaluate(
    trainer: Trainer, envs: VisualTaskVectorEnv | None, config: TrainConfig[Any], title: str, console: Console
) -> Evaluation | None:
    if envs is None:
        return None
    trainer.sync()
    count = sample_count(envs, config.eval_limit or DEFAULT_LIMIT)
    return evaluate(trainer.agent, envs, count, greedy=True, title=title, console=console, processes=trainer.processes)


@dataclass
class _Training:
    """A trainer on its way, each step of which is written as it is done."""

    trainer: Trainer
    envs: VisualTaskVectorEnv
    held_out: VisualTaskVectorEnv | None
    config: TrainConfig[Any]
    run: RunFolder
    tracking: Tracking
    console: Console
    before: Evaluation | None
    """what the model could do before training, where that was measured"""
    last: StepResult | None = None
    """the last step that was finished"""
    saved: int = 0
    """the last step after which a checkpoint was written, or could not be"""
    measured: dict[int, Evaluation] = field(default_factory=dict)
    """what the model could do after the last step after which that was measured on the way"""

    def __post_init__(self) -> None:
        self.history = self.run.history(self.trainer.step)
        self.saved = self.trainer.step

    def __call__(self) -> None:
        """Runs the trainer to its end.

        Where an error or a signal ends this early, the state after the last finished step is saved all the same.
        """
        accelerator = self.trainer.accelerator
        try:
            with Stopping(accelerator) as stopping, TrainingProgress(self.console, self.config.trainer.steps) as bar:
                for result in self.trainer.train(self.config.seed):
                    self._take(result)
                    bar.show(result.step, result.metrics)
                    if stopping.requested():
                        break
            self._finish()
        except BaseException as error:
            self._rescue(error)
            if isinstance(error, NonFiniteError):
                raise self._explained(error) from error
            raise
        stopping.end_process()

    def _take(self, result: StepResult) -> None:
        """Writes a step down, and saves what is due after it."""
        config, step, steps = self.config, result.step, self.config.trainer.steps
        every = _LOG_SAMPLES if config.log_samples is None else config.log_samples
        self.last = result
        result.rollouts.records = self.trainer.processes.collect(result.rollouts.records)
        if config.eval_every and step % config.eval_every == 0:
            result.metrics |= self._keep_best()
        with together(self.trainer.accelerator):
            self.history.append(result.metrics)
            if self.trainer.accelerator.is_main_process:
                self.run.write_step(result)
                self._watch(result)
            samples = every > 0 and (step % every == 0 or step in (1, steps))
            self.tracking.log(result, self.envs.task, samples=samples)
        if config.checkpoint_every and step % config.checkpoint_every == 0:
            self._save()
            self._prune()

    def _watch(self, result: StepResult) -> None:
        """Warns where answers drift while the first held-out metric falls."""
        metric = next((name.removeprefix("eval/") for name in result.metrics if name.startswith("eval/")), None)
        if metric is None:
            return
        before = None if self.before is None else self.before.metrics[metric].value
        if (message := drift(self.history, before, metric)) is not None:
            self.run.write_warning(result.step, message)
            self.console.print(f"[bold yellow]warning:[/] step {result.step}: {message}", soft_wrap=True)

    def _save(self) -> None:
        self.saved = self.trainer.step  # once is enough, whatever becomes of it
        save_checkpoint(self.trainer, self.run)

    def _prune(self) -> None:
        if self.trainer.accelerator.is_main_process:
            prune(self.run, self.config.keep)

    def _keep_best(self) -> dict[str, float]:
        """Measures the model, and saves it where it is better than any before by the first of the metrics."""
        trainer, run = self.trainer, self.run
        evaluation = _evaluate(trainer, self.held_out, self.config, f"step {trainer.step}", self.console)
        assert evaluation is not None
        self.measured = {trainer.step: evaluation}
        name, interval = next(iter(evaluation.metrics.items()))
        if trainer.processes.agree(interval.value > run.best().get("value", float("-inf"))):
            save_best(trainer, run)
            with together(trainer.accelerator):
                if trainer.accelerator.is_main_process:
                    run.write_json("best.json", {"step": trainer.step, "metric": name, "value": interval.value})
        return {f"eval/{metric}": found.value for metric, found in evaluation.metrics.items()}

    def _finish(self) -> None:
        """Saves the state after the last step, and draws the curve so far."""
        if self.saved < self.trainer.step:
            self._save()
        self._prune()
        self._draw()
        self.tracking.close()
        if self.trainer.step < self.config.trainer.steps:
            self._say_how_to_go_on()

    def _rescue(self, error: BaseException) -> None:
        """Saves what can be saved of training that an error ends. What fails in this is told, and hides nothing."""
        work: dict[str, Callable[[], None]] = {"the curve": self._draw, "the tracker's log": self._fail_tracking}
        if self.trainer.is_between_steps and stopped_together(error, self.trainer.accelerator):
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
        with together(self.trainer.accelerator):
            if self.trainer.accelerator.is_main_process and self.last is not None:
                self.run.write_step(self.last)
        self._save()

    def _draw(self) -> None:
        if self.trainer.accelerator.is_main_process and self.history:
            draw_curve(self.run.path / "curve.png", self.history, self.run.warned())

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
            self.console.print(message, highlight=False, markup=False, soft_wrap=True)


def _compare(
    config: TrainConfig[Any],
    run: RunFolder,
    envs: VisualTaskVectorEnv,
    before: Evaluation,
    after: Evaluation,
    console: Console,
) -> None:
    """Shows and writes what changed."""
    draw_samples(run.path / "samples.png", envs, before, after)
    run.write_json("evaluation.json", {"before": before.as_json(), "after": after.as_json()})
    held_out = config.dataset is None or config.eval_dataset is not None or config.eval_split is not None
    what = f"{len(after.answers)} {'held-out' if held_out else 'training'} samples, greedy answers"
    console.print(metrics_table(what, {"before": before, "after": after}))
