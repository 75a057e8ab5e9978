"""Rows of made-up texts, one token a word, and the checks on them."""

from __future__ import annotations

import zlib
from typing import Any

import orjson
import pyarrow as pa

from grape_service.config.checks import Check, ChecksConfig
from grape_service.rows.columns import LOSS_TOKEN, LOSS_TURN_END, SHARD

CLEAN = (
    "The sum of the two numbers is found in three steps, and for each of them we write down what is carried over "
    "to the next place, so that nothing is lost on the way. Case {n} of this kind has {n} as its result."
)


def row(
    prompt_id: str, candidate_id: str, text: str, prompt: str = "What is it?", turn_end: bool = True
) -> dict[str, Any]:
    ids = [zlib.crc32(word.encode()) % 2**31 for word in text.split()]
    mask = [0] * 3 + [LOSS_TOKEN] * len(ids) + [LOSS_TURN_END] * turn_end
    messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
    return {
        "row_key": (prompt_id + candidate_id).encode().ljust(16)[:16],
        "prompt_id": prompt_id,
        "candidate_id": candidate_id,
        "source": "a",
        "input_ids": [1, 2, 3, *ids, *([4] if turn_end else [])],
        "loss_mask": mask,
        "prompt_len": 3,
        "truncated": False,
        "messages": orjson.dumps(messages).decode(),
        "num_prompt_messages": 1,
    }


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, schema=SHARD).combine_chunks()


def clean_rows(count: int = 40) -> list[dict[str, Any]]:
    """A prompt with two different candidates each."""
    made = []
    for n in range(count):
        made.append(row(f"p{n:03}", "c0", CLEAN.format(n=n), f"How do we add {n} and {n + 7} on paper with a pencil?"))
        other = f"Take {n} apples and count them one by one; when you have all of them you know that there are {n}."
        made.append(row(f"p{n:03}", "c1", other))
    return made


def check_of(name: str, **settings: Any) -> Check:
    return ChecksConfig.model_validate({name: {"action": "warn", **settings}}).enabled()[0]
