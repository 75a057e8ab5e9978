"""Re-weighing a release: its rows become kept rows, at the same or another target, and a new version."""

from __future__ import annotations

from typing import Any

from grape_service.config.methods import SelectConfig
from grape_service.errors import UserError
from grape_service.prepare.counts import union_of_ids, unpack_ids
from grape_service.release.load import Release
from grape_service.release.manifest import FileEntry
from grape_service.release.rows import other_fields_of, write_kept_rows
from grape_service.report.examples import chosen_by_partition
from grape_service.report.statistics import SelectStatistics
from grape_service.report.sums import source_names
from grape_service.rows.columns import BEHAVIOR_KNOWN, made_fields
from grape_service.rows.statistics import TARGET_FIELDS, beside_logprob
from grape_service.select.partition import SelectCounts
from workers.cluster.tasks import run_tasks, together
from workers.outcome import Outcome, release_outcome
from workers.provenance import common_parents, policies_used, resolved_config
from workers.run import Run
from workers.stages.prepare import check_compatibility
from workers.stages.release import (
    Columns,
    check_failed_share,
    publish_rows,
    read_all_examples,
    report_statistics,
    says_known,
)
from workers.stages.select import Kept
from workers.stages.weigh import PolicyScores, Weighed


def load_kept(run: Run, release: Release) -> Kept:
    """The release's rows as kept files; the target's scores are taken over where the target is the same policy.

    Raises UserError where the config has no weights, or a target that reads the tokens differently.
    """
    if run.config.weights is None:
        raise UserError("the config has no weights: add 'weights: {method: pear}' and a behavior to weigh a release")
    run.check_models()
    target_id = run.policy_id(run.config.target)
    same_target = any(p.role == "target" and p.policy_id == target_id for p in release.manifest.parents.policies)
    other = other_fields_of(release.schema)
    explicit = run.config.score.statistics
    had = [name for name, item in TARGET_FIELDS.items() if same_target and item.name in release.schema.names]
    wanted = [*run.config.weights.statistics, *had, *(explicit if explicit != "auto" else ())]
    statistics = beside_logprob(wanted)
    paths = {_partition(entry): f"{run.folder}/kept/{_partition(entry)}.parquet" for entry in release.manifest.files}
    with run.stage("load kept rows"):
        done = run_tasks(
            write_kept_rows,
            (
                {
                    "part_path": f"{release.folder}/{entry.path}",
                    "sha256": entry.sha256,
                    "kept_path": paths[_partition(entry)],
                }
                for entry in release.manifest.files
            ),
            run.config.workers,
            shared={
                "output": release.storage,
                "workspace": run.workspace,
                "other_fields": other,
                "stop_ids": sorted(run.target_renderer.stop_ids),
                "keep_scores": same_target,
                "made": made_fields(statistics, "select_score" in release.schema.names),
            },
            together=together(run.config.workers, len(paths)),
        )
        rows, packed, has_scores = 0, "", same_target
        for count, ids, unscored in done:
            rows, packed = rows + count, union_of_ids([packed, ids])
            has_scores = has_scores and not unscored
    used = unpack_ids(packed)
    if len(used) and used[-1] >= run.target_renderer.vocab_size:
        raise UserError(f"{run.config.target.model} does not have the tokens of {release.reference}: token {used[-1]}")
    check_compatibility(run, used)
    prompts = release.manifest.counts.get("select", {}).get("kept_prompts", rows)
    names = (_old_report(release).get("select") or {}).get("names") or source_names({})
    counts = SelectCounts(kept_rows=rows, kept_prompts=prompts)
    return Kept(paths, counts, has_scores, SelectStatistics.empty(names), statistics)


def _partition(entry: FileEntry) -> str:
    return getattr(entry, "partition", "b")


def _old_report(release: Release) -> dict[str, Any]:
    return release.manifest.statistics.get("report") or {}


def release_reweighed(
    run: Run, release: Release, kept: Kept, policy_scores: PolicyScores, weighed: Weighed, force: bool = False
) -> Outcome:
    """Publish the weighed rows as a new version whose parent is `release`."""
    failed = sum(total.failed for total in policy_scores.totals.values())
    check_failed_share(run.config, failed, kept.counts.kept_rows)
    columns = Columns(
        [field.name for field in release.schema.field("messages").type.value_type],
        [
            *(field for field in release.schema if field.name in _extra_names(release)),
            *([BEHAVIOR_KNOWN] if says_known(run.config, weighed, BEHAVIOR_KNOWN.name in release.schema.names) else []),
        ],
        made_fields(kept.target_statistics, "select_score" in release.schema.names),
    )
    old = release.manifest
    parents = common_parents(run, policies_used(run, policy_scores)).model_copy(
        update={"pool": old.parents.pool, "prepare_id": old.parents.prepare_id, "release": release.reference}
    )
    own = run.config.weights.own if run.config.weights is not None else None
    chose = [method for method in old.parents.methods if method["kind"] == "select"]
    parents = parents.model_copy(update={"methods": [*chose, *([own.record()] if own is not None else [])]})
    config = {**resolved_config(run.config), "select": old.config.get("select"), "pool": old.config.get("pool")}
    fields = {
        "counts": {**old.counts, "weigh": weighed.counts.to_json()},
        "config": config,
        "parents": parents,
        "statistics": {
            "weights": weighed.counts.totals.figures(),
            "report": {**report_statistics(kept, weighed), "select": _old_report(release).get("select")},
            "stage_seconds": {name: round(seconds, 3) for name, seconds in run.stage_seconds.items()},
            "engines": run.engines,
            "events": run.events.to_json(),
        },
    }
    version, is_new = publish_rows(
        run,
        columns,
        weighed.files(),
        weighed.factor,
        fields,
        force,
        examples=lambda: kept_examples(run, release, weighed),
    )
    run.delete_intermediate()
    totals = policy_scores.totals.values()
    return release_outcome(
        run,
        version,
        is_new,
        prompts=weighed.counts.prompts,
        rows=weighed.counts.rows,
        failed=failed,
        scored=sum(total.rows for total in totals),
        reused=sum(total.reused for total in totals),
    )


def kept_examples(run: Run, release: Release, weighed: Weighed) -> list[dict[str, Any]]:
    """The examples of the release's own report with their new weights: the kept candidates alone, since those that
    lost have no score under this target."""
    chosen: dict[str, list[list[Any]]] = (_old_report(release).get("select") or {}).get("examples") or {}
    num_partitions = 2 ** (len(next(iter(weighed.paths))) - 1)
    wanted = chosen_by_partition(chosen, num_partitions)
    select = SelectConfig.model_validate(release.manifest.config.get("select") or {})
    arguments = [
        {"partition": partition, "shards": [path], "prompt_ids": wanted[partition], "final_path": path}
        for partition, path in weighed.paths.items()
        if partition in wanted
    ]
    return read_all_examples(run, arguments, {"store": None, "select": select}, chosen)


def _extra_names(release: Release) -> set[str]:
    return {field.name for field in other_fields_of(release.schema)} | (
        {"sampling", "tools"} & set(release.schema.names)
    )
