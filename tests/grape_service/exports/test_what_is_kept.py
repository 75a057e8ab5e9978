"""Fields of a release in its exports, the split for evaluation, exports that were killed, and the page about them."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import grape_service
from grape_service.errors import UserError
from grape_service.exports import export
from grape_service.exports.effects import EFFECTS, LEVELS, PLAIN_EFFECTS
from grape_service.exports.rows import TINY, weights_for_counting
from grape_service.exports.summary import UNFINISHED
from grape_service.exports.turns import conversations
from grape_service.release.claim import claim_version
from grape_service.release.load import Release
from grape_service.release.manifest import ManifestFields
from grape_service.release.writer import publish, write_part
from grape_service.rows.columns import release_schema
from grape_service.rows.keys import in_eval_share
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version
from tests.grape_service.release.made_up import rows as made_up_rows
from tests.tiny_models import make_model
from tests.workers.training.tiny_release import make_rows, write_release

TOOLS = '[{"type":"function","function":{"name":"add","parameters":{"type":"object"}}}]'
CALL = '[{"id":"c1","type":"function","function":{"name":"add","arguments":"{\\"a\\": 1}"}}]'
SCHEMA = release_schema(["tool_calls", "tool_call_id", "reasoning_content"], [pa.field("tools", pa.string())])


def row(number: int, messages: list[dict[str, Any]], num_spans: int, tools: str | None = None) -> dict[str, Any]:
    """A row whose tokens have loss in `num_spans` stretches."""
    mask = np.array([False] + [True, False] * num_spans)
    return {
        "prompt_id": f"p{number}",
        "candidate_id": f"c{number}",
        "messages": messages,
        "input_ids": np.arange(len(mask), dtype=np.int32),
        "loss_mask": mask,
        "labels": np.where(mask, np.arange(len(mask)), -100).astype(np.int32),
        "loss_weights": mask.astype(np.float32),
        "weight_source": "uniform",
        "num_candidates": 1,
        "truncated": False,
        "tools": tools,
    }


def say(role: str, content: str, **more: str) -> dict[str, str]:
    return {"role": role, "content": content, **more}


def release_of(folder: Path, rows: list[dict[str, Any]]) -> Release:
    storage = Storage(str(folder))
    claim = claim_version(storage, "t")
    entry = write_part(storage, claim.folder, 0, SCHEMA, [pa.Table.from_pylist(rows, schema=SCHEMA)])
    return grape_service.load(
        publish(storage, claim, SCHEMA, [entry], ManifestFields(content_digest="x", tags=["latest"])).reference
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


CALLING = [
    say("system", "S"),
    say("user", "Q1"),
    say("assistant", "", tool_calls=CALL, reasoning_content="I add."),
    say("tool", "3", tool_call_id="c1"),
    say("assistant", "Three."),
]
SECOND_TURN = [say("user", "Q"), say("assistant", "A"), say("user", "R"), say("assistant", "B")]


def test_llamafactory_gets_tools_calls_and_reasoning(tmp_path: Path) -> None:
    release = release_of(
        tmp_path / "out", [row(0, CALLING, 2, TOOLS), row(1, [say("user", "Q"), say("assistant", "A")], 1)]
    )
    summary = export(release, "llamafactory", str(tmp_path / "lf"))
    info = json.loads((tmp_path / "lf" / "dataset_info.json").read_text())["t"]
    assert info["columns"] == {"messages": "messages", "tools": "tools"}
    first, second = lines(tmp_path / "lf" / "train.jsonl")
    assert (first["tools"], second["tools"]) == (TOOLS, "")
    call = first["messages"][2]
    assert call == say("function_call", '<think>\nI add.\n</think>\n\n[{"name":"add","arguments":{"a":1}}]')
    assert [message["role"] for message in first["messages"]] == [
        "system",
        "user",
        "function_call",
        "tool",
        "assistant",
    ]
    assert "messages.tool_call_id" in summary.left_behind
    assert not any("mask_history" in note for note in summary.notes)


def test_turns_without_loss_ask_for_mask_history(tmp_path: Path) -> None:
    release = release_of(tmp_path / "out", [row(0, SECOND_TURN, 1), row(1, SECOND_TURN, 2)])
    summary = export(release, "llamafactory", str(tmp_path / "lf"))
    assert any("`mask_history: true`: 1 rows" in note for note in summary.notes)
    assert "mask_history: true" in (tmp_path / "lf" / "README.md").read_text()
    assert [len(line["messages"]) for line in lines(tmp_path / "lf" / "train.jsonl")] == [4, 2, 4]


def test_v1_messages_have_their_parts_and_weights(tmp_path: Path) -> None:
    export(
        release_of(tmp_path / "out", [row(0, SECOND_TURN, 1), row(1, CALLING, 2, TOOLS)]),
        "llamafactory-v1",
        str(tmp_path / "v1"),
    )
    first, second = lines(tmp_path / "v1" / "train.jsonl")
    assert [message["loss_weight"] for message in first["messages"]] == [0, 0, 0, 1]
    assert [part["type"] for part in second["messages"][2]["content"]] == ["reasoning", "tool_call"]
    assert json.loads(second["messages"][2]["content"][1]["value"]) == {"name": "add", "arguments": {"a": 1}}
    assert second["tools"] == TOOLS
    assert second["loss_mask"] == [False, True, False, True, False]


@pytest.mark.parametrize("to", ["trl", "verl", "tinker", "megatron-bridge"])
def test_parquet_exports_hold_every_field_but_statistics(to: str, tmp_path: Path) -> None:
    release = release_of(tmp_path / "out", [row(0, CALLING, 2, TOOLS)])
    summary = export(release, to, str(tmp_path / "export"))
    table = pq.read_table(tmp_path / "export" / "data" / "part-00000.parquet")
    released = release.dataset.to_table()
    for name in summary.kept:
        assert table[name].to_pylist() == released[name].to_pylist(), name
    assert summary.left_behind == ["target_logprobs", "behavior_logprobs"]


def test_the_split_is_the_trainers_own(tmp_path: Path) -> None:
    release = grape_service.load(write_release(tmp_path / "out", make_rows(40), {}))
    summary = export(release, "jsonl", str(tmp_path / "jsonl"), eval_share=0.3)
    held_back = {line["prompt_id"] for line in lines(tmp_path / "jsonl" / "eval.jsonl")}
    assert held_back == {f"prompt-{n}" for n in range(40) if in_eval_share(f"prompt-{n}", 0.3)}
    assert (summary.rows, summary.eval_rows) == (40 - len(held_back), len(held_back))
    export(release, "verl", str(tmp_path / "verl"), eval_share=0.3)
    assert pq.read_table(tmp_path / "verl" / "eval").num_rows == len(held_back)


KILLED = """
import sys, time, types
import grape_service
from grape_service.exports import export, summary
from grape_service.storage.s3 import RetryingS3

