"""Partitions: prompts are dealt to them by the leading bits of a digest of their id."""

from __future__ import annotations

import hashlib


def prompt_order(prompt_id: str) -> int:
    """64 bits of the prompt id's sha256: their leading bits are its partition, all of them its place in it."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8], "big")


def is_drawn(prompt_id: str, share: float, purpose: bytes) -> bool:
    """Whether a prompt is of a random share of all, another for each purpose: it follows from its id alone."""
    digest = hashlib.blake2b(prompt_id.encode(), digest_size=8, salt=purpose).digest()
    return int.from_bytes(digest, "big") < share * 2**64


def partition_bits(num_partitions: int) -> int:
    """log2 of a number of partitions, which is a power of two."""
    assert num_partitions > 0
    assert num_partitions & (num_partitions - 1) == 0
    return num_partitions.bit_length() - 1


def partition_name(index: int, num_partitions: int) -> str:
    """'b' and the leading bits of the partition's prompts: 'b' of one, 'b00' to 'b11' of four."""
    bits = partition_bits(num_partitions)
    return f"b{index:0{bits}b}" if bits else "b"


def partition_index(name: str) -> int:
    """The place of a partition among as many as its name has bits for: the inverse of partition_name."""
    return int(name[1:] or "0", 2)


def partition_names(num_partitions: int) -> list[str]:
    """Names of all partitions, in order."""
    return [partition_name(index, num_partitions) for index in range(num_partitions)]


def partition_of(prompt_id: str, num_partitions: int) -> str:
    """The partition that a prompt is dealt to."""
    return partition_name(prompt_order(prompt_id) >> (64 - partition_bits(num_partitions)), num_partitions)
