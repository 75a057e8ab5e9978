"""The config of a run: one YAML file, read into frozen pydantic models.

Every key is a contract of the design. Unknown keys are refused by `config_file.load_config`, which
names the nearest known key. Importing this module imports neither torch nor Ray nor Prefect.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from grape_service.addresses import is_http_address
from grape_service.config.base import Model
from grape_service.config.checks import ChecksConfig
from grape_service.config.methods import (
    SELECT_STATISTICS,
    WEIGHTS_STATISTICS,
    ScoreConfig,
    SelectConfig,
    WeightsConfig,
    refuse_unknown_methods,
)
from grape_service.config.own_methods import OwnMethod
from grape_service.config.policy import BehaviorConfig, PolicyConfig
from grape_service.config.training import TrainConfig
from grape_service.errors import UserError
from grape_service.rows.statistics import beside_logprob
from grape_service.storage.options import check_options

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


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
    at_least: float | None = None
    """Keep rows whose number is this or more."""
    at_most: float | None = None
    """Keep rows whose number is this or less."""

    @model_validator(mode="after")
    def _one_condition(self) -> Filter:
        if not self.model_fields_set - {"column"}:
            raise ValueError(
                f"the filter on '{self.column}' needs a condition: equals, not_equals, one_of, at_least or at_most"
            )
        return self


Shape = Literal["auto", "response", "responses", "columns", "messages"]
Columns = dict[str, str | list[str]]


def _known_columns(columns: Columns) -> Columns:
    unknown = sorted(set(columns) - set(POOL_COLUMNS))
    if unknown:
        raise ValueError(f"'{unknown[0]}' is not one of our columns; they are {', '.join(POOL_COLUMNS)}")
    for ours, theirs in columns.items():
        if isinstance(theirs, list) and (ours != "responses" or len(theirs) < 1):
            raise ValueError(f"'{ours}' is one column's name; a list of names is for responses that have a column each")
    return columns


class PoolGroup(Model):
    """Files of a pool that are read alike."""

    path: str
    """File, folder or glob: local, s3://, or anything that fsspec opens."""
    columns: Columns = {}
    """Our column names to these files'; goes over pool.columns."""
    source: str | None = None
    """The source of every row of these files."""
    where: list[Filter] = []
    """Filters for these files, after those of pool.where."""
    shape: Shape = "auto"
    """What a row of these files is; auto: what pool.shape says."""

    _columns = field_validator("columns")(_known_columns)


def _one_or_groups(path: Any) -> str:
    return "list[PoolGroup]" if isinstance(path, list) else "str"


class PoolConfig(Model):
    """Where the candidates are and which of them are looked at."""

    path: Annotated[
        Annotated[str, Tag("str")] | Annotated[Annotated[list[PoolGroup], Field(min_length=1)], Tag("list[PoolGroup]")],
        Discriminator(_one_or_groups),
    ]
    """File, folder or glob: local, s3://, or anything that fsspec opens; or a list of groups of files that differ, each
    with its path, columns, source and where."""
    columns: Columns = {}
    """Our column names to the pool's, only where they differ; a.b reaches into objects."""
    shape: Shape = "auto"
    """What a row is: a prompt with a response, with a list of responses, with responses in several columns, or messages
    that end with the response; auto finds it and `grape check` says which."""
    where: list[Filter] = []
    """Filters before scoring; ranks, margins and num_candidates count what is left."""
    max_reject_share: float = Field(0.1, ge=0, le=1)
    """The run stops when more than this share of the pool's rows is damaged or unusable; duplicates, truncated and too
    long rows are counted apart."""
    truncated: Literal["reject", "keep"] = "reject"
    """What happens to responses with finish_reason 'length'."""

    _columns = field_validator("columns")(_known_columns)

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
                }
            )
            for group in given
        ]

    @property
    def address(self) -> str:
        """The pool in a sentence: its path, or those of its groups."""
        return self.path if isinstance(self.path, str) else ", ".join(group.path for group in self.path)


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
)
"""The pool columns that have a meaning to us; every other column is carried along."""


