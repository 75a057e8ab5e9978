"""What the rows of a prompt say of it: how many distinct responses it has, and how many are to be kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from decimal import Decimal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from grape_service.config.methods import SelectConfig
from grape_service.display import nearest as nearest_name
from grape_service.errors import UserError
from grape_service.pool.filters import nearest, number_of
from grape_service.rows.columns import OUR_COLUMNS
from grape_service.rows.ragged import Int64s
from grape_service.select.ranking import pair_numbers
from grape_service.storage.parquet import array_of


def within_token_limits(loss_tokens: Int64s, select: SelectConfig) -> npt.NDArray[np.bool_]:
    """Which candidates [N] with so many tokens with loss may be kept."""
    within = np.ones(len(loss_tokens), dtype=bool)
    if select.min_response_tokens is not None:
        within &= loss_tokens >= select.min_response_tokens
    if select.max_response_tokens is not None:
        within &= loss_tokens <= select.max_response_tokens
    return within


def keep_column(select: SelectConfig) -> str | None:
    """The shard's column that says how many candidates of a prompt are kept, or None for a number."""
    if isinstance(select.keep, int):
        return None
    name = select.keep.column
    return f"pool_{name}" if name in OUR_COLUMNS else name


def check_keep_column(select: SelectConfig, other_columns: Iterable[str]) -> None:
    """Raises UserError where the pool has no column that `select.keep` names."""
    name, columns = keep_column(select), list(other_columns)
    if name is not None and name not in columns:
        near = nearest(name, columns)
        hint = f"; did you mean '{near}'?" if near else ""
        known = ", ".join(columns)
        raise UserError(f"select.keep names the column '{name}', which no row has{hint} (columns: {known})")


def check_source(select: SelectConfig, sources: Collection[str]) -> None:
    """Raises UserError where the method keeps one source alone and it is none of the pool's `sources`."""
    name = select.method.removeprefix("source:")
    if name != select.method and name not in sources:
        known = nearest_name(name, sorted(sources))
        raise UserError(f"select.method keeps the source '{name}', which no row of the pool has; {known}")


def distinct_responses(prompts: Int64s, num_prompts: int, row_keys: pa.Array) -> Int64s:
    """Distinct responses of each prompt [num_prompts]: rows [N] of the same tokens are one, whatever their source."""
    codes = row_keys.dictionary_encode().indices.to_numpy().astype(np.int64)
    _, first = np.unique(pair_numbers(prompts, codes), return_index=True)
    return np.bincount(prompts[first], minlength=num_prompts)


def kept_of_prompts(table: pa.Table, prompts: Int64s, num_prompts: int, select: SelectConfig) -> Int64s:
    """How many candidates of each prompt [num_prompts] are kept at most, as the pool's column says.

    Raises UserError where it says nothing, no whole number of 1 or more, or two things for one prompt.
    """
    name = keep_column(select)
    assert name is not None, "select.keep names a column"
    kept = np.zeros(num_prompts, dtype=np.int64)
    for place, given in enumerate(table[name].to_pylist()):
        prompt, prompt_id = int(prompts[place]), table["prompt_id"][place].as_py()
        value = number_of(str(given)) if isinstance(given, str | Decimal) else given  # a cell of a .csv, a decimal
        if not isinstance(value, int | float) or isinstance(value, bool) or not float(value).is_integer() or value < 1:
            raise UserError(
                f"select.keep: prompt {prompt_id!a} has {given!a} in the column '{name}', not a whole number of 1 or "
                "more: filter such rows with pool.where, or give keep a number"
            )
        if kept[prompt] not in (0, int(value)):
            raise UserError(
                f"select.keep: prompt {prompt_id!a} has both {kept[prompt]} and {int(value)} in the column '{name}': "
                "it must be the same for all its candidates"
            )
        kept[prompt] = int(value)
    return kept


def prompt_limits(table: pa.Table, prompts: Int64s, num_prompts: int, select: SelectConfig) -> tuple[Int64s, Int64s]:
    """(distinct responses, candidates to keep) of each prompt [num_prompts]."""
    distinct = distinct_responses(prompts, num_prompts, array_of(table, "row_key"))
    if isinstance(select.keep, int):
        return distinct, np.full(num_prompts, select.keep, dtype=np.int64)
    return distinct, kept_of_prompts(table, prompts, num_prompts, select)
