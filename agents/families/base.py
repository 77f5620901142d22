"""Families of vision-language models: their differences, and the loading of their processors."""

from __future__ import annotations

import functools
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    is_torchvision_available,
)

from vlmenv.agents.families.chat import ChatTemplate, check_switches
from vlmenv.agents.families.layers import layer_kinds
from vlmenv.agents.sending import send
from vlmenv.core.coordinates import CoordinateSpace, ResizeRule
from vlmenv.core.errors import ConfigError, ModelError
from vlmenv.core.files import parse_json
from vlmenv.core.pixels import PixelLimits
from vlmenv.core.rollout import IMAGE_MARK, Observation, Pictured, Prompt
from vlmenv.core.spaces import Image, blank_image
from vlmenv.core.video import Video


@dataclass(frozen=True)
class Processor:
    """The parts of a published processor for images and text."""

    tokenizer: PreTrainedTokenizerBase
    image_processor: Any
    chat_template: str
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """values of the template's own variables, as `enable_thinking`"""
    video_settings: Mapping[str, Any] = field(default_factory=dict)
    """settings of the video processor, as stored; empty: those of the image processor hold"""

    @classmethod
    def from_pretrained(cls, folder: Path, chat_template_kwargs: Mapping[str, Any] | None = None) -> Processor:
        """Loads the parts of a processor. Needs no torchvision.

        A whole processor needs its video processor, which needs torchvision, and for some families other packages too.

        Raises:
            ConfigError: The chat template never reads one of `chat_template_kwargs`.
            ModelError: The folder lacks the tokenizer, the image processor or the chat template.
        """
        require_processor(folder)
        backend = None if is_torchvision_available() else "pil"
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            image_processor = AutoImageProcessor.from_pretrained(folder, backend=backend)
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{folder}: the processor cannot be loaded: {error}") from error
        template, switches = _chat_template(folder, tokenizer), dict(chat_template_kwargs or {})
        check_switches(switches, template, tokenizer)
        return cls(tokenizer, image_processor, template, switches, _video_settings(folder))


def require_processor(folder: Path) -> None:
    """Raises ModelError if a model's folder lacks files of a processor."""
    wanted = {
        "a tokenizer": ("tokenizer.json", "vocab.json"),
        "an image processor": ("preprocessor_config.json", "processor_config.json"),
    }
    for what, names in wanted.items():
        if not any((folder / name).is_file() for name in names):
            raise ModelError(
                f"{folder}: the model folder has no processor: {what} is missing ({' or '.join(names)}). "
                "Copy the processor's files from the published checkpoint."
            )


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it holds something else. Raises ModelError if it is not JSON."""
    try:
        content = parse_json(file.read_bytes())
    except ValueError as error:
        raise ModelError(f"{file}: not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _chat_template(folder: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """The processor's template. Without one, the tokenizer's own, unless that is for text alone."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if template:
                return str(template)
    if isinstance(tokenizer.chat_template, str) and "image" in tokenizer.chat_template:
        return tokenizer.chat_template
    raise ModelError(
        f"{folder}: the model folder has no chat template for images (chat_template.jinja or chat_template.json)"
    )


def _video_settings(folder: Path) -> dict[str, Any]:
    """The stored settings of a folder's video processor; empty if it has none."""
    if (folder / "video_preprocessor_config.json").is_file():
        return read_json(folder / "video_preprocessor_config.json")
    file = folder / "processor_config.json"
    found = read_json(file).get("video_processor") if file.is_file() else None
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class PromptReading:
    """A family's encoding of an observation, for display."""

    text: str
    """the chat-formatted prompt, with one image token in the place of each image"""
    tokens: int
    """number of tokens of the whole prompt, including those of images"""
    image_tokens: tuple[int, ...]
    """[images], image tokens of each image in reading order"""
    video_tokens: tuple[int, ...] = ()
    """[videos], video tokens of each video in reading order"""


_CONTROL = re.compile(r"<\|.*\|>")


