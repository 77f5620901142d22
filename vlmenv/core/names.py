"""Names with a meaning of their own."""

from __future__ import annotations

from typing import Final

BUILTIN: Final = "builtin"
"""The model that comes with the package."""
