"""Names on the hub."""

from __future__ import annotations

import pytest

from vlmenv.core.names import hub_name


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("Qwen/Qwen2.5-VL-3B-Instruct", ("Qwen/Qwen2.5-VL-3B-Instruct", None)),
        ("a-b/c_d@v1.0", ("a-b/c_d", "v1.0")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("a/b@", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("/a/b", None),
        ("../b", None),
        ("rows.jsonl", None),
        ("a/b@c@d", None),
    ],
)
def test_a_name_has_an_owner_and_may_have_a_revision(name: str, parts: tuple[str, str | None] | None) -> None:
    assert hub_name(name) == parts
