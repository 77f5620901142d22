"""Credentials in URLs."""

from __future__ import annotations

import pytest

from vlmenv.core.errors import ConfigError
from vlmenv.core.urls import hidden, masked, revealed


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("http://localhost:8000/v1", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/@cf/x", "http://localhost:8000/v1/@cf/x"),
        ("https://user:pw@host:1/v1", "https://***@host:1/v1"),
        ("https://key@host/v1", "https://***@host/v1"),
        ("https://user:p@ss@host", "https://***@host"),
        ("user:pw@host/v1", "***@host/v1"),
        ("https://host/v1?key=abc&b=c=d&e=", "https://host/v1?key=***&b=***&e="),
        ("https://host/v1?abc", "https://host/v1?***"),
        ("https://u@host/v1?k=a@b#c", "https://***@host/v1?k=***"),
        ("http://[::1]:8000/v1", "http://[::1]:8000/v1"),
        ("", ""),
    ],
)
def test_credentials_are_masked(url: str, shown: str) -> None:
    assert masked(url) == masked(shown) == shown


def test_this_process_gets_them_back_and_another_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert revealed(hidden("http://u:one@a/v1"), "URL") == "http://u:one@a/v1"
    assert revealed("http://a/v1", "URL") == "http://a/v1"
    other = "http://***@b/v1?key=***"
    assert hidden(other) == other
    for wrong in (None, "", "http://b/v1", "http://u:pw@c/v1?key=x", other + "&x=y"):
        if wrong is not None:
            monkeypatch.setenv("URL", wrong)
        with pytest.raises(ConfigError, match=r"recorded without its credentials: set URL to the whole URL"):
            revealed(other, "URL")
    monkeypatch.setenv("URL", "http://u:pw@b/v1?key=x")
    assert revealed(other, "URL") == "http://u:pw@b/v1?key=x"
