"""The card of a checkpoint: README.md, which says what it was trained on and from, with which settings."""

from __future__ import annotations

from typing import Any, Literal, get_args

import orjson
import yaml

from grape_service.models.whole import CheckpointFacts

CARD = "README.md"
Count = Literal[
    "step", "steps", "rows", "eval_rows", "prompts", "rows_too_long", "rows_without_loss", "rows_without_weight"
]
COUNTS: tuple[Count, ...] = get_args(Count)


def card(facts: CheckpointFacts) -> str:
    """The card's text: a head that model hubs read, then the same for people."""
    model, dataset = facts["model"], facts["dataset"]
    # A hub takes names alone; a folder of this machine is told below.
    head: dict[str, Any] = {"library_name": "transformers", "tags": ["grape-service", facts["stage"]]}
    if "://" not in model and not model.startswith("/"):
        head["base_model"] = model
    what = "SFT on the rows" if facts["stage"] == "sft" else "RL on the prompts"
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).rstrip(),
        "---",
        "",
        f"# {dataset.rpartition('/')[2]}, {facts['stage']}",
        "",
        f"{what} of the dataset version `{dataset}`, from the model `{model}`. "
        f"`grape datasets show {dataset} --lineage` shows what the version was made of.",
        "",
        "| | |",
        "|---|---|",
        f"| dataset version | `{dataset}` |",
        f"| starting model | `{model}` |",
        f"| run | `{facts.get('run') or 'none'}` |",
        f"| digest of all inputs | `{facts['inputs']}` |",
    ]
    lines += [f"| {name.replace('_', ' ')} | {facts[name]:,} |" for name in COUNTS if name in facts]
    last = (facts.get("metrics") or {}).get("last") or {}
    lines += [f"| last {name} | {last[name]:.4g} |" for name in ("loss", "reward") if name in last]
    lines += [f"\n{note}" for note in facts.get("notes", [])]
    settings = orjson.dumps(facts["settings"], option=orjson.OPT_INDENT_2).decode()
    return "\n".join([*lines, "", "## Settings", "", "```json", settings, "```", ""])
