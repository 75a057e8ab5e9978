"""Names by content: ids of prompts and candidates, keys of rows, partitions of prompts."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from grape_service.candidates import Message
from grape_service.ragged import Int64s

ROW_KEY_BYTES = 16


def json_digest(value: Any) -> str:
    """32 hex digits (128 bits of sha256) of a JSON value; the order of keys does not count."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def prompt_id_of(prompt: list[Message], tools: list[dict[str, Any]] | None = None) -> str:
    """The id of a prompt that came without one: a digest of its messages and the tools it offers."""
    return json_digest([prompt, tools])


def response_messages(response: str | list[Message]) -> list[Message]:
    """A response in chat form: text is one assistant message."""
    return [{"role": "assistant", "content": response}] if isinstance(response, str) else response


def candidate_id_of(prompt_digest: str, source: str | None, response: str | list[Message]) -> str:
    """The id of a candidate that came without one: a digest of prompt, source and response.

    `prompt_digest` is `prompt_id_of` of its prompt, also where the pool gives ids of its own.
    """
    return json_digest([prompt_digest, source, response_messages(response)])


def row_keys(input_ids: npt.NDArray[np.int32], mask: npt.NDArray, offsets: Int64s) -> pa.FixedSizeBinaryArray:
    """Keys of rows [N], binary(16), what scores are stored under: flat ids [T], mask [T] and offsets [N + 1].

    A key is sha256 of the row's int32 little-endian ids, b"|" and, for each token, a byte that is 1 where
    the mask is not 0.
    """
    ids = input_ids.astype("<i4", copy=False).tobytes()
    has_loss = (mask != 0).astype("u1").tobytes()
    bounds = offsets.tolist()
    keys = [
        hashlib.sha256(b"|".join((ids[4 * start : 4 * end], has_loss[start:end]))).digest()[:ROW_KEY_BYTES]
        for start, end in itertools.pairwise(bounds)
    ]
    return pa.array(keys, pa.binary(ROW_KEY_BYTES))


def prompt_order(prompt_id: str) -> int:
    """64 bits of the prompt id's sha256: their leading bits are its partition, all of them its place in it."""
    return int.from_bytes(hashlib.sha256(prompt_id.encode()).digest()[:8], "big")


def partition_bits(num_partitions: int) -> int:
    """log2 of a number of partitions, which is a power of two."""
    assert num_partitions > 0
    assert num_partitions & (num_partitions - 1) == 0
    return num_partitions.bit_length() - 1


def partition_name(index: int, num_partitions: int) -> str:
    """'b' and the leading bits of the partition's prompts: 'b' of one, 'b00' to 'b11' of four."""
    bits = partition_bits(num_partitions)
    return f"b{index:0{bits}b}" if bits else "b"


def partition_names(num_partitions: int) -> list[str]:
    """Names of all partitions, in order."""
    return [partition_name(index, num_partitions) for index in range(num_partitions)]


def partition_of(prompt_id: str, num_partitions: int) -> str:
    """The partition that a prompt is dealt to."""
    return partition_name(prompt_order(prompt_id) >> (64 - partition_bits(num_partitions)), num_partitions)
