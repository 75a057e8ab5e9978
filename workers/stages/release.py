"""The release stage: weighed rows become the data files of a version, then its manifest makes it exist."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
import pyarrow as pa

from grape_service.config.schema import Config
from grape_service.errors import StageError
from grape_service.estimate.plan import estimate_against_actual
from grape_service.prepare.result import Prepared
from grape_service.prepare.shards import shard_paths
from grape_service.progress.reporter import reporter
from grape_service.release.claim import claim_version
from grape_service.release.manifest import FileEntry, ManifestFields
from grape_service.release.rows import final_batches
from grape_service.release.tags import move_tag, read_tag
from grape_service.release.writer import find_identical, publish, write_part
from grape_service.report.examples import chosen_by_partition, examples_of_kinds, read_examples
from grape_service.report.page import facts_of_fields, render_page
from grape_service.rows.columns import BEHAVIOR_KNOWN, RELEASE_FORMAT, made_fields, release_schema
from grape_service.score.store import ScoreStore
from grape_service.storage.storage import Storage
from workers.cluster.tasks import run_tasks, together
from workers.outcome import Outcome, release_outcome
from workers.provenance import parents, policies_used, resolved_config
from workers.run import Run
from workers.scoring.work import ScoreTotals
from workers.stages.select import Kept
from workers.stages.weigh import PolicyScores, Weighed, WeighedFile


def release(
    run: Run,
    prepared: Prepared,
    scored: ScoreTotals,
    kept: Kept,
    policy_scores: PolicyScores,
    weighed: Weighed,
    checked: list[dict[str, Any]],
    force: bool = False,
) -> Outcome:
    """Publish the weighed rows as an immutable version and move the tags to it."""
    totals = [scored, *policy_scores.totals.values()]
    failed = sum(total.failed for total in totals)
    check_failed_share(run.config, failed, prepared.rows)
    policies = policies_used(run, policy_scores)
    counts = {
        "pool": prepared.counts(),
        "select": kept.counts.to_json(),
        "weigh": weighed.counts.to_json(),
        "score": {"rows": prepared.rows, "failed": failed},
    }
    fields = {
        "counts": counts,
        "config": resolved_config(run.config),
        "parents": parents(run, prepared, policies),
        "statistics": {
            "weights": weighed.counts.totals.figures() if run.config.weights else None,
            "report": report_statistics(kept, weighed),
            "checks": checked,
            "stage_seconds": {name: round(seconds, 3) for name, seconds in run.stage_seconds.items()},
            "engines": run.engines,
            "estimate": estimate_against_actual(run.workspace, run.config, run.engines, sum(t.tokens for t in totals)),
            "events": run.events.to_json(),
        },
    }
    message_fields, other_fields = prepared.message_fields, list(prepared.other_fields)
    other_fields += [pa.field("sampling", pa.string())] if prepared.recorded else []
    other_fields += [pa.field("tools", pa.string())] if "tool_calls" in message_fields else []
    other_fields += [BEHAVIOR_KNOWN] if says_known(run.config, weighed, bool(prepared.recorded)) else []
    with run.stage("release"):
        made = made_fields(kept.target_statistics, run.config.select.makes_select_score)
        columns = Columns(message_fields, other_fields, made)
        version, is_new = publish_rows(
            run,
            columns,
            weighed.files(),
            weighed.factor,
            fields,
            force,
            examples=lambda: report_examples(run, prepared, kept, weighed),
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
        counts=counts,
    )


def says_known(config: Config, weighed: Weighed, has_recorded: bool) -> bool:
    """Whether a release has to say which of the behavior's log-probabilities are known."""
    return bool(weighed.counts.unknown_tokens) if config.compared_behavior is not None else has_recorded


def report_statistics(kept: Kept, weighed: Weighed) -> dict[str, Any]:
    """What report.html is made from, beside its examples."""
    weights = weighed.statistics.to_json() if weighed.statistics is not None else None
    return {"select": kept.statistics.to_json(), "weights": weights}


