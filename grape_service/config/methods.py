"""The methods of a run: which candidates are kept, and how kept tokens are weighed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from grape_service.config.base import Model
from grape_service.config.own_methods import OwnMethod, is_own_method, names_of_entry_points, own_method
from grape_service.rows.statistics import ENTROPY, RANK, TOP20_ENTROPY

SELECT_STATISTICS: dict[str, tuple[str, ...]] = {"grape": (), "rsr": (RANK,), "surprise": (ENTROPY,)}
"""Select methods of our own that need scores, with what each needs beside log-probabilities."""

UNSCORED_METHODS = ("all", "random", "longest", "shortest")
"""Select methods that need no score; source:<name> is another."""

WEIGHTS_STATISTICS: dict[str, tuple[str, ...]] = {"pear": (), "probability": (), "entropy": (TOP20_ENTROPY,)}
"""Weights methods of our own with what each needs of the target beside log-probabilities."""


class ScoreConfig(Model):
    """What is scored."""

    statistics: Literal["auto"] | list[Literal["logprob", "entropy", "rank", "top20_entropy"]] = "auto"
    """What the target's forward pass gives of each token with loss, stored and released as target_<statistic>:
    logprob (always), entropy, rank, top20_entropy; auto: what the methods need."""


class KeepColumn(Model):
    """As many candidates of a prompt as the pool says."""

    column: str
    """The pool's column with the number, the same for all candidates of a prompt."""


def _number_or_column(keep: Any) -> str:
    return "KeepColumn" if isinstance(keep, dict | KeepColumn) else "int"


class SelectConfig(Model):
    """Which candidates of a prompt are kept."""

    method: str = "grape"
    """grape | rsr | surprise, which score; all | random | longest | shortest | source:<name>, which score nothing; or a
    function of your own: package.module:function, or the name of an installed entry point."""
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
    def _named_method(cls, method: str) -> str:
        if method == "source:" or not method.strip():
            raise ValueError(f"'{method}' is not a method; use {', '.join(select_methods())} or source:<name>")
        return method

    @property
    def is_unscored(self) -> bool:
        """Whether it is one of the methods of ours that need no score."""
        return self.method in UNSCORED_METHODS or self.method.startswith("source:")

    @property
    def own(self) -> OwnMethod | None:
        """The user's function. Raises UserError where it cannot be loaded."""
        if self.is_unscored or self.method in SELECT_STATISTICS:
            return None
        return own_method("select", self.method)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the method needs beside log-probabilities."""
        if self.is_unscored:
            return ()
        own = self.own
        return own.beside_logprob if own is not None else SELECT_STATISTICS[self.method]

    @property
    def usual_keep(self) -> int:
        """Candidates of a prompt that are kept, for estimates: 1 where the pool says it."""
        return self.keep if isinstance(self.keep, int) else 1

    @property
    def needs_scores(self) -> bool:
        """Whether every candidate has to be scored before selection."""
        if self.min_margin is not None or self.method in SELECT_STATISTICS:
            return True
        own = self.own
        return own is not None and bool(own.statistics)

    @property
    def makes_select_score(self) -> bool:
        """Whether it chooses by a number of its own that is not grape_score."""
        return self.method != "grape" and not self.is_unscored


def select_methods() -> list[str]:
    """Names of the select methods that there are."""
    return [*SELECT_STATISTICS, *UNSCORED_METHODS, *names_of_entry_points("select")]


def weights_methods() -> list[str]:
    """Names of the weights methods that there are."""
    return [*WEIGHTS_STATISTICS, *names_of_entry_points("weights")]


def refuse_unknown_methods(select: SelectConfig, weights: WeightsConfig | None) -> None:
    """Raises ValueError for a name that is no method: not when a manifest is read, whose method may be gone."""
    if not (select.is_unscored or select.method in SELECT_STATISTICS or is_own_method("select", select.method)):
        raise ValueError(
            f"select.method: '{select.method}' is not a method; use {', '.join(select_methods())}, source:<name> or "
            "package.module:function"
        )
    if (
        weights is not None
        and weights.method not in WEIGHTS_STATISTICS
        and not is_own_method("weights", weights.method)
    ):
        raise ValueError(
            f"weights.method: '{weights.method}' is not a method; use {', '.join(weights_methods())} or "
            "package.module:function"
        )


def weights_settings(weights: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method of a manifest's weights section, and of its settings those that the method has."""
    method = str(weights.get("method", "pear"))
    others = [keys for keys, owner in ((PEAR_KEYS, "pear"), (ENTROPY_KEYS, "entropy")) if owner != method]
    left_out = {key for keys in others for key in keys}
    return method, {key: value for key, value in weights.items() if key not in left_out}


PEAR_KEYS = ("level", "gamma", "ratio_clip", "block_size", "center")
ENTROPY_KEYS = ("scale", "alpha")


class WeightsConfig(Model):
    """What each token's loss is multiplied by: PEAR (arXiv 2602.01058, section 3) or another method."""

    method: str = "pear"
    """pear | probability | entropy, or a function of your own: package.module:function, or the name of an installed
    entry point."""
    level: Literal["token", "block", "sequence"] = "token"
    """What one weight of PEAR is shared by."""
    gamma: float = Field(0.999, gt=0, le=1)
    """Discount of PEAR per token that is still to come."""
    ratio_clip: tuple[float, float] = (-0.08, 0.3)
    """Bounds of a token's log ratio in PEAR."""
    weight_clip: tuple[float, float] = (-10.0, 5.0)
    """Bounds of the log weight, of every method."""
    block_size: int = Field(4, ge=1)
    """Tokens per block, at PEAR's block level."""
    center: Literal["none", "sequence"] = "none"
    """sequence subtracts a response's mean log ratio before PEAR's clip."""
    normalize: Literal["none", "sequence", "dataset"] = "none"
    """Scale weights to a mean of 1 over each response or over the dataset, of every method."""
    scale: float = Field(3.0, gt=0)
    """For entropy: the top-20 entropy, in nats, at which a token's weight is 1."""
    alpha: float = Field(1.0, gt=0)
    """For entropy: the power of the top-20 entropy."""

    @model_validator(mode="after")
    def _sensible(self) -> WeightsConfig:
        for key in ("ratio_clip", "weight_clip"):
            low, high = getattr(self, key)
            if not low < high:
                raise ValueError(f"{key} needs its lower bound first: [{high}, {low}]")
        for keys, owner in ((PEAR_KEYS, "pear"), (ENTROPY_KEYS, "entropy")):
            for key in keys:
                if self.method != owner and getattr(self, key) != type(self).model_fields[key].default:
                    raise ValueError(f"{key} belongs to method {owner}; method {self.method} has no such setting")
        if self.level == "sequence" and self.center != "none":
            raise ValueError("level sequence refuses center, which would erase its weights")
        if self.level == "sequence" and self.normalize == "sequence":
            raise ValueError("level sequence refuses normalize: sequence, which would erase its weights")
        return self

    @property
    def needs_behavior(self) -> bool:
        """Whether it compares the target with the policy that wrote the response."""
        return self.method == "pear"

    @property
    def own(self) -> OwnMethod | None:
        """The user's function. Raises UserError where it cannot be loaded."""
        return None if self.method in WEIGHTS_STATISTICS else own_method("weights", self.method)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the method needs of the target beside log-probabilities."""
        own = self.own
        return own.beside_logprob if own is not None else WEIGHTS_STATISTICS[self.method]
