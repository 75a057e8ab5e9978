"""The methods of a run: which candidates are kept, and how kept tokens are weighed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from grape_service.config.base import Model


class KeepColumn(Model):
    """As many candidates of a prompt as the pool says."""

    column: str
    """The pool's column with the number, the same for all candidates of a prompt."""


def _number_or_column(keep: Any) -> str:
    return "KeepColumn" if isinstance(keep, dict | KeepColumn) else "int"


class SelectConfig(Model):
    """Which candidates of a prompt are kept."""

    method: str = "grape"
    """grape | all | random | longest | shortest | source:<name>; those but grape score nothing."""
    keep: Annotated[
        Annotated[Annotated[int, Field(ge=1)], Tag("int")] | Annotated[KeepColumn, Tag("KeepColumn")],
        Discriminator(_number_or_column),
    ] = 1
    """How many candidates of a prompt are kept at most: a number, or {column: name} for the pool's own."""
    min_candidates: int | None = Field(None, ge=1)
    """Prompts with fewer distinct responses are left out; the same text from two sources is one."""
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
    def usual_keep(self) -> int:
        """Candidates of a prompt that are kept, for estimates: 1 where the pool says it."""
        return self.keep if isinstance(self.keep, int) else 1

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
    """Tokens per block, at the block level."""
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
