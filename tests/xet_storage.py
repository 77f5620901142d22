"""Reads what Xet uploads (https://huggingface.co/docs/xet): blocks of compressed chunks, and shards.

A shard tells which chunks make up a file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

_ENTRY = 48
"""Bytes of each row of a shard, and of its header."""
_VERIFIED, _HASHED = 1 << 31, 1 << 30
"""Flags of a file in a shard: rows with hashes of its chunks follow, and a row with its SHA-256."""


class Chunks(list[bytes]):
    """The chunks of a block. Each has a header of 8 bytes: version, stored size, compression, size."""

    def __init__(self, block: bytes) -> None:
        super().__init__()
        at = 0
        while at < len(block) and block[at] == 0:  # what may follow begins with a name
            stored, kind, size = _number(block[at + 1 : at + 4]), block[at + 4], _number(block[at + 5 : at + 8])
            content = _unpacked(block[at + 8 : at + 8 + stored], kind)
            assert len(content) == size
            self.append(content)
            at += 8 + stored


def files_of_shard(shard: bytes, chunks: Mapping[str, Chunks]) -> Iterator[bytes]:
    """The contents of the files that a shard lists."""
    at = _ENTRY
    while shard[at : at + 32] != b"\xff" * 32:
        flags, segments = _number(shard[at + 32 : at + 36]), _number(shard[at + 36 : at + 40])
        rows = [shard[at + _ENTRY * (1 + i) :][:_ENTRY] for i in range(segments)]
        yield b"".join(
            chunk for row in rows for chunk in chunks[_name(row[:32])][_number(row[40:44]) : _number(row[44:48])]
        )
        at += _ENTRY * (1 + segments * (2 if flags & _VERIFIED else 1) + bool(flags & _HASHED))


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _name(hashed: bytes) -> str:
    """A hash as addresses have it: four numbers of 64 bits."""
    return "".join(f"{_number(hashed[i : i + 8]):016x}" for i in range(0, 32, 8))


def _unpacked(data: bytes, kind: int) -> bytes:
    """Content that is stored as it is (0), in LZ4's frames (1), or so with bytes grouped by fours (2)."""
    if kind == 0:
        return data
    unpacked = _frame(data)
    if kind == 1:
        return bytes(unpacked)
    content, at = bytearray(len(unpacked)), 0
    for i in range(4):
        length = len(content[i::4])
        content[i::4] = unpacked[at : at + length]
        at += length
    return bytes(content)


def _frame(data: bytes) -> bytearray:
    """The content of a frame of LZ4 (https://github.com/lz4/lz4/blob/dev/doc/lz4_Frame_format.md)."""
    flags, out = data[4], bytearray()
    at = 7 + 8 * bool(flags & 8) + 4 * bool(flags & 1)
    while size := _number(data[at : at + 4]):
        length = size & 0x7FFFFFFF
        block = data[at + 4 : at + 4 + length]
        if size >> 31:
            out += block
        else:
            _block(block, out)
        at += 4 + length + 4 * bool(flags & 16)
    return out


def _block(block: bytes, out: bytearray) -> None:
    """Adds the content of a block of LZ4: literals, and copies of what came before, in turns."""
    at = 0
    while True:
        token = block[at]
        length, at = _length(block, at + 1, token >> 4)
        out += block[at : at + length]
        at += length
        if at == len(block):
            return
        distance = _number(block[at : at + 2])
        length, at = _length(block, at + 2, token & 15)
        for _ in range(length + 4):
            out.append(out[-distance])


def _length(block: bytes, at: int, first: int) -> tuple[int, int]:
    """A length, which goes on where its first four bits are full, and where it ends."""
    total, more = first, first == 15
    while more:
        total, more, at = total + block[at], block[at] == 255, at + 1
    return total, at
