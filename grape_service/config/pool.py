"""The pool of a config: which files there are, what their columns mean, which rows are looked at."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo, field_validator, model_validator

from grape_service.config.base import Model

POOL_COLUMNS = (
    "prompt",
    "response",
    "responses",
    "source",
    "prompt_id",
    "candidate_id",
    "response_ids",
    "behavior_logprobs",
    "sampling",
    "finish_reason",
    "tools",
    "system_prompt",
    "response_mask",
    "reasoning",
    "chat_template_kwargs",
    "prefill",
)
"""The pool columns that have a meaning to us; every other column is carried along."""


class Filter(Model):
    """Keeps the rows whose column satisfies each condition that is given."""

    column: str
    """Name of the pool's column."""
    equals: Any = None
    """Keep rows whose value equals this."""
    not_equals: Any = None
    """Keep rows whose value differs from this."""
    one_of: list[Any] | None = None
    """Keep rows whose value is one of these."""
    at_least: int | float | None = None
    """Keep rows whose number is this or more."""
    at_most: int | float | None = None
    """Keep rows whose number is this or less."""

    @field_validator("equals", "not_equals", "one_of", "at_least", "at_most")
    @classmethod
    def _short_integers(cls, value: Any, info: ValidationInfo) -> Any:
        """Integers beyond 64 bits as rows have them: their digits, or a float as a bound."""
        if isinstance(value, list):
            return [cls._short_integers(one, info) for one in value]
        if not isinstance(value, int) or -(2**63) <= value < 2**64:
            return value
        return float(value) if info.field_name in ("at_least", "at_most") else str(value)

    @model_validator(mode="after")
    def _one_condition(self) -> Filter:
        if not self.model_fields_set - {"column"}:
            raise ValueError(
                f"the filter on '{self.column}' needs a condition: equals, not_equals, one_of, at_least or at_most"
            )
        return self


VARIABLE = re.compile(r"\$\{?(?P<name>[A-Za-z_][A-Za-z0-9_]*)\}?")


def _path(path: str) -> str:
    """A path as it is. Raises ValueError for an empty one, and for a variable that was not filled in."""
    if not path.strip():
        raise ValueError("the path is empty: is a variable unset where it was written?")
    if variable := VARIABLE.search(path):
        name = variable["name"]
        raise ValueError(f"'{path}' names the variable {name}: write ${{{name}}} and set it, or the path itself")
    return path


Path = Annotated[str, AfterValidator(_path)]
Shape = Literal["auto", "response", "responses", "columns", "messages", "prompts"]
Columns = dict[str, str | list[str]]


def _known_columns(columns: Columns) -> Columns:
    unknown = sorted(set(columns) - set(POOL_COLUMNS))
    if unknown:
        raise ValueError(f"'{unknown[0]}' is not one of our columns; they are {', '.join(POOL_COLUMNS)}")
    for ours, theirs in columns.items():
        if isinstance(theirs, list) and (ours != "responses" or len(theirs) < 1):
            raise ValueError(f"'{ours}' is one column's name; a list of names is for responses that have a column each")
    return columns


SETTINGS = ("temperature", "top_p", "top_k", "min_p", "logprobs")


def _known_settings(settings: dict[str, float | str]) -> dict[str, float | str]:
    for name, value in settings.items():
        if name not in SETTINGS:
            raise ValueError(f"'{name}' says nothing of probabilities; these do: {', '.join(SETTINGS)}")
        if value not in ("raw", "processed") if name == "logprobs" else isinstance(value, str):
            wanted = "raw or processed" if name == "logprobs" else "a number"
            raise ValueError(f"sampling.{name} is {wanted}, not {value!r}")
    return settings