class RenderConfig(Model):
    """How prompt and response become tokens."""

    mode: Literal["auto", "chat", "plain"] = "auto"
    """chat uses the model's template, plain joins prompt, separator and response; auto: chat if there is one."""
    separator: str = "\n\n"
    """Text between prompt and response in plain mode."""
    chat_template: str | None = None
    """A Jinja chat template instead of the model's own."""
    template_kwargs: dict[str, Any] = {}
    """Extra variables for the template, such as enable_thinking."""
    max_tokens: int | None = Field(None, ge=2)
    """Longer rows (prompt and response) are rejected; null: the model's own limit."""


class OutputConfig(Model):
    """Where the release goes."""

    path: str
    """Folder of datasets, local or s3://."""
    tags: list[str] = ["latest"]
    """Tags that are moved to the new version."""


class WorkersConfig(Model):
    """How the stages run."""

    replicas: int | Literal["auto"] = "auto"
    """Scoring engines at the same time; auto: as many as fit on the GPUs, or one per node without GPUs."""
    ray_address: str = "auto"
    """auto starts a private Ray; http://head:8265 submits there as one job."""
    max_failed_share: float = Field(0.0, ge=0, le=1)
    """A version is published only if no larger share of the rows failed to be scored."""
    shard_tokens: int = Field(65_536, ge=1)
    """Tokens per shard, about: the unit of work, retry and progress."""
    partition_bytes: int = Field(64 * 2**20, ge=1)
    """Bytes of pool a partition, about: what one task of prepare, select, weigh and release holds. Of more than 32
    partitions those below 2 MiB are joined."""
    cpus: int | None = Field(None, ge=1)
    """Tasks at the same time on a private Ray; null: the machine's cores."""
    reuse: Literal["compatible", "exact"] = "compatible"
    """Whether scores of another engine version are used (checked by canary rows)."""

    @field_validator("ray_address")
    @classmethod
    def _jobs_api(cls, address: str) -> str:
        return address if address == "auto" else jobs_address(address)


def jobs_address(address: str) -> str:
    """The address of a Ray head's Jobs API, as it is. Raises ValueError, without the address where it may be secret."""
    if "@" in address:
        raise ValueError("an address of Ray holds no user or password: the token is in the file RAY_AUTH_TOKEN_PATH")
    if not is_http_address(address) or "?" in address or "#" in address:
        raise ValueError(
            f"'{address.partition('?')[0]}' is not an address of Ray's Jobs API: write http://head:8265, or auto for "
            "a private Ray"
        )
    return address.strip().rstrip("/")


class NotifyConfig(Model):
    """Where a notification goes when a run ends."""

    webhook: str | None = None
    """URL that receives a JSON body, signed where GRAPE_WEBHOOK_SECRET is set; null: GRAPE_WEBHOOK of the environment,
    for an address that is itself a secret."""


