"""The end of prepare: all counts in one, and whether the pool is good enough to go on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from grape_service.config.pool import PoolGroup
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.prepare.counts import (
    INTENDED,
    MapSummary,
    PartitionCounts,
    Rejects,
    column_names,
    largest,
    union_of_ids,
)
from grape_service.prepare.groups import GroupCounts, add_counts
from grape_service.prepare.plan import FOLDER_OF_MAP, PREPARED, PreparePlan
from grape_service.prepare.reduce import are_all_there
from grape_service.prepare.result import PartitionTotals, Prepared
from grape_service.rows.counts import check_sum
from grape_service.storage.storage import Storage

TOP_REASONS = 3


def finish_prepare(
    plan: PreparePlan, summary: MapSummary, partitions: Iterable[PartitionCounts], config: Config, storage: Storage
) -> Prepared:
    """Add up the partitions, write `prepared.json` and delete what lay between map and reduce.

    Raises UserError where the pool is not good enough: see `refuse_unusable`.
    """
    prepared = Prepared(
        prepare_id=plan.prepare_id,
        num_partitions=plan.num_partitions,
        rows_in=summary.rows_in,
        filtered=summary.filtered,
        other_columns={new: summary.other_columns[old] for old, new in column_names(summary.other_columns).items()},
        message_fields=summary.message_fields,
        groups=[_group(group, counts) for group, counts in zip(config.pool.groups, summary.groups, strict=True)],
        passed_over=plan.passed_over,
    )
    for counts in partitions:
        _add(prepared, counts)
    assert sorted(prepared.partitions) == plan.partitions, "every partition is counted"
    check_prepared(prepared)
    storage.write_json(f"{plan.folder}/{PREPARED}", prepared.to_json())
    storage.delete_folder(f"{plan.folder}/{FOLDER_OF_MAP}")
    refuse_unusable(plan, prepared, config, storage)
    return prepared


def check_prepared(prepared: Prepared) -> None:
    """Every row of the pool is in a shard, filtered, rejected or left out. Raises StageError."""
    left = {"rejected": prepared.rejects.total, "left out": prepared.left_out.total}
    check_sum(
        "candidates of the pool",
        prepared.rows_in,
        {"prepared": prepared.rows, "filtered": prepared.filtered, **left},
    )
    in_partitions = sum(totals.rows for totals in prepared.partitions.values())
    check_sum("prepared rows", prepared.rows, {"in partitions": in_partitions})


def _group(group: PoolGroup, counts: GroupCounts) -> dict[str, Any]:
    """A group of files as the manifest tells it."""
    return {
        "path": group.path,
        "files": counts.files,
        "shapes": dict(sorted(counts.shapes.items())),
        "rows_in": counts.rows_in,
        "filtered": counts.filtered,
    }


def load_prepared(plan: PreparePlan, config: Config, storage: Storage) -> Prepared | None:
    """What an earlier run prepared, looked at as that run did; None where there is nothing, or a shard of it is gone.

    Raises UserError where the pool is not good enough for this config: see `refuse_unusable`.
    """
    try:
        prepared = Prepared.from_json(storage.read_json(f"{plan.folder}/{PREPARED}"))
    except FileNotFoundError:
        return None
    check_prepared(prepared)
    refuse_unusable(plan, prepared, config, storage)
    return prepared if are_all_there(prepared, storage) else None


def _add(prepared: Prepared, counts: PartitionCounts) -> None:
    prepared.partitions[counts.partition] = PartitionTotals(
        len(counts.shards), counts.rows, counts.prompts, counts.tokens, counts.loss_tokens
    )
    prepared.rows += counts.rows
    prepared.prompts += counts.prompts
    prepared.tokens += counts.tokens
    prepared.loss_tokens += counts.loss_tokens
    prepared.num_shards += len(counts.shards)
    prepared.max_tokens = max(prepared.max_tokens, counts.max_tokens)
    prepared.truncated += counts.truncated
    for found in (counts.duplicates, counts.piece_rejects):
        prepared.left_out.add(found.of(INTENDED))
        prepared.rejects.add(found.of(found.by_reason.keys() - INTENDED))
    add_counts(prepared.prompt_sizes, counts.prompt_sizes)
    prepared.used_ids = union_of_ids([prepared.used_ids, counts.used_ids])
    add_counts(prepared.sources, counts.sources)
    prepared.sources = largest(prepared.sources)
    prepared.without_source += counts.without_source
    prepared.recorded += counts.recorded
    add_counts(prepared.sampling, counts.sampling)
    prepared.sampling = largest(prepared.sampling)


def refuse_unusable(plan: PreparePlan, prepared: Prepared, config: Config, storage: Storage) -> None:
    """Raises UserError when nothing is usable or more than max_reject_share of the rows is rejected: on every run,
    whoever prepared the pool."""
    rejected = prepared.rejects.total
    left_out = prepared.left_out.total
    if prepared.rows_in == 0:
        raise UserError(f"the pool '{plan.pool}' has no rows")
    table = f"all of them are in {storage.url(f'{plan.folder}/rejects')}: see `grape rejects`"
    if prepared.rows == 0 and rejected + left_out == 0:
        raise UserError(f"pool.where leaves none of the {prepared.rows_in} rows of '{plan.pool}': loosen its filters")
    if prepared.rows == 0:
        both = Rejects()
        both.add(prepared.rejects)
        both.add(prepared.left_out)
        raise UserError(
            f"nothing in the pool '{plan.pool}' can be used, {rejected + left_out} of {prepared.rows_in} rows were "
            f"rejected and {prepared.filtered} filtered: {_top_reasons(both)}; {table}"
        )
    share = config.pool.max_reject_share
    if rejected > share * prepared.rows_in:
        raise UserError(
            f"{rejected} of {prepared.rows_in} rows of the pool '{plan.pool}' cannot be used, more than "
            f"pool.max_reject_share {share:g}: {_top_reasons(prepared.rejects)}; {table}"
        )


def _top_reasons(rejects: Rejects) -> str:
    reasons = sorted(rejects.by_reason, key=lambda reason: (-rejects.by_reason[reason], reason))[:TOP_REASONS]
    texts = []
    for reason in reasons:
        example = rejects.examples[reason]
        detail = f": {' '.join(example.detail.split())}" if example.detail else ""
        texts.append(f"{reason} ({rejects.by_reason[reason]}, first {example.file}:{example.row + 1}{detail})")
    return ", ".join(texts)
