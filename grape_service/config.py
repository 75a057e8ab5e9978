"""The config of a run: one YAML file, read into frozen pydantic models.

Every key is a contract of the design. Unknown keys are refused by `config_file.load_config`, which
names the nearest known key. Importing this module imports neither torch nor Ray nor Prefect.
"""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from grape_service.storage import refuse_secrets

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class Model(BaseModel):
    """Base of every part of the config: frozen, unknown keys refused, docstrings are descriptions.

    Errors do not repeat the input: it may be a secret in the wrong place.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )


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


class PoolConfig(Model):
    """Where the candidates are and which of them are looked at."""

    path: str
    """File, folder or glob: local, s3://, or anything that fsspec opens."""
    columns: dict[str, str] = {}
    """Our column names to the pool's, only where they differ."""
    where: list[Filter] = []
    """Filters before scoring; ranks, margins and num_candidates count what is left."""
    max_reject_share: float = Field(0.1, ge=0, le=1)
    """The run stops when more than this share of the pool's rows cannot be used."""
    truncated: Literal["reject", "keep"] = "reject"
    """What happens to responses with finish_reason 'length'."""

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        unknown = sorted(set(columns) - set(POOL_COLUMNS))
        if unknown:
            raise ValueError(f"'{unknown[0]}' is not one of our columns; they are {', '.join(POOL_COLUMNS)}")
        return columns


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


class PolicyConfig(Model):
    """A language model as a policy: weights, prompt and the engine that scores with it."""

    model: str
    """Hub id, local folder or s3:// folder."""
    revision: str | None = None
    """The hub revision; null: the newest, recorded in the manifest."""
    adapter: str | None = None
    """A LoRA folder."""
    system_prompt: str | None = None
    """Put before the prompt when it has no system message of its own."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """auto takes vllm where it is importable and runs the model."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision of weights and activations; log-softmax is always float32."""
    quantization: Literal["fp8"] | None = None
    """fp8 is for GRAPE alone; weights are refused on it."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs of one node that one replica takes."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models you trust."""
    engine_args: dict[str, Any] = {}
    """Passed to the engine as they are."""


class RecordedBehavior(Model):
    """Log-probabilities that were recorded when the response was sampled."""

    column: str = "behavior_logprobs"
    """The pool's column: one float for each of response_ids."""
    policy: PolicyConfig | None = None
    """The policy that wrote them, where it can be run: `grape check` scores a sample again and compares."""


Missing = Literal["error", "uniform", "drop"]


