"""Made-up release rows, and a version published in one call."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from grape_service.release.claim import claim_version
from grape_service.release.manifest import ManifestFields, Parents
from grape_service.release.writer import Version, publish, write_part
from grape_service.rows.columns import release_schema
from grape_service.storage.storage import Storage

SCHEMA = release_schema([], [pa.field("topic", pa.string())])
SOURCES = ("person", "gen-a", "gen-b")


def rows(start: int, count: int, seed: int = 0, tokens: int = 40) -> pa.Table:
    """Rows of prompts start .. start + count, one each; the same for the same arguments."""
    random = np.random.default_rng((seed, start))
    lengths = random.integers(tokens // 2, tokens * 2, count)
    prompt_lengths = lengths // 3
    total = int(lengths.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    position = np.arange(total) - np.repeat(offsets[:-1], lengths)
    mask = position >= np.repeat(prompt_lengths, lengths)
    ids = random.integers(0, 50_000, total).astype(np.int32)
    weights = np.where(mask, random.uniform(0, 2, total), 0).astype(np.float32)
    logprobs = np.where(mask, -random.exponential(1, total), 0).astype(np.float32)

    def lists(values: np.ndarray) -> pa.Array:
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))

    prompts = [f"p{start + i:08d}" for i in range(count)]
    values: dict[str, Any] = {
        "prompt_id": prompts,
        "candidate_id": [
            f"{prompt}-c{int(c)}" for prompt, c in zip(prompts, random.integers(0, 4, count), strict=True)
        ],
        "source": [SOURCES[int(i)] for i in random.integers(0, 3, count)],
        "messages": [
            [{"role": "user", "content": f"question {p}"}, {"role": "assistant", "content": f"answer {p}"}]
            for p in prompts
        ],
        "input_ids": lists(ids),
        "loss_mask": lists(mask),
        "labels": lists(np.where(mask, ids, -100).astype(np.int32)),
        "target_logprobs": lists(logprobs),
        "behavior_logprobs": pa.nulls(count, pa.list_(pa.float32())),
        "loss_weights": lists(weights),
        "weight_source": ["pear"] * count,
        "grape_score": random.normal(-1, 0.3, count),
        "grape_rank": np.ones(count, np.int32),
        "grape_margin": random.exponential(0.1, count),
        "num_candidates": np.full(count, 4, np.int32),
        "truncated": [False] * count,
        "topic": ["sums" if i % 3 else "facts" for i in range(count)],
    }
    return pa.table(values, schema=SCHEMA)


def batches(table: pa.Table, size: int) -> Iterator[pa.RecordBatch]:
    yield from table.to_batches(max_chunksize=size)


def publish_version(
    storage: Storage,
    name: str = "math-sft",
    parts: list[pa.Table] | None = None,
    digest: str | None = None,
    tags: tuple[str, ...] = ("latest",),
    **fields: Any,
) -> Version:
    parts = [rows(0, 50), rows(50, 30)] if parts is None else parts
    schema = parts[0].schema if parts else SCHEMA
    with claim_version(storage, name) as claim:
        entries = [write_part(storage, claim.folder, i, schema, batches(part, 16)) for i, part in enumerate(parts)]
        digest = digest or hashlib.sha256(claim.version.encode()).hexdigest()
        manifest = ManifestFields(content_digest=digest, tags=list(tags), **{"parents": Parents(), **fields})
        return publish(storage, claim, schema, entries, manifest, report_html="<p>report</p>")
