"""Names by content: ids of prompts and candidates, keys of rows, and the partitions that prompts are dealt to."""

from __future__ import annotations

import hashlib
import itertools
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from grape_service.json_types import JsonObject
from grape_service.rows.candidate import Message, Tool
from grape_service.rows.messages import response_messages, without_notes
from grape_service.rows.ragged import Int64s

ROW_KEY_BYTES = 16


def json_digest(value: Any) -> str:
    """32 hex digits (128 bits of sha256) of a JSON value; the order of keys does not count."""
    return hashlib.sha256(orjson.dumps(value, option=orjson.OPT_SORT_KEYS)).hexdigest()[:32]


def prompt_id_of(
    prompt: list[Message], tools: list[Tool] | None = None, template_kwargs: JsonObject | None = None
) -> str:
    """The id of a prompt that came without one: a digest of its messages, the tools it offers, and the variables of the
    template that it brings."""
    return json_digest([without_notes(prompt), tools, *([] if template_kwargs is None else [template_kwargs])])


def candidate_id_of(prompt_digest: str, source: str | None, response: str | list[Message]) -> str:
    """The id of a candidate that came without one: a digest of prompt, source and response.

    `prompt_digest` is `prompt_id_of` of its prompt, also where the pool gives ids of its own.
    """
    return json_digest([prompt_digest, source, without_notes(response_messages(response))])


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


def candidate_keys(prompt_ids: pa.Array, candidate_ids: pa.Array) -> pa.FixedSizeBinaryArray:
    """Keys of candidates [N], binary(16): rows of one prompt and one candidate have the same, whatever their tokens.

    Two candidates may have the same tokens, and so one row key, while another policy renders their prompts differently.
    """
    keys = []
    for prompt_id, candidate_id in zip(prompt_ids.to_pylist(), candidate_ids.to_pylist(), strict=True):
        prompt = prompt_id.encode()
        text = len(prompt).to_bytes(8, "little") + prompt + candidate_id.encode()
        keys.append(hashlib.sha256(text).digest()[:ROW_KEY_BYTES])
    return pa.array(keys, pa.binary(ROW_KEY_BYTES))


def in_eval_share(prompt_id: str, share: float) -> bool:
    """Whether a prompt is among the `share` kept back for evaluation: the same in every version of a dataset."""
    if share <= 0:
        return False
    digest = hashlib.sha256(b"grape-eval|" + prompt_id.encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


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
