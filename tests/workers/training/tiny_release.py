"""A small release with random tokens, weights and log-probabilities, and the loss it should have."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from grape_service.config.methods import WeightsConfig
from grape_service.release.claim import claim_version
from grape_service.release.manifest import ManifestFields, Parents
from grape_service.release.writer import publish, write_part
from grape_service.rows.columns import release_schema
from grape_service.storage.storage import Storage

SCHEMA = release_schema([], [pa.field("answer", pa.string())])


def make_rows(num_rows: int, seed: int = 0, vocab: int = 500, longest: int = 24) -> list[dict[str, Any]]:
    """Rows of different lengths; every third has loss in two stretches, the last has no behavior policy."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for i in range(num_rows):
        length = int(rng.integers(6, longest))
        ids = rng.integers(3, vocab, length).astype(np.int32)
        mask = np.arange(length) >= rng.integers(1, length - 3)
        if i % 3 == 2:
            mask[-2] = False
        has_behavior = i < num_rows - 1

        def on_mask(values: np.ndarray, mask: np.ndarray = mask) -> np.ndarray:
            return np.where(mask, values, 0).astype(np.float32)

        rows.append(
            {
                "prompt_id": f"prompt-{i}",
                "candidate_id": f"candidate-{i}",
                "source": "gen-a",
                "messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i + 1}"}],
                "input_ids": ids,
                "loss_mask": mask,
                "labels": np.where(mask, ids, -100).astype(np.int32),
                "target_logprobs": on_mask(-rng.uniform(0, 8, length)),
                "behavior_logprobs": on_mask(-rng.uniform(0, 8, length)) if has_behavior else None,
                "loss_weights": on_mask(rng.uniform(0.1, 2, length) if has_behavior else np.ones(length)),
                "weight_source": "pear" if has_behavior else "uniform",
                "num_candidates": 1,
                "truncated": False,
                "answer": str(i + 1),
            }
        )
    return rows


def write_release(
    folder: Path | str,
    rows: list[dict[str, Any]],
    config: dict[str, Any],
    name: str = "tiny",
    parents: Parents | None = None,
    schema: pa.Schema = SCHEMA,
) -> str:
    """Publish the rows as a release under `folder`; returns its reference."""
    storage = Storage(str(folder))
    claim = claim_version(storage, name)
    entry = write_part(storage, claim.folder, 0, schema, [pa.Table.from_pylist(rows, schema=schema)])
    fields = ManifestFields(content_digest=f"{len(rows)}", config=config, tags=["latest"], parents=parents or Parents())
    return publish(storage, claim, schema, [entry], fields).reference


def slow_weights(target: list[float], behavior: list[float], config: WeightsConfig) -> list[float]:
    """PEAR weights of one response, token after token; NaN in behavior is a ratio that is not known."""
    ratios = [t - b for t, b in zip(target, behavior, strict=True)]
    known = [r for r in ratios if not math.isnan(r)]
    mean = sum(known) / max(1, len(known)) if config.center == "sequence" else 0.0
    low, high = config.ratio_clip
    delta = [0.0 if math.isnan(r) else min(max(r - mean, low), high) for r in ratios]
    num = len(delta)
    weights = []
    for t in range(1, num + 1):
        if config.level == "sequence":
            log_weight = sum(delta)
        else:
            size = config.block_size if config.level == "block" else 1
            end = min(math.ceil(t / size) * size, num)
            log_weight = (num - end) * math.log(config.gamma) + sum(delta[end:])
        weights.append(math.exp(min(max(log_weight, config.weight_clip[0]), config.weight_clip[1])))
    if config.normalize == "sequence":
        weights = [w * num / sum(weights) for w in weights]
    return weights