class PoolGroup(Model):
    """Files of a pool that are read alike."""

    path: Path
    """File, folder or glob: local, s3://, or anything that fsspec opens."""
    columns: Columns = {}
    """Our column names to these files'; goes over pool.columns."""
    source: str | None = None
    """The source of every row of these files."""
    where: list[Filter] = []
    """Filters for these files, after those of pool.where."""
    shape: Shape = "auto"
    """What a row of these files is; auto: what pool.shape says."""
    carry: list[str] = []
    """Columns of these files that are carried along as they are, after those of pool.carry."""
    sampling: dict[str, float | str] = {}
    """How responses of these files were sampled; goes over pool.sampling."""

    _columns = field_validator("columns")(_known_columns)
    _sampling = field_validator("sampling")(_known_settings)


def _one_or_groups(path: Any) -> str:
    return "list[PoolGroup]" if isinstance(path, list) else "str"


class MessagesConfig(Model):
    """What is read of chat messages."""

    ignore: list[str] = []
    """Fields of messages that no template is to see and that reject no row; they stay in the release's messages, under
    notes. Fields that cannot belong into a prompt (country, timestamp) need not be named."""

    @field_validator("ignore")
    @classmethod
    def _not_the_words(cls, names: list[str]) -> list[str]:
        if kept := sorted({"role", "content"} & set(names)):
            raise ValueError(f"a message without its {kept[0]} says nothing: leave {kept[0]} out of ignore")
        return names


class PoolConfig(Model):
    """Where the candidates are and which of them are looked at."""

    path: Annotated[
        Annotated[Path, Tag("str")]
        | Annotated[Annotated[list[PoolGroup], Field(min_length=1)], Tag("list[PoolGroup]")],
        Discriminator(_one_or_groups),
    ]
    """File, folder or glob: local, s3://, or anything that fsspec opens; or a list of groups of files that differ, each
    with its path, columns, source and where."""
    columns: Columns = {}
    """Our column names to the pool's, only where they differ; a.b reaches into objects."""
    shape: Shape = "auto"
    """What a row is: a prompt with a response, with a list of responses, with responses in several columns, or messages
    that end with the response; auto finds it and `grape check` says which. prompts is what gather reads of a pool."""
    where: list[Filter] = []
    """Filters before scoring; ranks, margins and num_candidates count what is left."""
    carry: list[str] = []
    """Columns that are carried along as they are, whatever their names mean elsewhere (a response_mask, images): they
    are neither read nor dealt to the responses."""
    sampling: dict[str, float | str] = {}
    """How responses were sampled where their rows do not say: temperature, top_p, top_k, min_p, and in logprobs what
    recorded numbers are: raw, taken before the temperature, or processed, taken after it."""
    max_row_bytes: int = Field(256 * 2**20, ge=1024)
    """A row with more bytes is rejected: a task holds rows in memory, and a small compressed file can be gigabytes."""
    max_reject_share: float = Field(0.1, ge=0, le=1)
    """The run stops when more than this share of the pool's rows is damaged or unusable; duplicates, truncated and too
    long rows are counted apart."""
    truncated: Literal["reject", "keep"] = "reject"
    """What happens to responses with finish_reason 'length'."""
    messages: MessagesConfig = MessagesConfig()
    """Fields of chat messages."""

    _columns = field_validator("columns")(_known_columns)
    _sampling = field_validator("sampling")(_known_settings)

    @property
    def groups(self) -> list[PoolGroup]:
        """The groups of files, each with what holds for all of them filled in."""
        given = [PoolGroup(path=self.path)] if isinstance(self.path, str) else self.path
        return [
            group.model_copy(
                update={
                    "columns": {**self.columns, **group.columns},
                    "where": [*self.where, *group.where],
                    "shape": self.shape if group.shape == "auto" else group.shape,
                    "carry": [*self.carry, *group.carry],
                    "sampling": {**self.sampling, **group.sampling},
                }
            )
            for group in given
        ]

    @property
    def address(self) -> str:
        """The pool in a sentence: its path, or those of its groups."""
        return self.path if isinstance(self.path, str) else ", ".join(group.path for group in self.path)
