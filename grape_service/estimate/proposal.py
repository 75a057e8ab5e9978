"""A commented config that fits a pool: what `grape init` prints."""

from __future__ import annotations

import re
from typing import Any

import orjson
import yaml

from grape_service.config.schema import Config
from grape_service.display import visible
from grape_service.estimate.look import GroupLook, PoolLook, look_into
from grape_service.pool.shapes import Layout
from grape_service.prepare.groups import check_columns
from grape_service.rows.columns import NO_SOURCE

CORRECT = re.compile(r"correct|verified|verif(y|ied)|passed|is_right|solved", re.I)
COMPLETE = re.compile(r"complete|finished", re.I)
MAX_SOURCES = 12
SCHEMA_LINE = "# yaml-language-server: $schema=grape.schema.json"


def proposed_config(pool: str, model: str, name: str | None = None, storage: dict[str, Any] | None = None) -> str:
    """The text of a config for a pool and a target, which runs as it is.

    Raises UserError where the pool is not there or no column of it holds prompts or responses.
    """
    values: dict[str, Any] = {
        "name": name or name_of(pool),
        "pool": {"path": pool},
        "target": {"model": model},
        "output": {"path": "./datasets"},
        "storage": storage or {},
    }
    config = Config.model_validate(values)
    found = look_into(config)
    check_columns(config, [group.counts for group in found.groups])
    (group,) = found.groups
    lines = [SCHEMA_LINE, f"name: {_scalar(config.name)}", "", *_pool(pool, found, group), "", *_target(model)]
    lines += ["", *_select(found), "", *_behavior(found), "", "output: {path: ./datasets}"]
    if storage:
        lines.append(f"storage: {_flow(storage)}")
    return "\n".join(lines) + "\n"


def name_of(pool: str) -> str:
    """A dataset's name from the last part of a path that says something."""
    parts = [re.sub(r"[^a-z0-9]+", "-", part.split(".")[0].lower()).strip("-") for part in pool.split("/")]
    named = [part for part in parts if part and part not in ("pool", "data", "train", "s3", "file", "main")]
    return (named[-1] if named else "pool")[:63].strip("-") or "pool"


def _pool(path: str, found: PoolLook, group: GroupLook) -> list[str]:
    extent = "all of them" if found.is_whole else "the first ones"
    shapes = list(dict.fromkeys(layout.describe() for layout in group.layouts))
    lines = ["pool:", f"  path: {_scalar(path)}"]
    lines.append(
        _comment(f"{group.files:,} file{'s' * (group.files != 1)}; of {group.counts.rows_in:,} rows ({extent}) read:")
    )
    lines += [_comment(f"{shape}.") for shape in shapes]
    columns = _columns(group.layouts[0]) if len(shapes) == 1 else {}
    if columns:
        lines.append(f"  columns: {_flow(columns)}")
    if group.rejects:
        reasons = ", ".join(f"{reason} ({count:,})" for reason, count in group.rejects.most_common())
        lines.append(_comment(f"Rows that cannot be used: {reasons}."))
    others = [name for name in group.other if name != "response_column"]
    if others:
        lines.append(_comment(f"Carried along: {', '.join(others[:20])}{', …' if len(others) > 20 else ''}."))
    filters = _filters(group)
    if filters:
        lines.append(_comment("Filters before scoring that fit this pool (wrong answers should not win):"))
        lines += ["  # where:", *(f"  #   - {_flow(condition)}  # {note}" for condition, note in filters)]
    lines.append("  truncated: reject  # responses with finish_reason length; keep takes them without a turn end")
    return lines


def _columns(layout: Layout) -> dict[str, Any]:
    """What `pool.columns` would say of a layout that was found."""
    if layout.input is not None:
        return {}
    columns: dict[str, Any] = {}
    if layout.conversation is not None:
        columns["prompt"] = layout.conversation
    elif layout.theirs["prompt"] != "prompt":
        columns["prompt"] = layout.theirs["prompt"]
    if layout.columns:
        columns["responses"] = list(layout.columns)
    return {**columns, **{ours: name for ours, name in layout.guessed.items() if ours not in columns}}


def _filters(group: GroupLook) -> list[tuple[dict[str, Any], str]]:
    found: list[tuple[dict[str, Any], str]] = []
    for name, seen in group.other.items():
        if seen.is_bool and (CORRECT.search(name) or COMPLETE.search(name)):
            note = f"true for {seen.values['True']:,} of {seen.rows:,} candidates"
            found.append(({"column": name, "equals": True}, note))
    pair = group.other.get("response_column")
    if pair is not None and "chosen" in pair.values:
        found.append(({"column": "response_column", "equals": "chosen"}, "without those that were rejected"))
    return found


def _target(model: str) -> list[str]:
    return [
        "target:  # the model to be trained; it scores the pool",
        f"  model: {_scalar(model)}",
        "  # engine: auto        # vllm where it is installed and runs the model, else transformers",
        "  # dtype: bfloat16     # float32 for exact small runs",
    ]


def _select(found: PoolLook) -> list[str]:
    sizes = found.sizes()
    prompts = sum(sizes.values())
    shown = ", ".join(f"{size}: {count:,}" for size, count in list(sizes.items())[:8])
    lines = ["select:", "  method: grape", "  keep: 1  # of each prompt; or {column: name} for the pool's own number"]
    lines.append(_comment(f"{prompts:,} prompts by their number of distinct responses: {shown}."))
    if sizes.get(1, 0):
        lines.append("  # min_candidates: 2  # leaves out prompts with nothing to choose from")
    return lines


def _behavior(found: PoolLook) -> list[str]:
    """Sources, and what PEAR would need to know of each."""
    sources = [(name, count) for name, count in found.sources.most_common() if name != NO_SOURCE]
    without = found.sources.get(NO_SOURCE, 0)
    recorded = sum(group.recorded for group in found.groups)
    lines = ["# For SFT that RL follows, PEAR weighs each token by who wrote it. It needs the policy of each source:"]
    if recorded:
        lines += [f"# {recorded:,} candidates bring log-probabilities of their own:"]
        lines += ["# behavior: {column: behavior_logprobs, missing: uniform}"]
    elif sources:
        lines += ["# behavior:", "#   sources:"]
        lines += [
            f"#     {_scalar(name)}: {{model: …}}  # {count:,} candidates" for name, count in sources[:MAX_SOURCES]
        ]
        if len(sources) > MAX_SOURCES:
            lines.append(f"#     … and {len(sources) - MAX_SOURCES:,} more sources")
        lines.append("#   missing: uniform  # rows of other sources get weight 1; or drop, or error")
    else:
        lines += ["# behavior: {model: …}  # the rows name no source: the model that wrote them all"]
    if without and (sources or recorded):
        lines.append(f"# {without:,} candidates name no source.")
    return [*lines, "# weights: {method: pear}"]


def _comment(text: str) -> str:
    return f"  # {visible(' '.join(text.split()))}"


def _scalar(text: str) -> str:
    """A text as YAML, on one line."""
    plain = yaml.safe_dump(text, width=10**6, allow_unicode=True).removesuffix("\n").removesuffix("\n...")
    return plain if "\n" not in plain else orjson.dumps(text).decode()


def _flow(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False).strip()
