"""Policies: the target, and whose behavior the responses are."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, GetJsonSchemaHandler, SerializerFunctionWrapHandler, model_serializer, model_validator
from pydantic_core import CoreSchema

from grape_service.config.base import Model
from grape_service.json_types import JsonObject


class PolicyConfig(Model):
    """A language model as a policy: weights, prompt and the engine that scores with it."""

    model: str
    """Hub id, local folder or s3:// folder; folder/@latest and folder/@step-1000 are the newest whole checkpoint of a
    training's folder and that of a step."""
    revision: str | None = None
    """The hub revision; null: the newest, recorded in the manifest."""
    adapter: str | None = None
    """A LoRA folder; @latest and @step-1000 as for `model`."""
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
    allow_pickle: bool = False
    """Read weights from pickle files (.bin), which can run code. Only for models you trust."""
    engine_args: JsonObject = {}
    """Passed to the engine as they are. What they quantise counts as quantised, as `quantization` does."""

    @property
    def quantised_by(self) -> str | None:
        """The key that has scores made in fewer bits than `dtype`: quantization, or one of engine_args; else None."""
        if self.quantization is not None:
            return "quantization"
        return next((f"engine_args.{key}" for key, value in self.engine_args.items() if _quantises(key, value)), None)


_FULL: tuple[Any, ...] = (None, False, "", "none", "auto", "half", "float", "bfloat16", "float16", "float32", {}, [])
"""Values with which a key that could quantise does not."""
_FEWER_BITS = re.compile(
    r"(?<![a-z0-9])(fp[468]|[iu]?int[2348]|nf4|mxfp\d|nvfp4|w\d+a\d+|awq|gptq|bitsandbytes|bnb|gguf|hqq|torchao)(?![a-z])"
)


def _quantises(key: str, value: Any) -> bool:
    """Whether an engine's setting, or one inside of it, says that weights, activations or the cache have fewer bits."""
    if value in _FULL:
        return False
    if "quant" in key or key == "kv_cache_dtype":
        return True
    if isinstance(value, dict):
        return any(_quantises(str(name), one) for name, one in value.items())
    if isinstance(value, list | tuple):
        return any(_quantises(key, one) for one in value)
    return isinstance(value, str) and "/" not in value and _FEWER_BITS.search(value.lower()) is not None


Recorded = Literal["raw", "processed"]


class RecordedBehavior(Model):
    """Log-probabilities that were recorded when the response was sampled."""

    column: str = "behavior_logprobs"
    """The pool's column: one float for each of response_ids."""
    recorded: Recorded | None = None
    """What the numbers are: raw, taken before the temperature (what vLLM and servers built on it record unless told
    otherwise), or processed, taken after it. `sampling.logprobs` of a row goes first."""
    policy: PolicyConfig | None = None
    """The policy that wrote them, where it can be run: `grape check` scores a sample again and compares."""


Missing = Literal["error", "uniform", "drop"]
NoPolicy = Literal["none"]


class BehaviorConfig(Model):
    """Who wrote the responses: a recorded column, one policy, or one of these per source.

    In YAML the keys of the one policy stand beside `missing`: {model: ..., dtype: ..., missing: uniform}.
    """

    column: str | None = None
    """Recorded at sampling time, one float per response token."""
    policy: PolicyConfig | None = None
    """The one policy that wrote all responses; its keys are given directly."""
    sources: dict[str, PolicyConfig | RecordedBehavior | NoPolicy] | None = None
    """By the row's source: a policy, a recorded column, or none for a source without a policy, such as people: its rows
    get weight 1, or are left out where missing is drop."""
    recorded: Recorded | None = None
    """Of a recorded column: raw or processed, that is taken before or after the temperature."""
    missing: Missing = "error"
    """Rows without a behavior policy: stop the run, give them weight 1, or leave them out."""
    align: Literal["ids", "bytes"] = "ids"
    """How policies with other tokenizers than the target's are compared: ids refuses them where an id used means other
    text there; bytes compares spans of the response's text that both cover exactly."""
    min_coverage: float = Field(0.5, ge=0, le=1)
    """With align: bytes, rows of which a smaller share of the target's tokens is in spans of one token each count as
    without a behavior policy."""

    @model_validator(mode="before")
    @classmethod
    def _policy_keys(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        if "policy" in values:
            raise ValueError("unknown key 'policy'; give the policy's keys directly: model, dtype, ...")
        if isinstance(values.get("sources"), dict):
            sources = {name: "none" if one is None else one for name, one in values["sources"].items()}
            values = {**values, "sources": sources}
        own = {key: value for key, value in values.items() if key not in PolicyConfig.model_fields}
        policy = {key: value for key, value in values.items() if key in PolicyConfig.model_fields}
        if not policy:
            return own
        if "model" not in policy:
            if len({"column", "sources"} & set(own)) == 0:
                raise ValueError("behavior needs exactly one of: column, model, sources")
            raise ValueError(f"'{sorted(policy)[0]}' belongs to a behavior with a model")
        return {**own, "policy": policy}

    @model_validator(mode="after")
    def _exactly_one(self) -> BehaviorConfig:
        given = [key for key in ("column", "policy", "sources") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError("behavior needs exactly one of: column, model, sources")
        if self.align == "ids" and self.min_coverage != type(self).model_fields["min_coverage"].default:
            raise ValueError("behavior.min_coverage belongs to align: bytes")
        if self.recorded is not None and self.column is None:
            raise ValueError("behavior.recorded belongs to a behavior with a column: give it beside that column")
        return self

    @property
    def recorded_sources(self) -> dict[str, RecordedBehavior]:
        """Sources whose rows bring log-probabilities of their own."""
        return {name: one for name, one in (self.sources or {}).items() if isinstance(one, RecordedBehavior)}

    @model_serializer(mode="wrap")
    def _as_in_yaml(self, handler: SerializerFunctionWrapHandler) -> JsonObject:
        values: JsonObject = handler(self)
        return {**(values.pop("policy", None) or {}), **values}

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonObject:
        schema = handler.resolve_ref_schema(handler(core))
        properties = schema.get("properties", {})
        if properties.pop("policy", None) is not None:
            for name, value in PolicyConfig.model_json_schema()["properties"].items():
                properties.setdefault(name, value)
        return schema

    def of_source(self, source: str | None) -> PolicyConfig | RecordedBehavior | None:
        """The behavior of rows of `source`, or None where there is none."""
        if self.column is not None:
            return RecordedBehavior(column=self.column, recorded=self.recorded)
        if self.policy is not None:
            return self.policy
        assert self.sources is not None
        found = self.sources.get(source) if source is not None else None
        return None if found == "none" else found

    def has_no_policy(self, source: str | None) -> bool:
        """Whether the config says that a source has no policy."""
        return source is not None and (self.sources or {}).get(source) == "none"

    @property
    def has_recorded(self) -> bool:
        """Whether the log-probabilities of some rows are taken as recorded."""
        return self.column is not None or bool(self.recorded_sources)

    def policies(self) -> list[PolicyConfig]:
        """Every distinct policy that has to be run, in the order of the config."""
        if self.sources is None:
            candidates = [self.of_source(None)]
        else:
            candidates = [self.of_source(source) for source in sorted(self.sources)]
        distinct: list[PolicyConfig] = []
        for candidate in candidates:
            if isinstance(candidate, PolicyConfig) and candidate not in distinct:
                distinct.append(candidate)
        return distinct
