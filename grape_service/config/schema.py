"""The config of a run: one YAML file, read into frozen pydantic models.

Every key is a contract of the design. Unknown keys are refused by `config_file.load_config`, which
names the nearest known key. Importing this module imports neither torch nor Ray nor Prefect.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from grape_service.addresses import is_http_address
from grape_service.config.base import HIDDEN, Model
from grape_service.config.checks import ChecksConfig
from grape_service.config.gather import GatherConfig, VerifyConfig
from grape_service.config.methods import ScoreConfig, SelectConfig, WeightsConfig, refuse_race, refuse_unknown_methods
from grape_service.config.own_methods import OwnMethod
from grape_service.config.policy import BehaviorConfig, PolicyConfig
from grape_service.config.pool import Path, PoolConfig
from grape_service.config.training import TrainConfig
from grape_service.errors import UserError
from grape_service.json_types import JsonObject
from grape_service.methods import SELECT, WEIGHTS
from grape_service.rows.statistics import beside_logprob
from grape_service.storage.options import StorageOptions, check_options

NAME_PATTERN = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


class RenderConfig(Model):
    """How prompt and response become tokens."""

    mode: Literal["auto", "chat", "plain"] = "auto"
    """chat uses the model's template, plain joins prompt, separator and response; auto: chat if there is one."""
    separator: str = "\n\n"
    """Text between prompt and response in plain mode."""
    chat_template: str | None = None
    """A Jinja chat template instead of the model's own: its text, or the name of one where the model has several."""
    chat_template_for: list[str] = []
    """Models beside the target's that chat_template renders for too, where they sample, write or judge: rounds name
    those that the target came from."""
    template_kwargs: JsonObject = {}
    """Extra variables for the template, such as enable_thinking."""
    reasoning: Literal["template", "tags", "drop"] = "template"
    """What becomes of a message's reasoning_content where the template has no place for it: template rejects the row,
    tags puts it before the words as <think>…</think>, drop leaves it out."""
    max_tokens: int | None = Field(None, ge=2)
    """Longer rows (prompt and response) are rejected; null: the model's own limit."""


class OutputConfig(Model):
    """Where the release goes."""

    path: Path
    """Folder of datasets, local or s3://."""
    tags: list[str] = ["latest"]
    """Tags that are moved to the new version."""


class WorkersConfig(Model):
    """How the stages run."""

    replicas: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Scoring engines at the same time; auto: as many as fit on the GPUs, or one per node without GPUs."""
    ray_address: str = "auto"
    """auto starts a private Ray; http://head:8265 submits there as one job."""
    max_failed_share: float = Field(0.0, ge=0, le=1)
    """A version is published only if no larger share of the rows failed to be scored; sampling ends with an error where
    a larger share of the prompts failed."""
    shard_tokens: int = Field(65_536, ge=1)
    """Tokens per shard, about: the unit of work, retry and progress."""
    partition_bytes: int = Field(64 * 2**20, ge=1)
    """Bytes of pool a partition, about: what one task of prepare, select, weigh and release holds. Of more than 32
    partitions those below 2 MiB are joined."""
    cpus: int | None = Field(None, ge=1)
    """Tasks at the same time on a private Ray; null: the machine's cores."""
    reuse: Literal["compatible", "exact"] = "compatible"
    """Whether scores that another version of vLLM, transformers or torch made are used: compatible compares engines by
    canary rows, exact refuses them."""

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


def gate_verifier(config: Config) -> VerifyConfig | None:
    """What says which samples of the gate are right."""
    gate = config.train.gate if config.train is not None else None
    if gate is not None and gate.verify is not None:
        return gate.verify
    return config.gather.verify if config.gather is not None else None


