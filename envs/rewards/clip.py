"""Reward for descriptions: how near they are to the image, by a model of the CLIP kind."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from vlmenv.core.errors import ModelError
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.spaces import Image
from vlmenv.envs.rewards.terms import BatchTerm

BUILTIN: Final = "builtin"
"""The name of the small model that is shipped with the package. It knows the built-in scenes alone, and of them colours
and numbers well, kinds less so, and hardly any places."""
CEILING: Final = 0.4
"""The cosine that earns the whole reward."""

_LONGEST = 10_000  # characters of a description that are read; no model takes as many
_BATCH = 64  # texts or images that go through a tower at once
_REMEMBERED = 4096  # images whose embeddings are kept

Vector = NDArray[np.float32]


class ClipScore(BatchTerm):
    """min(1, max(0, s) / 0.4), with s the cosine of the embeddings of description and image.

    PeBR-R1 (arXiv 2509.13031). Only what a completion says about the image is scored; saying nothing
    scores 0, and so does a sample without an image. Of several images, s is the mean of their cosines.

    The model is loaded when it is first needed, once per process however many terms use it, and goes
    on the GPU where there is one.

    Args:
        model: `"builtin"`, a folder, or a name on the Hugging Face hub, of any model that transformers'
            `AutoModel` gives both image and text features: CLIP, SigLIP, SigLIP 2, AltCLIP and others.
    """

    name = "clip"

    def __init__(self, model: str = BUILTIN) -> None:
        self.model = model

    def load(self) -> None:
        """Loads the model now, so that what is wrong with it shows early.

        Raises:
            ModelError: There is no such model, or it is not of the CLIP kind.
        """
        _load(self.model)

    def batch(
        self,
        texts: Sequence[str],
        targets: Sequence[Any],
        images: Sequence[tuple[Image, ...]],
        answer_format: AnswerFormat,
    ) -> list[float]:
        """Scores N completions; the targets do not matter."""
        cosines = self.cosines([answer_format.description(text) for text in texts], images)
        return [min(1.0, max(0.0, cosine) / CEILING) for cosine in cosines]

    def cosines(self, descriptions: Sequence[str], images: Sequence[tuple[Image, ...]]) -> list[float]:
        """The CLIP scores themselves of N descriptions; 0 where there is no description or no image.

        Raises:
            ModelError: See `load`.
        """
        return _load(self.model).cosines([_readable(text) for text in descriptions], images)


class _Towers:
    """A model's text tower and image tower, with the embeddings of the latest images."""

    def __init__(self, name: str) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer

        source = str(files("vlmenv.envs.rewards") / "builtin_clip") if name == BUILTIN else name
        self._model = _load_weights(source)
        self._tokenizer = AutoTokenizer.from_pretrained(source)
        if not set(self._tokenizer("a red circle")["input_ids"]) - set(self._tokenizer.all_special_ids):
            raise ModelError("its tokenizer knows no words, which is what transformers makes of missing files")
        # Pillow's resizing is always there, so that scores do not depend on whether torchvision is.
        self._image_processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        # SigLIP was trained on texts filled up to the full length, the padding attended to.
        self._filled_up = self._model.config.model_type.startswith("siglip")
        self._max_tokens = min(self._tokenizer.model_max_length, _text_positions(self._model))
        self._cache: OrderedDict[bytes, Vector] = OrderedDict()
        self._lock = threading.Lock()  # the tokenizer's padding is state, as the cache is
        self.cosines(["shape " * _LONGEST], [(np.zeros((8, 8, 3), np.uint8),)])
        self._model.to("cuda" if torch.cuda.is_available() else "cpu")

    def cosines(self, texts: Sequence[str], images: Sequence[tuple[Image, ...]]) -> list[float]:
        rows = [bool(text and shown) for text, shown in zip(texts, images, strict=True)]
        with self._lock:
            by_text = self._embed_texts([text for text, scored in zip(texts, rows, strict=True) if scored])
            by_image = self._embed_images([image for i, scored in enumerate(rows) if scored for image in images[i]])
        return [
            float(np.mean([by_text[text] @ by_image[id(image)] for image in shown])) if scored else 0.0
            for text, shown, scored in zip(texts, images, rows, strict=True)
        ]

    def _embed_texts(self, texts: Sequence[str]) -> dict[str, Vector]:
        found: dict[str, Vector] = {}
        for chunk in _chunks(list(dict.fromkeys(texts))):
            inputs = self._tokenizer(
                chunk,
                padding="max_length" if self._filled_up else True,
                truncation=True,
                max_length=self._max_tokens,
                return_attention_mask=not self._filled_up,
                split_special_tokens=True,  # an end token that a completion spells out does not end it
                return_tensors="pt",
            )
            found |= zip(chunk, self._run(self._model.get_text_features, inputs), strict=True)
        return found

    def _embed_images(self, images: Sequence[Image]) -> dict[int, Vector]:
        """Embeddings by the arrays' ids, which spares hashing an array again for each of its completions."""
        keys = {i: _digest(image) for i, image in {id(image): image for image in images}.items()}
        distinct = {keys[id(image)]: image for image in images}
        found = {key: self._cache[key] for key in distinct if key in self._cache}
        for chunk in _chunks([key for key in distinct if key not in found]):
            pictures = [PILImage.fromarray(distinct[key]) for key in chunk]
            inputs = self._image_processor(images=pictures, return_tensors="pt")
            found |= zip(chunk, self._run(self._model.get_image_features, inputs), strict=True)
        self._remember(found)
        return {i: found[key] for i, key in keys.items()}

    def _remember(self, found: dict[bytes, Vector]) -> None:
        self._cache |= found
        for key in found:
            self._cache.move_to_end(key)
        while len(self._cache) > _REMEMBERED:
            self._cache.popitem(last=False)

    def _run(self, tower: Any, inputs: Any) -> Vector:
        """Embeddings [N, D] of unit length."""
        import torch

        with torch.inference_mode():
            features = tower(**inputs.to(self._model.device))
            features = getattr(features, "pooler_output", features)
            unit: Vector = torch.nn.functional.normalize(features.float(), dim=-1).cpu().numpy()
        return unit


