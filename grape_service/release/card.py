"""README.md of a version: a dataset card that `datasets.load_dataset(folder)` opens, and that people read."""

from __future__ import annotations

import html
import re
from typing import Any

import yaml

from grape_service.config.methods import weights_settings
from grape_service.display import visible
from grape_service.release.changes import since_of
from grape_service.release.manifest import Manifest

_READERS = """
## Who reads the weights

| trainer | reads |
|---|---|
| `grape train` (the built-in SFT) | `input_ids`, `loss_mask` and `loss_weights` |
| trl `SFTTrainer` as it is | `input_ids` and `labels`: it trains, **without the weights** |
| trl with this service's collator and loss | `input_ids`, `labels` and `loss_weights` |
| verl, LLaMA-Factory | what `grape export` writes for them; the export says whether the weights go along |

A plain trainer ignores `loss_weights` and says nothing about it. Mask and weights are separate columns on purpose: some
trainers cast a mask to integers, which turns fractions into 0.
"""


def render_card(manifest: Manifest) -> str:
    """The card of a version. Text from the pool and the config is escaped."""
    header: dict[str, Any] = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/part-*.parquet"}]}],
        "pretty_name": manifest.name,
        "size_categories": [_size_category(manifest.rows)],
        "tags": ["sft" if manifest.kind == "training" else "candidates", "grape-service"],
    }
    if manifest.licenses:  # the Hub knows its own list of names, in small letters
        header["license"] = [name.lower() for name in manifest.licenses]
    return "\n".join(
        [
            "---",
            yaml.safe_dump(header, sort_keys=False).strip(),
            "---",
            f"# {manifest.name} {manifest.version}",
            "",
            f"{manifest.content}; published {manifest.created}.",
            "",
            *_changes(manifest),
            *(_training_set(manifest) if manifest.kind == "training" else _candidates(manifest)),
            "## Columns",
            "",
            "| column | type |",
            "|---|---|",
            *[f"| {_code(column.name)} | {_code(column.type)} |" for column in manifest.columns],
            "",
            *_sources(manifest),
            "Everything that this was made from is in `manifest.json`"
            + ("; the report is in `report.html`." if manifest.kind == "training" else "."),
            "",
        ]
    )


def _training_set(manifest: Manifest) -> list[str]:
    return [*_how_it_was_made(manifest), *_weights(manifest), _READERS.strip(), ""]


def _candidates(manifest: Manifest) -> list[str]:
    """What gather sampled: how many by whom, what is right, how far recorded numbers are from scored ones."""
    gather = manifest.config.get("gather") or {}
    lines = ["## How it was made", "", "Candidates that were sampled; no training set, but the pool of one: name it in"]
    lines += ["`pool.path`, with `behavior: {column: behavior_logprobs}`. `log p` of each token is the policy's own,"]
    lines += ["before temperature and cuts; `sampling` says how a response was drawn.", ""]
    lines += ["| policy | model | samples | right | wrong | unknown | mean drift of a token |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for name, counts in (manifest.counts.get("gather") or {}).items():
        policy = (gather.get("policies") or {}).get(name) or {}
        numbers = [counts.get(key, "") for key in ("samples", "right", "wrong", "unknown")]
        drift = (counts.get("audit") or {}).get("mean", "")
        cells = [_code(name), _code(policy.get("model", "")), *map(_cell, numbers), _cell(drift)]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _changes(manifest: Manifest) -> list[str]:
    since = since_of(manifest.counts)
    if since is None:
        return []
    told = f"{since.sentence} (`changes.parquet`)" if since.is_known else _cell(since.sentence)
    return [f"Since {_code(since.version)}: {told}.", ""]


def _how_it_was_made(manifest: Manifest) -> list[str]:
    select = manifest.config.get("select") or {}
    lines = ["## How it was made", ""]
    if select:
        lines.append(f"Selected by {_code(select.get('method', ''))}, {_cell(select.get('keep', ''))} kept per prompt.")
    for policy in manifest.parents.models:
        lines.append(f"- {_cell(policy.role)}: {_code(policy.model)} {_code(policy.revision or policy.policy_id)}")
    if manifest.parents.release:
        lines.append(f"- weighed from {_code(manifest.parents.release)}")
    return [*lines, ""]


def _weights(manifest: Manifest) -> list[str]:
    weights = manifest.config.get("weights")
    if not weights:
        return ["`loss_weights` are 1.0 on every token with loss: no weights were made.", ""]
    method, settings = weights_settings(weights)
    text = ", ".join(f"{_cell(key)} {_cell(value)}" for key, value in settings.items())
    lines = [f"`loss_weights` are {'PEAR' if method == 'pear' else _code(method)} weights ({text})."]
    if method == "pear" and (manifest.config.get("select") or {}).get("method") == "grape":
        lines.append(
            "A GRAPE winner is no longer a sample from its behavior policy: the weights are biased by the choice."
        )
    return [*lines, ""]


def _sources(manifest: Manifest) -> list[str]:
    sources = manifest.statistics.get("sources")
    if not isinstance(sources, dict):
        return []
    rows = [f"| {_cell(source)} | {_cell(count)} |" for source, count in sources.items()]
    return ["## Sources", "", "| source | rows |", "|---|---|", *rows, ""]


def _size_category(rows: int) -> str:
    bounds = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
    return next((name for bound, name in bounds if rows < bound), "10M<n<100M" if rows < 10**8 else "n>100M")


def _code(value: Any) -> str:
    """Text as a code span, in which markup is text: nothing but the fence and a table's '|' needs care."""
    text = visible(_line(value)).replace("|", "\\|")
    if not text:
        return ""
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def _line(value: Any) -> str:
    return " ".join(str(value).split())[:200]


def _cell(value: Any) -> str:
    """Text that stays in its table cell and is not taken for markup."""
    return html.escape(visible(_line(value))).replace("|", "&#124;").replace("`", "&#96;")
