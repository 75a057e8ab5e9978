"""All candidates that a release was chosen from, with their scores, out of its workspace."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from grape_service.config.methods import SelectConfig
from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import RenderConfig
from grape_service.models.files import resolve_model
from grape_service.prepare.reduce import are_all_there, shard_paths
from grape_service.prepare.result import Prepared
from grape_service.release.load import Release
from grape_service.render.loading import load_renderer
from grape_service.render.renderer import Renderer
from grape_service.rows.columns import LOSS_TOKEN
from grape_service.rows.keys import partition_bits
from grape_service.rows.ragged import list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.score.store import ScoreStore
from grape_service.score.windows import WINDOW_READS
from grape_service.select.methods import select_method, stored_scores
from grape_service.select.steps import Tokenizer
from grape_service.storage.parquet import array_of, read_tables
from grape_service.storage.storage import Storage
from grape_service.storage.workspace import open_workspace


class ScoredPool:
    """The prepared pool and the target's scores of a release."""

    def __init__(self, release: Release, workspace: Storage, prepared: Prepared):
        config = release.manifest.config
        self.release = release
        self.workspace = workspace
        self.prepared = prepared
        self.select = SelectConfig.model_validate(config.get("select") or {})
        self.method = select_method(self.select)
        target = next((p for p in release.manifest.parents.policies if p.role == "target"), None)
        self.store = ScoreStore(workspace, target.policy_id) if target and self.select.needs_scores else None

    @property
    def smallest_wins(self) -> bool:
        """Whether the smallest score is the best."""
        return self.method is not None and self.method.better == "smallest"

    @property
    def has_scores(self) -> bool:
        """Whether its candidates have scores."""
        return self.store is not None or self.method is not None

    @property
    def num_partitions(self) -> int:
        """A power of two."""
        return self.prepared.num_partitions

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's, where a method that cuts steps finds it."""
        config = self.release.manifest.config
        render = RenderConfig.model_validate(config.get("render") or {})
        return Tokenizer(PolicyConfig.model_validate(config["target"]), render, self.release.storage.options)

    def renderer(self) -> Renderer:
        """The target's tokenizer. Raises UserError where the model is no longer there."""
        config = self.release.manifest.config
        policy = PolicyConfig.model_validate(config["target"])
        folder = resolve_model(policy, self.release.storage.options).folder
        render = RenderConfig.model_validate(config.get("render") or {})
        return load_renderer(folder, policy, render, storage_options=self.release.storage.options)

    def tables(self, num_groups: int) -> Iterator[pa.Table]:
        """Candidates [N] of the prompts of each of `num_groups` parts of the pool, at most its partitions:
        prompt_id, candidate_id, source, tokens (counted ones), score (of the release's method, or grape_score where
        that needs none; NaN where there is none)."""
        bits = partition_bits(num_groups)
        names = sorted(self.prepared.partitions)
        for _, members in itertools.groupby(names, key=lambda name: name[: 1 + bits]):
            tables = [table for name in members for table in self._partition(name)]
            yield pa.concat_tables(tables) if tables else EMPTY

    def _partition(self, partition: str) -> Iterator[pa.Table]:
        paths = shard_paths(self.prepared, partition)
        own = self.method.columns if self.method is not None else ()
        steps = WINDOW_READS if self.method is not None and self.method.cuts_steps else ["loss_mask"]
        columns = list(dict.fromkeys(["row_key", *EMPTY.column_names[:3], *steps, *own]))
        for table in read_tables(self.workspace, paths, columns):
            offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
            lengths = segment_sums(mask > 0, offsets)
            counted = np.ones(int(lengths.sum()), bool) if self.select.count_turn_end else mask[mask > 0] == LOSS_TOKEN
            _, scores = stored_scores(self.method, table, counted, self.select, self.store, partition, self.tokenizer)
            table = table.select(EMPTY.column_names[:3])
            table = table.append_column("tokens", pa.array(segment_sums(counted, offsets_from_lengths(lengths))))
            yield table.append_column("score", pa.array(scores))


EMPTY = pa.table(
    {
        "prompt_id": pa.array([], pa.string()),
        "candidate_id": pa.array([], pa.string()),
        "source": pa.array([], pa.string()),
        "tokens": pa.array([], pa.int64()),
        "score": pa.array([], pa.float64()),
    }
)


def open_scored_pool(release: Release) -> ScoredPool | None:
    """What a release was chosen from; None where its workspace no longer has all of it. Raises UserError where a newer
    grape-service wrote there."""
    parents = release.manifest.parents
    if not parents.workspace or not parents.prepare_id:
        return None
    workspace = open_workspace(parents.workspace, release.storage.options)
    try:
        prepared = Prepared.from_json(workspace.read_json(f"prepared/{parents.prepare_id}/prepared.json"))
    except FileNotFoundError:
        return None
    return ScoredPool(release, workspace, prepared) if are_all_there(prepared, workspace) else None
