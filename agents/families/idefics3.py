"""Idefics3 and SmolVLM: images enlarged and cut into rows and columns of crops, each behind a token for its place."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from vlmenv.agents.families.base import Family
from vlmenv.compat.transformers import resized
from vlmenv.core.coordinates import CoordinateSpace, ResizeRule
from vlmenv.core.spaces import Image

_PLACE = re.compile(r"<row_\d+_col_\d+>")


class Idefics3(Family):
    """Idefics3 (arXiv 2408.12637) and the first SmolVLM.

    No convention of coordinates is published. The models bring every image to the same longest side, so they cannot
    know its size in pixels. Thousandths do not depend on it.
    """

    model_type: ClassVar[str] = "idefics3"
    coordinates: ClassVar[CoordinateSpace] = CoordinateSpace.NORM1000

    def process_images(self, images: tuple[Image, ...]) -> tuple[dict[str, torch.Tensor], list[str]]:
        inputs = self.processor.image_processor(
            images=[list(images)], return_row_col_info=True, input_data_format="channels_last", return_tensors="pt"
        )
        # Each crop is passed as the only image of its own prompt: the model joins the axes of prompts and images
        # anyway, and no prompt needs padding to the number of crops of another. Crops have one size, without
        # padding, and so without a mask.
        crops = inputs["pixel_values"][0][:, None]
        features = self._features(crops.shape[3]) * self._features(crops.shape[4])
        grids = zip(inputs["rows"][0], inputs["cols"][0], strict=True)
        return {"pixel_values": crops}, [self._expanded(features, int(rows), int(columns)) for rows, columns in grids]

    def expanded(self, width: int, height: int) -> str:
        processor = self.processor.image_processor
        features = self._features(processor.max_image_size["longest_edge"]) ** 2
        size = resized(processor, width, height) if processor.do_resize else (width, height)
        return super().expanded(width, height) if size is None else self._expanded(features, *self._grid(*size))

    def _grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of crops of a resized image; 0 for one that is not cut.

        The processor's own count (`get_number_of_image_patches`) leaves a rounding out.
        """
        processor = self.processor.image_processor
        crop = processor.max_image_size["longest_edge"]
        if not processor.do_image_splitting:
            return 0, 0
        ratio = width / height
        if width >= height:
            columns = math.ceil(width / crop)
            rows = math.ceil(int(columns * crop / ratio) / crop)
        else:
            rows = math.ceil(height / crop)
            columns = math.ceil(int(rows * crop * ratio) / crop)
        return (0, 0) if rows == columns == 1 else (rows, columns)

    @classmethod
    def sizing(cls, settings: Mapping[str, Any]) -> str:
        longest, crop = (settings.get(name, {}).get("longest_edge") for name in ("size", "max_image_size"))
        return (
            f": they bring the longer side of every image to {longest} pixels, and cut it into crops of {crop}. Lower "
            "longest_edge of size in the model's preprocessor_config.json"
        )

    @classmethod
    def bound(cls, image_processor: Any) -> ResizeRule:
        """A square of the longer side, within which every shape keeps more pixels than the model sees."""
        return ResizeRule(1, 1, image_processor.size["longest_edge"] ** 2)

    def _features(self, pixels: int) -> int:
        """Features along a crop's side."""
        config = self.model.config
        return int(pixels // config.vision_config.patch_size // config.scale_factor)

    def _expanded(self, features: int, rows: int, columns: int) -> str:
        """The text of an image: its crops row by row, and then the whole image. An uncut image has only the latter."""

        def part(place: str) -> str:
            return f"<fake_token_around_image>{place}{self.image_token * features}"

        lines = ["".join(part(f"<row_{row + 1}_col_{col + 1}>") for col in range(columns)) for row in range(rows)]
        crops = "".join(f"{line}\n" for line in lines) + "\n" * bool(lines)
        return f"{crops}{part('<global-img>')}<fake_token_around_image>"

    def modality_tokens(self) -> set[int]:
        enclosing = self.token_ids("<fake_token_around_image>", "<global-img>")
        places = {i for token, i in self.processor.tokenizer.added_tokens_encoder.items() if _PLACE.fullmatch(token)}
        return {self.model.config.image_token_id} | enclosing | places

    def language_model(self) -> nn.Module:
        return self.model.get_submodule("model.text_model")

    def vision_tower(self) -> nn.Module:
        return self.model.get_submodule("model.vision_model")

    def projectors(self) -> list[nn.Module]:
        return [self.model.get_submodule("model.connector")]


class SmolVLM(Idefics3):
    """The second SmolVLM (arXiv 2504.05299), with the same inputs."""

    model_type: ClassVar[str] = "smolvlm"
