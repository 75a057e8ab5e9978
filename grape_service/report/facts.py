"""What a report is made of: facts of a version, and the statistics of select and weigh as its manifest keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NotRequired, TypedDict

from grape_service.json_types import JsonObject
from grape_service.release.manifest import FileEntry, Manifest, ManifestFields, without_secrets


class Facts(TypedDict):
    """What the page and its warnings tell of."""

    name: str
    version: str
    created: str | None  # None before the manifest is published
    rows: int
    tokens: int
    loss_tokens: int
    bytes: int
    counts: JsonObject  # by stage, as that stage's counts are in JSON
    config: JsonObject  # without secrets
    parents: JsonObject
    statistics: JsonObject


ExampleChoice = dict[str, list[list[Any]]]
"""[key, order, prompt_id] of a few prompts by kind: see sums.Examples."""


class SelectReport(TypedDict):
    """Statistics of select, by source where a list; a version of long ago lacks those that are not required."""

    names: list[str]
    candidates: list[int]
    kept: list[int]
    prompts_with: list[int]
    wins: list[int]
    beats: list[list[int]]
    scores: list[list[int]]
    score_mean: list[float]
    margins: list[list[int]]
    lengths: list[int]
    kept_lengths: list[int]
    length_scores: list[list[int]]
    stopped: NotRequired[list[int]]
    contested: int
    compared: NotRequired[int]
    compared_steps: NotRequired[int]
    at_least: NotRequired[int]
    stepped: NotRequired[int]
    winner_tokens: float
    rival_tokens: float
    winner_step_tokens: NotRequired[float | None]
    rival_step_tokens: NotRequired[float | None]
    chance: float
    agree: dict[str, int]
    picked: dict[str, list[int]]
    picked_tokens: dict[str, int]
    overlap: NotRequired[dict[str, int]]
    overall: float | None
    within: float | None
    examples: ExampleChoice


class WeightsReport(TypedDict):
    """Statistics of weights."""

    names: list[str]
    weights: list[list[int]]
    ratios: list[int]
    position_mean: list[float]
    position_q10: list[float | None]
    position_q50: list[float | None]
    position_q90: list[float | None]
    last_tenth: float | None


def facts_of_manifest(manifest: Manifest) -> Facts:
    """Of a published manifest."""
    return _facts(manifest, manifest.name, manifest.version, manifest.files, manifest.created)


def facts_of_fields(fields: ManifestFields, name: str, version: str, files: Sequence[FileEntry]) -> Facts:
    """The same before the manifest is published."""
    return _facts(fields, name, version, files, None)


def _facts(manifest: ManifestFields, name: str, version: str, files: Sequence[FileEntry], created: str | None) -> Facts:
    fields = manifest.model_dump(mode="json")
    return {
        "name": name,
        "version": version,
        "created": created,
        "rows": sum(file.rows for file in files),
        "tokens": sum(file.tokens for file in files),
        "loss_tokens": sum(file.loss_tokens for file in files),
        "bytes": sum(file.size for file in files),
        "counts": fields["counts"],
        "config": without_secrets(fields["config"]),
        "parents": fields["parents"],
        "statistics": fields["statistics"],
    }