class NotifyConfig(Model):
    """Where a notification goes when a run ends."""

    webhook: str | None = None
    """URL that receives a JSON body, signed where GRAPE_WEBHOOK_SECRET is set; null: GRAPE_WEBHOOK of the environment,
    for an address that is itself a secret."""

    @field_validator("webhook")
    @classmethod
    def _http(cls, webhook: str | None) -> str | None:
        if webhook not in (None, HIDDEN) and not is_http_address(webhook):
            raise ValueError("should be an address, such as https://hooks.example.com/grape")
        return webhook


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
    gather: GatherConfig | None = None
    """Candidates that are sampled for the pool's prompts before anything else; null: the pool brings them."""
    select: SelectConfig = SelectConfig()
    """GRAPE, or another method."""
    score: ScoreConfig = ScoreConfig()
    """What is scored beside log-probabilities, and how."""
    weights: WeightsConfig | None = None
    """PEAR or another method, or null."""
    output: OutputConfig
    """Where releases go."""
    workspace: str | None = None
    """Shards and scores; null: .grape beside the output."""
    workers: WorkersConfig = WorkersConfig()
    """How the stages run."""
    storage: StorageOptions = {}
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
    def _check_options(cls, storage: StorageOptions) -> dict[str, Any]:
        check_options(storage)
        return storage

    @model_validator(mode="before")
    @classmethod
    def _behavior_of_gathered(cls, values: Any) -> Any:
        """Whose behavior a gathered sample is needs no telling: what was recorded, or its policy where that was cut."""
        if not isinstance(values, dict) or not values.get("gather"):
            return values
        behavior = values.get("behavior") or {}
        if not isinstance(behavior, dict) or not set(behavior) <= {"sources", "missing", "align", "min_coverage"}:
            return values
        try:
            gathered = GatherConfig.model_validate(values["gather"])
        except ValidationError:  # the field says it, with the whole name of the key
            return values
        sources = {name: gathered.behavior_of(name).model_dump() for name in gathered.policies}
        return {**values, "behavior": {**behavior, "sources": {**sources, **(behavior.get("sources") or {})}}}

    @model_validator(mode="after")
    def _gate_has_a_verifier(self) -> Config:
        gate = self.train.gate if self.train is not None else None
        if gate is None or not gate.pass_at:
            return self
        if (gate_verifier(self) or VerifyConfig()).method == "none":
            raise ValueError("train.gate.pass_at needs to know what is right: give train.gate.verify, or gather.verify")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        refuse_unknown_methods(self.select, self.weights)
        if self.score.race != "off":
            refuse_race(self.select)
        if self.weights is not None and self.weights.needs_behavior and self.behavior is None:
            raise ValueError(
                f"weights: {self.weights.method} needs a behavior: add a behavior section or set weights to null"
            )
        if self.weights is not None:
            policies = [self.target, *(self.behavior.policies() if self.behavior else [])]
            for policy in policies:
                if (key := policy.quantised_by) is not None:
                    raise ValueError(f"weights are not made from quantised scores: remove '{key}' from {policy.model}")
            refresh = self.train.refresh if self.train is not None and self.train.rounds > 1 else None
            if refresh is not None and refresh.select == "again" and refresh.weights == "keep":
                raise ValueError(
                    "train.refresh: rows that a round chooses have no weights to keep: set select to keep, or weights "
                    "to again"
                )
        return self

    def policies(self) -> list[PolicyConfig]:
        """The target, every policy whose behavior is scored, and those that sample."""
        behavior = self.behavior.policies() if self.behavior is not None else []
        sampled = [self.gather.policy(name) for name in self.gather.policies] if self.gather is not None else []
        if self.gather is not None and self.gather.verify.asks_model:
            sampled.append(self.gather.verify.judge)
        return [self.target, *behavior, *(policy for policy in sampled if policy not in (self.target, *behavior))]

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

    def has_own_template(self, policy: PolicyConfig) -> bool:
        """Whether a policy's prompts are rendered by its own model's template: `render.chat_template` is for that of
        the target, whoever samples or writes with that, and of those that `render.chat_template_for` names."""
        return policy.model not in (self.target.model, *self.render.chat_template_for)

    def trained_to(self, checkpoint: str) -> Config:
        """This config with a checkpoint that came of its target as target. `render.chat_template` is for both."""
        target = self.target.model_copy(update={"model": checkpoint, "revision": None, "adapter": None})
        update: dict[str, Any] = {"target": target}
        if self.render.chat_template is not None:
            models = list(dict.fromkeys([*self.render.chat_template_for, self.target.model]))
            update["render"] = self.render.model_copy(update={"chat_template_for": models})
        return self.model_copy(update=update)

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
        select = not self.select.is_unscored and self.select.method not in SELECT
        return select or (self.weights is not None and self.weights.method not in WEIGHTS)

    @model_validator(mode="after")
    def _candidates_have_a_name_of_their_own(self) -> Config:
        if self.gather is not None and self.gather.release == self.name:
            raise ValueError(
                f"gather.release is '{self.name}', as the training set is: give the candidates another name"
            )
        return self

    @property
    def has_own_judge(self) -> bool:
        """Whether a function of the user's says which samples are right; loads nothing."""
        return self.gather is not None and self.gather.verify.is_own

    @property
    def runs_own_code(self) -> bool:
        """Whether code of the user's or of a model's repository is run, which may need whatever is installed."""
        own = self.names_own_methods or self.has_own_judge
        return own or any(policy.trust_remote_code for policy in self.policies())

    def check_methods(self) -> None:
        """Load the user's own methods, before anything is scored. Raises UserError: see `statistics`, `own_methods`."""
        assert self.statistics is not None
        assert self.own_methods is not None

    @property
    def workspace_path(self) -> str:
        """The workspace, with its default filled in."""
        return self.workspace or f"{self.output.path.rstrip('/')}/.grape"
