"""The `train` section of a config: which job trains, with what, and the settings of our own trainers.

Importing this module imports neither torch nor TRL nor Ray.
"""

from __future__ import annotations

import importlib.util
import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from grape_service.addresses import moving_checkpoint
from grape_service.config.base import Model
from grape_service.config.gate import GateConfig
from grape_service.config.jobs import JobSettings
from grape_service.config.methods import WeightsConfig
from grape_service.config.rounds import RefreshConfig
from grape_service.errors import UserError
from grape_service.install import TRAIN_PACKAGES, install_command
from grape_service.json_types import JsonObject
from grape_service.storage.options import StorageOptions


class LoraSettings(Model):
    """Train a low-rank adapter instead of all weights."""

    r: int = Field(16, ge=1)
    """Rank of the adapter."""
    alpha: int = Field(32, ge=1)
    """The adapter's output is scaled by alpha / r."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout on the adapter's input."""
    target_modules: str | list[str] = "all-linear"
    """Names of the layers that get an adapter; all-linear: every linear layer but the output head."""
    merge: bool = True
    """Whether the final checkpoint is a whole model with the adapter merged in; the adapter is kept beside it."""


class OptimizerSettings(Model):
    """What both trainers share: the model, the optimizer, precision and checkpoints."""

    model: str | None = None
    """Hub id, local folder or s3:// folder of the model to train; null: SFT takes the release's target, RL the
    SFT checkpoint."""
    revision: str | None = None
    """The hub revision of `model`."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Only for models you trust."""
    lora: LoraSettings | None = None
    """Train a low-rank adapter; null trains all weights."""
    precision: Literal["auto", "bf16", "fp32", "pure_bf16"] = "auto"
    """bf16: float32 weights, bfloat16 arithmetic; pure_bf16: weights too; auto: bf16 on a GPU, else fp32."""
    device: Literal["auto", "cpu"] = "auto"
    """cpu leaves a GPU alone."""
    attention: str | None = None
    """Attention implementation for transformers, such as sdpa or flash_attention_2; null: the model's default."""
    learning_rate: float = Field(1e-5, ge=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Steps over which the learning rate grows to its peak."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW's weight decay."""
    max_grad_norm: float = Field(1.0, ge=0)
    """Gradients are scaled down to this norm; 0 leaves them alone."""
    optimizer: str = "adamw_torch"
    """Name of a transformers optimizer, such as adamw_torch or sgd."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: slower, less memory."""
    logging_steps: int = Field(1, ge=1)
    """Steps between two lines of metrics."""
    save_steps: int = Field(500, ge=1)
    """Steps between two checkpoints from which a retry resumes."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of those are kept."""
    seed: int = 0
    """Order of the rows, initial adapter, sampling."""

    @field_validator("model")
    @classmethod
    def _stays(cls, model: str | None) -> str | None:
        if model is not None and moving_checkpoint(model) is not None:
            raise ValueError(
                f"'{model}' moves, and that belongs to target.model: SFT takes the target that the release was made for"
            )
        return model


class SftSettings(OptimizerSettings):
    """Weighted SFT on a release."""

    loss: Literal["uniform", "column", "online"] = "column"
    """uniform: every token has weight 1; column: loss_weights as released; online: weights recomputed at each step from
    the current model: pear (with behavior_logprobs) or probability."""
    base_loss: Literal["nll", "dft"] = "nll"
    """nll: -log p; dft: -p log p with the factor p without gradient (arXiv 2508.05629)."""
    pear: WeightsConfig | None = None
    """Settings of `loss: online`; null: those with which the release was weighed."""
    packing: bool = False
    """Several rows in one sequence, each seeing only itself. The loss is the same; padding is saved."""
    max_length: int | None = Field(None, ge=2)
    """Tokens per sequence: longer rows are left out and counted; null: the longest row (packing needs a number)."""
    max_left_out_share: float = Field(0.1, ge=0, le=1)
    """Share of rows that may train nothing, because they are longer than max_length, have no token with loss or weights
    that are all 0; with more the job is refused."""
    batch_size: int = Field(32, ge=1)
    """Rows (packed sequences with packing) per step, over all processes."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Rows (packed sequences) at once in one process; null: as many as batch_size gives each process, 8 at most."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the rows, if max_steps does not end it before."""
    max_steps: int | None = Field(None, ge=1)
    """Steps at most."""
    shuffle: bool = True
    """Whether rows come in a new random order in each pass."""
    eval_share: float = Field(0.0, ge=0, lt=1)
    """Share of the prompts that is kept back for evaluation, by a digest of prompt_id."""
    eval_steps: int | None = Field(None, ge=1)
    """Steps between two evaluations; null: one at the end."""

    @model_validator(mode="after")
    def _sensible(self) -> SftSettings:
        if self.packing and self.max_length is None:
            raise ValueError("packing needs max_length, the tokens of one packed sequence")
        if self.pear is not None and self.loss != "online":
            raise ValueError(f"pear belongs to loss: online; it has no effect on loss: {self.loss}")
        if self.pear is not None and self.pear.normalize == "dataset":
            raise ValueError(ONLINE_NEEDS_NO_DATASET_MEAN)
        return self


ONLINE_NEEDS_NO_DATASET_MEAN = (
    "loss: online refuses normalize: dataset, since the mean over the dataset is not known at a step; "
    "use normalize: sequence or none"
)


class RewardSettings(Model):
    """How an answer of the policy is judged, from 0 to 1 unless a function says otherwise."""

    type: Literal["math", "exact", "function"] = "math"
    """math: the answer is mathematically equal (math-verify); exact: the same text after trimming;
    function: a Python function."""
    answer_column: str = "answer"
    """Column with the right answer, for math and exact."""
    pattern: str | None = None
    """For exact: a regular expression whose last match's first group is the answer in a response."""
    function: str | None = None
    """For function: its import path, as in my_package.rewards:score. It is called as function(prompt, response,
    row) and returns a number; row holds the other columns."""
    weight: float = 1.0
    """Factor of this reward in the sum."""

    @model_validator(mode="after")
    def _sensible(self) -> RewardSettings:
        if (self.type == "function") != (self.function is not None):
            raise ValueError("type: function needs `function`, and only it takes one")
        if self.function is not None and self.function.count(":") != 1:
            raise ValueError(f"'{self.function}' is not module:name, as in my_package.rewards:score")
        if self.pattern is not None and self.type != "exact":
            raise ValueError("pattern belongs to type: exact")
        try:
            re.compile(self.pattern or "")
        except re.error as error:
            raise ValueError(f"pattern '{self.pattern}' is not a regular expression: {error}") from None
        return self


class PromptSettings(Model):
    """Another pool than the release to take prompts from."""

    path: str
    """File, folder or glob of .jsonl(.gz), .json or .parquet, local or s3://."""
    column: str = "prompt"
    """Column with the prompt: a string, or chat messages."""


class RlSettings(OptimizerSettings):
    """GRPO on the SFT checkpoint."""

    learning_rate: float = Field(1e-6, ge=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "constant"
    """How the learning rate falls after the warm-up."""
    prompts: PromptSettings | None = None
    """Where prompts come from; null: the release, each prompt once."""
    max_prompts: int | None = Field(None, ge=1)
    """Take this many prompts, spread over the pool by a digest of the seed and the prompt."""
    rewards: list[RewardSettings] = Field([RewardSettings()], min_length=1)
    """Added up, each times its weight."""
    steps: int = Field(100, ge=1)
    """Optimizer steps."""
    num_generations: int = Field(8, ge=2)
    """Answers a prompt that are compared with one another."""
    prompts_per_step: int = Field(8, ge=1)
    """Prompts per step, over all processes."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Answers at once in one process's backward pass; null: 8, or all of them if they are fewer."""
    max_response_tokens: int = Field(512, ge=1)
    """Longest answer."""
    temperature: float = Field(1.0, gt=0)
    """Temperature of the answers."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of the answers."""
    beta: float = Field(0.0, ge=0)
    """Weight of the KL term against the starting checkpoint."""
    rollouts: Literal["auto", "vllm", "transformers"] = "auto"
    """Who writes the answers; auto: vLLM in the trainer's own process where there is a GPU and vLLM."""
    vllm_memory: float = Field(0.3, gt=0, lt=1)
    """Share of the GPU's memory for vLLM."""
    extra: JsonObject = {}
    """Further arguments of trl.GRPOConfig."""


class SftTask(Model):
    """All that one SFT process needs: what a settings file holds."""

    stage: Literal["sft"] = "sft"
    """Tells the settings file of an SFT job from that of an RL job."""
    dataset: str
    """Reference of the release, with its version."""
    output: str
    """Local or s3:// folder of this job: checkpoints, metrics, final model."""
    run: str | None = None
    """Name of the run record that started this job."""
    storage: StorageOptions = {}
    """s3fs options; secrets come from the environment."""
    settings: SftSettings = SftSettings()
    """Settings of the trainer."""


class RlTask(Model):
    """All that one RL process needs: what a settings file holds."""

    stage: Literal["rl"] = "rl"
    """Tells the settings file of an RL job from that of an SFT job."""
    dataset: str
    """Reference of the release, with its version."""
    checkpoint: str
    """Local or s3:// folder of the model to start from."""
    output: str
    """Local or s3:// folder of this job: checkpoints, metrics, final model."""
    run: str | None = None
    """Name of the run record that started this job."""
    storage: StorageOptions = {}
    """s3fs options; secrets come from the environment."""
    settings: RlSettings = RlSettings()
    """Settings of the trainer."""


class SftJob(SftSettings, JobSettings):
    """`train.sft`: the job's keys and the SFT trainer's."""

    @model_validator(mode="after")
    def _only_its_own(self) -> SftJob:
        _refuse_trainer_keys(self, SftSettings)
        return self

    def own_settings(self) -> SftSettings:
        """The trainer's part."""
        return SftSettings(**{key: getattr(self, key) for key in SftSettings.model_fields})


class RlJob(RlSettings, JobSettings):
    """`train.rl`: the job's keys and the RL trainer's."""

    after: Literal["last", "each"] = "last"
    """Of several rounds: RL on the checkpoint of the last, or of each, whose checkpoint the next round starts from."""

    @model_validator(mode="after")
    def _only_its_own(self) -> RlJob:
        _refuse_trainer_keys(self, RlSettings)
        return self

    def own_settings(self) -> RlSettings:
        """The trainer's part."""
        return RlSettings(**{key: getattr(self, key) for key in RlSettings.model_fields})


Job = SftJob | RlJob
Stage = Literal["sft", "rl"]
STAGES: tuple[Stage, ...] = ("sft", "rl")


def _refuse_trainer_keys(job: SftJob | RlJob, settings: type[SftSettings] | type[RlSettings]) -> None:
    """Values that differ from the default count: a config that was written out whole holds every key."""
    defaults = settings()
    foreign = [key for key in sorted(settings.model_fields) if getattr(job, key) != getattr(defaults, key)]
    if job.kind != "builtin" and foreign:
        raise ValueError(f"'{foreign[0]}' is for the built-in trainer and has no effect on a {job.kind}: remove it")


class TrainConfig(Model):
    """Jobs that start once the release is there."""

    sft: SftJob | None = None
    """The SFT job."""
    rl: RlJob | None = None
    """The RL job, on the SFT job's checkpoint."""
    rounds: int = Field(1, ge=1, le=1000)
    """How often rows are selected, weighed, released and trained on: each time under the checkpoint of the round
    before, which is trained further."""
    refresh: RefreshConfig = RefreshConfig()
    """What rounds after the first do again."""
    gate: GateConfig | None = None
    """What is measured of SFT's checkpoint, and when RL is not started on it."""

    @model_validator(mode="after")
    def _not_empty(self) -> TrainConfig:
        if not self.jobs:
            raise ValueError("there is nothing to do: give it an sft or an rl section")
        return self

    @model_validator(mode="after")
    def _gate_has_what_it_measures(self) -> TrainConfig:
        if self.gate is None:
            return self
        if self.sft is None:
            raise ValueError("a gate stands after SFT: add an sft section")
        if self.gate.held_out_loss and (self.sft.kind != "builtin" or not self.sft.eval_share):
            raise ValueError("gate.held_out_loss is of prompts that our SFT keeps back: set sft.eval_share, as in 0.05")
        return self

    @model_validator(mode="after")
    def _rounds_follow_each_other(self) -> TrainConfig:
        if self.rounds == 1:
            return self
        if self.sft is None:
            raise ValueError("rounds need an sft section: each starts from the checkpoint that SFT made")
        if self.sft.model is not None:
            raise ValueError("rounds train the target, and then the checkpoint of each round: remove sft.model")
        if self.sft.lora is not None and not self.sft.lora.merge:
            raise ValueError("rounds need whole models: set sft.lora.merge to true")
        return self

    @property
    def jobs(self) -> dict[Stage, Job]:
        """The jobs by stage, SFT first."""
        jobs: dict[Stage, Job] = {}
        if self.sft is not None:
            jobs["sft"] = self.sft
        if self.rl is not None:
            jobs["rl"] = self.rl
        return jobs


def require_train_extra(*more: str) -> None:
    """Raises UserError that names what to install when a package of the train extra is missing."""
    for package in (*TRAIN_PACKAGES, *more):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"training needs the package '{package}': {install_command('train')}")
