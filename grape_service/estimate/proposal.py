"""A commented config that fits a pool: what `grape init` prints."""

from __future__ import annotations

import itertools
import re
import statistics
from typing import Any

import orjson
import yaml

from grape_service.config.loading import apply_override, parse_config
from grape_service.config.pool import PoolConfig
from grape_service.display import visible
from grape_service.errors import UserError
from grape_service.estimate.look import GroupLook, PoolLook, look_into
from grape_service.gather.prompts import REFERENCES, prompts_config
from grape_service.json_types import JsonObject
from grape_service.pool.column_names import PROMPTS
from grape_service.pool.filters import nearest
from grape_service.pool.layout import Layout
from grape_service.pool.meanings import BY_NAME
from grape_service.rows.columns import NO_SOURCE
from grape_service.storage.options import StorageOptions

CORRECT = re.compile(r"correct|verified|verif(y|ied)|passed|is_right|solved", re.I)
REWARD = re.compile(r"reward|score|rating|accuracy|grade", re.I)
COMPLETE = re.compile(r"complete|finished", re.I)
MAX_SOURCES = 12
SCHEMA_LINE = "# yaml-language-server: $schema=grape.schema.json"


def proposed_config(
    pool: str,
    model: str,
    name: str | None = None,
    storage: StorageOptions | None = None,
    sets: list[str] | None = None,
    gather: list[str] | None = None,
) -> str:
    """The text of a config for a pool and a target, which runs as it is; where the pool leaves a question open, it
    stands there as a comment.

    `sets` are key=value, as `--set` takes them; `gather` are models that sample candidates for a pool of prompts.
    Raises UserError where the pool is not there or has no rows.
    """
    values: JsonObject = {
        "name": name or name_of(pool),
        "pool": {"path": pool},
        "target": {"model": model},
        "output": {"path": "./datasets"},
        "storage": storage or {},
    }
    if gather:
        values["gather"] = {"policies": _policies(gather)}
    for override in sets or []:
        apply_override(values, override)
    config = parse_config(values)
    found = look_into(config if config.gather is None else prompts_config(config, config.target))
    (group,) = found.groups
    if group.counts.rows_in == 0:
        raise UserError(f"the pool '{pool}' has no rows: there is nothing to make a config for")
    sections = {
        "name": [f"name: {_scalar(config.name)}"],
        "pool": _pool(config.pool, found, group),
        "target": _target(model),
        **({"gather": _gather(gather, found, group)} if gather else {}),
        "select": _select(found) if not gather else ["select: {method: grape, keep: 1}  # of each prompt"],
        "behavior": _behavior(found, group) if not gather else GATHERED_BEHAVIOR,
        "output": ["output: {path: ./datasets}"],
        **({"storage": [f"storage: {_flow(storage)}"]} if storage else {}),
    }
    for override in sets or []:
        key = override.partition(".")[0].partition("=")[0].strip()
        sections[key] = _with_set(sections.get(key, []), key, override)
    return "\n".join([SCHEMA_LINE, *itertools.chain.from_iterable([*lines, ""] for lines in sections.values())])


GATHERED_BEHAVIOR = [
    "# For SFT that RL follows, PEAR weighs each token by who wrote it; the samples say whose they are:",
    "# weights: {method: pear}",
]


def _policies(models: list[str]) -> JsonObject:
    """Policies that sample, by names made of their models'."""
    named: JsonObject = {}
    for model in models:
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rstrip("/").rsplit("/", 1)[-1]).strip("-._")[:55] or "model"
        number = next(n for n in itertools.count(1) if (name if n == 1 else f"{name}-{n}") not in named)
        named[name if number == 1 else f"{name}-{number}"] = {"model": model, "samples": 4}
    return named


def _gather(models: list[str], found: PoolLook, group: GroupLook) -> list[str]:
    lines = ["gather:  # samples candidates for the pool's prompts, with their log-probabilities", "  policies:"]
    lines += [f"    {_scalar(name)}: {_flow(policy)}" for name, policy in _policies(models).items()]
    lines.append("  sampling: {temperature: 1.0, max_tokens: 4096}")
    lines.append(_comment(f"{len(found.prompts):,} prompts were read{'' if found.is_whole else ' of the first rows'}."))
    answers = [name for name in REFERENCES if name in group.other]
    if answers:
        lines.append(f"  verify: {{method: math, answer: {_scalar(answers[0])}}}  # or exact, regex, judge, a function")
        lines.append("  stop_after: {right: 2}  # no more samples for a prompt that has so many right ones")
    else:
        lines.append(
            _comment("No column is known to hold what is right: verify: {method: judge, model: ...} asks a model.")
        )
    lines.append("  # limit: {tokens: 1000000}  # what a run may spend; the next one goes on")
    lines.append("  # release: NAME  # publishes the candidates too, as a pool for other configs")
    return lines