class Family(ABC):
    """Encodes observations for one family of models, and lists the tokens that it must never sample.

    Raises:
        ModelError: A layer of the model is of a kind that its family does not have.
    """

    model_type: ClassVar[str]
    """`model_type` in the published `config.json`."""
    coordinates: ClassVar[CoordinateSpace]
    """The convention in which the published models write boxes."""
    packs_images: ClassVar[bool] = False
    """Whether the vision tower takes the patches of all images as one sequence, cut by `cu_seqlens`. Default: False."""

    takes_videos: ClassVar[bool] = False
    """Whether prompts may have videos: then the family has `process_video` and `expanded_video`. Default: False."""
    vllm_video_fault: ClassVar[str | None] = "how vLLM reads them has not been compared with the trainer"
    """Why the family's videos do not go through vLLM, to end a message; None: vLLM reads them as the trainer does."""

    sees_both_ways: frozenset[str] = frozenset()
    """The kinds of layers in which the tokens of an image attend to each other in both directions. Default: none."""
    layers: ClassVar[frozenset[str]] = frozenset({"full_attention"})
    """The kinds of layers that the language models have, as in `layer_types`. Default: full attention."""

    def __init__(self, model: PreTrainedModel, processor: Processor) -> None:
        self.model = model
        self.processor = processor
        for part in self.unused():
            part.requires_grad_(False)
        unknown = layer_kinds(model.config) - self.layers
        if unknown:
            raise ModelError(
                f"the language model has layers of {', '.join(sorted(unknown))}; models of type {self.model_type} are "
                f"known with {', '.join(sorted(self.layers))} alone"
            )

    @abstractmethod
    def process_images(self, images: tuple[Image, ...]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Prepares one or more images.

        Returns:
            The vision inputs, by the model's own argument names. Those of several prompts can be joined along their
            first axis. And for each image the text in the place of its mark, with one image token per feature.

        Raises:
            ValueError: The processor refuses an image.
        """

    def expanded(self, width: int, height: int) -> str:
        """The text in the place of an image of some size, as `process_images` gives it, without any pixel.

        Default: that of a blank image. Families compute it from the size.

        Raises:
            ValueError: The processor refuses images of this shape.
        """
        return self.process_images((np.array(blank_image(width, height)),))[1][0]

    def process_video(self, video: Video) -> dict[str, torch.Tensor]:
        """Prepares a video: its vision inputs, by the names that `process_images` has for those of images.

        Raises:
            ValueError: The processor refuses its frames.
        """
        raise NotImplementedError

    def expanded_video(self, video: Video) -> str:
        """The text in the place of a video's mark, with one video token per feature. Only sizes and times are read.

        Raises:
            ValueError: The processor refuses frames of this shape.
        """
        raise NotImplementedError

    def resized_frames(self, video: Video) -> NDArray[np.uint8]:
        """A video's frames [F, H, W, 3] at the size that the model sees.

        Raises:
            ValueError: The processor refuses frames of this shape.
        """
        raise NotImplementedError

    @property
    def video_mark(self) -> str | None:
        """The text of chat templates for a whole video. Default: None, the family takes no videos."""
        return None

    @classmethod
    def require_videos(cls) -> None:
        """Raises ModelError if the family takes no videos."""
        if not cls.takes_videos:
            raise ModelError(
                f"models of type {cls.model_type} are not trained on videos here: take Qwen2-VL, Qwen2.5-VL, Qwen3-VL "
                "or Qwen3.5, or a task of images with frames as 'images'"
            )

    @classmethod
    def require_videos_in_vllm(cls) -> None:
        """Raises ConfigError if vLLM would read the family's videos otherwise than the trainer."""
        if cls.vllm_video_fault is not None:
            raise ConfigError(
                f"videos of {cls.model_type} go with engine hf, the model itself: {cls.vllm_video_fault}, so that both "
                "would see another prompt"
            )

    def as_seen(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids for the model's pass, whose image tokens alone are replaced by features. Default: as they are."""
        return ids

    @classmethod
    def limited(cls, settings: Mapping[str, Any], limits: PixelLimits) -> dict[str, Any]:
        """An image processor's stored settings with other limits of pixels. Default: refused.

        Raises:
            ConfigError: The family has no such limits, or they contradict the processor's others.
        """
        raise ConfigError(f"models of type {cls.model_type} take no min_pixels and max_pixels{cls.sizing(settings)}")

    @classmethod
    def sizing(cls, settings: Mapping[str, Any]) -> str:
        """The family's own way to size images, to end a message. Default: empty."""
        return ""

    @classmethod
    def bound(cls, image_processor: Any) -> ResizeRule | None:
        """The rule for images that have more pixels than the model sees. Default: None, they are shown as they are."""
        return None

    @abstractmethod
    def modality_tokens(self) -> set[int]:
        """Ids of image and video features, and of the tokens that enclose them."""

    def language_model(self) -> nn.Module:
        """The text decoder, whose blocks are its `layers`; without the head. Default: `model.language_model`."""
        return self.model.get_submodule("model.language_model")

    def vision_tower(self) -> nn.Module:
        """The vision tower; it may contain the projectors. Default: `model.vision_tower`."""
        return self.model.get_submodule("model.vision_tower")

    def vision_blocks(self) -> nn.Module:
        """The list of the vision tower's blocks. Default: the tower's `encoder.layers`."""
        return self.vision_tower().get_submodule("encoder.layers")

    def projectors(self) -> list[nn.Module]:
        """What maps the vision tower's features into the language model. Default: `model.multi_modal_projector`."""
        return [self.model.get_submodule("model.multi_modal_projector")]

    def unused(self) -> list[nn.Module]:
        """Parts of the model that no pass runs, as a tower for sound. They stay as they are. Default: none."""
        return []

    @property
    def logit_cap(self) -> float | None:
        """The bound of the logits, as of `linear_logprobs`. Default: by the configuration; None without one."""
        cap = getattr(self.model.config.get_text_config(), "final_logit_softcapping", None)
        return None if cap is None else float(cap)

    @property
    def experts_per_token(self) -> int:
        """Number of experts that a token is sent to, in a mixture of experts."""
        return int(self.model.config.get_text_config().num_experts_per_tok)

    def sees_by_trained_weights(self) -> bool:
        """Whether training changes the features of images."""
        parts = [self.vision_tower(), *self.projectors()]
        return any(parameter.requires_grad for part in parts for parameter in part.parameters())

    def vision_inputs(self, images: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, Any]:
        """The arguments of the model's `get_image_features` for images that are on the host."""
        return {name: send(one, device) for name, one in images.items()}

    def join_images(self, holders: Sequence[Pictured]) -> dict[str, torch.Tensor]:
        """Joins the vision inputs of prompts and completions along their first axis; text alone adds nothing."""
        names = {name for one in holders for name in one.images}
        return {
            name: self.stack_images([one.images[name] for one in holders if name in one.images])
            for name in sorted(names)
        }

    def stack_images(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Joins one vision input of several prompts along its first axis."""
        return torch.cat(list(parts))

    def join_features(self, parts: list[Any]) -> Any:
        """Joins results of the model's `get_image_features` for several prompts, as if it had been called once."""
        found = [part.pooler_output for part in parts]
        if isinstance(found[0], torch.Tensor):
            return type(parts[0])(pooler_output=torch.cat(found))
        return type(parts[0])(pooler_output=tuple(one for images in found for one in images))

    def images_seen_both_ways(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """The number [T] of the image whose features attend to each other, for each token of a prompt; -1 for others.

        By default these are runs of image tokens, in families with `sees_both_ways`.
        """
        inside = (ids == self.model.config.image_token_id) & bool(self.sees_both_ways)
        starts = inside & ~np.concatenate([[False], inside[:-1]])
        return np.where(inside, starts.cumsum() - 1, -1)

    def unpacked_arguments(self, ids: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the model's own pass over padded token ids [N, T] needs besides features of images. Default: nothing."""
        return {}

    def positions(
        self, ids: NDArray[np.int64], images: Mapping[str, torch.Tensor], shown: Sequence[Image | Video] = ()
    ) -> NDArray[np.int64]:
        """Positions [axes, T] of a prompt's tokens [T]. Default: consecutive.

        Args:
            ids: The tokens.
            images: The vision inputs.
            shown: Images and videos in reading order.
        """
        return np.arange(len(ids))[None]

    def encode(self, observation: Observation) -> Prompt:
        """Turns an observation into model inputs.

        Raises:
            ValueError: As for `chat`, or the processor refuses an image or a video.
        """
        return self._encoded_chat(self.chat(observation), observation["images"], observation.get("videos", ()))

    def encode_turn(self, observation: Observation) -> Prompt:
        """Encodes what follows the last assistant turn of a conversation, from the end of that turn on.

        It may begin with the token that ends the turn. Positions count from 0.

        Args:
            observation: A conversation whose prompt follows an assistant turn.

        Raises:
            ValueError: As for `encode`.
        """
        self._refuse_control_tokens(observation["prompt"], bool(observation["images"]), "the turn's own text")
        chat, images = self.chat_template.after_answer(observation), observation["images"]
        return self._encoded_chat(chat, images[len(images) - chat.count(self.image_mark) :])

    def _encoded_chat(self, chat: str, images: tuple[Image, ...], videos: tuple[Video, ...] = ()) -> Prompt:
        """Encodes text in the model's format, with a mark in the place of each image and video."""
        marks = [self.image_mark, *([self.video_mark] if videos and self.video_mark else [])]
        first, *rest = re.split(f"({'|'.join(map(re.escape, marks))})", chat)
        left: dict[str | None, Iterator[Image | Video]] = {self.image_mark: iter(images), self.video_mark: iter(videos)}
        shown = [next(left[mark]) for mark in rest[::2]]
        inputs, expanded = self.process_shown(shown) if shown else ({}, [])
        text = first + "".join(mark + text for mark, text in zip(expanded, rest[1::2], strict=True))
        ids = np.array(self._encoded(text), dtype=np.int64)
        bare = chat.replace(self.video_mark, self.video_token) if videos and self.video_mark else chat
        marked = np.array(self._encoded(bare), dtype=np.int64) if shown else None
        return Prompt(ids, self.positions(ids, inputs, shown), inputs, marked)

    def process_shown(self, shown: Sequence[Image | Video]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """As `process_images`, for images and videos in reading order.

        Raises:
            ValueError: The processor refuses one.
        """
        images = tuple(one for one in shown if not isinstance(one, Video))
        if len(images) == len(shown):
            return self.process_images(images)
        parts = [
            (self.process_video(one), [self.expanded_video(one)])
            if isinstance(one, Video)
            else self.process_images((one,))
            for one in shown
        ]
        inputs = {name: self.stack_images([part[name] for part, _ in parts]) for name in parts[0][0]}
        return inputs, [text for _, texts in parts for text in texts]

    def lengths(self, observations: Sequence[Observation]) -> list[int | ValueError]:
        """The number of tokens that `encode` makes of each observation, or the reason why it cannot.

        Of images only the sizes are looked at.
        """
        found, chats = list[int | ValueError](), list[str]()
        mark = len(self._encoded(self.spaced_mark))
        for observation in observations:
            try:
                chat, images = self.chat(observation), [image.shape[1::-1] for image in observation["images"]]
                for video in observation.get("videos", ()):
                    chat = chat.replace(self.video_mark or "", self.expanded_video(video), 1)
                found.append(sum(self.image_lengths(images)) - len(images) * mark)
                chats.append(chat.replace(self.image_mark, self.spaced_mark) if images else chat)
            except ValueError as error:
                found.append(error)
        texts = iter(self._text_lengths(chats))
        return [one if isinstance(one, ValueError) else one + next(texts) for one in found]

    def _text_lengths(self, texts: list[str]) -> list[int]:
        """The tokens of several texts, by all of the tokenizer's threads where it has any."""
        backend = getattr(self.processor.tokenizer, "backend_tokenizer", None)
        self._encoded("")  # which takes stored truncation and padding out
        if backend is None:
            return [len(self._encoded(text)) for text in texts]
        return [len(one.ids) for one in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def _encoded(self, text: str) -> list[int]:
        ids: list[int] = self.processor.tokenizer.encode(text, add_special_tokens=False)
        return ids

    @property
    def spaced_mark(self) -> str:
        """An image's mark with the text that `expanded` puts around it, whose tokens may join the text beside it.

        Default: the mark alone.
        """
        return self.image_mark

    def image_lengths(self, sizes: Sequence[tuple[int, int]]) -> list[int]:
        """The tokens of each image of a prompt, from their widths and heights.

        Default: those of `expanded`. Families override it where the number of images matters.

        Raises:
            ValueError: The processor refuses images of this shape.
        """
        return [self._image_length(*size) for size in sizes]

    @cached_property
    def _image_length(self) -> Callable[[int, int], int]:
        """Counts the tokens of an image by its width and height."""
        return functools.lru_cache(1 << 16)(lambda width, height: len(self._encoded(self.expanded(width, height))))

    def read(self, observation: Observation) -> PromptReading:
        """The input of a model for an observation, as text and numbers.

        Raises:
            ValueError: As for `encode`.
        """
        text, images = self.chat(observation), observation["images"]
        expanded = self.process_images(images)[1] if images else []
        counts = tuple(mark.count(self.image_token) for mark in expanded)
        videos = tuple(self.expanded_video(video).count(self.video_token) for video in observation.get("videos", ()))
        return PromptReading(text, len(self.encode(observation).input_ids), counts, videos)

    @cached_property
    def image_token(self) -> str:
        """The token of one image feature."""
        token = self.processor.tokenizer.convert_ids_to_tokens(self.model.config.image_token_id)
        assert isinstance(token, str)
        return token

    @cached_property
    def video_token(self) -> str:
        """The token of one feature of a video, in families that take videos."""
        token = self.processor.tokenizer.convert_ids_to_tokens(self.model.config.video_token_id)
        assert isinstance(token, str)
        return token

    @property
    def image_mark(self) -> str:
        """The token that chat templates write for a whole image. Default: that of one feature."""
        return self.image_token

    def token_ids(self, *tokens: str) -> set[int]:
        """Ids of the tokenizer's added tokens with these names.

        Raises:
            ModelError: It lacks one.
        """
        known = self.processor.tokenizer.added_tokens_encoder
        missing = [token for token in tokens if token not in known]
        if missing:
            raise ModelError(f"the tokenizer lacks {', '.join(missing)}, which models of type {self.model_type} need")
        return {known[token] for token in tokens}

    @cached_property
    def end_tokens(self) -> tuple[int, ...]:
        """Ids that end a completion."""
        configured = getattr(self.model.generation_config, "eos_token_id", None)
        named = configured if isinstance(configured, list) else [configured]
        ends = {int(token) for token in (*named, self.processor.tokenizer.eos_token_id) if token is not None}
        if not ends:
            raise ModelError("neither the generation configuration nor the tokenizer names an end token")
        return tuple(sorted(ends))

    @cached_property
    def control_tokens(self) -> set[int]:
        """Ids of a chat's control tokens: special tokens, and others of the form <|…|>, such as <|fim_prefix|>."""
        added = self.processor.tokenizer.added_tokens_decoder
        return {i for i, token in added.items() if token.special or _CONTROL.fullmatch(token.content)}

    @cached_property
    def banned_tokens(self) -> NDArray[np.int64]:
        """Ids that are never sampled: modality and control tokens, and rows of the head without a token.

        A sampled image token would have no features in the next forward pass; a padded row of the
        head has no text.
        """
        tokenizer = self.processor.tokenizer
        head = self.model.get_output_embeddings()
        assert head is not None
        rows = set(range(head.weight.shape[0]))  # a tokenizer may have yet more tokens, such as InternVL's <video>
        unused = rows - set(range(len(tokenizer)))
        banned = (self.control_tokens | self.modality_tokens() | unused) - set(self.end_tokens)
        return np.array(sorted(banned & rows), dtype=np.int64)

    @cached_property
    def opening(self) -> str:
        """The open <think> at the end of a thinking model's prompt, written by its chat template; otherwise empty."""
        chat = self.chat({"images": (), "prompt": "?"})
        start = chat.rfind("<think>")
        return chat[start:] if start >= 0 and "</think>" not in chat[start:] else ""

    def decode(self, token_ids: NDArray[np.int64]) -> str:
        """A completion's text, without control tokens, with the thought that the prompt opened for it."""
        text = self.processor.tokenizer.decode(
            token_ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return self.opening + text

    def chat(self, observation: Observation) -> str:
        """The chat-formatted prompt, with one unexpanded mark per image, ready for the answer.

        Raises:
            ValueError: A turn's own text holds a control token, marks and images differ in number, or the chat
                template leaves out a turn or an image; so for videos.
            ModelError: There is a video, and the family takes none.
        """
        turns = observation.get("turns", ())
        if observation.get("videos"):
            self.require_videos()
        for number, turn in enumerate(turns, 1):
            marked = bool(observation["images"]) and turn["role"] != "assistant"
            self._refuse_control_tokens(turn["text"], marked, f"the text of turn {number} ({turn['role']})")
        self._refuse_control_tokens(observation["prompt"], bool(observation["images"]), "the prompt's own text")
        return self.chat_template.render(observation)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The chat template that writes observations in the model's format."""
        processor = self.processor
        return ChatTemplate(
            processor.tokenizer,
            processor.chat_template,
            self.image_mark,
            processor.chat_template_kwargs,
            self.video_mark,
        )

    def require_system_turns(self) -> None:
        """Raises ModelError if the chat template leaves system turns out."""
        if "system" not in self.chat_template.forms:
            raise ModelError(
                "the model's chat template has no system turn: leave out system_prompt, and put its text into "
                "prompt_template"
            )

    def _refuse_control_tokens(self, text: str, marked: bool, name: str) -> None:
        tokenizer, control = self.processor.tokenizer, self._forbidden
        if not self._forbidden_text.search(text):
            return
        pieces = text.split(IMAGE_MARK) if marked else [text]
        found = {token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)}
        if forbidden := control & found:
            names = ", ".join(map(str, tokenizer.convert_ids_to_tokens(sorted(forbidden))))
            raise ValueError(
                f"{name} must not contain control tokens: {names}; take them out of the row, or of the prompt template"
            )

    @cached_property
    def _forbidden(self) -> set[int]:
        return self.control_tokens | self.modality_tokens()

    @cached_property
    def _forbidden_text(self) -> re.Pattern[str]:
        """Finds what may be a control token: tokenizers look for these as they are written."""
        names = self.processor.tokenizer.convert_ids_to_tokens(sorted(self._forbidden))
        return re.compile("|".join(re.escape(name) for name in names if name), re.IGNORECASE)
