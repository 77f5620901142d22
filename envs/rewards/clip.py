"""Reward for descriptions: their similarity to the image, by a CLIP-like model."""

from __future__ import annotations

import hashlib
import math
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from importlib.resources import files
from typing import Any, Final, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from vlmenv.core.errors import ConfigError, ModelError, unknown_name
from vlmenv.core.formats import AnswerFormat
from vlmenv.core.names import hub_name
from vlmenv.core.spaces import Image
from vlmenv.envs.rewards.fg_clip import is_fg_clip, load_fg_clip
from vlmenv.envs.rewards.terms import BatchTerm

BUILTIN: Final = "builtin"
"""The name of the small model that comes with the package. It knows only the built-in scenes: colours and numbers
well, kinds less so, and hardly any places."""
CEILING: Final = 0.4
"""The cosine that earns the whole reward."""

_LONGEST = 10_000  # characters of a description that are read; no model takes as many
_BATCH = 8
"""Batch size of texts or images. It is constant, because the last digits of a matrix product depend on its shape. A
score must not depend on the other inputs or the cache."""
_REMEMBERED = 4096  # images whose embeddings are kept

Vector = NDArray[np.float32]
ScoreName = Literal["cosine", "sigmoid"]


class ClipScore(BatchTerm):
    """min(1, max(0, s) / 0.4), with s the cosine of the embeddings of description and image.

    PeBR-R1 (arXiv 2509.13031). Only the description in a completion is scored. An empty one scores 0, and so does a
    sample without an image. With several images, s is the mean of their cosines.

    SigLIP's cosines stay far below 0.4, also for a good match. Its own score is the probability that image and text
    belong together (arXiv 2303.15343): the sigmoid of the scaled and shifted cosine. That is score "sigmoid".

    The model is loaded at its first use, once per process for all terms, on the GPU if there is one.

    Args:
        model: `"builtin"`, a folder, or a name on the Hugging Face hub, which may end with @REVISION. Any model
            works for which transformers' `AutoModel` gives image and text features: CLIP, SigLIP, SigLIP 2, AltCLIP
            and others. FG-CLIP runs with its embeddings of long texts.
        score: "cosine", or "sigmoid" for models of SigLIP's kind.
        remote_code: Permission to run the checkpoint's own code, which may do anything. FG-CLIP does not need it.
            Default: False.

    Raises:
        ConfigError: There is no such score.
    """

    name = "clip"

    def __init__(self, model: str = BUILTIN, score: ScoreName = "cosine", remote_code: bool = False) -> None:
        if score not in get_args(ScoreName):
            raise ConfigError(unknown_name("score", score, get_args(ScoreName)))
        self.model, self.score, self.remote_code = model, score, remote_code

    def load(self) -> None:
        """Loads the model now, so that its errors are raised early.

        Raises:
            ModelError: There is no such model, it is not of the CLIP kind, or has no score of this name.
        """
        if _load(self.model, self.remote_code).sigmoid is None and self.score == "sigmoid":
            raise ModelError(f"{self.model}: has no sigmoid score, as it was not trained for one; leave it out")

    def batch(
        self,
        texts: Sequence[str],
        targets: Sequence[Any],
        images: Sequence[tuple[Image, ...]],
        answer_format: AnswerFormat,
    ) -> list[float]:
        """Scores N completions; targets are not used."""
        descriptions = [answer_format.description(text) for text in texts]
        cosines = self.cosines(descriptions, images)
        if self.score == "cosine":
            return [min(1.0, max(0.0, cosine) / CEILING) for cosine in cosines]
        self.load()
        scale, shift = _load(self.model, self.remote_code).sigmoid or (0.0, 0.0)
        said = (bool(text and shown) for text, shown in zip(descriptions, images, strict=True))
        return [float(s) / (1 + math.exp(-scale * cosine - shift)) for s, cosine in zip(said, cosines, strict=True)]

    def cosines(self, descriptions: Sequence[str], images: Sequence[tuple[Image, ...]]) -> list[float]:
        """The CLIP scores themselves of N descriptions; 0 where there is no description or no image.

        Raises:
            ModelError: See `load`.
        """
        return _load(self.model, self.remote_code).cosines([_readable(text) for text in descriptions], images)


