"""`vlmenv train`: builds environments, agent and algorithm from options, and reports on the run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from accelerate import Accelerator, DistributedDataParallelKwargs
from rich.console import Console

from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import ALGORITHMS, GRPOConfig, Trainer, TrainerConfig
from vlmenv.core.config import flatten, to_yaml
from vlmenv.core.errors import ConfigError
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import DEFAULT_LIMIT, Evaluation, evaluate, metrics_table, sample_count
from vlmenv.report.pictures import draw_curve, draw_samples
from vlmenv.report.progress import TrainingProgress
from vlmenv.report.run_folder import RunFolder
from vlmenv.tasks import TaskConfig, check_device, load_agent, make_envs, report_broken_rows


@dataclass(frozen=True)
class TrainConfig(TaskConfig):
    """Train a model by reinforcement learning; with no options, the built-in model on the built-in scenes."""

    config: Path | None = None
    """YAML file of options; those on the command line win."""
    algo: Literal["grpo"] = "grpo"
    """Algorithm."""
    output: Path | None = None
    """Folder of the run; runs/DATE-TIME-ENV-ALGO where left out."""
    prompts_per_step: int = 16
    """Samples in a batch, each answered `group_size` times; over all processes together."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward passes; weights are kept in fp32."""
    checkpoint_every: int | None = None
    """Save the model every so many steps, and not only at the end."""
    eval_dataset: tuple[str, ...] | None = None
    """What to measure on before and after, with images as for `dataset`; the training data where left out."""
    eval_split: str | None = None
    """The split of a Hugging Face data set to measure on; that of the training data where left out."""
    eval_limit: int | None = None
    """Measure on at most so many samples, 512 where left out. 0 leaves the measuring out."""
    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = field(default_factory=TrainerConfig)
    algorithm: Annotated[GRPOConfig, tyro.conf.arg(name="")] = field(default_factory=GRPOConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.prompts_per_step < 1:
            raise ConfigError(f"prompts_per_step must be at least 1, not {self.prompts_per_step}")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every must be at least 1, not {self.checkpoint_every}")
        if self.eval_limit is not None and self.eval_limit < 0:
            raise ConfigError(f"eval_limit must not be negative, not {self.eval_limit}")
        if self.temperature == 0:
            raise ConfigError("temperature must be above 0: training needs varied answers")
        if self.dataset is None and not (self.eval_dataset is None and self.eval_split is None and self.split is None):
            raise ConfigError(
                "split, eval_dataset and eval_split go with dataset: the built-in samples have splits of their own"
            )


def run_training(config: TrainConfig) -> Path:
    """`vlmenv train`.

    Returns:
        The run's folder.
    """
    check_device(config.device)
    run = RunFolder(config.output or RunFolder.default_path(config.env, config.algo))
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with="tensorboard",
        project_dir=run.path,
        # A process whose rows happen to hold no image gives the vision tower no gradient.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.is_main_process:
        run.check_new()
    console = Console(quiet=not accelerator.is_main_process)
    envs = _training_envs(config, accelerator)
    report_broken_rows(envs, console)
    held_out = None if config.eval_limit == 0 else _evaluation_envs(config)
    agent = load_agent(config.model, accelerator.device, config.temperature, config.max_new_tokens)
    if accelerator.is_main_process:
        run.create(to_yaml(_located(config), without=("config", "output")))
    console.print(f"{config.env}, {config.algo}, model {config.model}; writing to {run.path}", highlight=False)
    before = _evaluate(agent, held_out, config, "before training", console)
    trainer = Trainer(agent, envs, ALGORITHMS[config.algo](config.algorithm), config.trainer, accelerator)
    _train(trainer, config, run, console)
    after = _evaluate(agent, held_out, config, "after training", console)
    if accelerator.is_main_process and held_out is not None and before is not None and after is not None:
        _compare(config, run, held_out, before, after, console)
    console.print(f"model, metrics and pictures are in {run.path}", highlight=False)
    return run.path


def _located(config: TrainConfig) -> TrainConfig:
    """The options with a model folder's whole path, so that they hold from anywhere."""
    folder = Path(config.model)
    return dataclasses.replace(config, model=str(folder.absolute())) if folder.is_dir() else config


def _training_envs(config: TrainConfig, accelerator: Accelerator) -> VisualTaskVectorEnv:
    processes, group_size = accelerator.num_processes, config.algorithm.group_size
    if config.prompts_per_step % processes:
        raise ConfigError(f"prompts_per_step={config.prompts_per_step} is not a multiple of {processes} processes")
    return make_envs(
        config.env,
        config.prompts_per_step // processes * group_size,
        group_size=group_size,
        shard=accelerator.process_index,
        num_shards=processes,
        **config.data_arguments(),
        **config.env_arguments(),
    )


def _evaluation_envs(config: TrainConfig) -> VisualTaskVectorEnv:
    split = "eval" if config.dataset is None else config.eval_split or config.split
    data = dataclasses.replace(config, dataset=config.eval_dataset or config.dataset).data_arguments()
    num_envs = min(64, config.prompts_per_step * config.algorithm.group_size)
    return make_envs(config.env, num_envs, **(data | {"split": split}), **config.env_arguments())


def _evaluate(
    agent: VLMAgent, envs: VisualTaskVectorEnv | None, config: TrainConfig, title: str, console: Console
) -> Evaluation | None:
    if envs is None:
        return None
    count = sample_count(envs, config.eval_limit or DEFAULT_LIMIT)
    return evaluate(agent, envs, count, greedy=True, title=title, console=console)


def _train(trainer: Trainer, config: TrainConfig, run: RunFolder, console: Console) -> None:
    """Runs the trainer to its end, writing each step as it is done.

    Where an error or Ctrl-C ends this process early, the model after the last finished step is saved all the same.
    """
    accelerator, steps = trainer.accelerator, config.trainer.steps
    accelerator.init_trackers("tensorboard", {name: str(value) for name, value in flatten(config).items()})
    history: list[dict[str, float]] = []
    try:
        with TrainingProgress(console, steps) as progress:
            for result in trainer.train(config.seed):
                history.append(result.metrics)
                accelerator.log(result.metrics, step=result.step)
                progress.show(result.step, result.metrics)
                if accelerator.is_main_process:
                    run.write_step(result)
                    if config.checkpoint_every and result.step % config.checkpoint_every == 0:
                        trainer.agent.save(run.checkpoint(result.step))
    finally:
        if history and accelerator.is_main_process:
            _finish(trainer, run, history, console)
        accelerator.end_training()


def _finish(trainer: Trainer, run: RunFolder, history: list[dict[str, float]], console: Console) -> None:
    """Saves the model after the last step that was finished, and draws the curve so far."""
    folder = run.checkpoint(len(history))
    if not folder.exists():
        trainer.agent.save(folder)
    draw_curve(run.path / "curve.png", history)
    if len(history) < trainer.config.steps:
        console.print(f"ended early; the model after step {len(history)} is in {folder}", highlight=False)


def _compare(
    config: TrainConfig,
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
