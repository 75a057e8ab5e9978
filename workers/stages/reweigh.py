"""Re-weighing a release: its rows become kept rows, at the same or another target, and a new version."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from grape_service.config.methods import SelectConfig
from grape_service.errors import UserError
from grape_service.gather.audit import refuse_drifted
from grape_service.prepare.counts import union_of_ids, unpack_ids
from grape_service.release.load import Release, load
from grape_service.release.manifest import ManifestFields, PolicyUse, Rendering
from grape_service.release.rows import other_fields_of, write_kept_rows
from grape_service.report.examples import ExampleContext, ExamplePartition, PromptExample, chosen_by_partition
from grape_service.report.facts import ExampleChoice
from grape_service.report.statistics import SelectStatistics
from grape_service.report.sums import source_names
from grape_service.rows.columns import (
    BEHAVIOR_KNOWN,
    MARGIN_AT_LEAST,
    PLACES,
    PREFILL,
    SAMPLING,
    TARGET_FIELDS,
    TOOLS,
    computed_fields,
)
from grape_service.rows.counts import check_sum
from grape_service.rows.statistics import beside_logprob
from grape_service.select.counts import SelectCounts
from workers.cluster.tasks import run_tasks, together
from workers.outcome import Outcome, release_outcome
from workers.run import Run
from workers.stages.prepare import check_compatibility
from workers.stages.provenance import common_parents, policies_used, resolved_config
from workers.stages.release import (
    Columns,
    check_failed_share,
    content_digest,
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
    check_tokenizer(run, release)
    check_audits(run, release)
    # A manifest names the engine of the run that made it, and some scores may have been there before: with
    # workers.reuse: exact they are looked up in the workspace, file by file.
    same_target = run.config.workers.reuse != "exact" and bool(uses_of_target(run, release))
    other = other_fields_of(release.schema)
    explicit = run.config.score.statistics
    had = [name for name, item in TARGET_FIELDS.items() if same_target and item.name in release.schema.names]
    wanted = [*run.config.weights.statistics, *had, *(explicit if explicit != "auto" else ())]
    statistics = beside_logprob(wanted)
    paths = kept_paths(release, f"{run.folder}/kept")
    with run.stage("load kept rows"):
        done = run_tasks(
            write_kept_rows,
            (
                {
                    "part_path": f"{release.folder}/{entry.path}",
                    "sha256": entry.sha256,
                    "kept_path": paths[entry.partition],
                }
                for entry in release.manifest.files
            ),
            run.config.workers,
            shared={
                "output": release.storage,
                "workspace": run.workspace,
                "other_fields": other,
                "stop_ids": stop_ids_of(run, release),
                "keep_scores": same_target,
                "computed": _computed_fields(statistics, release),
                "known_ids": (run.target_renderer.vocabulary.size, run.config.target.model),
            },
            together=together(run.config.workers, len(paths)),
        )
        rows, packed, has_scores = 0, "", same_target
        for count, ids, unscored in done:
            rows, packed = rows + count, union_of_ids([packed, ids])
            has_scores = has_scores and not unscored
    check_sum(f"rows of {release.reference}", release.manifest.rows, {"loaded": rows})
    check_compatibility(run, unpack_ids(packed))
    prompts = release.manifest.counts.get("select", {}).get("kept_prompts", rows)
    names = (_old_report(release).get("select") or {}).get("names") or source_names({})
    counts = SelectCounts(kept_rows=rows, kept_prompts=prompts)
    return Kept(paths, counts, has_scores, SelectStatistics.empty(names), statistics)


def check_audits(run: Run, release: Release) -> None:
    """Raises UserError where weights would be made of recorded numbers that an audit found to be another policy's, as
    the release was gathered or as the candidates were that are its pool."""
    refuse_drifted(run.config, release.manifest.counts)
    for reference in release.manifest.parents.candidates.values():
        try:
            candidates = load(reference, run.config.storage)
        except UserError as error:
            run.event(f"whether the recorded numbers of {reference} are its policies' own is not known: {error}")
        else:
            refuse_drifted(run.config, candidates.manifest.counts)


def kept_paths(release: Release, folder: str) -> dict[str, str]:
    """A path below `folder` for each partition of a release. Raises UserError where two files are of one."""
    paths = {entry.partition: f"{folder}/{entry.partition}.parquet" for entry in release.manifest.files}
    if len(paths) < len(release.manifest.files):
        raise UserError(
            f"{release.reference} cannot be weighed again: its manifest does not say which prompts each of its data "
            "files holds, or names the same for two: make the release again"
        )
    return paths


def _computed_fields(statistics: Sequence[str], release: Release) -> list[pa.Field]:
    """The columns of `computed_fields` that a release has, with `statistics`."""
    names = release.schema.names
    return computed_fields(statistics, "select_score" in names, MARGIN_AT_LEAST.name in names)


def uses_of_target(run: Run, release: Release) -> list[PolicyUse]:
    """The config's target among the policies that made the release's numbers; none where it is another."""
    target_id = run.policy_id(run.config.target)
    return [use for use in release.manifest.parents.policies if use.role == "target" and use.policy_id == target_id]


def check_tokenizer(run: Run, release: Release) -> None:
    """Raises UserError where the config's target reads the release's token ids with another tokenizer."""
    parents, target = release.manifest.parents, run.config.target.model
    earlier = next((policy for policy in parents.policies if policy.role == "target"), None)
    made_by: Rendering | PolicyUse | None = parents.rendering or earlier
    digest = made_by.tokenizer_digest if made_by is not None else None
    if made_by is None or digest is None:
        if earlier is not None and earlier.policy_id == run.policy_id(run.config.target):
            return
        raise UserError(
            f"{release.reference} does not say which tokenizer made its tokens, since an earlier grape-service wrote "
            "it: weigh it at the target that it was made for, or make the release again"
        )
    if digest != run.target_renderer.vocabulary.digest:
        raise UserError(
            f"{release.reference} holds tokens of the tokenizer of {made_by.model}, and that of {target} is another "
            f"(digest {run.target_renderer.vocabulary.digest[:12]}, not {digest[:12]}): weigh it at a target with the "
            "same tokenizer, or make a release for this one"
        )


def stop_ids_of(run: Run, release: Release) -> list[int]:
    """Tokens that end a turn of whoever rendered the release's rows."""
    rendering = release.manifest.parents.rendering
    return rendering.stop_ids if rendering is not None else sorted(run.target_renderer.stop_ids)


