"""Canary rows: a replica must give the scores that its policy gave before, or it is refused."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from grape_service.errors import StageError, UserError
from grape_service.rows.ragged import TokenBatch
from grape_service.score.store import engine_version
from grape_service.storage.storage import Storage, json_bytes
from workers.engines.base import Engine, EngineDescription

TOLERANCE = {"float32": (1e-3, 2e-4), "float16": (0.15, 0.03), "bfloat16": (0.35, 0.06)}
"""dtype -> largest difference of one log-probability, and of the mean absolute difference. Half precision
differs by 0.01 to 0.06 per token between engines and batch shapes on real text; random tokens differ by more."""

OTHERS = "canaries"
"""Folder of the canary rows of engine versions that came after the first, by version."""

LENGTHS = (6, 17, 33, 48)


def canary_rows(folder: str) -> TokenBatch:
    """Four fixed rows of random token ids, the second half of each with loss; the same for a vocabulary size."""
    config = orjson.loads((Path(folder) / "config.json").read_bytes())
    vocab_size = int(config.get("vocab_size") or config.get("text_config", {}).get("vocab_size"))
    random = np.random.default_rng(20260131)
    rows = []
    for length in LENGTHS:
        ids = random.integers(0, vocab_size, size=length).tolist()
        rows.append((ids, [place >= length // 2 for place in range(length)]))
    return TokenBatch.from_rows(rows)


def check_canary(engine: Engine, folder: str, workspace: Storage, policy_id: str, reuse: str) -> None:
    """Score the canary rows and compare them with those of every engine version that is stored; store a new one's.

    Raises StageError that names the difference when the replica may not be used.
    """
    batch = canary_rows(folder)
    scores = engine.score(batch)
    if not np.isfinite(scores).all():
        raise UserError(
            f"model '{engine.description.model}': its logits are not finite: try another dtype, such as float32"
        )
    mine = {**asdict(engine.description), "logprobs": [float(value) for value in scores]}
    if workspace.create_if_absent(f"scores/{policy_id}/canary.json", json_bytes(mine)):
        return
    first = workspace.read_json(f"scores/{policy_id}/canary.json")
    others = [workspace.read_json(info.path) for info in workspace.list(f"scores/{policy_id}/{OTHERS}")]
    for stored in [first, *others]:
        _compare(stored, engine.description, scores, policy_id, reuse)
    if all(engine_version(stored) != engine_version(mine) for stored in [first, *others]):
        name = re.sub(r"[^A-Za-z0-9.]+", "-", engine_version(mine))
        workspace.create_if_absent(f"scores/{policy_id}/{OTHERS}/{name}.json", json_bytes(mine))


def _compare(
    stored: dict[str, Any],
    description: EngineDescription,
    scores: npt.NDArray[np.float32],
    policy_id: str,
    reuse: str,
) -> None:
    here = engine_version(asdict(description))
    if reuse == "exact" and engine_version(stored) != here:
        raise StageError(
            f"scores of {policy_id} were made by {engine_version(stored)} and this replica has {here}: "
            "set workers.reuse to compatible, or score with the same version"
        )
    reference = np.asarray(stored["logprobs"], dtype=np.float64)
    difference = np.abs(reference - scores) if len(reference) == len(scores) else np.asarray([np.inf])
    largest, mean = TOLERANCE[description.dtype]
    if not (difference.max() <= largest and difference.mean() <= mean):
        named = [
            f"{key} {stored[key]} there, {getattr(description, key)} here"
            for key in ("dtype", "quantization", "engine", "version")
            if stored[key] != getattr(description, key)
        ]
        torch = [str((made_by.get("extra") or {}).get("torch")) for made_by in (stored, asdict(description))]
        if torch[0] != torch[1]:
            named.append(f"torch {torch[0]} there, {torch[1]} here")
        raise StageError(
            f"a replica of {policy_id} was refused: its canary rows differ from the stored ones by "
            f"{difference.mean():.3g} a token on average (allowed: {mean}); "
            f"{'; '.join(named) or 'same engine and precision, so its weights differ'}"
        )
