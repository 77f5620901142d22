"""Options of `vlmenv data`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from vlmenv.core.errors import ConfigError, require
from vlmenv.core.names import BUILTIN
from vlmenv.core.pixels import PixelLimits
from vlmenv.options.task import DataOptions, PromptOptions, ReadingOptions


@dataclass(frozen=True)
class DataCheckConfig:
    """Check a data set: broken rows with their places, a summary, and the task's scores of its own right answers.

    Ends with status 1 if something is wrong.
    """

    dataset: tyro.conf.Positional[tuple[str, ...]]
    """Files, folders saved by `datasets`, or ids on the Hugging Face hub."""
    env: str = "VLM-REC-v0"
    """Environment that reads the data set."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own to import first, which register tasks."""
    decode: bool = False
    """Read every image too, and compare boxes with its size."""
    model: str | None = None
    """Model whose processor counts the tokens of every prompt, from texts and image headers: a shipped one, a folder,
    or a name on the Hugging Face hub. No weights are loaded. None: nothing is counted."""
    max_new_tokens: int = 160
    """Length of answers that prompts must leave room for, in tokens; goes with `model`."""
    engine_length: int | None = None
    """Length limit of prompt and completion together in the engine, in tokens; goes with `model`. None: the model's."""
    prompt_template: str | None = None
    """Prompt template as for `vlmenv train`."""
    system_prompt: str | None = None
    """System prompt as for `vlmenv train`."""
    chat_template_kwargs: dict[str, str] | None = None
    """Values of the chat template's variables, as for `vlmenv train`; goes with `model`."""
    write: Path | None = None
    """File for the good rows, in their own format: .jsonl for rows of JSON, or as the data set's."""
    data: ReadingOptions = field(default_factory=ReadingOptions)
    pixels: PixelLimits = field(default_factory=PixelLimits)

    def __post_init__(self) -> None:
        given = self.max_new_tokens != type(self).max_new_tokens or self.chat_template_kwargs is not None
        if self.model is None and (given or self.engine_length is not None or self.pixels.given):
            raise ConfigError(
                "max_new_tokens, engine_length, min_pixels, max_pixels and chat_template_kwargs go with model, whose "
                "processor they concern"
            )
        least = self.max_new_tokens
        require(
            self.engine_length is None or self.engine_length > least,
            f"engine_length must leave room for prompts: more than {least} tokens",
        )


@dataclass(frozen=True)
class DataConvertConfig:
    """Convert a data set of another layout into rows that the tasks read. Images stay where they are."""

    source: tyro.conf.Positional[Path]
    """Folder or file of annotations: VOC, YOLO, LabelMe, refer-style, CSV or TSV, or a folder with metadata."""
    target: tyro.conf.Positional[Path]
    """File to write (.jsonl). Its image paths are relative to its folder."""
    layout: str | None = None
    """Layout of the source: voc, yolo, labelme, refer, folder, csv or tsv. None: found by its files."""
    images: Path | None = None
    """Folder of the images. None: searched for beside the annotations."""
    split: str | None = None
    """Split to convert, if the source has several."""
    expressions: bool = False
    """Take labels as referring expressions: a row of VLM-REC-v0 for each box whose label its image has once."""
    skip_broken: bool = False
    """Leave broken rows out instead of ending with the first one."""


@dataclass(frozen=True)
class DataShowConfig:
    """Show a sample as a model sees it: the prompt after its chat template, and the picture with the truth."""

    dataset: tyro.conf.Positional[tuple[str, ...]] = ()
    """Files, folders saved by `datasets`, or ids on the Hugging Face hub. None given: the built-in samples."""
    index: int = 0
    """Number of the sample, from 0."""
    env: str = "VLM-REC-v0"
    """Environment that reads the data set."""
    model: str = BUILTIN
    """Model whose processor renders the prompt. No weights are loaded."""
    imports: Annotated[tuple[str, ...], tyro.conf.arg(name="import")] = ()
    """Modules of your own to import first, which register tasks and model families."""
    output: Path = Path("sample.png")
    """File for the picture with the true boxes (.png)."""
    data: ReadingOptions = field(default_factory=ReadingOptions)
    pixels: PixelLimits = field(default_factory=PixelLimits)
    prompts: PromptOptions = field(default_factory=PromptOptions)


@dataclass(frozen=True)
class DataExportConfig:
    """Write a task's samples and its rewards as files for another trainer. docs/adapters.md has more."""

    target: tyro.conf.Positional[Path]
    """File of rows to write: .parquet for verl and EasyR1, .jsonl for ms-swift, .yaml for lmms-eval. reward.py is
    written beside it."""
    to: Literal["verl", "easyr1", "swift", "lmms-eval"] = "verl"
    """Trainer that reads the files, or lmms-eval, which measures alone."""
    env: str = "VLM-REC-v0"
    """Environment; one of your own is named with its module, as in my_task:My-Task-v0."""
    rows: int | None = None
    """Number of rows. None: all of the data set."""
    seed: int = 0
    """Seed of the samples and their order."""
    model: str | None = None
    """Model that is to be trained, for its convention of coordinates and its sizes of images. No weights are loaded.
    None: coordinates are pixels of the stored image."""
    data: DataOptions = field(default_factory=DataOptions)
    prompts: PromptOptions = field(default_factory=PromptOptions)
    pixels: PixelLimits = field(default_factory=PixelLimits)

    def __post_init__(self) -> None:
        require(self.rows is None or self.rows >= 1, f"rows must be at least 1, not {self.rows}")
        require(self.seed >= 0, f"seed must be at least 0, not {self.seed}")
        if self.prompts.chat_template_kwargs is not None:
            raise ConfigError("chat_template_kwargs are the trainer's own option: it fills in the chat template")
        if self.model is None and (self.pixels.given or self.prompts.coordinates == "resized"):
            raise ConfigError("min_pixels, max_pixels and coordinates resized go with model, whose sizes they concern")