def _old_report(release: Release) -> dict[str, Any]:
    return release.manifest.statistics.get("report") or {}


def release_reweighed(
    run: Run, release: Release, kept: Kept, policy_scores: PolicyScores, weighed: Weighed, force: bool = False
) -> Outcome:
    """Publish the weighed rows as a new version whose parent is `release`."""
    failed = sum(total.failed for total in policy_scores.totals.values())
    check_failed_share(run.config, policy_scores.totals.values())
    columns = Columns(
        [field.name for field in release.schema.field("messages").type.value_type],
        [
            *(field for field in release.schema if field.name in _extra_names(release)),
            *([BEHAVIOR_KNOWN] if says_known(run.config, weighed, BEHAVIOR_KNOWN.name in release.schema.names) else []),
        ],
        _computed_fields(kept.target_statistics, release),
    )
    old = release.manifest
    parents = common_parents(run, policies_used(run, policy_scores)).model_copy(
        update={
            "pool": old.parents.pool,
            "prepare_id": old.parents.prepare_id,
            "prompts": old.parents.prompts,
            "all_files": old.parents.all_files,
            "candidates": old.parents.candidates,
            "release": release.reference,
            "rendering": old.parents.rendering,
            "at_another_target": old.parents.at_another_target or not uses_of_target(run, release),
        }
    )
    own = run.config.weights.own if run.config.weights is not None else None
    chose = [method for method in old.parents.methods if method["kind"] == "select"]
    parents = parents.model_copy(update={"methods": [*chose, *([own.record()] if own is not None else [])]})
    config = {**resolved_config(run.config), "select": old.config.get("select"), "pool": old.config.get("pool")}
    fields = ManifestFields(
        content_digest=content_digest(columns, weighed),
        counts={**old.counts, "weigh": weighed.counts.to_json()},
        config=config,
        parents=parents,
        statistics={
            "weights": weighed.counts.totals.figures(),
            "report": {**report_statistics(kept, weighed), "select": _old_report(release).get("select")},
            "stage_seconds": {name: round(seconds, 3) for name, seconds in run.stage_seconds.items()},
            "engines": run.engines,
            "events": run.events.to_json(),
        },
        tags=run.config.output.tags,
    )
    version, is_new = publish_rows(
        run, columns, weighed, fields, force, examples=lambda: kept_examples(run, release, weighed)
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


def kept_examples(run: Run, release: Release, weighed: Weighed) -> list[PromptExample]:
    """The examples of the release's own report with their new weights: the kept candidates alone, since those that
    lost have no score under this target."""
    chosen: ExampleChoice = (_old_report(release).get("select") or {}).get("examples") or {}
    num_partitions = 2 ** (len(next(iter(weighed.paths))) - 1)
    wanted = chosen_by_partition(chosen, num_partitions)
    select = SelectConfig.model_validate(release.manifest.config.get("select") or {})
    partitions = [
        ExamplePartition(name, [path], wanted[name], path) for name, path in weighed.paths.items() if name in wanted
    ]
    return read_all_examples(run, ExampleContext(run.workspace, None, select, None), partitions, chosen)


def _extra_names(release: Release) -> set[str]:
    return {field.name for field in other_fields_of(release.schema)} | (
        {item.name for item in (SAMPLING, TOOLS, *PLACES, PREFILL)} & set(release.schema.names)
    )
