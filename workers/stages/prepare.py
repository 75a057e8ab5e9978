"""The prepare stage: a pool becomes shards of whole prompts, as Ray tasks over pieces and partitions."""

from __future__ import annotations

import socket

import numpy as np
import numpy.typing as npt

from grape_service.config.schema import Config
from grape_service.errors import StageError, UserError
from grape_service.estimate.eta import CANDIDATES_PER_PROMPT, POOL_BYTES_PER_TOKEN, earlier_rate, upcoming_stages
from grape_service.keys import text_libraries
from grape_service.models.files import folder_here
from grape_service.models.vocabulary import incompatible_ids
from grape_service.prepare.counts import MAX_NAMED_SOURCES, PieceCounts, summarise_map
from grape_service.prepare.deal import Dealt, deal_group, next_level
from grape_service.prepare.finish import finish_prepare, load_prepared
from grape_service.prepare.map import map_piece
from grape_service.prepare.plan import PREPARED, PreparePlan, plan_prepare, rendering_of
from grape_service.prepare.reduce import reduce_partition
from grape_service.prepare.result import Prepared
from grape_service.progress.reporter import reporter
from grape_service.render.loading import PromptRenderer, load_same_renderer
from grape_service.rows.columns import MAPPED
from grape_service.select.limits import check_keep_column, check_source
from grape_service.storage.storage import Storage
from grape_service.weigh.behavior import (
    refuse_missing_sources,
    refuse_unrecorded,
    refuse_unsaid,
    unknown_sources,
    unsaid_temperature,
)
from workers.cluster.ray import num_cores, num_slots
from workers.cluster.tasks import run_tasks, together
from workers.run import Run
from workers.scoring.engines import Engines
from workers.scoring.metrics import count_rejects


def prepare(run: Run, engines: Engines) -> Prepared:
    """Pool -> shards of whole prompts. An unchanged pool under unchanged settings is not read again.

    The target's engine may load meanwhile.
    """
    config, workspace = run.config, run.workspace
    with run.stage("prepare"):
        run.check_models()
        plan = plan_prepare(config, rendering_of(run.target_renderer, run.target_files), workspace)
        prepared = load_prepared(plan, config, workspace)
        expect_stages(run, plan.pool_bytes, prepared)
        if prepared is None:
            if config.select.needs_scores:
                engines.begin(config.target)
            prepared = read_pool(run, plan)
            expect_stages(run, plan.pool_bytes, prepared)
        else:
            run.event(f"prepare: the pool is unchanged, {prepared.rows:,} rows are there")
        check_keep_column(config.select, prepared.other_columns)
        if len(prepared.sources) < MAX_NAMED_SOURCES:  # others have no counts
            check_source(config.select, prepared.sources)
        refuse_missing_sources(config, prepared.sources, prepared.without_source)
        refuse_unrecorded(config, prepared.recorded, prepared.other_columns)
        if unknown := unknown_sources(config, prepared.sources, prepared.without_source):
            run.event(f"warning: {unknown}")
        check_compatibility(run, prepared.used_token_ids)
        if config.weights is not None and config.behavior is not None:
            temperature = unsaid_temperature(prepared.sampling, config.behavior)
            if temperature is not None:
                refuse_unsaid(temperature)
        count_rejects(run.name, prepared.rejects.by_reason)
    return prepared


