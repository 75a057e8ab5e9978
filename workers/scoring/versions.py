"""Which engines made the scores that are there: `workers.reuse: exact` takes those of one version alone."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from grape_service.config.policy import PolicyConfig
from grape_service.errors import StageError
from grape_service.score.shards import Shards
from grape_service.score.stopped import stopped_store
from grape_service.score.store import ScoreStore
from workers.cluster.tasks import run_tasks, together
from workers.engines.choose import installed_version
from workers.run import Run
from workers.scoring.rows import read_rows


def refuse_other_versions(
    run: Run, policy: PolicyConfig, store_id: str, shards: Sequence[Shards], statistics: Sequence[str] = ()
) -> None:
    """Raises StageError where `workers.reuse: exact` meets scores of another engine version, file by file."""
    store = ScoreStore(run.workspace, store_id).with_folders()
    stopped = stopped_store(store).with_folders()
    scored = [one for one in shards if store.related(one.partition) or stopped.related(one.partition)]
    found = run_tasks(
        stored_versions,
        ({"shards": one} for one in scored),
        run.config.workers,
        shared={"store": store, "stopped": stopped, "statistics": tuple(statistics)},
        together=together(run.config.workers, len(scored)),
    )
    stored = sorted(set().union(*found))
    here = installed_version(policy, run.files_of(policy).folder, run.config.workers.ray_address == "auto")
    other = next((version for version in stored if version != (here or stored[0])), None)
    if other is not None:
        raise StageError(
            f"scores of {store_id} were made by {other}, and the engine here is {here or stored[0]}: "
            "set workers.reuse to compatible, or score with the same version"
        )


def stored_versions(
    shards: Shards, store: ScoreStore, stopped: ScoreStore, statistics: tuple[str, ...] = ()
) -> set[str]:
    """Which engines made the scores that a partition's rows have, whole or in part (a Ray task)."""
    keys = [read_rows(store.storage, path, ["row_key"]) for path in shards.paths]
    in_part = {stopped.version_of(path) for path in stopped.partition_files(shards.partition)}
    return store.versions(shards.partition, pa.concat_tables(keys)["row_key"], statistics) | in_part
