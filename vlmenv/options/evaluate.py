"""Options of the commands in which a model answers and learns nothing: `vlmenv eval` and `vlmenv sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from vlmenv.core.errors import ConfigError, require
from vlmenv.options.task import TaskConfig


@dataclass(frozen=True)
class AnswerConfig(TaskConfig):
    """Answer a data set with a model."""

    config: Path | None = None
    """YAML file of options. The command line wins."""
    eval_limit: int | None = None
    """Largest number of samples to answer, from the first one. None: all of a data set, 512 built-in ones."""
    batch_size: int = 64
    """Completions generated at a time."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """Data type in which the model is loaded and computes, also by vLLM in the same process. Servers have their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.eval_limit is None or self.eval_limit >= 1, f"eval_limit must be at least 1, not {self.eval_limit}"
        )
        require(self.batch_size >= 1, f"batch_size must be at least 1, not {self.batch_size}")


@dataclass(frozen=True)
class EvalConfig(AnswerConfig):
    """Measure how well a model answers."""

    samples: int | None = None
    """Number of sampled completions per question, at `temperature`. None: one greedy completion."""
    output: Path | None = None
    """Folder for metrics.json and answers.jsonl. None: nothing is written."""
    visual_dependence: bool = False
    """Measure with images masked, shuffled among samples and blank too: how much the model looks at them."""
    mask_share: float = 0.6
    """Share of an image's patches that visual_dependence masks."""
    suite: Literal["vlm_r1", "pebr_r1"] | None = None
    """Paper whose data sets are measured, if they are in the folders of `suite_data`."""
    suite_data: tuple[Path, ...] | None = None
    """Folders of the suite's data sets; docs/suites.md lists their names."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.samples is None or self.samples >= 1, f"samples must be at least 1, not {self.samples}")
        if self.samples is not None and self.sampling.temperature <= 0:
            raise ConfigError(
                f"temperature must be above 0, not {self.sampling.temperature}: sampled answers would all be alike"
            )
        require(0 < self.mask_share <= 1, f"mask_share must be a share above 0, not {self.mask_share}")
        if not self.visual_dependence and self.mask_share != type(self).mask_share:
            raise ConfigError("mask_share goes with visual_dependence")
        if self.visual_dependence and self.suite is not None:
            raise ConfigError("visual_dependence is for a single data set: leave out suite")
        if self.suite is None and self.suite_data is not None:
            raise ConfigError("suite_data goes with a suite; a data set of your own is given as dataset")


@dataclass(frozen=True)
class SampleConfig(AnswerConfig):
    """Answer every question several times, and divide the data set by the share of right answers."""

    recipe: str | None = None
    """Published recipe to take options from, such as pebr_r1_sampling."""
    n: int = 8
    """Number of sampled completions per question. All right: easy; none right: hard; otherwise medium."""
    measure: str | None = None
    """Measure that tells if an answer is right, one of those in answers.jsonl of `vlmenv eval`. None: the task's own
    choice, which is accuracy, or the overlap of boxes."""
    threshold: float | None = None
    """Least value of the measure for a right answer. None: the task's own, which is 1, and 0.5 for boxes."""
    part_size: int = 64
    """Samples after which results are written. An interrupted run continues with the missing parts."""
    output: Path | None = None
    """Folder for the files. The same command with the same folder continues where it was interrupted."""
    data_changed: bool = False
    """Answer samples anew whose rows have changed since they were answered."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("n", "part_size"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}")
        if self.sampling.temperature == 0:
            raise ConfigError("temperature must be above 0: sampled answers would all be alike")
        if self.threshold is None and self.measure is not None:
            raise ConfigError("measure goes with threshold: from what value on is an answer right?")
