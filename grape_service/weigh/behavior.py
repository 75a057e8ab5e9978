"""Whose behavior a kept row is: its source's policy, what was recorded while sampling, or nobody's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa

from grape_service.config.policy import BehaviorConfig, PolicyConfig, RecordedBehavior
from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.prepare.counts import MAX_NAMED_SOURCES
from grape_service.rows.columns import NO_SOURCE
from grape_service.rows.counts import add_dicts
from grape_service.rows.ragged import Int64s, list_offsets_and_values, segment_sums
from grape_service.storage.parquet import array_of, read_row_groups
from grape_service.storage.storage import Storage

RECORDED = -1
NOT_ASKED = 1 << 40
NO_POLICY, NOT_RECORDED, CUT_SUPPORT, GREEDY, NOT_FINITE, NOT_RENDERED, SAID_NONE, LOW_COVERAGE = range(-2, -10, -1)
MISSING_REASONS = {
    NO_POLICY: "source has no behavior",
    NOT_RECORDED: "no log-probabilities recorded",
    CUT_SUPPORT: "sampled with top-p, top-k or min-p, which cut the support",
    GREEDY: "sampled at temperature 0",
    NOT_FINITE: "a recorded log-probability is infinite",
    NOT_RENDERED: "its behavior policy cannot render it as the target does",
    SAID_NONE: "behavior.sources says none",
    LOW_COVERAGE: "fewer of its tokens than behavior.min_coverage are compared one with one",
}
"""Why a row has no behavior policy."""


NUMBERS = (None, "raw", "processed")
"""What recorded log-probabilities are said to be."""

BEHAVIOR_READS = ["row_key", "prompt_id", "candidate_id", "source", "sampling", "recorded_logprobs"]
"""The kept columns that say whose behavior a row is."""

CANDIDATE = ["prompt_id", "candidate_id"]
"""What tells kept rows apart: two of them may have the same tokens, and so one row key."""


@dataclass(frozen=True)
class RowBehaviors:
    """Whose behavior each of N kept rows is."""

    policy: Int64s  # [N]: the place in config.behavior.policies(), RECORDED, NOT_ASKED, or one of MISSING_REASONS
    temperature: npt.NDArray[np.float64]  # [N], at which a recorded row was sampled; 1 for others
    sources: pa.Array  # [N]
    candidates: pa.Table  # [N], prompt_id and candidate_id

    @classmethod
    def not_asked(cls, table: pa.Table) -> RowBehaviors:
        """Of rows whose weights compare with no behavior: none of them misses one."""
        num_rows = table.num_rows
        policy = np.full(num_rows, NOT_ASKED, dtype=np.int64)
        return cls(policy, np.ones(num_rows), array_of(table, "source"), candidates_of(table))

    def missing(self) -> npt.NDArray[np.bool_]:
        """Rows [N] that are nobody's."""
        return self.policy < RECORDED

    def without(self, rows: Int64s, reason: int) -> RowBehaviors:
        """The same, but `rows` are nobody's, for one of MISSING_REASONS."""
        policy = self.policy.copy()
        policy[rows] = reason
        return replace(self, policy=policy)

    def census(self) -> dict[str, dict[str, int]]:
        """Rows without a behavior by source and reason."""
        rows = np.flatnonzero(self.missing())
        sources = self.sources.take(pa.array(rows)).fill_null(NO_SOURCE).to_pylist()
        counted = Counter(zip(sources, self.policy[rows].tolist(), strict=True))
        census: dict[str, dict[str, int]] = {}
        for (source, reason), number in sorted(counted.items()):
            census.setdefault(source, {})[MISSING_REASONS[reason]] = number
        return census


def candidates_of(table: pa.Table) -> pa.Table:
    """The columns that tell kept rows apart, of those that a table has."""
    return table.select([name for name in CANDIDATE if name in table.column_names])


def row_behaviors(table: pa.Table, behavior: BehaviorConfig) -> RowBehaviors:
    """Whose behavior each row of a table with BEHAVIOR_READS is."""
    sources = array_of(table, "source")
    policies = behavior.policies()
    encoded = sources.dictionary_encode()
    names = [*encoded.dictionary.to_pylist(), None]
    codes = np.array([_source_code(name, behavior, policies) for name in names], dtype=np.int64)
    policy = codes[encoded.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False).astype(np.int64)]
    temperature = np.ones(table.num_rows)

    recorded = policy == RECORDED
    if recorded.any():
        found = [behavior.of_source(name) for name in names]
        said = [one.recorded if isinstance(one, RecordedBehavior) else None for one in found]
        numbers = np.array([NUMBERS.index(one) for one in said])[encoded.indices.fill_null(len(names) - 1).to_numpy()]
        kind, sampled_at = _recorded(table, numbers)
        policy = np.where(recorded, kind, policy)
        temperature = np.where(policy == RECORDED, sampled_at, 1.0)
    return RowBehaviors(policy, temperature, sources, candidates_of(table))


