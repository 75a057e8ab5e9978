"""The methods of a run: which candidates are kept, and how kept tokens are weighed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from grape_service.config.base import Model
from grape_service.config.own_methods import OwnMethod, is_own_method, names_of_entry_points, own_method
from grape_service.json_types import JsonObject
from grape_service.methods import SELECT, WEIGHTS
from grape_service.methods.base import SelectMethod, WeightsKeys, WeightsMethod, Window
from grape_service.rows.statistics import beside_logprob
from grape_service.rows.steps import STEP_END

UNSCORED_METHODS = ("all", "random", "longest", "shortest")
"""Select methods that need no score; source:<name> is another."""


class RaceRisk(Model):
    """A race in which a candidate is stopped once it is unlikely enough to be kept."""

    risk: float = Field(0.001, gt=0, le=0.2)
    """How likely a stopped candidate may be to end better than the last one kept, by its tokens so far and the pool's
    spread."""
    audit: float = Field(0.02, ge=0, le=1)
    """Share of prompts that are scored whole, drawn by their ids: manifest and report say how often they keep the
    same."""


class ScoreConfig(Model):
    """What is scored."""

    race: Literal["off", "exact"] | RaceRisk = "off"
    """Scoring in waves, in which candidates that cannot be kept any more are stopped. exact: the same candidates are
    kept as with off; {risk: 0.001, audit: 0.02}: they are but for a stated risk, and more is saved."""
    statistics: Literal["auto"] | list[Literal["logprob", "entropy", "rank", "top20_entropy"]] = "auto"
    """What the target's forward pass gives of each token with loss, stored and released as target_<statistic>:
    logprob (always), entropy, rank, top20_entropy; auto: what the methods need."""

    @field_validator("race", mode="before")
    @classmethod
    def _off(cls, race: Any) -> Any:
        return "off" if race is False else race  # YAML reads a bare off as false


class KeepColumn(Model):
    """As many candidates of a prompt as the pool says."""

    column: str
    """The pool's column with the number, the same for all candidates of a prompt."""


def _number_or_column(keep: Any) -> str:
    return "KeepColumn" if isinstance(keep, dict | KeepColumn) else "int"


_SELECT_KEYS = [method.keys for method in reversed(SELECT.values()) if method.own_keys]


