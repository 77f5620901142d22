"""`vlmenv answer`: asks a model about one's own pictures, without any truth, and draws the places that it answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import torch
from PIL import Image as PILImage
from rich.console import Console

from vlmenv.agents.families import image_bound
from vlmenv.agents.pixels import prepared_folder
from vlmenv.agents.vlm import VLMAgent
from vlmenv.building import DTYPES, check_device, load_agent, task_arguments
from vlmenv.core.answers import parse_detections, parse_places
from vlmenv.core.console import open_console, say, styled
from vlmenv.core.coordinates import ResizeRule
from vlmenv.core.errors import ConfigError, DataError, PromptError
from vlmenv.core.loading import import_modules
from vlmenv.core.names import SHIPPED
from vlmenv.core.rollout import IMAGE_MARK
from vlmenv.core.sampling import Sampling
from vlmenv.envs.base import VisualTaskEnv
from vlmenv.envs.data.images import load_image
from vlmenv.envs.data.source import Sample, Source
from vlmenv.envs.episodes import Episode, follow
from vlmenv.envs.geometry import Geometry, places
from vlmenv.envs.making import make_envs
from vlmenv.envs.rewards.terms import RewardTerm
from vlmenv.options.answer import AskConfig
from vlmenv.options.files import read_options
from vlmenv.options.parsing import parse_plain
from vlmenv.options.resolve import RECORD
from vlmenv.options.task import PromptOptions, TaskConfig
from vlmenv.runs.models import with_checkpoint

_ASKED: Final = ("prompt_template", "system_prompt", "answer_format", "coordinates", "chat_template_kwargs")
"""Options of a run that say how its model was asked."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A model's answer about pictures."""

    text: str
    """the completion; in a task of several turns the last one"""
    prediction: Any
    """what the task reads in it; None if it cannot be read"""
    picture: Path | None
    """the file with the places that it names; None if it names none"""


def parse(args: Sequence[str], program: str) -> AskConfig:
    """The options of a command line."""
    config: AskConfig = parse_plain(args, AskConfig(()), program)
    import_modules(config.imports)
    return config


def run(config: AskConfig) -> list[Answer]:
    """Asks the model, prints its answers, and writes the pictures."""
    _check(config)
    console = open_console()
    task_config = with_checkpoint(_as_asked_in_training(config, console), console)
    bound = image_bound(prepared_folder(task_config.model, task_config.pixels))
    pictures = OwnPictures(config.images, bound)
    task = _task(task_config, pictures, is_plain=not task_config.env)
    device = torch.device("cuda" if config.device != "cpu" and torch.cuda.is_available() else "cpu")
    with closing(load_agent(task_config, device, DTYPES[config.weights])) as agent:
        agent.seed(config.seed)
        return [
            answer
            for number, prompt in enumerate(_prompts(config, console), 1)
            for answer in _answers(config, prompt, number, task, pictures, agent, console)
        ]


def _check(config: AskConfig) -> None:
    """Raises ConfigError for what is missing, before a model is loaded."""
    check_device(config.device)
    if not config.images:
        raise ConfigError("name a picture, as in vlmenv answer photo.jpg --prompt 'the red cup'")
    if config.prompt is None and not config.interactive:
        raise ConfigError("give --prompt, or --interactive to be asked for prompts")
    if config.output is None:
        return
    if config.output.exists() and not config.output.is_dir():
        raise ConfigError(f"output {config.output} is no folder")
    names = [image.name for image in config.images]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ConfigError(f"several pictures have the name {twice[0]}: leave out --output, or ask one by one")


def _as_asked_in_training(config: AskConfig, console: Console) -> TaskConfig:
    """The options of the task that the model is asked by; `env` is empty if the prompt is sent as it is."""
    options = {} if config.plain else _run_options(Path(config.model))
    env = config.env or options.get("env") or ("VLM-REC-v0" if config.model in SHIPPED and not config.plain else "")
    same = not config.plain and options.get("env") == env
    prompts = {name: options[name] for name in _ASKED if same and options.get(name) is not None}
    if config.coordinates != "auto":
        prompts["coordinates"] = config.coordinates
    pixels = {name: options.get(name) for name in ("min_pixels", "max_pixels")}
    if env:
        whose = f" as in {config.model}" if same else ""
        say(f"asked by the prompt of {env}{whose}; --plain sends a prompt as it is", console)
    return TaskConfig(
        env=str(env),
        model=config.model,
        imports=config.imports,
        device=config.device,
        seed=config.seed,
        prompts=PromptOptions(**prompts),
        pixels=config.pixels if config.pixels.given else replace(config.pixels, **pixels),
        sampling=Sampling(temperature=config.temperature, max_new_tokens=config.max_new_tokens),
    )


def _run_options(model: Path) -> Mapping[str, Any]:
    """The resolved options of the run that a model's folder is or belongs to; empty for other models."""
    for folder in (model, model.parent, model.parent.parent):
        if (folder / "config.yaml").is_file() and (folder / "resolved.yaml").is_file():
            options = read_options(folder / "resolved.yaml")
            record = options.pop(RECORD, None)
            if record is not None:
                import_modules([str(name) for name in options.get("import") or ()])
                return options
    return {}


