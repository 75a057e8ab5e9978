"""Scoring kept rows under the policies that PEAR compares, and weighing them: stages of a run on Ray."""

from __future__ import annotations

from dataclasses import dataclass, field

from grape_service.behavior import add_census, behavior_census, recorded_temperatures, refuse_missing
from grape_service.config import Config
from grape_service.derived import Derived, Group, derive_partition
from grape_service.progress import reporter
from grape_service.report.statistics import SelectStatistics, WeighStatistics
from grape_service.scores import ScoreStore
from grape_service.select import SelectCounts
from grape_service.storage import Storage
from grape_service.weigh import BehaviorScores, WeighCounts, dataset_factor, weigh_partition
from workers import publishing
from workers.cluster import run_tasks
from workers.control import score_twice, twice_store
from workers.publishing import file_digest
from workers.replicas import ScoreTotals
from workers.run import Run
from workers.scoring import Engines, ShardFile, score_shards


@dataclass
class Kept:
    """What selection left: a file of kept rows for each partition that has any."""

    paths: dict[str, str]  # partition -> path in the workspace
    counts: SelectCounts
    has_scores: bool  # whether target_logprobs are in the files
    statistics: SelectStatistics


def policy_groups(run: Run, kept: Kept) -> list[Group]:
    """Who scores kept rows: the target where it has not, the target at recorded temperatures, behavior policies."""
    config = run.config
    assert config.behavior is not None
    target, files = config.target, run.target_files
    temperatures = [] if kept.has_scores else [1.0]
    arguments = [(run.workspace, path, config.behavior) for path in kept.paths.values()]
    temperatures += sorted({t for found in run_tasks(recorded_temperatures, arguments, config.workers) for t in found})
    groups = [
        Group(f"target-{t:g}", target, run.policy_id(target, t), files.folder, t, place=None) for t in temperatures
    ]
    for place, policy in enumerate(config.behavior.policies()):
        folder = run.files_of(policy).folder
        groups.append(Group(f"behavior-{place}", policy, run.policy_id(policy), folder, 1.0, place))
    return groups


@dataclass
class Derivations:
    """The shards of kept rows that were made for each group."""

    groups: list[Group] = field(default_factory=list)
    shards: dict[str, dict[str, Derived]] = field(default_factory=dict)  # partition -> group name -> shards
    totals: dict[str, ScoreTotals] = field(default_factory=dict)  # group name -> what scoring did


def score_policies(run: Run, engines: Engines, kept: Kept) -> Derivations:
    """log p of kept responses under whatever PEAR needs beside the target's scores, policy by policy."""
    config = run.config
    if config.weights is None:
        return Derivations()
    groups = policy_groups(run, kept)
    with run.stage("score behavior"):
        arguments = [
            (
                run.workspace,
                path,
                f"{run.folder}/derived/{partition}",
                groups,
                config.behavior,
                config.render,
                run.target_renderer.turn_end_id,
                config.workers.shard_tokens,
            )
            for partition, path in kept.paths.items()
        ]
        made = run_tasks(derive_partition, arguments if groups else [], config.workers)
        derivations = Derivations(groups, dict(zip(kept.paths, made, strict=bool(groups))))

        def score_group(group: Group) -> None:
            shards = [
                ShardFile(shard.path, partition, shard.rows, shard.tokens)
                for partition, by_group in derivations.shards.items()
                for shard in by_group[group.name].shards
            ]
            if shards:
                stage = f"score {group.name}"
                totals = score_shards(run, engines, group.policy, shards, stage, group.temperature)
                derivations.totals[group.name] = totals

        # What the target scores comes first: its engines may be up.
        ours = [group for group in groups if _same_weights(run, group)]
        for group in ours:
            score_group(group)
        score_twice(run, engines, kept.paths)
        for group in groups:
            if group not in ours:
                score_group(group)
    return derivations


def _same_weights(run: Run, group: Group) -> bool:
    return run.policy_id(group.policy) == run.policy_id(run.config.target)


