"""The audit of what was sampled: some samples go through the scoring engine of the same policy."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from grape_service.config.policy import PolicyConfig
from grape_service.errors import StageError
from grape_service.gather.audit import Drift, drift_of, is_audited
from grape_service.gather.missing import Sampling
from grape_service.gather.samples import SampleStore, prompt_keys, sample_key
from grape_service.prepare.reduce import shard_path
from grape_service.rows.columns import AUDITED, LOSS_TOKEN
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import list_array, offsets_from_lengths
from grape_service.score.shards import Shards
from grape_service.score.store import AUDIT_SUFFIX, ScoreStore
from grape_service.storage.parquet import open_small, write_parquet
from grape_service.storage.storage import Storage
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.scoring.engines import Engines
from workers.stages.score import Scoring, score_shards

PARTITION = "b"
"""The one partition of audited samples: they are few."""


def audit(
    run: Run,
    engines: Engines,
    name: str,
    policy: PolicyConfig,
    sampling: Sampling,
    shards: list[tuple[str, str]],
    samples: int,
) -> Drift | None:
    """Score some of a policy's `samples` again and compare; None where there are none.

    `shards` are (partition, path) of prompts. Raises StageError where most could not be scored.
    """
    found = run_tasks(
        audited_rows,
        ({"shard": path, "partition": partition} for partition, path in shards),
        run.config.workers,
        shared={"storage": run.workspace, "sampling": sampling, "samples": samples},
        together=together(run.config.workers, len(shards)),
    )
    rows = pa.concat_tables([AUDITED.empty_table(), *found]).combine_chunks()
    if not rows.num_rows:
        return None
    folder = f"{run.folder}/rescore/audit-{name}"
    write_parquet(run.workspace, shard_path(folder, 0), AUDITED, [rows])
    lengths = pc.list_value_length(rows["recorded"]).to_numpy()
    tokens = int(pc.sum(pc.list_value_length(rows["input_ids"])).as_py())
    shard = Shards(folder, PARTITION, 1, rows.num_rows, tokens)
    store_id = f"{run.policy_id(policy)}{AUDIT_SUFFIX}"
    score_shards(run, engines, Scoring(policy, f"audit {name}", store_id=store_id), [shard])
    table = ScoreStore(run.workspace, store_id).read(PARTITION, rows["row_key"])
    usable = np.flatnonzero(table.finite() & (table.lengths == lengths))
    if len(usable) < rows.num_rows / 2:
        raise StageError(f"gather.policies.{name}: only {len(usable)} of {rows.num_rows} samples could be scored again")
    kept = rows.take(pa.array(usable))
    recorded = kept["recorded"].combine_chunks().flatten().to_numpy()
    return drift_of(recorded, table.take(usable), offsets_from_lengths(lengths[usable]), policy.dtype)


def audited_rows(storage: Storage, shard: str, partition: str, sampling: Sampling, samples: int) -> pa.Table:
    """The samples of a shard's prompts that are audited, as rows to score (a Ray task)."""
    with open_small(storage, shard) as file:
        table = file.read(columns=["row_key", "prompt_id", "input_ids"])
    keys = prompt_keys(table)
    wanted = [
        (place, key)
        for place, prompt in enumerate(keys)
        for key in (sample_key(prompt, number) for number in range(sampling.samples))
        if is_audited(key, samples)
    ]
    found = SampleStore(storage, sampling.sampler).read(partition, [key for _, key in wanted])
    pairs = [(place, sample) for (place, _), sample in zip(wanted, found, strict=True) if sample is not None]
    prompts = table["input_ids"].to_pylist()
    ids = [np.array([*prompts[place], *sample["ids"]], np.int32) for place, sample in pairs]
    lens = [len(prompts[place]) for place, _ in pairs]
    mask = [np.repeat([0, LOSS_TOKEN], [n, len(row) - n]).astype(np.uint8) for row, n in zip(ids, lens, strict=True)]
    offsets = offsets_from_lengths([len(row) for row in ids])
    flat_ids = np.concatenate([np.zeros(0, np.int32), *ids])
    flat_mask = np.concatenate([np.zeros(0, np.uint8), *mask])
    return pa.table(
        {
            "row_key": row_keys(flat_ids, flat_mask, offsets),
            "prompt_id": [table["prompt_id"][place].as_py() for place, _ in pairs],
            "candidate_id": [str(sample["number"]) for _, sample in pairs],
            "input_ids": list_array(offsets, flat_ids, pa.int32()),
            "loss_mask": list_array(offsets, flat_mask, pa.uint8()),
            "prompt_len": pa.array(lens, pa.int32()),
            "recorded": pa.array([sample["logprobs"] for _, sample in pairs], pa.list_(pa.float32())),
        }
    ).cast(AUDITED)
