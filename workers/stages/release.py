"""The release stage: weighed rows become the data files of a version, then its manifest makes it exist."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypedDict

import orjson
import pyarrow as pa

from grape_service.checks.findings import CheckResult
from grape_service.config.schema import Config, RenderConfig
from grape_service.errors import StageError, UserError
from grape_service.estimate.plan import estimate_against_actual
from grape_service.json_types import JsonObject
from grape_service.models.files import PolicyFiles
from grape_service.prepare.reduce import shard_paths
from grape_service.prepare.result import Prepared
from grape_service.progress.reporter import reporter
from grape_service.release import tags
from grape_service.release.changes import ChangeCounts, Part, parts_of, sentence_of, version_before, write_part_changes
from grape_service.release.claim import Claim, claim_version
from grape_service.release.manifest import CHANGES_FILE, DocumentEntry, FileEntry, ManifestFields, read_manifest
from grape_service.release.proof import RowProof
from grape_service.release.reference import version_folder
from grape_service.release.rows import final_batches
from grape_service.release.why_new import why_new
from grape_service.release.writer import find_identical, publish, write_part, write_table
from grape_service.render.loading import load_renderer
from grape_service.report.examples import (
    ExampleContext,
    ExamplePartition,
    PromptExample,
    chosen_by_partition,
    examples_of_kinds,
    read_examples,
)
from grape_service.report.facts import ExampleChoice, SelectReport, WeightsReport, facts_of_fields
from grape_service.report.page import render_page
from grape_service.report.race import race_figures
from grape_service.rows.columns import CHANGE, RELEASE_FORMAT, computed_fields, needed_fields, release_schema
from grape_service.score.store import ScoreStore
from grape_service.storage.parquet import open_parquet, read_row_groups
from grape_service.storage.storage import Storage
from workers.cluster.tasks import Arguments, run_tasks, together
from workers.outcome import Outcome, release_outcome
from workers.run import Run
from workers.scoring.work import ScoreTotals
from workers.stages.accounts import check_released
from workers.stages.provenance import kin_of, parents, policies_used, rendering_of, resolved_config, write_many_files
from workers.stages.select import Kept
from workers.stages.weigh import PolicyScores, Weighed, WeighedFile


def release(
    run: Run,
    prepared: Prepared,
    scored: ScoreTotals,
    kept: Kept,
    policy_scores: PolicyScores,
    weighed: Weighed,
    checked: list[CheckResult],
    force: bool = False,
) -> Outcome:
    """Publish the weighed rows as an immutable version and move the tags to it."""
    totals = [scored, *policy_scores.totals.values()]
    failed = sum(total.failed for total in totals)
    if run.config.select.windows is not None:  # a candidate with several failed windows is one row
        failed += kept.counts.failed_candidates - scored.failed
    check_failed_share(run.config, [_of_candidates(run, prepared, scored, kept), *policy_scores.totals.values()])
    policies = policies_used(run, policy_scores)
    counts = {
        **({"gather": run.gathered} if run.gathered else {}),
        "pool": prepared.counts(),
        "select": kept.counts.to_json(),
        "weigh": weighed.counts.to_json(),
        "score": {"rows": prepared.rows, "failed": failed},
    }
    message_fields = prepared.message_fields
    other_fields = [
        *prepared.other_fields,
        *needed_fields(
            recorded=bool(prepared.recorded),
            tools=bool(kept.counts.kept_with_tools) or "tool_calls" in message_fields,
            not_told=bool(kept.counts.kept_not_told),
            says_known=says_known(run.config, weighed, bool(prepared.recorded)),
            prefilled=bool(kept.counts.kept_with_prefill),
        ),
    ]
    computed = computed_fields(
        kept.target_statistics, run.config.select.makes_select_score, run.config.score.race != "off"
    )
    columns = Columns(message_fields, other_fields, computed)
    fields = ManifestFields(
        content_digest=content_digest(columns, weighed),
        counts=counts,
        config=resolved_config(run.config),
        parents=parents(run, prepared, policies).model_copy(update={"rendering": rendering_of(run)}),
        statistics={
            "weights": weighed.counts.totals.figures() if run.config.weights else None,
            "report": report_statistics(kept, weighed),
            "race": race_figures(run.config.score, kept.counts),
            "checks": checked,
            "kin": kin_of(run),
            "stage_seconds": {name: round(seconds, 3) for name, seconds in run.stage_seconds.items()},
            "engines": run.engines,
            "estimate": estimate_against_actual(run.workspace, run.config, run.engines, sum(t.tokens for t in totals)),
            "events": run.events.to_json(),
        },
        tags=run.config.output.tags,
    )
    with run.stage("release"):
        version, is_new = publish_rows(
            run, columns, weighed, fields, force, examples=lambda: report_examples(run, prepared, kept, weighed)
        )
    run.delete_intermediate()
    return release_outcome(
        run,
        version,
        is_new,
        prompts=weighed.counts.prompts,
        rows=weighed.counts.rows,
        rejected=prepared.rejects.total,
        failed=failed,
        scored=sum(total.rows for total in totals),
        reused=sum(total.reused for total in totals),
        counts=fields.counts,
    )


def _of_candidates(run: Run, prepared: Prepared, scored: ScoreTotals, kept: Kept) -> ScoreTotals:
    """What the target did of the pool's rows, each of which fails once however many windows of it do."""
    if run.config.select.windows is None:
        return scored
    failed = kept.counts.failed_candidates
    return ScoreTotals(reused=prepared.rows - failed, failed=failed)


