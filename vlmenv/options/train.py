"""Options of `vlmenv train`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Generic, Literal, Self, TypeVar

from vlmenv.algos import AlgorithmConfig, GRPOConfig, TrainerConfig, find_algorithm
from vlmenv.core.errors import ConfigError, require
from vlmenv.options.mixing import MixOptions, parts_of
from vlmenv.options.task import BoxNumbers, TaskConfig, located_model, located_names

AlgorithmT = TypeVar("AlgorithmT", bound=AlgorithmConfig)


@dataclass(frozen=True)
class AdaptationOptions:
    """Trained weights, and the computation of gradients."""

    lora_rank: int | None = None
    """Rank of low-rank adapters (LoRA, arXiv 2106.09685). With adapters no other weight is trained. None: no
    adapters."""
    lora_alpha: int | None = None
    """Scale of the adapters times their rank. None: twice the rank."""
    lora_dropout: float = 0.0
    """Dropout probability of an adapter's inputs in training."""
    lora_vision: bool = False
    """Adapt the vision tower too."""
    freeze_vision: bool = False
    """Freeze the vision tower."""
    freeze_projector: bool = False
    """Freeze the projector between vision tower and language model."""
    share_prefixes: bool = True
    """Run image and prompt through the model once per group, not once per completion. Exact, and much faster."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    checkpointed_blocks: int | None = None
    """Number of the language model's blocks whose activations are recomputed, the first ones, besides all of the vision
    tower; goes with gradient_checkpointing. None: all."""
    weights: Literal["auto", "fp32", "bf16"] = "auto"
    """Data type of the weights in memory. "auto": fp32, but bf16 for frozen weights (beneath adapters, frozen parts,
    the reference) with precision bf16, where no result changes. "bf16": all but adapters; updates are rounded at
    random, so that small ones count."""
    quantize: Literal["nf4", "int8"] | None = None
    """Quantisation of the frozen linear layers beneath adapters (QLoRA, arXiv 2305.14314), those of the language model
    and, with lora_vision, of the vision tower. None: none."""
    save_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    """Data type of the weights in checkpoints. What it rounds away is kept beside them, so that a run continues bit for
    bit. Adapters are always fp32. None: that of the model's own files."""

    def __post_init__(self) -> None:
        lora = self.lora_alpha is not None or self.lora_dropout or self.lora_vision
        if self.lora_rank is None and lora:
            raise ConfigError("lora_alpha, lora_dropout and lora_vision go with lora_rank")
        if self.checkpointed_blocks is not None:
            require(
                self.checkpointed_blocks >= 0,
                f"checkpointed_blocks must not be negative, not {self.checkpointed_blocks}",
            )
            if not self.gradient_checkpointing:
                raise ConfigError("checkpointed_blocks goes with gradient_checkpointing")
        if self.lora_rank is not None and (self.freeze_vision or self.freeze_projector):
            raise ConfigError("with lora_rank all but the adapters is frozen: leave out the options to freeze")
        if self.quantize is not None and (self.freeze_vision or self.freeze_projector):
            raise ConfigError("quantize is for the base of adapters, which is frozen as a whole: give lora_rank")


@dataclass(frozen=True)
class BatchOptions:
    """Size and number of batches."""

    prompts_per_step: int = 16
    """Samples in a batch over all ranks together, each answered `group_size` times."""
    revisit: float = 1.0
    """Probability of showing a sample again whose answers all got the same reward last time."""
    epochs: float | None = None
    """Passes over the data set, instead of `steps`. A step counts one batch, also if `most_rounds` takes several."""
    warmup_share: float | None = None
    """Share of the steps over which the learning rate rises, instead of `warmup_steps`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of forward and backward passes. `weights` is that of the weights."""
    rank_timeout: float | None = None
    """Minutes that a rank waits for the others before the run ends, as while one saves a large model. None: PyTorch's
    own limit, 10 with GPUs and 30 without."""

    def __post_init__(self) -> None:
        require(self.prompts_per_step >= 1, f"prompts_per_step must be at least 1, not {self.prompts_per_step}")
        if self.rank_timeout is not None and not 0 < self.rank_timeout < math.inf:
            raise ConfigError(f"rank_timeout must be above 0 minutes, not {self.rank_timeout}")
        require(0 <= self.revisit <= 1, f"revisit is a probability from 0 to 1, not {self.revisit}")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            raise ConfigError(f"epochs must be above 0, not {self.epochs}")
        if self.warmup_share is not None and not 0 <= self.warmup_share < 1:
            raise ConfigError(f"warmup_share is a share from 0 to below 1, not {self.warmup_share}")


