"""How completions are sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vlmenv.core.errors import require


@dataclass(frozen=True)
class Sampling:
    """Sampling of completions."""

    temperature: float = 1.0
    """Sampling temperature, which divides the logits. 0 takes the most likely token."""
    max_new_tokens: int = 160
    """Length limit of a completion in tokens, its end token included."""
    top_k: int | None = None
    """Number of most likely tokens to sample among. None: all tokens."""
    top_p: float = 1.0
    """Probability mass to sample within: the fewest most likely tokens that reach it."""
    stop: tuple[str, ...] = ()
    """Texts that end a completion. They stay part of it."""

    def __post_init__(self) -> None:
        require(0 <= self.temperature < math.inf, f"temperature must be a number from 0 up, not {self.temperature}")
        require(self.max_new_tokens >= 1, f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        require(self.top_k is None or self.top_k >= 1, f"top_k must be at least 1, not {self.top_k}")
        require(0 < self.top_p <= 1, f"top_p must be above 0 and at most 1, not {self.top_p}")
        require(all(self.stop), "a stop text must not be empty")

    @property
    def cuts_tail(self) -> bool:
        """True if unlikely tokens are left out."""
        return self.top_k is not None or self.top_p < 1
