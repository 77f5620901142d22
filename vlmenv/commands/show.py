"""`vlmenv data show`: shows a sample as a model sees it, to the last token."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing

from PIL import Image

from vlmenv.agents.families import weightless_family
from vlmenv.agents.pixels import prepared_folder
from vlmenv.building import task_arguments
from vlmenv.core.console import open_console, say
from vlmenv.core.errors import ConfigError
from vlmenv.core.loading import import_modules
from vlmenv.envs.making import make_envs
from vlmenv.options.data import DataShowConfig
from vlmenv.options.parsing import parse_plain
from vlmenv.options.task import TaskConfig
from vlmenv.runs.models import checkpoint_name
from vlmenv.showing import ShownSample, show_sample


def parse(args: Sequence[str], program: str) -> DataShowConfig:
    """The options of a command line."""
    config: DataShowConfig = parse_plain(args, DataShowConfig(dataset=()), program)
    import_modules(config.imports)
    return config


def run(config: DataShowConfig) -> ShownSample:
    """Prints the rendered prompt with its image places, and writes the picture with the truth beside."""
    model = checkpoint_name(config.model)
    family = weightless_family(prepared_folder(model, config.pixels), config.prompts.template_switches())
    task = TaskConfig(env=config.env, model=model, prompts=config.prompts, pixels=config.pixels)
    dataset = list(config.dataset) or None
    arguments = config.data.reading_arguments() | task_arguments(task)
    with closing(make_envs(config.env, 1, dataset=dataset, **arguments)) as envs:
        shown = show_sample(envs.task, config.index, family)
    console = open_console()
    console.rule(f"sample {config.index}", align="left")
    say(f"id: {shown.id}", console)
    images = ", ".join(map(str, (*shown.prompt.image_tokens, *shown.prompt.video_tokens))) or "none"
    say(f"prompt: {shown.prompt.tokens} tokens, of which images: {images}", console)
    say(shown.prompt.text, console)
    console.rule("the right answer", align="left")
    say(shown.answer, console)
    if config.output.suffix.lower() != ".png":
        raise ConfigError(f"{config.output}: the picture is a .png file")
    Image.fromarray(shown.picture).save(config.output)
    say(f"the picture with the truth is {config.output}", console)
    return shown
