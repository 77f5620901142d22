"""The published processor, which the doctor compares with a family's own encoding of prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from transformers import AutoProcessor, ProcessorMixin, is_torchvision_available

from vlmenv.agents.families.chat import ChatTemplate, Message
from vlmenv.compat.transformers import processor_without_videos
from vlmenv.core.errors import ConfigError, ModelError
from vlmenv.core.rollout import IMAGE_MARK, Observation


class PublishedProcessor:
    """A processor that transformers loads from a folder.

    Args:
        folder: Folder of a model, or of the processor's files with a `config.json`.
        chat_template_kwargs: Values of the chat template's own variables.

    Raises:
        ConfigError: The processor needs a package that is not installed.
        ModelError: The processor cannot be loaded.
    """

    def __init__(self, folder: Path, chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
        self._switches = dict(chat_template_kwargs or {})
        try:
            self._processor = AutoProcessor.from_pretrained(folder) if _whole() else processor_without_videos(folder)
        except ImportError as error:
            raise ConfigError(f"transformers cannot load the published processor here: {error}") from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{folder}: transformers cannot load the published processor: {error}") from error

    def read(self, observation: Observation) -> tuple[NDArray[np.int64], dict[str, torch.Tensor]]:
        """The tokens [T] of an observation, ready for the answer, and its vision inputs.

        Raises:
            ValueError: The processor's chat template has no place for a turn or an image.
        """
        processor: Any = self._processor
        template = ChatTemplate(
            processor.tokenizer,
            processor.chat_template,
            str(getattr(processor, "image_token", IMAGE_MARK)),
            self._switches,
        )
        images = (Image.fromarray(image) for image in observation["images"])
        # Of the common class: SmolVLM's own wants a video processor.
        inputs: Any = ProcessorMixin.apply_chat_template(
            processor,
            [_with_images(message, images) for message in template.conversation(observation)],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            **self._switches,
        )
        read = dict(inputs)
        return read.pop("input_ids")[0].numpy(), read


def _with_images(message: Message, images: Iterator[Image.Image]) -> Message:
    """A message whose image parts hold the next images."""
    if isinstance(message["content"], str):
        return message
    parts = [part | ({"image": next(images)} if part["type"] == "image" else {}) for part in message["content"]]
    return {**message, "content": parts}


def _whole() -> bool:
    """Whether processors of videos, which whole processors hold, can be loaded."""
    return bool(is_torchvision_available())
