"""Names with a meaning of their own."""

from __future__ import annotations

import re
from typing import Final

BUILTIN: Final = "builtin"
"""The model that comes with the package."""
BUILTIN_TASKS: Final = "builtin-tasks"
"""Its sibling, which has been taught more tasks."""
SHIPPED: Final = (BUILTIN, BUILTIN_TASKS)
"""All models that come with the package."""

_HUB_NAME: Final = re.compile(r"([\w-][\w.-]*/[\w-][\w.-]*)(?:@([\w./-]+))?", re.ASCII)


def hub_name(name: str) -> tuple[str, str | None] | None:
    """Splits `OWNER/NAME` or `OWNER/NAME@REVISION`, a name on the Hugging Face hub.

    Returns:
        The repository and its revision (a branch, a tag or a commit; None: its main branch). None for other names.
    """
    found = _HUB_NAME.fullmatch(name)
    return found and (found[1], found[2])