def report_examples(run: Run, prepared: Prepared, kept: Kept, weighed: Weighed) -> list[dict[str, Any]]:
    """The report's examples: a few prompts with all candidates, token by token."""
    store = ScoreStore(run.workspace, run.policy_id(run.config.target)) if run.config.select.needs_scores else None
    chosen = kept.statistics.examples.chosen
    arguments = [
        {"partition": p, "shards": shard_paths(prepared, p), "prompt_ids": ids, "final_path": weighed.paths.get(p)}
        for p, ids in chosen_by_partition(chosen, prepared.num_partitions).items()
    ]
    return read_all_examples(run, arguments, {"store": store, "select": run.config.select}, chosen)


def read_all_examples(
    run: Run, arguments: list[dict[str, Any]], shared: dict[str, Any], chosen: dict[str, list[list[Any]]]
) -> list[dict[str, Any]]:
    """`read_examples` of each partition as Ray tasks, in the order of `chosen`."""
    prompts: dict[str, dict[str, Any]] = {}
    for found in run_tasks(read_examples, arguments, run.config.workers, {"storage": run.workspace, **shared}):
        prompts.update(found)
    return examples_of_kinds(prompts, chosen, run.target_renderer.token_bytes)


@dataclass(frozen=True)
class Columns:
    """What decides a release's schema."""

    message_fields: list[str]
    other_fields: list[pa.Field]
    made: list[pa.Field] = field(default_factory=list)

    @property
    def schema(self) -> pa.Schema:
        """The schema."""
        return release_schema(self.message_fields, self.other_fields, self.made)


def write_part_task(
    workspace: Storage,
    output: Storage,
    version_folder: str,
    index: int,
    weighed: WeighedFile,
    columns: Columns,
    factor: float,
) -> FileEntry:
    """One data file of a version from one partition's weighed rows (a Ray task)."""
    batches = final_batches(workspace, weighed.path, columns.message_fields, columns.other_fields, factor, columns.made)
    entry = write_part(output, version_folder, index, columns.schema, batches)
    return entry.model_copy(update={"partition": weighed.partition})


def content_digest(schema: pa.Schema, digests: list[str], factor: float) -> str:
    """What two releases with the same data files have in common: known before those are written."""
    parts = [RELEASE_FORMAT, [str(field) for field in schema], digests, factor]
    return hashlib.sha256(orjson.dumps(parts)).hexdigest()


def publish_rows(
    run: Run,
    columns: Columns,
    files: list[WeighedFile],
    factor: float,
    fields: dict[str, Any],
    force: bool,
    examples: Callable[[], list[dict[str, Any]]] = list,
) -> tuple[str, bool]:
    """Publish weighed files as a version and move the tags; the version, and whether it is a new one."""
    name, output = run.name, run.output
    digest = content_digest(columns.schema, [file.digest for file in files], factor)
    same = None if force else find_identical(output, name, digest)
    if same is not None:
        point_tags(run, same)
        return same, False
    with claim_version(output, name) as claim:
        reporter().begin("release", len(files), "files")
        entries = list(
            run_tasks(
                write_part_task,
                ({"index": index, "weighed": file} for index, file in enumerate(files)),
                run.config.workers,
                shared={
                    "workspace": run.workspace,
                    "output": output,
                    "version_folder": claim.folder,
                    "columns": columns,
                    "factor": factor,
                },
                done=lambda number: reporter().advance("release", number),
                together=together(run.config.workers, len(files)),
            )
        )
        reporter().end("release")
        manifest_fields = ManifestFields(content_digest=digest, tags=run.config.output.tags, **fields)
        with run.stage("report"):
            page = render_page(facts_of_fields(manifest_fields, claim.name, claim.version, entries), examples())
        version = publish(output, claim, columns.schema, entries, manifest_fields, report_html=page)
    return version.version, True


def point_tags(run: Run, version: str) -> None:
    """Move the config's tags to a version that was there, where they are not on it."""
    for tag in run.config.output.tags:
        current = read_tag(run.output, run.name, tag)
        if current is None or current.version != version:
            move_tag(run.output, run.name, tag, version, who="grape", reason="unchanged content")


def check_failed_share(config: Config, failed: int, rows: int) -> None:
    """Raises StageError when more rows failed than the config allows."""
    allowed = config.workers.max_failed_share
    if failed > allowed * rows:
        raise StageError(
            f"{failed:,} of {rows:,} rows could not be scored, more than workers.max_failed_share {allowed:g} allows: "
            "nothing is published; run again to try them once more, or see the failures folder of the run"
        )