class _Towers:
    """A model's text tower and image tower, with the embeddings of the latest images.

    Attributes:
        sigmoid: Scale and shift of the cosine before a sigmoid; None where the model has no such score.
    """

    def __init__(self, name: str, remote_code: bool = False) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer

        source = _source(name)
        config = _stored_config(source)
        self._model = _load_weights(source, config, remote_code)
        self._tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=remote_code)
        if not set(self._tokenizer("a red circle")["input_ids"]) - set(self._tokenizer.all_special_ids):
            raise ModelError("its tokenizer knows no words, which is what transformers makes of missing files")
        # Pillow's resizing is always there, so that scores do not depend on whether torchvision is.
        processor = AutoImageProcessor.from_pretrained(source, backend="pil", trust_remote_code=remote_code)
        self._image_processor = processor
        # SigLIP was trained on texts filled up to the full length, the padding attended to.
        self._attends_padding = self._model.config.model_type.startswith("siglip")
        self._max_tokens = min(self._tokenizer.model_max_length, _text_positions(self._model))
        self._side: int | None = None
        if is_fg_clip(config):  # its tokenizer speaks of CLIP's length, and its images are squares, not cut-outs
            self._max_tokens, self._side = _text_positions(self._model), self._model.config.vision_config.image_size
        self.sigmoid = _sigmoid(self._model)
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
                _whole(chunk),
                padding="max_length",
                truncation=True,
                max_length=self._max_tokens,
                return_attention_mask=not self._attends_padding,
                split_special_tokens=True,  # an end token that a completion spells out does not end it
                return_tensors="pt",
            )
            found |= zip(chunk, self._run(self._model.get_text_features, inputs)[: len(chunk)], strict=True)
        return found

    def _embed_images(self, images: Sequence[Image]) -> dict[int, Vector]:
        """Embeddings by the arrays' ids, which spares hashing an array again for each of its completions."""
        keys = {i: _digest(image) for i, image in {id(image): image for image in images}.items()}
        distinct = {keys[id(image)]: image for image in images}
        found = {key: self._cache[key] for key in distinct if key in self._cache}
        for chunk in _chunks([key for key in distinct if key not in found]):
            pictures = [self._shaped(PILImage.fromarray(distinct[key])) for key in _whole(chunk)]
            inputs = self._image_processor(images=pictures, return_tensors="pt")
            found |= zip(chunk, self._run(self._model.get_image_features, inputs)[: len(chunk)], strict=True)
        self._remember(found)
        return {i: found[key] for i, key in keys.items()}

    def _shaped(self, picture: PILImage.Image) -> PILImage.Image:
        return picture if self._side is None else picture.resize((self._side, self._side))

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


_loaded: dict[tuple[str, bool], _Towers] = {}
_loading = threading.Lock()


def _load(name: str, remote_code: bool = False) -> _Towers:
    with _loading:
        if (name, remote_code) not in _loaded:
            try:
                _loaded[name, remote_code] = _Towers(name, remote_code)
            except Exception as error:  # whatever a model's own code may raise
                raise ModelError(
                    f"{name}: cannot be used to score descriptions: {error}\nGive 'builtin', or the folder or "
                    "hub name of a CLIP-like model with its tokenizer and image processor."
                ) from error
        return _loaded[name, remote_code]


def _stored_config(source: str) -> dict[str, Any]:
    """A checkpoint's configuration as it is stored."""
    from transformers import PretrainedConfig

    stored: dict[str, Any] = PretrainedConfig.get_config_dict(source)[0]
    return stored


def _load_weights(source: str, config: dict[str, Any], remote_code: bool) -> Any:
    model, report = load_fg_clip(source) if is_fg_clip(config) else _load_any(source, config, remote_code)
    if report["missing_keys"]:
        raise ModelError(f"{len(report['missing_keys'])} of its weights are missing")
    for tower in ("get_text_features", "get_image_features"):
        if not hasattr(model, tower):
            raise ModelError(f"{type(model).__name__} has no {tower}")
    return model.eval()


def _source(name: str) -> str:
    """The folder or the name on the hub that a model is loaded from; with a revision, the folder of that revision."""
    if name == BUILTIN:
        return str(files("vlmenv.envs.rewards") / "builtin_clip")
    repository, revision = hub_name(name) or (name, None)
    if revision is None:
        return name
    from huggingface_hub import snapshot_download

    return snapshot_download(repository, revision=revision)


def _load_any(source: str, config: dict[str, Any], remote_code: bool) -> Any:
    import torch
    from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM

    brought = config.get("auto_map") or {}
    if brought and not remote_code and config.get("model_type") not in CONFIG_MAPPING:
        raise ModelError(
            f"it is of the kind '{config.get('model_type')}', which needs code that the checkpoint brings; that is "
            "run only where remote_code (--clip-remote-code) allows it"
        )
    # FG-CLIP 2 and others name their class for another purpose than it has.
    known_as_causal = remote_code and "AutoModel" not in brought and "AutoModelForCausalLM" in brought
    kind: Any = AutoModelForCausalLM if known_as_causal else AutoModel
    return kind.from_pretrained(source, dtype=torch.float32, output_loading_info=True, trust_remote_code=remote_code)


def _sigmoid(model: Any) -> tuple[float, float] | None:
    """Scale and shift of the cosine before a sigmoid; None where the model has no shift, as it needs none."""
    if getattr(model, "logit_bias", None) is None:
        return None
    return math.exp(model.logit_scale.item()), model.logit_bias.item()


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


def _whole(chunk: list[Any]) -> list[Any]:
    """A chunk of the full size: its last item fills it up."""
    return chunk + chunk[-1:] * (_BATCH - len(chunk))