class Config(Model):
    """The whole job: one file for a laptop and for a cluster."""

    name: str
    """The dataset's name: a-z, 0-9 and '-', at most 63 characters."""
    pool: PoolConfig
    """The candidates."""
    render: RenderConfig = RenderConfig()
    """From text to tokens."""
    target: PolicyConfig
    """The policy to be trained."""
    behavior: BehaviorConfig | None = None
    """Who wrote the responses; needed for PEAR."""
    select: SelectConfig = SelectConfig()
    """GRAPE, or another method."""
    score: ScoreConfig = ScoreConfig()
    """What is scored beside log-probabilities."""
    weights: WeightsConfig | None = None
    """PEAR or another method, or null."""
    output: OutputConfig
    """Where releases go."""
    workspace: str | None = None
    """Shards and scores; null: .grape beside the output."""
    workers: WorkersConfig = WorkersConfig()
    """How the stages run."""
    storage: dict[str, Any] = {}
    """s3fs options such as endpoint_url; secrets come from the environment."""
    checks: ChecksConfig = ChecksConfig()
    """Data checks by name."""
    train: TrainConfig | None = None
    """Training jobs on the release."""
    notify: NotifyConfig | None = None
    """A webhook on completion and failure."""

    @field_validator("name")
    @classmethod
    def _valid_name(cls, name: str) -> str:
        if not NAME_PATTERN.fullmatch(name):
            raise ValueError(
                f"'{name}' is not a dataset name: use a-z, 0-9 and '-', 63 characters at most, no '-' in front"
            )
        return name

    @field_validator("workspace")
    @classmethod
    def _workspace_not_empty(cls, workspace: str | None) -> str | None:
        if workspace is not None and not workspace.strip():
            raise ValueError("workspace is empty: give a folder or leave the key out")
        return workspace

    @field_validator("storage")
    @classmethod
    def _check_options(cls, storage: dict[str, Any]) -> dict[str, Any]:
        check_options(storage)
        return storage

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        refuse_unknown_methods(self.select, self.weights)
        if self.weights is not None and self.weights.needs_behavior and self.behavior is None:
            raise ValueError("weights: pear needs a behavior: add a behavior section or set weights to null")
        if self.weights is not None:
            policies = [self.target, *(self.behavior.policies() if self.behavior else [])]
            for policy in policies:
                if policy.quantization is not None:
                    raise ValueError(
                        f"weights are not made from quantised scores: remove 'quantization' from {policy.model}"
                    )
        return self

    def policies(self) -> list[PolicyConfig]:
        """The target and every policy whose behavior is scored."""
        return [self.target, *(self.behavior.policies() if self.behavior is not None else [])]

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the target is asked for beside log-probabilities.

        Raises UserError where score.statistics lacks what a method needs, or a method of the user's cannot be loaded.
        """
        weights = self.weights.statistics if self.weights is not None else ()
        needed = {"select": self.select.statistics, "weights": weights}
        if self.score.statistics == "auto":
            return beside_logprob([name for names in needed.values() for name in names])
        for key, names in needed.items():
            for name in names:
                if name not in self.score.statistics:
                    raise UserError(
                        f"score.statistics lacks '{name}', which {key}.method {getattr(self, key).method} needs: "
                        "add it, or set score.statistics to auto"
                    )
        asked = beside_logprob(self.score.statistics)
        if asked and not self.select.needs_scores and self.weights is None:
            raise UserError(
                f"score.statistics asks for {asked[0]}, but nothing is scored: select.method {self.select.method} "
                "needs no scores and there are no weights"
            )
        return asked

    @property
    def compared_behavior(self) -> BehaviorConfig | None:
        """Whose behavior the weights compare with; None where they compare with none."""
        return self.behavior if self.weights is not None and self.weights.needs_behavior else None

    @property
    def own_methods(self) -> list[OwnMethod]:
        """The user's functions. Raises UserError where one cannot be loaded."""
        return [part.own for part in (self.select, self.weights) if part is not None and part.own is not None]

    @property
    def names_own_methods(self) -> bool:
        """Whether it names a function of the user's; loads nothing."""
        select = not self.select.is_unscored and self.select.method not in SELECT_STATISTICS
        return select or (self.weights is not None and self.weights.method not in WEIGHTS_STATISTICS)

    @property
    def runs_own_code(self) -> bool:
        """Whether code of the user's or of a model's repository is run, which may need whatever is installed."""
        return self.names_own_methods or any(policy.trust_remote_code for policy in self.policies())

    def check_methods(self) -> None:
        """Load the user's own methods, before anything is scored. Raises UserError: see `statistics`, `own_methods`."""
        assert self.statistics is not None
        assert self.own_methods is not None

    @property
    def workspace_path(self) -> str:
        """The workspace, with its default filled in."""
        return self.workspace or f"{self.output.path.rstrip('/')}/.grape"
