"""Credentials in URLs, which belong neither in records nor in messages."""

from __future__ import annotations

import os
import re
from typing import Final

from vlmenv.core.errors import ConfigError

MASK: Final = "***"
_PARTS: Final = re.compile(
    r"(?P<scheme>[^/?#]*://)?(?:(?P<user>[^/?#]*)@)?(?P<place>[^?#]*)(?:\?(?P<query>[^#]*))?(?s:.*)"
)
_whole: dict[str, str] = {}
"""URLs with credentials that this process was given, by their masked form"""


def masked(url: str) -> str:
    """A URL with *** in place of user and password, and of each value of the query."""
    found = _PARTS.fullmatch(url)
    if found is None or (found["user"] is None and not found["query"]):
        return url
    user = "" if found["user"] is None else f"{MASK}@"
    query = re.sub(r"[^&=]+(?=&|$)|(?<==)[^&]+", MASK, found["query"] or "")
    return f"{found['scheme'] or ''}{user}{found['place']}" + f"?{query}" * bool(query)


def hidden(url: str) -> str:
    """The masked form of a URL, for options and records. `revealed` gives the URL back to this process."""
    if (shown := masked(url)) != url:
        _whole[shown] = url
    return shown


def revealed(url: str, variable: str) -> str:
    """The URL of a masked form.

    Args:
        url: A masked URL, or one without credentials, which is given back.
        variable: Name of the environment variable that holds the whole URL if this process was not given it.

    Raises:
        ConfigError: The variable does not hold this URL.
    """
    if MASK not in url:
        return url
    whole = _whole.get(url) or os.environ.get(variable, "")
    if masked(whole) != url:
        raise ConfigError(f"{url} is recorded without its credentials: set {variable} to the whole URL")
    return whole


def is_server(name: str) -> bool:
    """Whether a name is the address of a server, not of a model."""
    return name.startswith(("http://", "https://", "unix:"))