@dataclass
class Weighed:
    """Weighed rows by partition, and what scales them."""

    paths: dict[str, str]
    digests: dict[str, str]  # sha256 of each file
    counts: WeighCounts
    factor: float  # of normalize: dataset
    statistics: WeighStatistics | None = None

    def files(self) -> list[publishing.WeighedFile]:
        """The files in the order of the partitions."""
        return [publishing.WeighedFile(p, path, self.digests[p]) for p, path in self.paths.items()]


def weigh(run: Run, kept: Kept, derivations: Derivations) -> Weighed:
    """Importance weights for the tokens of kept rows; without `weights`, 1 each."""
    config, partitions = run.config, list(kept.paths)
    if config.weights is None:
        found = run_tasks(file_digest, [(run.workspace, path) for path in kept.paths.values()], config.workers)
        counts = WeighCounts(rows=kept.counts.kept_rows, prompts=kept.counts.kept_prompts)
        return Weighed(kept.paths, dict(zip(partitions, found, strict=True)), counts, factor=1.0)
    names = kept.statistics.names
    arguments = [
        (run.workspace, partition, kept.paths[partition], _lookups(run, derivations, partition), config, out, names)
        for partition, out in ((partition, f"{run.folder}/weighed/{partition}.parquet") for partition in partitions)
    ]
    with run.stage("weigh"):
        if config.behavior is not None and config.behavior.missing == "error":
            refuse_missing_behavior(run, kept)
        reporter().begin("weigh", len(arguments), "partitions")
        done = run_tasks(weigh_task, arguments, config.workers, done=lambda *_: reporter().advance("weigh", 1))
        reporter().end("weigh")
    counts = sum((count for count, _, _ in done), WeighCounts())
    statistics = sum((found for _, _, found in done), WeighStatistics.empty(names))
    factor = dataset_factor(counts, config.weights)
    paths = {partition: arguments[place][-2] for place, partition in enumerate(partitions)}
    digests = {partition: digest for partition, (_, digest, _) in zip(partitions, done, strict=True)}
    return Weighed(paths, digests, counts, factor, statistics)


@dataclass(frozen=True)
class Lookups:
    """Where weigh finds the scores that are not in the kept rows themselves."""

    target: ScoreStore | None
    behaviors: list[BehaviorScores]
    at_temperature: dict[float, ScoreStore]
    twice: ScoreStore


def _lookups(run: Run, derivations: Derivations, partition: str) -> Lookups:
    target, behaviors, at_temperature = None, [], {}
    for group in derivations.groups:
        store = ScoreStore(run.workspace, group.policy_id)
        if group.is_target and group.temperature == 1.0:
            target = store
        elif group.is_target:
            at_temperature[group.temperature] = store
        else:
            paths = [shard.path for shard in derivations.shards[partition][group.name].shards]
            behaviors.append(BehaviorScores(store, paths))
    return Lookups(target, behaviors, at_temperature, twice_store(run))


def weigh_task(
    storage: Storage, partition: str, kept_path: str, lookups: Lookups, config: Config, out_path: str, names: list[str]
) -> tuple[WeighCounts, str, WeighStatistics]:
    """weigh_partition, the digest of what it wrote and its statistics for the report (a Ray task)."""
    statistics = WeighStatistics.empty(names)
    counts = weigh_partition(
        storage,
        partition,
        kept_path,
        lookups.target,
        lookups.behaviors,
        config,
        out_path,
        at_temperature=lookups.at_temperature,
        observer=statistics,
        twice_store=lookups.twice,
    )
    return counts, file_digest(storage, out_path), statistics


def refuse_missing_behavior(run: Run, kept: Kept) -> None:
    """Raises UserError when kept rows have no behavior policy and the config says that this is an error."""
    arguments = [(run.workspace, path, run.config.behavior) for path in kept.paths.values()]
    census: dict[str, dict[str, int]] = {}
    for found in run_tasks(behavior_census, arguments, run.config.workers):
        census = add_census(census, found)
    refuse_missing(census)