class BehaviorConfig(Model):
    """Who wrote the responses: a recorded column, one policy, or one of these per source."""

    column: str | None = None
    """Recorded at sampling time, one float a response token."""
    model: str | None = None
    """A policy like target."""
    revision: str | None = None
    """The hub revision of `model`."""
    adapter: str | None = None
    """A LoRA folder for `model`."""
    system_prompt: str | None = None
    """System prompt under which `model` wrote."""
    engine: Literal["auto", "vllm", "transformers"] = "auto"
    """Engine for `model`."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Precision for `model`."""
    quantization: Literal["fp8"] | None = None
    """Quantization for `model`."""
    tensor_parallel: int = Field(1, ge=1)
    """GPUs a replica for `model`."""
    trust_remote_code: bool = False
    """Run code that comes with `model`."""
    engine_args: dict[str, Any] = {}
    """Passed to the engine of `model` as they are."""
    sources: dict[str, PolicyConfig | RecordedBehavior] | None = None
    """By the row's source: a policy or a recorded column."""
    missing: Missing = "error"
    """Rows without a behavior policy: stop the run, weigh them 1, or leave them out."""

    @model_validator(mode="after")
    def _exactly_one(self) -> BehaviorConfig:
        given = [key for key in ("column", "model", "sources") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("behavior needs exactly one of: column, model, sources")
        if self.model is None:
            policy_keys = set(PolicyConfig.model_fields) & self.model_fields_set
            if policy_keys:
                raise ValueError(f"'{sorted(policy_keys)[0]}' belongs to a behavior with a model")
        return self

    def of_source(self, source: str | None) -> PolicyConfig | RecordedBehavior | None:
        """The behavior of rows of `source`, or None where there is none."""
        if self.column is not None:
            return RecordedBehavior(column=self.column)
        if self.model is not None:
            keys = set(PolicyConfig.model_fields)
            return PolicyConfig(**{key: getattr(self, key) for key in keys})
        assert self.sources is not None
        return self.sources.get(source) if source is not None else None

    def policies(self) -> list[PolicyConfig]:
        """Every distinct policy that has to be run, in the order of the config."""
        if self.sources is None:
            candidates = [self.of_source(None)]
        else:
            candidates = [self.sources[source] for source in sorted(self.sources)]
        distinct: list[PolicyConfig] = []
        for candidate in candidates:
            if isinstance(candidate, PolicyConfig) and candidate not in distinct:
                distinct.append(candidate)
        return distinct


class SelectConfig(Model):
    """Which candidates of a prompt are kept."""

    method: str = "grape"
    """grape | all | random | longest | shortest | source:<name>; those but grape score nothing."""
    keep: int = Field(1, ge=1)
    """How many candidates of a prompt are kept at most."""
    min_response_tokens: int | None = Field(None, ge=1)
    """Candidates with fewer tokens with loss never win."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Candidates with more tokens with loss never win."""
    min_margin: float | None = Field(None, ge=0)
    """Prompts whose best candidate leads by less are left out."""
    max_source_share: float | None = Field(None, gt=0, le=1)
    """No source gives more than this share of the kept rows; its least clear wins pass to the next best."""
    count_turn_end: bool = False
    """Whether the turn-end token counts in grape_score."""
    seed: int = 0
    """For method random."""

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        if method in ("grape", "all", "random", "longest", "shortest"):
            return method
        if method.startswith("source:") and len(method) > len("source:"):
            return method
        raise ValueError(f"'{method}' is not a method; use grape, all, random, longest, shortest or source:<name>")

    @property
    def needs_scores(self) -> bool:
        """Whether every candidate has to be scored before selection."""
        return self.method == "grape" or self.min_margin is not None


class WeightsConfig(Model):
    """PEAR: importance weights for SFT that is to be followed by RL (arXiv 2602.01058, section 3)."""

    method: Literal["pear"] = "pear"
    """The only method there is."""
    level: Literal["token", "block", "sequence"] = "token"
    """What one weight is shared by."""
    gamma: float = Field(0.999, gt=0, le=1)
    """Discount per token that is still to come."""
    ratio_clip: tuple[float, float] = (-0.08, 0.3)
    """Bounds of a token's log ratio."""
    weight_clip: tuple[float, float] = (-10.0, 5.0)
    """Bounds of the log weight."""
    block_size: int = Field(4, ge=1)
    """Tokens a block, at the block level."""
    center: Literal["none", "sequence"] = "none"
    """sequence subtracts a response's mean log ratio before the clip."""
    normalize: Literal["none", "sequence", "dataset"] = "none"
    """Scale weights to a mean of 1 over each response or over the dataset."""

    @model_validator(mode="after")
    def _sensible(self) -> WeightsConfig:
        for key in ("ratio_clip", "weight_clip"):
            low, high = getattr(self, key)
            if not low < high:
                raise ValueError(f"{key} needs its lower bound first: [{high}, {low}]")
        if self.level == "sequence" and self.center != "none":
            raise ValueError("level sequence refuses center, which would erase its weights")
        if self.level == "sequence" and self.normalize == "sequence":
            raise ValueError("level sequence refuses normalize: sequence, which would erase its weights")
        return self


class OutputConfig(Model):
    """Where the release goes."""

    path: str
    """Folder of datasets, local or s3://."""
    tags: list[str] = ["latest"]
    """Tags that are moved to the new version."""


class WorkersConfig(Model):
    """How the stages run."""

    replicas: int | Literal["auto"] = "auto"
    """Scoring engines at the same time; auto: as many as fit on the GPUs, or one a node without GPUs."""
    ray_address: str = "auto"
    """auto starts a private Ray; http://head:8265 submits there as one job."""
    max_failed_share: float = Field(0.0, ge=0, le=1)
    """A version is published only if no larger share of the rows failed to be scored."""
    shard_tokens: int = Field(65_536, ge=1)
    """Tokens a shard, about: the unit of work, retry and progress."""
    partition_bytes: int = Field(64 * 2**20, ge=1)
    """Bytes of pool a partition, about: what one task of prepare, select, weigh and release holds."""
    cpus: int | None = Field(None, ge=1)
    """Tasks at the same time on a private Ray; null: the machine's cores."""
    reuse: Literal["compatible", "exact"] = "compatible"
    """Whether scores of another engine version are used (checked by canary rows)."""


class TrainConfig(Model):
    """Jobs that start once the release is there."""

    sft: dict[str, Any] | None = None
    """Settings of the SFT job; see workers.trainers."""
    rl: dict[str, Any] | None = None
    """Settings of the RL job, on the SFT job's checkpoint."""


class NotifyConfig(Model):
    """Who is told when a run ends."""

    webhook: str | None = None
    """URL that receives a JSON body, signed where GRAPE_WEBHOOK_SECRET is set; null: GRAPE_WEBHOOK of the environment,
    for an address that is itself a secret."""


class CheckConfig(Model):
    """One data check: off, warn or fail, with its settings."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    action: Literal["off", "warn", "fail"] = "warn"
    """What a finding does."""


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
    weights: WeightsConfig | None = None
    """PEAR, or null."""
    output: OutputConfig
    """Where releases go."""
    workspace: str | None = None
    """Shards and scores; null: .grape beside the output."""
    workers: WorkersConfig = WorkersConfig()
    """How the stages run."""
    storage: dict[str, Any] = {}
    """s3fs options such as endpoint_url; secrets come from the environment."""
    checks: dict[str, Literal["off", "warn", "fail"] | CheckConfig] = {}
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
    def _no_secrets(cls, storage: dict[str, Any]) -> dict[str, Any]:
        refuse_secrets(storage)
        return storage

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        if self.weights is not None and self.behavior is None:
            raise ValueError("weights: pear needs a behavior: add a behavior section or set weights to null")
        if self.weights is not None:
            policies = [self.target, *(self.behavior.policies() if self.behavior else [])]
            for policy in policies:
                if policy.quantization is not None:
                    raise ValueError(
                        f"weights are not made from quantised scores: remove 'quantization' from {policy.model}"
                    )
        return self

    @property
    def workspace_path(self) -> str:
        """The workspace, with its default filled in."""
        return self.workspace or f"{self.output.path.rstrip('/')}/.grape"
