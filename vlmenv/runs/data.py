"""Fingerprints of data sets, and what differs between two."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any, Final

from vlmenv.envs.data.dataset import Concatenated, TableSource
from vlmenv.envs.data.source import Source

BLOCKS: Final = 64
"""Largest number of stretches of rows that have a checksum of their own."""


def fingerprint(source: Source, block: int | None = None) -> dict[str, Any]:
    """The number of samples and checksums of their rows, as JSON can hold them.

    Images that a row only names are not read. Of built-in samples and of sources of other classes only the number of
    samples is known.

    Args:
        source: The samples.
        block: Rows of a stretch with a checksum of its own. Default: so many that there are at most `BLOCKS`.

    Returns:
        `size`; and of rows `block`, `blocks` (a checksum per stretch) and `set`, which does not depend on their order.
    """
    told: dict[str, Any] = {"size": source.size}
    if not source.size or not isinstance(source, TableSource | Concatenated):
        return told
    block = block or -(-source.size // BLOCKS)
    rows, blocks, total = row_digests(source), list[str](), 0
    while stretch := list(islice(rows, block)):
        blocks.append(hashlib.sha256(b"".join(stretch)).hexdigest()[:16])
        total += sum(int.from_bytes(digest[:8]) for digest in stretch)
    return told | {"block": block, "blocks": blocks, "set": f"{total % 2**64:016x}"}


def row_digests(source: Source) -> Iterator[bytes]:
    """A checksum of each row, in the order of the samples; nothing of sources without rows."""
    if isinstance(source, Concatenated):
        for one in source.sources:
            yield from row_digests(one)
    elif isinstance(source, TableSource):
        kept = (source.number(index) for index in range(source.size or 0))
        wanted = next(kept, None)
        for number, row in enumerate(source.table.stored()):
            if number == wanted:
                yield hashlib.sha256(row).digest()
                wanted = next(kept, None)


def difference(old: Mapping[str, Any], source: Source) -> str | None:
    """What differs between a data set and the fingerprint of an earlier one, in words; None if nothing does."""
    new = fingerprint(source, old.get("block"))
    if old == new:
        return None
    if "blocks" not in old or "blocks" not in new:
        return f"it has {_number(new)}, and had {_number(old)}" if old["size"] != new["size"] else None
    if old["size"] == new["size"]:
        return "its rows stand in another order" if old["set"] == new["set"] else _changed_rows(old, new, source)
    return f"it has {_number(new)}, and had {_number(old)}; {_beginning(old, new)}"


def _number(told: Mapping[str, Any]) -> str:
    return "samples without end" if told["size"] is None else f"{told['size']} samples"


def _changed_rows(old: Mapping[str, Any], new: Mapping[str, Any], source: Source) -> str:
    differing = [i for i, (one, other) in enumerate(zip(old["blocks"], new["blocks"], strict=True)) if one != other]
    first = differing[0] * old["block"]
    last = min(first + old["block"], new["size"]) - 1
    which = source.place(first, str(first)) if first == last else f"samples {first} to {last}, counted from 0"
    return f"rows differ, the first of them: {which} ({len(differing)} of {len(old['blocks'])} stretches in all)"


def _beginning(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    whole = min(old["size"], new["size"]) // old["block"]
    same = old["blocks"][:whole] == new["blocks"][:whole]
    return f"the first {whole * old['block']} rows are {'the same' if same else 'others'}"
