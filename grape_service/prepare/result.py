"""What prepare leaves behind: counts and names, as the later stages and the manifest need them."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.pool.column_types import Kind, arrow_type
from grape_service.prepare.counts import Rejects, unpack_ids


@dataclass
class PartitionTotals:
    """Counts of one partition."""

    num_shards: int
    rows: int
    prompts: int
    tokens: int
    loss_tokens: int


@dataclass
class Prepared:
    """A prepared pool; `prepared/<prepare_id>/prepared.json`."""

    prepare_id: str
    num_partitions: int
    rows_in: int = 0
    """rows + filtered + rejects.total + left_out.total. Candidates, and rows that are unusable as a whole."""
    filtered: int = 0
    rejects: Rejects = field(default_factory=Rejects)
    """Rows that are damaged or unusable."""
    left_out: Rejects = field(default_factory=Rejects)
    """Duplicates, truncated and too long rows."""
    rows: int = 0
    prompts: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    max_tokens: int = 0
    """Tokens of the longest row."""
    truncated: int = 0
    num_shards: int = 0
    partitions: dict[str, PartitionTotals] = field(default_factory=dict)
    other_columns: dict[str, Kind] = field(default_factory=dict)
    """The pool's other columns under their names in shards; see pool.column_types."""
    message_fields: list[str] = field(default_factory=list)
    """Those of rows.columns.MESSAGE_FIELDS that messages have beside role and content."""
    used_ids: str = ""
    """Token ids with loss; see used_token_ids."""
    sources: dict[str, int] = field(default_factory=dict)
    """Rows by source; the 4096 largest where there are more."""
    without_source: int = 0
    recorded: int = 0
    """Rows with recorded log-probabilities."""
    sampling: dict[str, int] = field(default_factory=dict)
    """Rows with recorded log-probabilities by sampling settings (JSON); 'null' where none are given."""
    prompt_sizes: dict[str, int] = field(default_factory=dict)
    """Prompts by their number of candidates."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """Groups of files: path, files, shapes, rows_in, filtered."""
    passed_over: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Entries below the pool's path that are not read, by reason: count, examples."""

    @property
    def folder(self) -> str:
        """Where it lies in the workspace."""
        return f"prepared/{self.prepare_id}"

    @property
    def used_token_ids(self) -> npt.NDArray[np.int64]:
        """Ids of all tokens with loss, ascending."""
        return unpack_ids(self.used_ids)

    @property
    def other_fields(self) -> list[pa.Field]:
        """The pool's other columns as they stand in shards."""
        return [pa.field(name, arrow_type(kind)) for name, kind in sorted(self.other_columns.items())]

    def counts(self) -> dict[str, Any]:
        """What came in and what became of it, for the manifest."""
        return {
            "rows_in": self.rows_in,
            "filtered": self.filtered,
            "rejected": self.rejects.total,
            "rejected_by_reason": self.rejects.by_reason,
            "left_out": self.left_out.total,
            "left_out_by_reason": self.left_out.by_reason,
            "rows": self.rows,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "truncated": self.truncated,
            "prompt_sizes": {size: self.prompt_sizes[size] for size in sorted(self.prompt_sizes, key=int)},
            "sources": self.sources,
            "groups": self.groups,
            "passed_over": self.passed_over,
            "rejects_table": f"{self.folder}/rejects",
        }

    def to_json(self) -> JsonObject:
        """JSON value."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: JsonObject) -> Self:
        """The inverse of to_json. Raises UserError for one that another version of grape-service wrote."""
        unknown = sorted(value.keys() - {item.name for item in fields(cls)})
        if unknown:
            raise UserError(
                f"the prepared pool {value.get('prepare_id')} has '{unknown[0]}', which this version of grape-service "
                "does not know: use the version that made it"
            )
        value = dict(value)
        for name in ("rejects", "left_out"):
            value[name] = Rejects.from_json(value.get(name) or {"by_reason": {}, "examples": {}})
        value["partitions"] = {name: PartitionTotals(**totals) for name, totals in value["partitions"].items()}
        return cls(**value)
