"""Whether the target's scores depend on the prompt: a sample of responses, each shuffled to another prompt."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from grape_service.checks.findings import Flagged
from grape_service.config.checks import UntrustedTarget
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import list_array, list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.storage.parquet import array_of

MIN_ROWS = 16
"""Fewer rows say nothing."""


def shuffled(table: pa.Table) -> pa.Table:
    """Rows of SHARD with each response after the prompt of the next row; both of one table of different prompts."""
    offsets, ids = list_offsets_and_values(array_of(table, "input_ids"))
    _, mask = list_offsets_and_values(array_of(table, "loss_mask"))
    prompt_lens = table["prompt_len"].to_numpy()
    count = table.num_rows
    new_ids, new_mask, new_lens = [], [], []
    for row in range(count):
        other = (row + 1) % count
        prompt = slice(offsets[other], offsets[other] + prompt_lens[other])
        response = slice(offsets[row] + prompt_lens[row], offsets[row + 1])
        new_ids.append(np.concatenate([ids[prompt], ids[response]]))
        new_mask.append(np.concatenate([np.zeros(int(prompt_lens[other]), dtype=np.uint8), mask[response]]))
        new_lens.append(int(prompt_lens[other]))
    new_offsets = offsets_from_lengths([len(values) for values in new_ids])
    flat_ids, flat_mask = np.concatenate(new_ids), np.concatenate(new_mask)
    shuffled = {
        "row_key": row_keys(flat_ids, flat_mask, new_offsets),
        "input_ids": list_array(new_offsets, flat_ids, pa.int32()),
        "loss_mask": list_array(new_offsets, flat_mask, pa.uint8()),
        "prompt_len": pa.array(new_lens, pa.int32()),
    }
    columns = [shuffled.get(name, table[name]) for name in SHARD.names]
    return pa.table(columns, schema=SHARD)


def mean_scores(logprobs: list[list[float]]) -> np.ndarray:
    """Mean log-probability of each row [N]."""
    offsets = offsets_from_lengths([len(row) for row in logprobs])
    return segment_sums(np.concatenate([np.asarray(row, dtype=np.float64) for row in logprobs]), offsets) / np.diff(
        offsets
    )


def trust(real: np.ndarray, shuffled: np.ndarray, check: UntrustedTarget) -> tuple[Flagged, str | None]:
    """The sampled rows whose response scores no better under its own prompt, and a warning or None."""
    worse = np.flatnonzero(real <= shuffled).tolist()
    reasons = ["scores as high under another prompt"] * len(worse)
    details: list[str | None] = [f"{real[row]:.4f} under its own prompt, {shuffled[row]:.4f} there" for row in worse]
    flagged = Flagged(worse, reasons, details)
    better = 1 - len(worse) / max(1, len(real))
    if len(real) < MIN_ROWS or better >= check.min_better:
        return flagged, None
    return flagged, (
        f"The target's scores cannot be trusted: only {better:.0%} of {len(real)} sampled responses score higher under "
        f"their own prompt than under another (mean {real.mean():.3f} against {shuffled.mean():.3f})."
    )
