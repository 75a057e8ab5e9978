"""LLaMA-Factory (v0, its main entry point): chat messages, of which it makes its own tokens; it takes no weights.

Its converter for openai messages reads role and content alone, wants user and assistant in turns, and trains on every
assistant turn unless `mask_history` says to train on the last one. So tool calls become messages of the role
function_call, with the calls as JSON text; reasoning stands before the answer between <think> and </think>; and where
a release has assistant turns without loss, the export is for `mask_history: true`: a row in which several turns have
loss becomes one row for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import orjson
import pyarrow as pa

from grape_service.exports.lines import write_lines
from grape_service.exports.prefills import without_prefills
from grape_service.exports.repeats import NEEDED, Repeats
from grape_service.exports.rows import chat_messages, loss_spans, message_fields, split_batches, system_prompt_of
from grape_service.exports.summary import ExportSummary, Target
from grape_service.exports.turns import TurnCounts, called_functions, conversations
from grape_service.release.load import Release
from grape_service.rows.candidate import Message

TAGS = {
    "role_tag": "role",
    "content_tag": "content",
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "function_call",
    "system_tag": "system",
}
CARRIED = ("role", "content", "tool_calls", "reasoning_content")
ROLES = {"developer": "system", "function": "tool"}
THOUGHT = "<think>\n{}\n</think>\n\n"


def export(release: Release, target: Target) -> ExportSummary:
    """Write train.jsonl and dataset_info.json."""
    target, told = without_prefills(release, target, "LLaMA-Factory v0")
    repeats = Repeats(release, target)
    turns = TurnCounts()
    for batch in split_batches(release, ["messages", "loss_mask"], target, "train"):
        for messages, num_spans in zip(batch.column("messages").to_pylist(), loss_spans(batch), strict=True):
            turns.add(messages, int(num_spans))
    has_tools, system_prompt = "tools" in release.schema.names, system_prompt_of(release)
    lost = Lost()

    def objects(batch: pa.RecordBatch, split: str) -> Iterator[dict[str, Any]]:
        tools = batch.column("tools").to_pylist() if has_tools else itertools.repeat(None)
        rows = zip(
            batch.column("messages").to_pylist(), loss_spans(batch), tools, repeats.copies(batch, split), strict=False
        )
        for messages, num_spans, offered, copies in rows:
            flat = list(chat_messages(messages, system_prompt))
            parts = conversations(flat, int(num_spans)) if turns.masked and num_spans > 1 else [flat]
            lines: list[dict[str, Any]] = [{"messages": [lost.message(message) for message in part]} for part in parts]
            if has_tools:
                lines = [{**line, "tools": offered or ""} for line in lines]
            lost.skipped += sum(not alternates(line["messages"]) for line in lines)
            yield from lines * int(copies)

    columns = [*NEEDED, "messages", *(["tools"] if has_tools else [])]
    rows = write_lines(release, target, columns, None, objects)
    info: dict[str, Any] = {}
    for split in target.splits:
        used = {"messages": "messages", **({"tools": "tools"} if has_tools else {})}
        name = release.name if split == "train" else f"{release.name}-eval"
        info[name] = {"file_name": f"{split}.jsonl", "formatting": "openai", "columns": used, "tags": TAGS}
    sentence = repeats.sentence("llamafactory", "LLaMA-Factory v0", rows["train"]) + (
        " It makes its own tokens of the messages."
    )
    notes = told
    if turns.masked:
        notes.append(
            f"Give `mask_history: true`: {turns.masked} rows have assistant turns without loss, and LLaMA-Factory "
            "trains on every assistant turn without it."
        )
        if turns.several or turns.all_turns:
            notes.append("A row in which several turns have loss is one line for each of them, which ends with it.")
    notes += lost.notes
    options = ["mask_history: true"] if turns.masked else []
    if target.eval_share:
        options.append(f"eval_dataset: {release.name}-eval")
    usage = "\n".join(["```yaml", f"dataset_dir: {target.folder}", f"dataset: {release.name}", *options, "```"])
    fields = [f"messages.{name}" for name in message_fields(release) if name not in CARRIED]
    kept = ["messages", *(["tools"] if has_tools else [])]
    left = [name for name in release.schema.names if name not in kept]
    target.storage.write_json("dataset_info.json", info)
    return target.summary("llamafactory", release, rows, sentence, usage, kept, [*fields, *left], notes)


class Lost:
    """What LLaMA-Factory cannot be given, counted while messages pass."""

    def __init__(self) -> None:
        self.skipped = 0  # conversations
        self.texts = 0  # messages

    def message(self, message: Message) -> dict[str, str]:
        """A message with role and content alone."""
        role: str = message["role"]
        role = ROLES.get(role, role)
        content: str = message.get("content") or ""
        if message.get("tool_calls"):
            self.texts += bool(content.strip())
            role, content = "function_call", orjson.dumps(called_functions(message["tool_calls"])).decode()
        if message.get("reasoning_content"):
            content = THOUGHT.format(message["reasoning_content"]) + content
        return {"role": role, "content": content}

    @property
    def notes(self) -> list[str]:
        """Lines for the user."""
        notes = []
        if self.texts:
            notes.append(f"The text beside tool calls is not in it ({self.texts} messages): it takes calls alone.")
        if self.skipped:
            notes.append(
                f"LLaMA-Factory skips {self.skipped} conversations: it wants user (or tool) and assistant in turns."
            )
        return notes


def alternates(messages: list[dict[str, str]]) -> bool:
    """Whether user or tool messages and assistant turns follow one another, as LLaMA-Factory wants them; tool messages
    next to each other are one."""
    kinds: list[str] = []
    for place, message in enumerate(messages):
        role = message["role"]
        if role == "system" and place == 0:
            continue
        if role not in ("user", "tool", "assistant", "function_call"):
            return False
        if role == "tool" and kinds and kinds[-1] == "tool":
            continue
        kinds.append(role)
    asks = [kind in ("user", "tool") for kind in kinds]
    return len(asks) % 2 == 0 and all(ask == (place % 2 == 0) for place, ask in enumerate(asks))
