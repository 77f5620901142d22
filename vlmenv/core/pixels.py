"""Limits of the pixels at which a model sees an image."""

from __future__ import annotations

from dataclasses import dataclass

from vlmenv.core.errors import require


@dataclass(frozen=True)
class PixelLimits:
    """Size at which the model sees images."""

    min_pixels: int | None = None
    """Pixels, width times height, to which the model's processor enlarges smaller images. None: the processor's own."""
    max_pixels: int | None = None
    """Pixels, width times height, to which larger images are scaled down. Fewer pixels make shorter prompts. Saved
    models keep the limit. None: the processor's own."""

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name} must be at least 1, not {value}")
        least, most = self.min_pixels or 0, self.max_pixels
        require(most is None or least <= most, f"min_pixels={least} is above max_pixels={most}")

    @property
    def given(self) -> bool:
        """True if there is a limit."""
        return (self.min_pixels, self.max_pixels) != (None, None)