def _with_set(lines: list[str], key: str, override: str) -> list[str]:
    """A section of the config with `key=value` put over it; its comments stay."""
    values = yaml.safe_load("\n".join(lines)) or {}
    apply_override(values, override)
    comments = [line for line in lines if line.lstrip().startswith("#")]
    body = yaml.safe_dump({key: values[key]}, width=10**6, allow_unicode=True, sort_keys=False).rstrip("\n").split("\n")
    return [*body, *comments]


def name_of(pool: str) -> str:
    """A dataset's name from the last part of a path that says something."""
    parts = [re.sub(r"[^a-z0-9]+", "-", part.split(".")[0].lower()).strip("-") for part in pool.split("/")]
    named = [part for part in parts if part and part not in ("pool", "data", "train", "s3", "file", "main")]
    return (named[-1] if named else "pool")[:63].strip("-") or "pool"


def _pool(config: PoolConfig, found: PoolLook, group: GroupLook) -> list[str]:
    path = config.address
    extent = "all of them" if found.is_whole else "the first ones"
    shapes = list(dict.fromkeys(layout.describe() for layout in group.layouts))
    lines = ["pool:", f"  path: {_scalar(path)}"]
    lines.append(
        _comment(f"{group.files:,} file{'s' * (group.files != 1)}; of {group.counts.rows_in:,} rows ({extent}) read:")
    )
    lines += [_comment(f"{shape}.") for shape in shapes]
    columns = {**(_columns(group.layouts[0]) if len(shapes) == 1 else {}), **config.columns}
    if columns:
        lines.append(f"  columns: {_flow(columns)}")
    lines += _questions(config, group)
    unread = sorted(group.counts.unread)
    if unread or config.carry:
        carried = [*config.carry, *(name for name in unread if name not in config.carry)]
        lines += [
            _comment(f"'{name}' holds {BY_NAME[name].holds}: {BY_NAME[name].way(name)}, and take it out of carry.")
            for name in unread
        ]
        lines.append(f"  carry: {_flow(carried)}")
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


def _questions(config: PoolConfig, group: GroupLook) -> list[str]:
    """What the pool leaves open: which columns hold the prompt and the response, where no name says so."""
    missing = sorted({layout.missing for layout in group.layouts if layout.missing is not None})
    if not missing or group.candidates:
        return []
    names = sorted({name for layout in group.layouts for name in layout.names})
    prompts = [layout.theirs["prompt"] for layout in group.layouts if layout.missing != "prompt"]
    lines = [_comment(f"No column has a name that says it holds the {' or the '.join(missing)}. Which one does?")]
    lines.append(_comment(f"Columns: {', '.join(names)}."))
    places = {"prompt": [], "response": [], **config.columns}
    guesses: dict[str, str] = {}
    for ours in missing:
        near = nearest(ours, set(names) - {*prompts, *guesses.values(), *PROMPTS * (ours == "response")})
        guesses[ours] = near or "…"
    said = {ours: name for ours, name in places.items() if isinstance(name, str)}
    lines.append(f"  # columns: {_flow({**said, **guesses})}")
    return lines


def _columns(layout: Layout) -> JsonObject:
    """What `pool.columns` would say of a layout that was found."""
    if layout.input is not None:
        return {}
    columns: JsonObject = {}
    if layout.conversation is not None:
        columns["prompt"] = layout.conversation
    elif layout.theirs["prompt"] != "prompt" and not layout.theirs["prompt"].startswith("\0"):
        columns["prompt"] = layout.theirs["prompt"]
    if layout.columns:
        columns["responses"] = list(layout.columns)
    return {**columns, **{ours: name for ours, name in layout.guessed.items() if ours not in columns}}


def _filters(group: GroupLook) -> list[tuple[JsonObject, str]]:
    found: list[tuple[JsonObject, str]] = []
    for name, seen in group.other.items():
        if seen.is_bool and (CORRECT.search(name) or COMPLETE.search(name)):
            note = f"true for {seen.values['True']:,} of {seen.rows:,} candidates"
            found.append(({"column": name, "equals": True}, note))
        elif REWARD.search(name) and len(seen.numbers) > 1 and min(seen.numbers) < max(seen.numbers):
            middle = statistics.median_low(seen.numbers)
            least = middle if middle > min(seen.numbers) else max(seen.numbers)
            note = f"from {min(seen.numbers):g} to {max(seen.numbers):g}; half have {middle:g} or less"
            found.append(({"column": name, "at_least": least}, note))
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


def _behavior(found: PoolLook, group: GroupLook) -> list[str]:
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
    elif logprobs := [name for name in group.counts.unread if "log" in name]:
        lines += [f"# behavior: {{column: {_scalar(logprobs[0])}, missing: uniform}}  # recorded, with response_ids"]
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