@dataclass(frozen=True)
class MeasuringOptions:
    """Evaluation before, during and after training."""

    eval_dataset: tuple[str, ...] | None = None
    """Data set to measure on, in the forms of `dataset`. None: the training data."""
    eval_split: str | None = None
    """Split of a Hugging Face data set to measure on. None: that of the training data."""
    eval_image_root: tuple[Path, ...] | None = None
    """Folder of the images of `eval_dataset`. None: `image_root`."""
    eval_boxes_in: BoxNumbers | None = None
    """Numbers of the true boxes of `eval_dataset`, in the forms of `boxes_in`. None: `boxes_in`."""
    eval_box_orientation: Literal["shown", "stored"] | None = None
    """Orientation of the image that the boxes of `eval_dataset` refer to. None: `box_orientation`."""
    eval_limit: int = 512
    """Largest number of samples to measure on. 0: no measuring."""
    eval_every: int | None = None
    """Steps between two evaluations during training. The best model by the first metric is kept, and a warning tells if
    answers drift (in length, repetition, boxes, format) while that metric falls. None: before and after only."""

    stop_on_collapse: bool = False
    """End training, with the state saved, when it collapses: the KL divergence runs away, or the reward is lost."""

    def __post_init__(self) -> None:
        require(self.eval_limit >= 0, f"eval_limit must not be negative, not {self.eval_limit}")
        require(
            self.eval_every is None or self.eval_every >= 1, f"eval_every must be at least 1, not {self.eval_every}"
        )
        if self.eval_every is not None and self.eval_limit == 0:
            raise ConfigError("eval_every needs samples to measure on: leave out eval_limit 0")
        for name in ("eval_image_root", "eval_boxes_in", "eval_box_orientation"):
            if getattr(self, name) is not None and self.eval_dataset is None:
                raise ConfigError(f"{name} goes with eval_dataset")


_MINUTES: Final = 30.0
_KEPT: Final = 2


