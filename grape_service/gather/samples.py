"""Samples: what names one, and where they are kept.

    gathered/<sampler>/<partition>/<milliseconds>-<shard>-<random>.parquet      columns.SAMPLE

A sampler is a policy, how it samples and where it stops; a sample of it is a prompt's tokens and a number from 0. Its
seed follows from these, so it is made once: files are only ever added, and of two with one key the first file name
wins.
"""

from __future__ import annotations

import hashlib
import re
import time
import uuid
from collections.abc import Iterable, Sequence
from typing import Required, TypedDict, cast

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.gather import SamplingConfig, VerifyConfig
from grape_service.errors import StageError
from grape_service.json_types import JsonObject
from grape_service.keys import digest_of, settings_of
from grape_service.rows.columns import SAMPLE
from grape_service.score.store import METADATA_KEY, ScoreStore
from grape_service.score.tables import KeyIndex
from grape_service.storage.parquet import array_of, open_small, write_parquet
from grape_service.storage.storage import Storage

OUTLINE = ("sample_key", "prompt_id", "number", "verdict", "ids")
"""Columns of what tells how many samples there are, and how long."""


def sampler_id(policy_id: str, sampling: SamplingConfig, stop_ids: Iterable[int]) -> str:
    """The folder of a sampler: a policy's id, and a digest of how it samples and of the tokens that end a response.

    A policy's id is that of its scores, which depend neither on its template nor on its generation_config.json."""
    return f"{policy_id}-{digest_of([settings_of(sampling), sorted(set(stop_ids))], 12)}"


def verify_id(verify: VerifyConfig, verifier: str) -> str:
    """What a stored verdict was made of: the settings, and the verifier with its version."""
    return digest_of([settings_of(verify), verifier], 16)


def sample_key(prompt_key: bytes, number: int) -> bytes:
    """The key of a sample [16 bytes], of the key of its prompt's tokens and its number."""
    return hashlib.sha256(b"%b|%d" % (prompt_key, number)).digest()[:16]


def seed_of(sampler: str, key: bytes) -> int:
    """The seed of a sample, below 2**63."""
    return int.from_bytes(hashlib.sha256(sampler.encode() + b"|" + key).digest()[:8], "big") >> 1


class StoredSample(TypedDict, total=False):
    """A sample as it is stored, and what its file says of all in it: columns of SAMPLE, and those of `write`."""

    sample_key: Required[bytes]
    prompt_id: Required[str]
    number: Required[int]
    seed: int
    ids: Sequence[int] | npt.NDArray[np.int32]
    num_tokens: int  # in the place of ids
    logprobs: Sequence[float] | npt.NDArray[np.float32]
    finish_reason: str
    verdict: Required[str | None]
    verdict_reason: str | None
    asked: str | None  # names the question of the verdict
    made_by: JsonObject
    verifier: str
    verify_id: str


class SampleStore:
    """The samples of one sampler."""

    def __init__(self, storage: Storage, sampler: str):
        self.storage, self.sampler = storage, sampler
        self._files = ScoreStore(storage, sampler, root="gathered")  # finds files by partition, however many

    def read(
        self, partition: str, keys: Iterable[bytes], lengths_only: bool = False, shard: str | None = None
    ) -> list[StoredSample | None]:
        """The sample of each key, with `verify_id` and `asked` of its verdict and the `made_by` of its file; None where
        none is.

        `lengths_only`: with `num_tokens` in the place of its tokens. `shard`: of the files that were written for this
        shard of prompts alone. Raises StageError on a bad file.
        """
        wanted = pa.array(list(keys), pa.binary(16))
        index = KeyIndex(wanted)
        found: list[StoredSample | None] = [None] * index.num_unique
        for path in self._files.partition_files(partition):
            if shard is not None and f"-{_name_of(shard)}-" not in path.rsplit("/", 1)[-1]:
                continue
            try:
                with open_small(self.storage, path) as file:
                    if file.schema_arrow.remove_metadata() != SAMPLE:
                        raise pa.ArrowInvalid("its columns are not a sample's")
                    known = orjson.loads((file.schema_arrow.metadata or {}).get(METADATA_KEY, b"{}"))
                    table = file.read(columns=list(OUTLINE) if lengths_only else None)
            except (pa.ArrowInvalid, OSError) as error:
                if isinstance(error, FileNotFoundError):
                    raise
                raise StageError(f"{self.storage.url(path)} is damaged ({error}): delete it to sample again") from error
            if lengths_only:
                table = table.append_column("num_tokens", pc.list_value_length(table["ids"])).drop_columns(["ids"])
            asked = known.pop("asked", {})
            places = index.places(table["sample_key"])
            rows = [row for row in np.flatnonzero(places >= 0).tolist() if found[places[row]] is None]
            for row, value in zip(rows, table.take(pa.array(rows, pa.int64())).to_pylist(), strict=True):
                found[places[row]] = cast(StoredSample, value | known | {"asked": asked.get(value["prompt_id"])})
        return [found[place] for place in index.inverse.tolist()]

    def write(self, partition: str, samples: list[StoredSample], shard: str, metadata: JsonObject) -> None:
        """Store samples as a new file; `metadata` has what all of them share: `made_by`, `verify_id`, `verifier`.

        A sample that was judged has `asked`, which names the question: see `candidates.asked_of`."""
        questions: dict[str, set[str | None]] = {}
        for one in samples:
            questions.setdefault(one["prompt_id"], set()).add(one.get("asked"))
        # Of a prompt that stands there with two answers, nothing is said: its samples are judged again.
        asked = {prompt_id: names.pop() for prompt_id, names in questions.items() if len(names) == 1}
        metadata = {**metadata, "asked": asked}
        folder = f"{self._files.folder}/{partition}"
        path = f"{folder}/{time.time_ns() // 1_000_000:013d}-{_name_of(shard)}-{uuid.uuid4().hex[:8]}.parquet"
        schema = SAMPLE.with_metadata({METADATA_KEY: orjson.dumps(metadata, option=orjson.OPT_SORT_KEYS)})
        write_parquet(self.storage, path, schema, [pa.Table.from_pylist(samples, SAMPLE)])


def _name_of(shard: str) -> str:
    """What a shard is called in the names of its files of samples."""
    return re.sub(r"[^A-Za-z0-9_.]", "-", shard.rsplit("/", 1)[-1].removesuffix(".parquet"))


def prompt_keys(shard: pa.Table) -> list[bytes]:
    """Keys of the prompts of a shard: its rows' own, which are of their tokens."""
    return array_of(shard, "row_key").to_pylist()