def says_known(config: Config, weighed: Weighed, has_recorded: bool) -> bool:
    """Whether a release has to say which of the behavior's log-probabilities are known."""
    return bool(weighed.counts.unknown_tokens) if config.compared_behavior is not None else has_recorded


class ReportStatistics(TypedDict):
    """Of the manifest's statistics, what report.html is made from beside its examples."""

    select: SelectReport
    weights: WeightsReport | None


def report_statistics(kept: Kept, weighed: Weighed) -> ReportStatistics:
    """What report.html is made from, beside its examples."""
    weights = weighed.statistics.to_json() if weighed.statistics is not None else None
    return {"select": kept.statistics.to_json(), "weights": weights}


def report_examples(run: Run, prepared: Prepared, kept: Kept, weighed: Weighed) -> list[PromptExample]:
    """The report's examples: a few prompts with all candidates, token by token."""
    store = ScoreStore(run.workspace, run.policy_id(run.config.target)) if run.config.select.needs_scores else None
    chosen = kept.statistics.examples.chosen
    partitions = [
        ExamplePartition(name, shard_paths(prepared, name), ids, weighed.paths.get(name))
        for name, ids in chosen_by_partition(chosen, prepared.num_partitions).items()
    ]
    context = ExampleContext(run.workspace, store, run.config.select, run.target_tokenizer)
    return read_all_examples(run, context, partitions, chosen)


def read_all_examples(
    run: Run, context: ExampleContext, partitions: list[ExamplePartition], chosen: ExampleChoice
) -> list[PromptExample]:
    """`read_examples` of each partition as Ray tasks, in the order of `chosen`."""
    prompts: dict[str, PromptExample] = {}
    arguments: list[Arguments] = [{"partition": partition} for partition in partitions]
    for found in run_tasks(read_examples, arguments, run.config.workers, {"context": context}):
        prompts.update(found)
    return examples_of_kinds(prompts, chosen, run.target_renderer.token_bytes)


@dataclass(frozen=True)
class Columns:
    """What decides a release's schema."""

    message_fields: list[str]
    other_fields: list[pa.Field]
    computed: list[pa.Field] = field(default_factory=list)

    @property
    def schema(self) -> pa.Schema:
        """The schema."""
        return release_schema(self.message_fields, self.other_fields, self.computed)


@dataclass(frozen=True)
class Version:
    """What every data file of a version is written with."""

    workspace: Storage
    output: Storage
    folder: str
    columns: Columns
    factor: float
    stop_ids: frozenset[int]
    """Tokens that end turns of whoever rendered the rows."""
    renderer: tuple[PolicyFiles, RenderConfig] | None
    """Of rows that the target rendered: what makes its renderer."""


def write_part_task(version: Version, index: int, weighed: WeighedFile) -> FileEntry:
    """One data file of a version from one partition's weighed rows, a sample of them proven (a Ray task).

    Raises StageError for a row that could not be weighed again: see release/proof.py.
    """
    columns, renderer = version.columns, None
    if version.renderer is not None:
        model, render = version.renderer
        renderer = load_renderer(model.here(), model.policy, render, storage_options=model.options)
    with open_parquet(version.workspace, weighed.path) as file:
        proof = RowProof(file.metadata.num_rows, columns.computed, version.stop_ids, renderer)
    batches = final_batches(
        version.workspace,
        weighed.path,
        columns.message_fields,
        columns.other_fields,
        version.factor,
        columns.computed,
        proof.look,
    )
    entry = write_part(version.output, version.folder, index, columns.schema, batches)
    return entry.model_copy(update={"partition": weighed.partition, "proven_rows": proof.rows})


def content_digest(columns: Columns, weighed: Weighed) -> str:
    """What two releases with the same data files have in common: known before those are written."""
    digests = [file.digest for file in weighed.files()]
    parts = [RELEASE_FORMAT, [str(field) for field in columns.schema], digests, weighed.factor]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()