@dataclass(frozen=True)
class LoggingOptions:
    """Files of a run."""

    output: Path | None = None
    """Folder of the run. None: runs/DATE-TIME-ENV-ALGO."""
    checkpoint_every: int | None = None
    """Steps between two checkpoints; one is written at the end too. None: by time."""
    checkpoint_minutes: float | None = None
    """Minutes of training between two checkpoints. 0: none by time. None: 30, or none with checkpoint_every."""
    keep: int | None = None
    """Number of checkpoints to keep, the newest. None: all with checkpoint_every, else 2."""
    tracker: str = "tensorboard"
    """Tracker of metrics and example completions: tensorboard (in the run's folder), wandb, none, or a class of your
    own, as in `my_tracker:MyTracker`."""
    log_samples: int = 50
    """Steps between two logs of example completions with their pictures; also at the first and last step. 0: none."""

    def __post_init__(self) -> None:
        for name in ("checkpoint_every", "keep"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
        minutes = self.checkpoint_minutes
        require(minutes is None or 0 <= minutes < math.inf, f"checkpoint_minutes must not be negative, not {minutes}")
        require(self.log_samples >= 0, f"log_samples must not be negative, not {self.log_samples}")
        if self.tracker == "none" and self.log_samples not in (0, type(self).log_samples):
            raise ConfigError("log_samples is for a tracker, but tracker is none")

    @property
    def minutes(self) -> float:
        """Minutes between two checkpoints; 0 for none by time."""
        if self.checkpoint_minutes is not None:
            return self.checkpoint_minutes
        return 0.0 if self.checkpoint_every is not None else _MINUTES

    @property
    def kept(self) -> int | None:
        """Number of checkpoints to keep; None for all."""
        return _KEPT if self.keep is None and self.checkpoint_every is None else self.keep


SINGLE: Final = "env is the task of a run on a single one: name it in mix, or leave mix out"
"""What is wrong with `env` beside `mix`."""


@dataclass(frozen=True)
class TrainConfig(TaskConfig, Generic[AlgorithmT]):
    """Train a model by reinforcement learning; with no options, the built-in model on the built-in scenes."""

    recipe: str | None = None
    """Published recipe to take options from; `vlmenv recipes` lists them. `--config` and the command line win."""
    config: Path | None = None
    """YAML file of options, such as a run's config.yaml or resolved.yaml. The command line wins."""
    resume: Path | None = None
    """Run's folder to continue from its newest whole checkpoint, with its own options. `--steps N` beside it prolongs
    it."""
    data_changed: bool = False
    """Go on, beside `resume`, though the data set is not the one that the run began with. changes.jsonl records it."""
    dry_run: bool = False
    """Print the resolved options, the files to be read and the folder to be written, and stop."""
    algo: str = "grpo"
    """Algorithm: grpo, dr_grpo, dapo, gspo, cispo, sapo, gmpo, gdpo, papo_g, papo_d, vppo, rloo, reinforce++, ppo,
    opd, sft, or a class of your own, as in `my_algorithm:MyAlgorithm`. `vlmenv train --algo NAME --help` shows its
    options."""
    mixing: MixOptions = field(default_factory=MixOptions)
    batches: BatchOptions = field(default_factory=BatchOptions)
    measuring: MeasuringOptions = field(default_factory=MeasuringOptions)
    logging: LoggingOptions = field(default_factory=LoggingOptions)
    adaptation: AdaptationOptions = field(default_factory=AdaptationOptions)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    algorithm: AlgorithmT = field(default_factory=GRPOConfig)  # type: ignore[assignment]

    def located(self) -> Self:
        measuring = replace(self.measuring, eval_dataset=located_names(self.measuring.eval_dataset))
        located = replace(super().located(), measuring=measuring)
        if (teacher := getattr(self.algorithm, "teacher", None)) is None:
            return located
        algorithm: Any = self.algorithm
        return replace(located, algorithm=replace(algorithm, teacher=located_model(teacher)))

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batches.revisit < 1 and self.algorithm.group_size == 1:
            raise ConfigError("revisit compares the answers to a sample: it needs a group_size above 1")
        if self.batches.revisit < 1 and self.algorithm.equal_rewards_teach:
            told = "revisit passes over samples whose answers had equal rewards"
            raise ConfigError(f"{told}, and {self.algo} learns from those too: leave it out")
        self._check_masks()
        if self.sampling.temperature == 0:
            raise ConfigError("temperature must be above 0: training needs varied answers")
        self._check_sampler()
        if self.adaptation.weights == "bf16" and self.batches.precision != "bf16":
            raise ConfigError(f"weights bf16 goes with precision bf16, not with {self.batches.precision}")
        data, measuring = self.data, self.measuring
        given = not (measuring.eval_dataset is None and measuring.eval_split is None and data.split is None)
        if data.dataset is None and given:
            raise ConfigError(
                "split, eval_dataset and eval_split go with dataset: the built-in samples have splits of their own"
            )
        self._check_mix()

    def _check_mix(self) -> None:
        """Raises ConfigError if options go with a single task, or those of the mix are faulty."""
        if self.mixing.mix is None:
            return
        if self.env != TaskConfig.env:
            raise ConfigError(SINGLE)
        if self.batches.epochs is not None:
            raise ConfigError("epochs are passes over one data set, and a mix has several: give steps")
        parts_of(self)

    @property
    def task_name(self) -> str:
        """The name of the task, or those of a mix."""
        return "+".join(self.mixing.names) or self.env

    @property
    def masks_images(self) -> bool:
        """True if images are masked, by the algorithm or for `visual_dependence_every`."""
        measures = self.trainer.visual_dependence_every is not None
        return measures or self._is("wants_masked") or self._is("learns_masked")

    @property
    def imitates(self) -> bool:
        """True if completions are the true answers, and not the policy's own."""
        return self._is("imitates")

    def _is(self, what: str) -> bool:
        """True if a class attribute of the algorithm is set."""
        return bool(getattr(find_algorithm(self.algo).make, what, False))

    def _check_masks(self) -> None:
        """Raises ConfigError if images are masked for nothing."""
        given = self.trainer.mask_share != TrainerConfig.mask_share
        if given and not self.masks_images:
            raise ConfigError(
                "mask_share goes with visual_dependence_every, or with an algorithm that masks images, such as papo_g"
            )

    def _check_sampler(self) -> None:
        """Raises ConfigError if options for a sampler with other weights have no use."""
        names = ("correction", "correction_cap", "max_staleness")
        given = [name for name in names if getattr(self.trainer, name) != getattr(TrainerConfig, name)]
        engine = self.generation.engine
        if given and self.imitates:
            raise ConfigError(f"{self.algo} learns from true answers: leave out {' and '.join(given)}")
        if getattr(self.algorithm, "replay", 0):  # of answers by earlier weights
            given = [name for name in given if name == "max_staleness"]
        if given and engine == "hf":
            go = "goes" if len(given) == 1 else "go"
            told = f"{' and '.join(given)} {go} with an engine"
            raise ConfigError(f"{told}: the model itself samples from what it learns")
        if self.trainer.max_staleness and engine != "vllm-server":
            raise ConfigError("max_staleness 1 needs a server that answers meanwhile: engine vllm-server")


RIVALS: Final = (("steps", "epochs"), ("warmup_steps", "warmup_share"), ("env", "mix"))
"""Pairs of options that replace each other."""


def default_config(algo: str = "grpo") -> TrainConfig[Any]:
    """The defaults of all options for an algorithm.

    Raises:
        ConfigError: There is no such algorithm.
    """
    return TrainConfig(algo=algo, algorithm=find_algorithm(algo).preset)
