"""The gather section: who samples candidates for the pool's prompts, how, and what is said of their answers."""

from __future__ import annotations

import re

from pydantic import Field, field_validator, model_validator

from grape_service.config.base import Model
from grape_service.config.policy import PolicyConfig, RecordedBehavior
from grape_service.json_types import JsonObject

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
FUNCTION = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


class SamplingConfig(Model):
    """How a response is sampled."""

    temperature: float = Field(1.0, ge=0)
    """Divides the logits; 0 takes the most probable token each time."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Below 1 it cuts the support: such log-probabilities are no policy's, and PEAR scores the rows again."""
    top_k: int = Field(-1, ge=-1)
    """-1 or 0 is all tokens; more cuts the support, as top_p does."""
    max_tokens: int = Field(4096, ge=1)
    """A response that is still going on then has finish_reason length."""
    stop: list[str] = []
    """Texts that end a response; they stay in it."""
    seed: int = Field(0, ge=0)
    """Part of every sample's own seed."""

    @property
    def cuts_support(self) -> bool:
        """Whether some tokens could not be sampled."""
        return self.top_p < 1 or self.top_k > 0


class GatherPolicy(PolicyConfig):
    """A policy that samples: the keys of a policy, how many samples of each prompt, and how."""

    samples: int = Field(1, ge=1, le=10_000)
    """Responses to each prompt."""
    sampling: JsonObject = {}
    """Keys of gather.sampling that are other for this policy."""


class VerifyConfig(Model):
    """What decides whether a response is right."""

    method: str = "none"
    """none, exact, math, regex, judge (a model is asked), or package.module:function."""
    answer: str | None = None
    """The pool's column with the right answer."""
    pattern: str | None = None
    """Of regex: the first group of its last match is the response's answer; without `answer` a match is right."""
    seconds: float = Field(10.0, gt=0)
    """A response that is not judged by then is unknown."""
    model: str | None = None
    """Of judge: the model that is asked, on the engines that sample."""
    prompt: str | None = None
    """Of judge: what it is asked, with {prompt}, {response} and {answer} in their places. It has to ask for a last line
    that says Verdict: right, Verdict: wrong or Verdict: unknown."""
    policy: JsonObject = {}
    """Of judge: other keys of it as a policy, such as dtype, engine or tensor_parallel."""
    max_tokens: int = Field(1024, ge=1)
    """Of judge: tokens of its answer at most; it answers with its most probable tokens."""

    @property
    def judge(self) -> PolicyConfig:
        """The policy that is asked."""
        assert self.model is not None
        return PolicyConfig.model_validate({**self.policy, "model": self.model})

    @property
    def asks_model(self) -> bool:
        """Whether a model is asked."""
        return self.method == "judge"

    @property
    def while_sampling(self) -> VerifyConfig:
        """What judges samples as they are made: a model is asked afterwards."""
        return VerifyConfig() if self.asks_model else self

    @property
    def is_own(self) -> bool:
        """Whether the method is a function of the user's."""
        return ":" in self.method

    @model_validator(mode="after")
    def _fits(self) -> VerifyConfig:
        known = ("none", "exact", "math", "regex", "judge")
        if self.method not in known and not FUNCTION.fullmatch(self.method):
            raise ValueError("gather.verify.method is none, exact, math, regex, judge or package.module:function")
        if self.asks_model != (self.model is not None):
            raise ValueError("gather.verify.model and method: judge belong together")
        if self.asks_model:
            _ = self.judge
            if self.prompt is not None and "{response}" not in self.prompt:
                raise ValueError("gather.verify.prompt has no {response}: the judge would not see what it judges")
            if self.prompt is not None and "{answer}" in self.prompt and self.answer is None:
                raise ValueError("gather.verify.prompt has {answer}, and verify.answer names no column")
        if self.method in ("exact", "math") and self.answer is None:
            raise ValueError(
                f"gather.verify.method {self.method} needs verify.answer: the column with the right answer"
            )
        if (self.method == "regex") != (self.pattern is not None):
            raise ValueError("gather.verify.pattern and method: regex belong together")
        if self.pattern is not None:
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise ValueError(f"gather.verify.pattern is no regular expression: {error}") from None
        return self


class StopAfter(Model):
    """When a prompt has enough samples."""

    right: int = Field(ge=1)
    """No more samples for a prompt with so many right ones."""


class GatherLimit(Model):
    """What a run may spend on sampling: it ends with what it has when one is met."""

    tokens: int | None = Field(None, ge=1)
    """Sampled tokens of this run."""
    gpu_hours: float | None = Field(None, gt=0)
    """GPUs times hours on units of this run."""
    cost: float | None = Field(None, gt=0)
    """GPU hours times gpu_hour_price."""
    gpu_hour_price: float | None = Field(None, gt=0)
    """What a GPU costs an hour, in the currency of `cost`."""

    @model_validator(mode="after")
    def _cost_needs_a_price(self) -> GatherLimit:
        if self.cost is not None and self.gpu_hour_price is None:
            raise ValueError("gather.limit.cost needs gather.limit.gpu_hour_price")
        return self


class GatherConfig(Model):
    """Sample candidates for the pool's prompts before anything else."""

    policies: dict[str, GatherPolicy] = Field(min_length=1)
    """By the name that becomes the samples' source."""
    sampling: SamplingConfig = SamplingConfig()
    """How all policies sample, unless one says otherwise."""
    verify: VerifyConfig = VerifyConfig()
    """Whether responses are right: the columns verdict, verdict_reason and verifier."""
    stop_after: StopAfter | None = None
    """When a prompt has enough."""
    limit: GatherLimit = GatherLimit()
    """What a run may spend."""
    release: str | None = Field(None, pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Name of a dataset below output.path, as which the gathered candidates are released too: other configs name it as
    their pool."""

    @field_validator("policies")
    @classmethod
    def _named(cls, policies: dict[str, GatherPolicy]) -> dict[str, GatherPolicy]:
        for name, policy in policies.items():
            if not NAME.fullmatch(name):
                raise ValueError(f"gather.policies: '{name}' is no name: use letters, digits, dots, dashes")
            if any("speculative" in key for key in policy.engine_args):
                raise ValueError(
                    f"gather.policies.{name}: speculative decoding changes recorded log-probabilities: leave it out"
                )
        return policies

    @model_validator(mode="after")
    def _sampling_of_each(self) -> GatherConfig:
        for name in self.policies:
            self.sampling_of(name)
        if self.stop_after is not None and self.verify.method == "none":
            raise ValueError("gather.stop_after.right needs gather.verify: nothing is right or wrong without it")
        if self.stop_after is not None and self.verify.asks_model:
            raise ValueError("gather.stop_after.right needs verdicts while sampling, and a judge is asked afterwards")
        return self

    def policy(self, name: str) -> PolicyConfig:
        """A policy without how it samples."""
        given = self.policies[name]
        return PolicyConfig.model_validate({key: getattr(given, key) for key in PolicyConfig.model_fields})

    def behavior_of(self, name: str) -> PolicyConfig | RecordedBehavior:
        """Whose behavior a policy's samples are: what was recorded, or the policy itself where the numbers are of a
        distribution that was cut."""
        sampling = self.sampling_of(name)
        if sampling.cuts_support or sampling.temperature == 0:
            return self.policy(name)
        return RecordedBehavior(column="behavior_logprobs", recorded="raw", policy=self.policy(name))

    def sampling_of(self, name: str) -> SamplingConfig:
        """How a policy samples."""
        return SamplingConfig.model_validate({**self.sampling.model_dump(), **self.policies[name].sampling})