class OwnPictures(Source):
    """Pictures without any truth.

    Args:
        files: Image files.
        bound: Rule for images with more pixels than the model sees.

    Attributes:
        question: The question to all of them.

    Raises:
        DataError: A file cannot be read as an image.
    """

    def __init__(self, files: Sequence[Path], bound: ResizeRule | None) -> None:
        self.question = ""
        self._loaded = [load_image(str(file), "answer", bound) for file in files]
        self._together = False

    @property
    def size(self) -> int:  # type: ignore[override]
        """Number of samples: one for each picture, or one with all."""
        return 1 if self._together else len(self._loaded)

    def ask(self, question: str) -> None:
        """Sets the question. With marks in it all pictures belong to one sample.

        Raises:
            ConfigError: It has another number of marks than there are pictures.
        """
        count = question.count(IMAGE_MARK)
        if count not in (0, len(self._loaded)):
            raise ConfigError(f"the prompt has {count} marks {IMAGE_MARK}, but there are {len(self._loaded)} pictures")
        self.question, self._together = question, count > 0

    def get(self, index: int) -> Sample:
        shown = self._loaded if self._together else [self._loaded[index]]
        images, sizes = (tuple(part) for part in zip(*shown, strict=True))
        return Sample(f"picture {index + 1}", images, self.question, None, sizes=sizes)


def _read_places(content: str) -> Any:
    """Labelled boxes, boxes or points in any text; None if there are none."""
    found = parse_detections(content)
    for size in (4, 2):
        found = found or parse_places(content, size)  # type: ignore[assignment]
    return found or None


def _any_text(text: str, target: Any) -> float:
    """The term of answers that are not scored."""
    return 0.0


class PlainEnv(VisualTaskEnv):
    """A task for prompts as they are: no truth, no score, and places wherever they stand in an answer."""

    terms: ClassVar[Mapping[str, RewardTerm]] = {"none": _any_text}
    default_rewards: ClassVar[Mapping[str, float]] = {"none": 1.0}
    prompt_template: ClassVar[str] = "{question}"
    geometry: ClassVar[Geometry | None] = Geometry("[x1,y1,x2,y2]", "places", _read_places, str)

    def parse(self, text: str) -> Any:
        return _read_places(self.answer_format.extract(text) or text)


def _task(config: TaskConfig, pictures: OwnPictures, *, is_plain: bool) -> VisualTaskEnv:
    arguments = task_arguments(config)
    if is_plain:
        return PlainEnv(dataset=pictures, **arguments)
    return make_envs(config.env, 1, dataset=pictures, **arguments).task


def _prompts(config: AskConfig, console: Console) -> Iterator[str]:
    """The prompt of the options and, if they are to be asked for, further ones until an empty line."""
    if config.prompt is not None:
        yield config.prompt
    while config.interactive:
        try:
            prompt = console.input(styled("prompt (empty to end): ")).strip()
        except EOFError:
            return
        if not prompt:
            return
        yield prompt


def _answers(
    config: AskConfig,
    prompt: str,
    number: int,
    task: VisualTaskEnv,
    pictures: OwnPictures,
    agent: VLMAgent,
    console: Console,
) -> Iterator[Answer]:
    """The answers to one prompt, printed, with their pictures."""
    try:
        pictures.ask(prompt)
    except ConfigError as error:
        if not config.interactive:
            raise
        say(f"error: {error}", console)
        return
    for index in range(pictures.size):
        sample = pictures.get(index)
        texts = _completions(config, task, sample, agent)
        text, file = texts[-1], config.images[index]
        prediction = task.parse(text)
        console.rule(
            styled(file.name if pictures.size > 1 or len(config.images) == 1 else "all pictures"), align="left"
        )
        for one in texts:
            console.print(styled(one), soft_wrap=True)
        picture = None
        if task.geometry is not None and any(places(prediction)):
            picture = _picture_file(config, file, number)
            picture.parent.mkdir(parents=True, exist_ok=True)
            PILImage.fromarray(np.asarray(task.draw(sample, prediction))).save(picture)
            say(f"the places that it names are drawn in {picture}", console)
        elif task.geometry is not None:
            say("it names no place that can be read", console)
        yield Answer(text, prediction, picture)


def _completions(config: AskConfig, task: VisualTaskEnv, sample: Sample, agent: VLMAgent) -> list[str]:
    """The model's answers in each turn of an episode.

    Raises:
        DataError: The model cannot take the prompt, or a later turn.
    """
    episode, greedy = Episode(sample, task.observe(sample)), config.temperature == 0
    try:
        rollout = agent.rollout([episode.observation], greedy=greedy)
        while follow(task, episode, rollout.texts[0]):
            rollout = agent.proceed(rollout, [episode.observation], greedy=greedy)
        return episode.texts
    except PromptError as error:
        raise DataError(f"{sample.id}: {error.reason}") from error


def _picture_file(config: AskConfig, image: Path, number: int) -> Path:
    """The file for an answer's picture: that of the first prompt has no number."""
    folder = config.output or image.parent
    return folder / (f"{image.name}.answer.png" if number == 1 else f"{image.name}.answer-{number}.png")
