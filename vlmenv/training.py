"""`vlmenv train`: builds environments, agent and algorithm from options, and reports on the run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import Accelerator
from rich.console import Console

from vlmenv.agents.vlm import VLMAgent
from vlmenv.algos import GRPO, GRPOConfig, Trainer, TrainerConfig
from vlmenv.core.config import flatten, to_yaml
from vlmenv.core.errors import ConfigError
from vlmenv.envs.vector import VisualTaskVectorEnv
from vlmenv.evaluation import Evaluation, evaluate, metrics_table, sample_count
from vlmenv.report.pictures import draw_curve, draw_samples
from vlmenv.report.progress import TrainingProgress
from vlmenv.report.run_folder import RunFolder
from vlmenv.tasks import TaskConfig, check_device, load_agent, make_envs


@dataclass(frozen=True)
class TrainConfig(TaskConfig):
    """Train a model by reinforcement learning; with no options, the built-in model on the built-in scenes."""

    config: Path | None = None
    """YAML file of options; those on the command line win."""
    algo: Literal["grpo"] = "grpo"
    """Algorithm."""
    seed: int = 0
    """Fixes the order of samples and the sampling of answers."""
    output: Path | None = None
    """Folder of the run; runs/DATE-TIME-ENV-ALGO where left out."""
    prompts_per_step: int = 16
    """Samples in a batch, each answered `group_size` times; over all processes together."""
    temperature: float = 1.0
    """Of the sampled answers."""
    max_new_tokens: int = 64
    """Longest answer, in tokens."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of forward and backward passes; weights are kept in fp32."""
    checkpoint_every: int | None = None
    """Save the model every so many steps, and not only at the end."""
    eval_dataset: Path | None = None
    """JSONL file to measure on before and after, with its images as for `dataset`; the training file where left out."""
    eval_limit: int | None = None
    """Measure on at most so many samples; of the built-in ones 512 where left out. 0 leaves the measuring out."""
    trainer: Annotated[TrainerConfig, tyro.conf.arg(name="")] = field(default_factory=TrainerConfig)
    algorithm: Annotated[GRPOConfig, tyro.conf.arg(name="")] = field(default_factory=GRPOConfig)

    def __post_init__(self) -> None:
        if self.prompts_per_step < 1:
            raise ConfigError(f"prompts_per_step must be at least 1, not {self.prompts_per_step}")
        if self.checkpoint_every is not None and self.checkpoint_every < 1:
            raise ConfigError(f"checkpoint_every must be at least 1, not {self.checkpoint_every}")
        if self.temperature <= 0:
            raise ConfigError(f"temperature must be above 0, not {self.temperature}: training needs varied answers")
        if self.eval_dataset is not None and self.dataset is None:
            raise ConfigError("eval_dataset goes with dataset: the built-in samples have their own evaluation split")


def run_training(config: TrainConfig) -> Path:
    """`vlmenv train`.

    Returns:
        The run's folder.
    """
    check_device(config.device)
    console = Console()
    path = config.output or RunFolder.default_path(config.env, config.algo)
    RunFolder.check_new(path)
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision="no" if config.precision == "fp32" else config.precision,
        log_with="tensorboard",
        project_dir=path,
    )
    console.quiet = not accelerator.is_main_process
    torch.manual_seed(config.seed)
    envs = _training_envs(config, accelerator)
    held_out = None if config.eval_limit == 0 else _evaluation_envs(config)
    agent = load_agent(config.model, accelerator.device, config.temperature, config.max_new_tokens)
    run = RunFolder(path) if accelerator.is_main_process else None
    console.print(f"{config.env}, {config.algo}, model {config.model}; writing to {path}", highlight=False)
    before = _evaluate(agent, held_out, config, "before training")
    trainer = Trainer(agent, envs, GRPO(config.algorithm), config.trainer, accelerator)
    history = _train(trainer, config, run, console)
    after = _evaluate(agent, held_out, config, "after training")
    if run is not None:
        draw_curve(run.path / "curve.png", history)
        if held_out is not None and before is not None and after is not None:
            _compare(config, run, held_out, before, after, console)
        run.close()
        console.print(f"model, metrics and pictures are in {path}", highlight=False)
    accelerator.end_training()
    return path


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
        dataset=config.dataset,
        image_root=config.image_root,
        **config.env_arguments(),
    )


def _evaluation_envs(config: TrainConfig) -> VisualTaskVectorEnv:
    return make_envs(
        config.env,
        min(64, config.prompts_per_step * config.algorithm.group_size),
        dataset=config.eval_dataset or config.dataset,
        image_root=config.image_root,
        split="eval" if config.dataset is None else None,
        **config.env_arguments(),
    )


def _evaluate(agent: VLMAgent, envs: VisualTaskVectorEnv | None, config: TrainConfig, title: str) -> Evaluation | None:
    if envs is None:
        return None
    return evaluate(agent, envs, sample_count(envs, config.eval_limit), greedy=True, title=title)


def _train(trainer: Trainer, config: TrainConfig, run: RunFolder | None, console: Console) -> list[dict[str, float]]:
    """Runs the trainer to its end, writing each step as it is done; the metrics of all steps."""
    history = []
    if run is not None:
        run.write_config(to_yaml(config, without=("config", "output")))
    trainer.accelerator.init_trackers("tensorboard", {k: str(v) for k, v in flatten(config).items()})
    with TrainingProgress(console, config.trainer.steps) as progress:
        try:
            for result in trainer.train(config.seed):
                history.append(result.metrics)
                trainer.accelerator.log(result.metrics, step=result.step)
                progress.show(result.step, result.metrics)
                if run is not None:
                    run.write_step(result)
                    if config.checkpoint_every and result.step % config.checkpoint_every == 0:
                        trainer.agent.save(run.checkpoint(result.step))
        finally:
            if run is not None and history:
                _save_last(trainer, run, len(history), console)
    return history


def _save_last(trainer: Trainer, run: RunFolder, step: int, console: Console) -> None:
    """Saves the model after the last finished step, also where an error or Ctrl-C ends the run."""
    folder = run.checkpoint(step)
    if not folder.exists():
        trainer.agent.save(folder)
    if step < trainer.config.steps:
        console.print(f"ended early; the model after step {step} is in {folder}", highlight=False)


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
    run.write_json("evaluation.json", {"before": before.metrics, "after": after.metrics})
    held_out = config.dataset is None or config.eval_dataset is not None
    what = f"{len(after.answers)} {'held-out' if held_out else 'training'} samples, greedy answers"
    console.print(metrics_table(what, {"before": before.metrics, "after": after.metrics}))
