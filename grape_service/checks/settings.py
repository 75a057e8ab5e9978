"""Which checks there are, their settings and defaults, and what to do about their findings."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any, Literal

from grape_service.config import CheckConfig
from grape_service.errors import UserError

Scope = Literal["all rows", "kept rows", "sources", "a sample"]


@dataclass(frozen=True)
class Kind:
    """A check: where it looks, its settings with their defaults, and the advice that goes with a finding.

    `max_share` is the share of the rows looked at above which it warns or fails.
    """

    scope: Scope
    settings: dict[str, Any]
    change: str


KINDS: dict[str, Kind] = {
    "exact_duplicates": Kind(
        "all rows",
        {"max_share": 0.01, "min_tokens": 12},
        "Remove responses that stand under several prompts from the pool, or name them in pool.where.",
    ),
    "near_duplicates": Kind(
        "all rows",
        {"max_share": 0.1, "similarity": 0.85, "num_perm": 64, "shingle": 4},
        "Sample the candidates of a prompt at a higher temperature, or keep one of each group.",
    ),
    "contamination": Kind(
        "kept rows",
        {"max_share": 0.0, "files": [], "n": 13},
        "Leave the prompts that the findings name out of the pool: evaluation on those sets would mean nothing.",
    ),
    "language": Kind(
        "kept rows",
        {"max_share": 0.02, "languages": ["en"]},
        "Filter the pool by language, or name the languages that you want in checks.language.languages.",
    ),
    "refusal": Kind("kept rows", {"max_share": 0.02}, "Filter refusals out of the pool, or look at their source."),
    "boilerplate": Kind(
        "kept rows", {"max_share": 0.05}, "Strip set phrases from the pool's responses, or limit their source."
    ),
    "truncation": Kind(
        "kept rows", {"max_share": 0.02}, "Set pool.truncated: reject and give finish_reason in the pool's rows."
    ),
    "repetition": Kind(
        "kept rows",
        {"max_share": 0.01, "min_tokens": 40, "n": 4, "max_repeated": 0.5},
        "Set select.max_response_tokens, or filter looping responses out of the pool.",
    ),
    "sources": Kind(
        "sources",
        {"always": 0.95, "never": 0.005, "min_prompts": 20},
        "Use select.max_source_share for one that always wins; leave one that never wins out with pool.where.",
    ),
    "untrusted_target": Kind(
        "a sample",
        {"rows": 64, "min_better": 0.75},
        "The target's scores do not depend on the prompt: check model, template and system prompt of the target.",
    ),
}


@dataclass(frozen=True)
class Check:
    """A check that is to run."""

    name: str
    action: Literal["warn", "fail"]
    settings: dict[str, Any]

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]


def enabled_checks(checks: dict[str, Any]) -> list[Check]:
    """The checks of a config that are not off, in the order of KINDS.

    Raises UserError for an unknown check or setting, and for contamination without files.
    """
    for name in checks:
        if name not in KINDS:
            near = difflib.get_close_matches(name, KINDS, n=1)
            hint = f"did you mean '{near[0]}'?" if near else f"they are {', '.join(KINDS)}"
            raise UserError(f"checks.{name} is not a check: {hint}")
    found = []
    for name, kind in KINDS.items():
        given = checks.get(name, "off")
        config = given if isinstance(given, CheckConfig) else CheckConfig(action=given)
        extra = config.model_extra or {}
        for key, value in extra.items():
            if key not in kind.settings:
                raise UserError(f"checks.{name}.{key} is not a setting: they are {', '.join(kind.settings)}")
            default = kind.settings[key]
            right = isinstance(value, int | float) if isinstance(default, int | float) else isinstance(value, list)
            if not right or isinstance(value, bool):
                wanted = "a number" if isinstance(default, int | float) else "a list"
                raise UserError(f"checks.{name}.{key} is {value!r}: it has to be {wanted}")
        if config.action != "off":
            found.append(Check(name, config.action, {**kind.settings, **extra}))
    for check in found:
        if check.name == "contamination" and not check.settings["files"]:
            raise UserError("checks.contamination needs files: name the evaluation sets to look for")
        if check.name == "near_duplicates":
            _need_datasketch()
    return found


def _need_datasketch() -> None:
    try:
        import datasketch  # noqa: F401
    except ImportError as error:
        raise UserError(
            "checks.near_duplicates needs the datasketch package: pip install grape-service[checks]"
        ) from error