reference, folder, moment = sys.argv[1:]
moved = []


def stop(*_):
    print("here", flush=True)
    time.sleep(60)


def after_the_first(move):
    def moving(*names):
        stop() if moved else moved.append(move(*names))
    return moving


if moment == "written":
    summary.Target.add_loader = stop
else:
    summary.os = types.SimpleNamespace(replace=after_the_first(summary.os.replace))
    RetryingS3.copy = after_the_first(RetryingS3.copy)
export(grape_service.load(reference), "verl", folder, eval_share=0.3)
"""


def kill_an_export(reference: str, folder: str, moment: str) -> None:
    """SIGKILL for an export when all data files are written, or when the first of them is at its place."""
    command = [sys.executable, "-c", KILLED, reference, folder, moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "here\n"
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL


@pytest.mark.drill
@pytest.mark.parametrize("place", ["local", "s3"])
def test_an_export_that_was_killed_starts_over(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = str(tmp_path / "export") if place == "local" else f"{request.getfixturevalue('s3_url')}/export"
    release = grape_service.load(write_release(tmp_path / "out", make_rows(9), {}))
    storage = Storage(folder)

    kill_an_export(release.reference, folder, "written")
    assert {info.path.split("/")[0] for info in storage.list()} == {"unfinished"}

    kill_an_export(release.reference, folder, "moved")
    names = {info.path for info in storage.list() if not info.path.startswith("unfinished/")}
    assert names == {"data/part-00000.parquet"}  # whole, and without README.md
    with storage.open("data/part-00000.parquet") as file:
        assert 0 < pq.read_table(file).num_rows < 9

    said: list[str] = []
    summary = export(release, "verl", folder, eval_share=0.3, say=said.append)
    assert summary.rows + summary.eval_rows == 9
    assert said == [f"an earlier export of {release.reference} to this folder did not end: starting over"]
    names = {info.path for info in storage.list()}
    assert names == {"README.md", "data/part-00000.parquet", "eval/part-00000.parquet", "grape_verl.py"}
    with pytest.raises(UserError, match="is not empty"):
        export(release, "verl", folder)


PEAK = """
import re, sys
from pathlib import Path
import grape_service
from grape_service.exports import export