def read_pool(run: Run, plan: PreparePlan) -> Prepared:
    """All tasks of a plan: its pool's rows become shards."""
    config, workspace = run.config, run.workspace
    if workspace.exists(f"{plan.folder}/{PREPARED}"):  # see load_prepared; from here on it is not prepared
        run.event("prepare: shards of the prepared pool are gone from the workspace, so it is prepared again")
        workspace.delete(f"{plan.folder}/{PREPARED}")
    threads = max(1, num_cores(config.workers) // max(1, len(plan.pieces)))
    reporter().begin("prepare", len(plan.pieces), "pieces")
    pieces = run_tasks(
        map_task,
        ({"piece": piece.index} for piece in plan.pieces),
        config.workers,
        shared={
            "plan": plan,
            "config": config,
            "folder": run.target_files.folder,
            "digest": run.target_renderer.digest(),
            "libraries": text_libraries(),
            "workspace": workspace,
        },
        done=lambda number: reporter().advance("prepare", number),
        threads=threads,
    )
    summary = summarise_map(plan, pieces, config)
    reporter().end("prepare")
    for bits in plan.level_bits[1:]:
        summary.dealt = _deal(run, plan, summary.dealt, bits)
    reporter().begin("shard", plan.num_partitions, "partitions")
    partitions = run_tasks(
        reduce_partition,
        ({"partition": partition} for partition in plan.partitions),
        config.workers,
        shared={"plan": plan, "config": config, "summary": summary, "storage": workspace},
        done=lambda number: reporter().advance("shard", number),
        together=together(config.workers, plan.num_partitions),
    )
    prepared = finish_prepare(plan, summary, partitions, config, workspace)
    reporter().end("shard")
    return prepared


def _deal(run: Run, plan: PreparePlan, dealt: Dealt, bits: int) -> Dealt:
    """A level between map and reduce."""
    groups = list(dealt.groups(plan.fan_out))
    reporter().begin("deal", len(groups), "buckets")
    bounds = run_tasks(
        deal_group,
        ({"bucket": bucket, "first": first} for bucket, first in groups),
        run.config.workers,
        shared={"plan": plan, "dealt": dealt, "bits": bits, "schema": MAPPED, "storage": run.workspace},
        done=lambda number: reporter().advance("deal", number),
        together=together(run.config.workers, len(groups)),
    )
    found = next_level(plan, dealt, bits, bounds)
    reporter().end("deal")
    return found


def map_task(
    piece: int,
    plan: PreparePlan,
    config: Config,
    folder: str,
    digest: str,
    libraries: dict[str, str],
    workspace: Storage,
) -> PieceCounts:
    """map_piece with a renderer of this process (a Ray task). Raises StageError where it is not that of the run."""
    if (here := text_libraries()) != libraries:
        differ = sorted(name for name in {*here, *libraries} if here.get(name) != libraries.get(name))
        versions = ", ".join(f"{name} {here.get(name)}, not {libraries.get(name)}" for name in differ)
        raise StageError(f"{socket.gethostname()} has {versions}: install the same versions on every node")
    local = folder_here(config.target, folder, config.storage)
    renderer = load_same_renderer(digest, local, config.target, config.render, storage_options=config.storage)
    renders = PromptRenderer(renderer) if config.pool.shape == "prompts" else renderer
    return map_piece(plan, plan.pieces[piece], config, renders, workspace)


def check_compatibility(run: Run, used_ids: npt.NDArray[np.int64]) -> None:
    """Refuse behavior policies under which the token ids with loss mean other bytes, before any scoring."""
    config = run.config
    if config.weights is None or config.behavior is None:
        return
    for policy in config.behavior.policies():
        if run.files_of(policy).folder == run.target_files.folder or run.aligns(policy):
            continue
        bad = incompatible_ids(run.target_renderer.vocabulary, run.renderer_of(policy).vocabulary, used_ids)
        if len(bad):
            raise UserError(
                f"{config.target.model} and {policy.model} cannot be compared token by token: "
                f"{len(bad):,} of the token ids used mean other text there (the first: {bad[0]}); "
                "set behavior.align: bytes, use a behavior policy with the same tokenizer, or weights: null"
            )


def expect_stages(run: Run, pool_bytes: int, prepared: Prepared | None) -> None:
    """Tell the reporter what is to come: all of it, or what follows prepare where that is done."""
    tokens = prepared.tokens if prepared else pool_bytes / POOL_BYTES_PER_TOKEN
    per_prompt = prepared.rows / max(1, prepared.prompts) if prepared else CANDIDATES_PER_PROMPT
    upcoming = upcoming_stages(run.config, tokens, per_prompt, num_slots(run.config.workers), done=prepared is not None)
    reporter().expect(upcoming, earlier_rate(run.workspace, run.policy_id(run.config.target)))