_loaded: dict[str, _Towers] = {}
_loading = threading.Lock()


def _load(name: str) -> _Towers:
    with _loading:
        if name not in _loaded:
            try:
                _loaded[name] = _Towers(name)
            except Exception as error:  # whatever a model's own code may raise
                raise ModelError(
                    f"{name}: cannot be used to score descriptions: {error}\nGive 'builtin', or the folder or "
                    "hub name of a CLIP-like model with its tokenizer and image processor."
                ) from error
        return _loaded[name]


def _load_weights(source: str) -> Any:
    import torch
    from transformers import AutoModel

    loaded: Any = AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    if report["missing_keys"]:
        raise ModelError(f"{len(report['missing_keys'])} of its weights are missing")
    for tower in ("get_text_features", "get_image_features"):
        if not hasattr(model, tower):
            raise ModelError(f"{type(model).__name__} has no {tower}")
    return model.eval()


def _text_positions(model: Any) -> int:
    """The most tokens that the text tower has positions for."""
    positions: int = model.config.text_config.max_position_embeddings
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions -= module.padding_idx + 1  # RoBERTa's, as in AltCLIP, begin after the padding's
    return positions


def _readable(text: str) -> str:
    """A text that any tokenizer takes, cut to what models can read."""
    return text[:_LONGEST].encode("utf-8", "replace").decode().strip()


def _digest(image: Image) -> bytes:
    return hashlib.blake2b(repr(image.shape).encode() + image.tobytes(), digest_size=16).digest()


def _chunks(items: list[Any]) -> Iterator[list[Any]]:
    for start in range(0, len(items), _BATCH):
        yield items[start : start + _BATCH]
