"""The `checks` section of a config: which data checks run, their settings, and what to do about their findings."""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar, Literal

from pydantic import Field, GetJsonSchemaHandler, model_validator
from pydantic_core import CoreSchema

from grape_service.config.base import Model
from grape_service.install import install_command
from grape_service.json_types import JsonObject

Scope = Literal["all rows", "kept rows", "sources", "a sample"]
Action = Literal["off", "warn", "fail"]


class Check(Model):
    """What all checks share. In YAML a check is its action alone, or a section with its settings."""

    name: ClassVar[str]
    scope: ClassVar[Scope]
    advice: ClassVar[str]
    """What the report advises where the check finds something."""

    action: Action = "warn"
    """off: does not run; warn: the report tells; fail: nothing is published."""
    max_share: float = Field(1.0, ge=0, le=1)
    """The check warns or fails when a larger share of the rows it looks at is flagged."""

    @model_validator(mode="before")
    @classmethod
    def _action_alone(cls, value: Any) -> Any:
        if value is False:  # YAML reads a bare off as false
            return {"action": "off"}
        return {"action": value} if isinstance(value, str) else value

    @classmethod
    def __get_pydantic_json_schema__(cls, core: CoreSchema, handler: GetJsonSchemaHandler) -> JsonObject:
        reference = handler(core)
        schema = handler.resolve_ref_schema(reference)
        keys = dict(schema)
        schema.clear()
        schema.update(anyOf=[{"enum": ["off", "warn", "fail", False]}, keys])
        return reference


class ExactDuplicates(Check):
    """The same response under several prompts."""

    name = "exact_duplicates"
    scope = "all rows"
    advice = "Remove responses that stand under several prompts from the pool, or name them in pool.where."
    max_share: float = Field(0.01, ge=0, le=1)
    """Largest share of flagged rows."""
    min_tokens: int = Field(12, ge=1)
    """Shorter responses are left alone."""


class NearDuplicates(Check):
    """Candidates of a prompt that hardly differ."""

    name = "near_duplicates"
    scope = "all rows"
    advice = "Sample the candidates of a prompt at a higher temperature, or keep one of each group."
    max_share: float = Field(0.1, ge=0, le=1)
    """Largest share of flagged rows."""
    similarity: float = Field(0.85, gt=0, le=1)
    """Jaccard similarity of token n-grams from which two responses are near duplicates."""
    num_perm: int = Field(64, ge=16)
    """Permutations of the MinHash."""
    shingle: int = Field(4, ge=1)
    """Tokens per n-gram."""

    @model_validator(mode="after")
    def _package_there(self) -> NearDuplicates:
        if self.action != "off" and importlib.util.find_spec("datasketch") is None:
            raise ValueError(f"near_duplicates needs the package 'datasketch': {install_command('checks')}")
        return self


class Contamination(Check):
    """Kept rows that contain text of an evaluation set."""

    name = "contamination"
    scope = "kept rows"
    advice = "Leave the prompts that the findings name out of the pool: evaluation on those sets would mean nothing."
    max_share: float = Field(0.0, ge=0, le=1)
    """Largest share of flagged rows."""
    files: list[str] = []
    """Evaluation sets, local or s3://."""
    n: int = Field(13, ge=1)
    """Words in a row that have to be the same."""

    @model_validator(mode="after")
    def _has_files(self) -> Contamination:
        if self.action != "off" and not self.files:
            raise ValueError("contamination needs files: name the evaluation sets to look for")
        return self


class Language(Check):
    """Responses in another language."""

    name = "language"
    scope = "kept rows"
    advice = "Filter the pool by language, or name the languages that you want in checks.language.languages."
    max_share: float = Field(0.02, ge=0, le=1)
    """Largest share of flagged rows."""
    languages: list[str] = ["en"]
    """Languages that are expected."""


class Refusal(Check):
    """Responses that refuse to answer."""

    name = "refusal"
    scope = "kept rows"
    advice = "Filter refusals out of the pool, or look at their source."
    max_share: float = Field(0.02, ge=0, le=1)
    """Largest share of flagged rows."""


class Boilerplate(Check):
    """Set phrases of assistants."""

    name = "boilerplate"
    scope = "kept rows"
    advice = "Strip set phrases from the pool's responses, or limit their source."
    max_share: float = Field(0.05, ge=0, le=1)
    """Largest share of flagged rows."""


class Truncation(Check):
    """Responses that end in the middle of a sentence."""

    name = "truncation"
    scope = "kept rows"
    advice = "Set pool.truncated: reject and give finish_reason in the pool's rows."
    max_share: float = Field(0.02, ge=0, le=1)
    """Largest share of flagged rows."""


class Repetition(Check):
    """Responses that repeat themselves."""

    name = "repetition"
    scope = "kept rows"
    advice = "Set select.max_response_tokens, or filter looping responses out of the pool."
    max_share: float = Field(0.01, ge=0, le=1)
    """Largest share of flagged rows."""
    min_tokens: int = Field(40, ge=1)
    """Shorter responses are left alone."""
    n: int = Field(4, ge=1)
    """Tokens per n-gram."""
    max_repeated: float = Field(0.5, ge=0, le=1)
    """Share of repeated n-grams above which a response is flagged."""


class Sources(Check):
    """Sources that always or never win."""

    name = "sources"
    scope = "sources"
    advice = "Use select.max_source_share for one that always wins; leave one that never wins out with pool.where."
    always: float = Field(0.95, ge=0, le=1)
    """A source that wins more than this share of its prompts always wins."""
    never: float = Field(0.005, ge=0, le=1)
    """A source that wins less than this share of its prompts never wins."""
    min_prompts: int = Field(20, ge=1)
    """Sources with fewer prompts are left alone."""


class UntrustedTarget(Check):
    """A target whose scores do not depend on the prompt."""

    name = "untrusted_target"
    scope = "a sample"
    advice = "The target's scores do not depend on the prompt: check model, template and system prompt of the target."
    rows: int = Field(64, ge=2)
    """Rows of the sample."""
    min_better: float = Field(0.75, ge=0, le=1)
    """Share of responses that have to be more probable under their own prompt than under another."""


class ChecksConfig(Model):
    """Data checks by name; one that is not named is off."""

    exact_duplicates: ExactDuplicates = ExactDuplicates(action="off")
    """The same response under several prompts."""
    near_duplicates: NearDuplicates = NearDuplicates(action="off")
    """Candidates of a prompt that hardly differ."""
    contamination: Contamination = Contamination(action="off")
    """Kept rows that contain text of an evaluation set."""
    language: Language = Language(action="off")
    """Responses in another language."""
    refusal: Refusal = Refusal(action="off")
    """Responses that refuse to answer."""
    boilerplate: Boilerplate = Boilerplate(action="off")
    """Set phrases of assistants."""
    truncation: Truncation = Truncation(action="off")
    """Responses that end in the middle of a sentence."""
    repetition: Repetition = Repetition(action="off")
    """Responses that repeat themselves."""
    sources: Sources = Sources(action="off")
    """Sources that always or never win."""
    untrusted_target: UntrustedTarget = UntrustedTarget(action="off")
    """A target whose scores do not depend on the prompt."""

    def enabled(self) -> list[Check]:
        """The checks that are not off, in the order above."""
        checks = [getattr(self, name) for name in type(self).model_fields]
        return [check for check in checks if check.action != "off"]