class SelectConfig(Model, *_SELECT_KEYS):  # type: ignore[misc]  # each method's module has its keys
    """Which candidates of a prompt are kept."""

    method: str = Field(
        next(iter(SELECT)),
        description=f"{' | '.join(SELECT)}, which score; {' | '.join(UNSCORED_METHODS)} | source:<name>, which score "
        "nothing; or a function of your own: package.module:function, or the name of an installed entry point.",
    )
    keep: Annotated[
        Annotated[Annotated[int, Field(ge=1)], Tag("int")] | Annotated[KeepColumn, Tag("KeepColumn")],
        Discriminator(_number_or_column),
    ] = 1
    """How many distinct responses of a prompt are kept at most: a number, or {column: name} for the pool's own."""
    min_candidates: int | None = Field(None, ge=1)
    """Prompts with fewer distinct responses are left out; the same text from two sources is one."""
    min_response_tokens: int | None = Field(None, ge=1)
    """Candidates with fewer tokens with loss never win."""
    max_response_tokens: int | None = Field(None, ge=1)
    """Candidates with more tokens with loss never win."""
    min_margin: float | None = Field(None, ge=0)
    """Prompts whose best candidate leads the next distinct response by less are left out."""
    max_source_share: float | None = Field(None, gt=0, le=1)
    """No source gives more than this share of the kept rows; its least clear wins pass to the next best."""
    count_turn_end: bool = False
    """Whether the turn-end token counts in grape_score."""
    seed: int = 0
    """For method random."""
    step_end: str = STEP_END
    """What ends a step of a response, for the methods that cut steps and for the report: a regular expression over its
    text. A step is from behind one match to behind the next."""

    @field_validator("method")
    @classmethod
    def _named_method(cls, method: str) -> str:
        if method == "source:" or not method.strip():
            raise ValueError(f"'{method}' is not a method; use {', '.join(select_methods())} or source:<name>")
        return method

    @field_validator("step_end")
    @classmethod
    def _cuts_text(cls, step_end: str) -> str:
        try:
            matches_nothing = re.compile(step_end).search("") is not None
        except re.error as error:
            raise ValueError(f"step_end: '{step_end}' is no regular expression ({error})") from error
        if matches_nothing:
            raise ValueError(f"step_end: '{step_end}' matches a text without characters: give what ends a step")
        return step_end

    @model_validator(mode="after")
    def _own_keys(self) -> SelectConfig:
        _refuse_keys_of_others(self, SELECT)
        return self

    @property
    def is_unscored(self) -> bool:
        """Whether it is one of the methods of ours that need no score."""
        return self.method in UNSCORED_METHODS or self.method.startswith("source:")

    @property
    def own(self) -> OwnMethod | None:
        """The user's function. Raises UserError where it cannot be loaded."""
        if self.is_unscored or self.method in SELECT:
            return None
        return own_method("select", self.method)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the method needs beside log-probabilities."""
        if self.is_unscored:
            return ()
        own = self.own
        return own.beside_logprob if own is not None else beside_logprob(SELECT[self.method].statistics)

    @property
    def windows(self) -> Window | None:
        """What each step of a candidate is scored in, where the method does so."""
        method = SELECT.get(self.method)
        return self.window if method is not None and method.scores_windows else None  # type: ignore[attr-defined]

    @property
    def usual_keep(self) -> int:
        """Candidates of a prompt that are kept, for estimates: 1 where the pool says it."""
        return self.keep if isinstance(self.keep, int) else 1

    @property
    def needs_scores(self) -> bool:
        """Whether every candidate has to be scored before selection."""
        if self.min_margin is not None or self.method in SELECT:
            return True
        own = self.own
        return own is not None and bool(own.statistics)

    @property
    def makes_select_score(self) -> bool:
        """Whether it chooses by a number of its own that is not grape_score."""
        return self.method != "grape" and not self.is_unscored


def _refuse_keys_of_others(section: Any, methods: Mapping[str, SelectMethod | WeightsMethod]) -> None:
    """Raises ValueError where a section sets what another method than its own has alone."""
    for owner, method in methods.items():
        for key in method.own_keys:
            if section.method != owner and getattr(section, key) != type(section).model_fields[key].default:
                raise ValueError(f"{key} belongs to method {owner}; method {section.method} has no such setting")


def select_methods() -> list[str]:
    """Names of the select methods that there are."""
    return [*SELECT, *UNSCORED_METHODS, *names_of_entry_points("select")]


def weights_methods() -> list[str]:
    """Names of the weights methods that there are."""
    return [*WEIGHTS, *names_of_entry_points("weights")]


def refuse_unknown_methods(select: SelectConfig, weights: WeightsConfig | None) -> None:
    """Raises ValueError for a name that is not a method: not when a manifest is read, whose method may be gone."""
    if not (select.is_unscored or select.method in SELECT or is_own_method("select", select.method)):
        if select.method in WEIGHTS:
            raise ValueError(f"select.method: '{select.method}' makes weights: set it as weights.method")
        raise ValueError(
            f"select.method: '{select.method}' is not a method; use {', '.join(select_methods())}, source:<name> or "
            "package.module:function"
        )
    if weights is not None and weights.method not in WEIGHTS and not is_own_method("weights", weights.method):
        if weights.method in SELECT:
            raise ValueError(f"weights.method: '{weights.method}' selects rows: set it as select.method")
        raise ValueError(
            f"weights.method: '{weights.method}' is not a method; use {', '.join(weights_methods())} or "
            "package.module:function"
        )


def refuse_race(select: SelectConfig) -> None:
    """Raises ValueError where a selection does not let candidates be stopped before all their tokens are scored."""
    able = [name for name, method in SELECT.items() if method.bound is not None]
    if select.max_source_share is not None:
        raise ValueError(
            "score.race does not go with select.max_source_share, which may pass a win on to any candidate, also to "
            "one that was stopped: leave one of the two out"
        )
    if select.method not in able:
        why = "scores nothing" if select.is_unscored else "says no such thing of a part of a response"
        raise ValueError(
            f"score.race stops candidates by the most that their scores can still reach, and select.method "
            f"{select.method} {why}: set score.race to off, or use {' or '.join(able)}"
        )


def weights_settings(weights: JsonObject) -> tuple[str, JsonObject]:
    """The method of a manifest's weights section, and of its settings those that the method has."""
    method = str(weights.get("method", next(iter(WEIGHTS))))
    others = {key for name, other in WEIGHTS.items() if name != method for key in other.own_keys}
    return method, {key: value for key, value in weights.items() if key not in others}


_KEYS = [method.keys for method in reversed(WEIGHTS.values()) if method.own_keys]


class WeightsConfig(Model, *_KEYS, WeightsKeys):  # type: ignore[misc, valid-type]  # each method's module has its keys
    """What each token's loss is multiplied by: PEAR (arXiv 2602.01058, section 3) or another method."""

    method: str = Field(
        next(iter(WEIGHTS)),
        description=f"{' | '.join(WEIGHTS)}, or a function of your own: package.module:function, or the name of an "
        "installed entry point.",
    )

    @model_validator(mode="after")
    def _sensible(self) -> WeightsConfig:
        for key, field in type(self).model_fields.items():
            if field.annotation == tuple[float, float]:
                low, high = getattr(self, key)
                if not low < high:
                    raise ValueError(f"{key} needs its lower bound first: [{high}, {low}]")
        _refuse_keys_of_others(self, WEIGHTS)
        return self

    @property
    def ours(self) -> WeightsMethod | None:
        """The method, where it is one of ours."""
        return WEIGHTS.get(self.method)

    @property
    def needs_behavior(self) -> bool:
        """Whether it compares the target with the policy that wrote the response."""
        return self.ours is not None and self.ours.needs_behavior

    @property
    def own(self) -> OwnMethod | None:
        """The user's function. Raises UserError where it cannot be loaded."""
        return None if self.ours is not None else own_method("weights", self.method)

    @property
    def statistics(self) -> tuple[str, ...]:
        """What the method needs of the target beside log-probabilities."""
        own = self.own
        if own is not None:
            return own.beside_logprob
        assert self.ours is not None
        return beside_logprob(self.ours.statistics)