export(grape_service.load(sys.argv[1]), "ms-swift", sys.argv[2])
print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    """Six times the rows, 60 MB of lines more; `python -m benchmarks.exports` has larger ones, from S3 to S3."""
    peaks = []
    for count in (10_000, 60_000):
        parts = [made_up_rows(start, 5_000) for start in range(0, count, 5_000)]
        reference = publish_version(Storage(str(tmp_path / f"{count}")), parts=parts).reference
        command = [sys.executable, "-c", PEAK, reference, str(tmp_path / f"out-{count}")]
        peaks.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) // 1024)
    assert peaks[1] < peaks[0] + 32, f"MiB: {peaks}"


def test_the_page_lists_what_the_matrix_measures() -> None:
    page = (Path(__file__).parents[3] / "docs" / "exports.md").read_text()
    for effects in (EFFECTS, PLAIN_EFFECTS):
        for name, by_level in effects.items():
            cells = [
                by_level[level].gradient + (f": {by_level[level].how}" if by_level[level].how else "")
                for level in LEVELS
            ]
            assert any(line.startswith(f"| `{name}` |") and " | ".join(cells) in line for line in page.splitlines()), (
                name
            )


def test_a_weight_of_0_still_counts_as_a_token_with_loss() -> None:
    batch = pa.RecordBatch.from_pydict({"loss_mask": [[False, True, True]], "loss_weights": [[0.0, 0.0, 0.5]]})
    weights = weights_for_counting(batch)
    assert weights.tolist() == [0.0, float(TINY), 0.5]
    assert TINY > 0


def test_the_turns_that_were_written_are_the_last_ones() -> None:
    messages = [{"role": role, "content": str(n)} for n, role in enumerate(["user", "assistant", "user", "assistant"])]
    assert [part[-1]["content"] for part in conversations(messages, 1)] == ["3"]
    assert [part[-1]["content"] for part in conversations(messages, 2)] == ["1", "3"]


@pytest.mark.parametrize("format", ["jsonl", "openrlhf", "llamafactory"])
def test_messages_begin_with_the_system_prompt_that_their_tokens_hold(tmp_path: Path, format: str) -> None:
    config = {"target": {"model": "m", "system_prompt": "Be brief."}, "weights": None}
    publish_version(Storage(str(tmp_path / "datasets")), "math-sft", config=config)
    export(grape_service.load(str(tmp_path / "datasets" / "math-sft")), format, str(tmp_path / "out"))
    [path] = [path for path in (tmp_path / "out").rglob("*.jsonl") if "train" in path.name]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines
    for line in lines:
        roles = [message["role"] for message in line["messages"]]
        assert line["messages"][0]["content"] == "Be brief." or roles.count("system") == 1
        assert roles[0] == "system"
        assert roles.count("system") == 1


@pytest.mark.parametrize("to", ["trl", "verl", "jsonl", "axolotl", "tinker", "megatron-bridge", "llamafactory-v1"])
def test_a_token_id_that_the_target_does_not_have_is_refused(to: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    for number, (unknown, target) in enumerate([(515, model), (-7, "a-team/its-model")]):
        rows = make_rows(6)
        rows[4]["input_ids"][1] = unknown
        reference = write_release(tmp_path / f"out{number}", rows, {"target": {"model": target}})
        with pytest.raises(UserError, match=rf"row 5 of {reference} .*holds the token id {unknown}, and"):
            export(grape_service.load(reference), to, tmp_path / f"{to}{number}")
        assert [path.name for path in (tmp_path / f"{to}{number}").iterdir()] == [UNFINISHED]