def behavior_census(storage: Storage, kept_path: str, behavior: BehaviorConfig) -> dict[str, dict[str, int]]:
    """Kept rows of a partition without a behavior, by source and reason; add them up with `add_census`."""
    census: dict[str, dict[str, int]] = {}
    for table in read_row_groups(storage, kept_path, BEHAVIOR_READS):
        census = add_census(census, row_behaviors(table, behavior).census())
    return census


def recorded_temperatures(storage: Storage, kept_path: str, behavior: BehaviorConfig) -> list[float]:
    """Temperatures other than 1 at which kept rows were sampled and so have to be scored again."""
    found: set[float] = set()
    for table in read_row_groups(storage, kept_path, BEHAVIOR_READS):
        found |= set(np.unique(row_behaviors(table, behavior).temperature).tolist())
    return sorted(found - {1.0})


def add_census(left: dict[str, dict[str, int]], right: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The sum of two censuses."""
    return {source: add_dicts(left.get(source, {}), right.get(source, {})) for source in sorted({*left, *right})}


def refuse_missing(census: dict[str, dict[str, int]]) -> None:
    """Raises UserError naming a source whose rows have no behavior, for `missing: error`; a source of which the config
    says so is as it should be."""
    for source, reasons in census.items():
        for reason, number in reasons.items():
            if reason == MISSING_REASONS[SAID_NONE]:
                continue
            raise UserError(
                f"{number} kept {'row' if number == 1 else 'rows'} of source '{source}' cannot be weighed ({reason}): "
                "give it another behavior, or set behavior.missing to uniform or drop"
            )


def _source_code(source: str | None, behavior: BehaviorConfig, policies: list[PolicyConfig]) -> int:
    found = behavior.of_source(source)
    if found is None:
        return SAID_NONE if behavior.has_no_policy(source) else NO_POLICY
    return RECORDED if isinstance(found, RecordedBehavior) else policies.index(found)


def _recorded(table: pa.Table, numbers: Int64s) -> tuple[Int64s, npt.NDArray[np.float64]]:
    """For each row, taken as recorded: RECORDED or why not, and the temperature at which the numbers were taken.

    `numbers` [N] are places in NUMBERS: what the config says of each row's. Raises UserError for rows of which nobody
    says so, where it makes a difference.
    """
    logprobs = array_of(table, "recorded_logprobs")
    offsets, values = list_offsets_and_values(logprobs)
    known = segment_sums(~np.isnan(values), offsets)
    kind = np.where(known > 0, RECORDED, NOT_RECORDED)
    kind[segment_sums(np.isinf(values), offsets) > 0] = NOT_FINITE
    kind[~logprobs.is_valid().to_numpy(zero_copy_only=False)] = NOT_RECORDED

    sampling = array_of(table, "sampling").dictionary_encode()
    settings = [orjson.loads(text) for text in sampling.dictionary.to_pylist()]
    settings = [setting if isinstance(setting, dict) else {} for setting in settings]
    how = [_sampled(setting) for setting in settings] + [(RECORDED, 1.0)]
    codes = sampling.indices.fill_null(len(how) - 1).to_numpy(zero_copy_only=False).astype(np.int64)
    sampled, temperature = (np.array(column)[codes] for column in zip(*how, strict=True))
    own = [setting.get("logprobs") for setting in settings] + [None]
    said = np.array([NUMBERS.index(one) if one in NUMBERS else 0 for one in own])[codes]
    said = np.where(said > 0, said, numbers)
    kind = np.where(kind == RECORDED, sampled, kind)
    needs = np.array([_needs_temperature(setting) for setting in settings] + [False])[codes]
    if ((kind == RECORDED) & needs & (said != NUMBERS.index("raw"))).any():
        raise UserError(_UNKNOWN_TEMPERATURE)
    unsaid = (kind == RECORDED) & (temperature != 1) & (said == 0)
    if unsaid.any():
        refuse_unsaid(float(temperature[unsaid][0]))
    return kind, np.where(NUMBERS.index("raw") == said, 1.0, temperature)


_UNKNOWN_TEMPERATURE = (
    "the pool has log-probabilities that its trainer recorded, and no row says at which temperature they were sampled: "
    "say it with pool.sampling: {temperature: ...}, with logprobs: raw or processed beside it where the trainer's "
    "default was changed, or score the rows again with behavior: {model: ...}"
)


def _needs_temperature(setting: dict[str, Any]) -> bool:
    """Whether numbers may have been taken after a temperature that is not told."""
    return setting.get("logprobs") in ("processed", "unsaid") and setting.get("temperature") is None


def refuse_unsaid(temperature: float) -> None:
    """Raises UserError for log-probabilities of which nobody says whether the temperature is in them."""
    raise UserError(
        f"the pool's recorded log-probabilities were sampled at temperature {temperature:g}, and nobody says whether "
        "it is in the numbers: set behavior.recorded to raw (taken before the temperature, as vLLM records unless told "
        "otherwise) or to processed (taken after it), or sampling.logprobs in the rows"
    )


def unsaid_temperature(sampling: Iterable[str | None], behavior: BehaviorConfig) -> float | None:
    """A temperature of recorded rows, given their `sampling` as JSON, of which nobody says whether it is in the
    numbers; None where there is none, or it depends on the rows' sources."""
    if behavior.column is None or behavior.recorded is not None:
        return None
    for text in sampling:
        setting = orjson.loads(text) if text else None
        if isinstance(setting, dict) and _needs_temperature(setting):
            raise UserError(_UNKNOWN_TEMPERATURE)
        if not isinstance(setting, dict) or setting.get("logprobs") in NUMBERS[1:]:
            continue
        kind, temperature = _sampled(setting)
        if kind == RECORDED and temperature != 1:
            return temperature
    return None


def _sampled(setting: dict[str, Any]) -> tuple[int, float]:
    """RECORDED or why log-probabilities recorded under these settings are not a policy's, and the temperature."""
    temperature = setting.get("temperature")
    temperature = 1.0 if temperature is None else float(temperature)
    top_p, top_k, min_p = setting.get("top_p"), setting.get("top_k"), setting.get("min_p")
    if temperature <= 0:
        return GREEDY, 1.0
    if (top_p is not None and top_p < 1) or (top_k is not None and top_k > 0) or (min_p is not None and min_p > 0):
        return CUT_SUPPORT, temperature
    return RECORDED, temperature


MAX_NAMED = 12


def missing_sources(config: Config, sources: dict[str, int], without_source: int) -> dict[str, int]:
    """Of the sources that may be kept, those without a behavior, with their rows; NO_SOURCE for rows without one."""
    behavior = config.behavior
    if config.weights is None or behavior is None or behavior.sources is None:
        return {}
    wanted = config.select.method.removeprefix("source:") if config.select.method.startswith("source:") else None
    rows = {**sources, **({NO_SOURCE: without_source} if without_source else {})}
    return {
        name: count
        for name, count in rows.items()
        if name not in behavior.sources and count and (wanted is None or name == wanted)
    }


def unknown_sources(config: Config, sources: dict[str, int], without_source: int) -> str | None:
    """A sentence on the names in behavior.sources that are no source of the pool; None where all of them are."""
    behavior = config.behavior
    if config.weights is None or behavior is None or behavior.sources is None:
        return None
    unknown = sorted(set(behavior.sources) - set(sources))
    if not unknown or len(sources) >= MAX_NAMED_SOURCES:  # others have no counts
        return None
    there = ", ".join([*list(sources)[:MAX_NAMED], *([NO_SOURCE] if without_source else [])])
    return f"behavior.sources names {', '.join(unknown)}, which no row of the pool has as its source: there are {there}"


def refuse_unrecorded(config: Config, recorded: int, columns: Iterable[str] = ()) -> None:
    """Raises UserError where the behavior of all rows is a column and `recorded`, the rows that have it, is 0."""
    if config.weights is None or config.behavior is None or config.behavior.column is None or recorded:
        return
    known = ", ".join(sorted(columns)[:MAX_NAMED])
    raise UserError(
        f"behavior.column names '{config.behavior.column}', which no row of the pool has beside response_ids"
        f"{f' (columns: {known})' if known else ''}: name the column with the log-probabilities that were recorded "
        "while sampling, or give another behavior"
    )


def refuse_missing_sources(config: Config, sources: dict[str, int], without_source: int) -> None:
    """Raises UserError that names every source of a pool without a behavior, where `behavior.missing` is error."""
    missing = missing_sources(config, sources, without_source)
    if not missing or config.behavior is None or config.behavior.missing != "error":
        return
    named = [f"{name} ({count:,} rows)" for name, count in list(missing.items())[:MAX_NAMED]]
    more = f" and {len(missing) - MAX_NAMED} more" if len(missing) > MAX_NAMED else ""
    known = ", ".join(list(config.behavior.sources or {})[:MAX_NAMED])
    raise UserError(
        f"behavior.sources has no behavior for these sources of the pool: {', '.join(named)}{more}; it has {known}: "
        "add them (none for a source without a policy), filter them with pool.where, or set behavior.missing to "
        "uniform or drop"
    )
