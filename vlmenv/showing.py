"""What a model is shown of a sample: its prompt to the last token, and a picture with the truth."""

from __future__ import annotations

from dataclasses import dataclass

from vlmenv.agents.families import Family, PromptReading
from vlmenv.core.errors import DataError
from vlmenv.core.spaces import Image
from vlmenv.envs.base import VisualTaskEnv, check_index


@dataclass(frozen=True)
class ShownSample:
    """A sample as a model takes it in."""

    id: str
    prompt: PromptReading
    """the chat-formatted prompt with its token counts"""
    answer: str
    """the completion that answers it rightly: the row's own, or the task's"""
    picture: Image
    """uint8 [H, W, 3], with the true boxes where the task has any"""


def show_sample(task: VisualTaskEnv, index: int, family: Family) -> ShownSample:
    """What a model is shown of one sample.

    Args:
        task: With the options of a run (prompt template, system prompt, coordinates).
        index: Of the sample in the task's source.
        family: The model's; `weightless_family` suffices.

    Raises:
        ConfigError: There is no such sample.
        DataError: The sample cannot be read, or the model cannot take its prompt.
    """
    sample = task.source.get(check_index(index, task.source.size))
    try:
        prompt = family.read(task.observe(sample))
    except ValueError as error:
        raise DataError(f"sample {sample.id}: {error}") from error
    return ShownSample(sample.id, prompt, sample.response or task.write_answer(sample), task.draw(sample, None))