def publish_rows(
    run: Run,
    columns: Columns,
    weighed: Weighed,
    fields: ManifestFields,
    force: bool,
    examples: Callable[[], list[PromptExample]] = list,
) -> tuple[str, bool]:
    """Publish weighed files as a version and move the tags; the version, and whether it is a new one."""
    name, output, files = run.name, run.output, weighed.files()
    same = None if force else find_identical(output, name, fields.content_digest)
    if same is not None:
        point_tags(run, same)
        return same, False
    with claim_version(output, name) as claim:
        rendering = fields.parents.rendering
        by_target = rendering is not None and rendering.digest == run.target_renderer.digest()
        shared = Version(
            run.workspace,
            output,
            claim.folder,
            columns,
            weighed.factor,
            frozenset(rendering.stop_ids if rendering is not None else run.target_renderer.stop_ids),
            (run.shared_files_of(run.config.target), run.config.render) if by_target else None,
        )
        reporter().begin("release", len(files), "files")
        entries = list(
            run_tasks(
                write_part_task,
                ({"index": index, "weighed": file} for index, file in enumerate(files)),
                run.config.workers,
                shared={"version": shared},
                done=lambda number: reporter().advance("release", number),
                together=together(run.config.workers, len(files)),
            )
        )
        reporter().end("release")
        check_released(weighed.counts.rows, entries)
        documents, changes = write_changes(run, claim, entries, fields.parents.release)
        documents += write_many_files(run, claim.folder, fields.parents.release)
        fields.counts.update(changes)
        proven = {"rows": sum(entry.proven_rows for entry in entries), "rendered": shared.renderer is not None}
        fields = fields.model_copy(update={"statistics": {**fields.statistics, "proven": proven}})
        with run.stage("report"):
            job = run.round.job if run.round is not None else None
            page = render_page(facts_of_fields(fields, claim.name, claim.version, entries), examples(), job)
        reason = why_new(output, name, fields, force)
        version = publish(output, claim, columns.schema, entries, fields, page, documents)
    if reason is not None:
        run.event(f"{version.version} is a new version: {reason}")
    return version.version, True


def write_changes(
    run: Run, claim: Claim, entries: list[FileEntry], weighed_from: str | None
) -> tuple[list[DocumentEntry], JsonObject]:
    """changes.parquet of a version that has one before it, and what the manifest's counts say of it; nothing for a
    first version. `weighed_from`: the release that was weighed again.

    One before it that is damaged stops nothing: the counts say that the changes are not known, and why."""
    output = run.output
    before = version_before(output, claim.name, claim.version, weighed_from)
    if before is None:
        return [], {}
    try:
        old = read_manifest(output, claim.name, before)
        parts = parts_of(old.files, version_folder(claim.name, before), entries, claim.folder)
        document, counts = _write_changes(run, claim, parts)
    except UserError as error:
        run.event(f"{claim.name} {before} cannot be read, so nothing is said of the changes since: {error}")
        return [], {"changes": {"since": before, "unreadable": str(error)}}
    run.event(f"since {before}: {sentence_of(counts)}")
    return [document], {"changes": {"since": before, **counts.to_json()}}


def _write_changes(run: Run, claim: Claim, parts: list[Part]) -> tuple[DocumentEntry, ChangeCounts]:
    folder = f"{run.folder}/changes"
    paths = [f"{folder}/{part.name}.parquet" for part in parts]
    reporter().begin("changes", len(parts), "files")
    try:
        found = run_tasks(
            write_part_changes,
            ({"part": part, "out_path": path} for part, path in zip(parts, paths, strict=True)),
            run.config.workers,
            shared={"storage": run.workspace, "output": run.output},
            done=lambda number: reporter().advance("changes", number),
            together=together(run.config.workers, len(parts)),
        )
        counts = sum(found, ChangeCounts())
        tables = (table for path in paths for table in read_row_groups(run.workspace, path))
        return write_table(run.output, claim.folder, CHANGES_FILE, CHANGE, tables), counts
    finally:
        reporter().end("changes")
        run.workspace.delete_folder(folder)


def point_tags(run: Run, version: str, name: str | None = None) -> None:
    """Move the config's tags to a version that was there, of the run's dataset or of `name`, if they are elsewhere; the
    run keeps where those of its own dataset were."""
    moved = tags.point_tags(run.output, name or run.name, run.config.output.tags, version, "unchanged content")
    if name in (None, run.name):
        run.tags_moved |= moved


def check_failed_share(config: Config, totals: Iterable[ScoreTotals]) -> None:
    """Raises StageError when of the rows that a policy scores more failed than the config allows."""
    allowed = config.workers.max_failed_share
    for one in totals:
        rows = one.rows + one.reused + one.stopped + one.failed
        if one.failed > allowed * rows:
            raise StageError(
                f"{one.failed:,} of {rows:,} rows could not be scored, more than workers.max_failed_share {allowed:g} "
                "allows: nothing is published; run again to try them once more, or see the failures folder of the run"
            )
