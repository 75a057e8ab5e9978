"""Selection by steps on real files: the target's own tokenizer spells them, in one pass over shards and in two."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config, RenderConfig
from grape_service.models.tokenizer import load_tokenizer
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import is_drawn, row_keys
from grape_service.rows.ragged import list_array, offsets_from_lengths
from grape_service.score.store import ScoreStore
from grape_service.select.choose import Candidates, Choice
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.select.steps import Tokenizer
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from tests.made_rows import Row, row_table
from tests.tiny_models import make_model

TEXTS = {
    "p1-a": "one two three\n\nfour five six",
    "p1-b": "one\n\ntwo\n\nthree\n\nfour",
    "p2-a": "seven",
    "p2-b": "eight\n\nnine ten",
}


def shard(tokenizer) -> tuple[pa.Table, list[list[str]]]:
    """A shard of these responses, each with a turn end, and their tokens' texts."""
    rows = row_table([Row(name[:2], name, name[-1]) for name in TEXTS])
    written = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS.values()]
    ids = [[5, 6, 7, *own, tokenizer.eos_token_id] for own in written]
    masks = [[0, 0, 0, *[1] * len(own), 2] for own in written]
    offsets = offsets_from_lengths([len(row) for row in ids])
    flat, mask = np.concatenate(ids).astype(np.int32), np.concatenate(masks).astype(np.uint8)
    made = {
        "row_key": row_keys(flat, mask, offsets),
        "input_ids": list_array(offsets, flat, pa.int32()),
        "loss_mask": list_array(offsets, mask, pa.uint8()),
    }
    for name, column in made.items():
        rows = rows.set_column(rows.column_names.index(name), SHARD.field(name), column)
    return rows, [[tokenizer.decode([id_]) for id_ in own] for own in written]


class Report:
    """What a report is given of each candidate, by its name: the score by steps and how many there are."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[float | None, int]] = {}

    def add_candidates(self, candidates: Candidates, choice: Choice) -> None:
        detail = candidates.detail
        assert detail is not None
        assert detail.num_steps is not None
        names = np.array(sorted(TEXTS))[candidates.ties]
        for name, score, steps in zip(names, detail.others["steps"], detail.num_steps, strict=True):
            self.found[str(name)] = (None if np.isnan(score) else float(score), int(steps))


@pytest.mark.parametrize("settings", [{}, {"max_source_share": 1.0}, {"skip": 2}, {"count_turn_end": True}])
def test_the_method_counts_what_goes_on(tmp_path: Path, settings: dict[str, object]) -> None:
    policy = PolicyConfig(model=make_model(tmp_path / "model"))
    tokenizer = load_tokenizer(policy.model, policy)
    storage = Storage(str(tmp_path / "workspace"))
    table, texts = shard(tokenizer)
    write_parquet(storage, "shard.parquet", table.schema, [table])
    random = np.random.default_rng(0)
    scores = [(-random.exponential(1, len(own) + 1)).astype(np.float32) for own in texts]
    store = ScoreStore(storage, "target")
    lengths = offsets_from_lengths([len(own) for own in scores])
    store.write("b", table["row_key"].combine_chunks(), lengths, np.concatenate(scores), {})

    skip = int(settings.get("skip", 1))  # type: ignore[call-overload]
    expected = {}
    for name, own, values in zip(TEXTS, texts, scores, strict=True):
        left, seen, before = [], 0, ""
        for text, value in zip([*own, "<end>"], values, strict=True):
            if text != "<end>" or settings.get("count_turn_end"):
                left += [float(value)] if seen >= skip else []
            before += text
            seen = 0 if before.endswith("\n\n") else seen + 1
        expected[name] = sum(left) / len(left) if left else None
    best = {}
    for name, number in expected.items():
        if number is not None and number > best.get(name[:2], ("", -np.inf))[1]:
            best[name[:2]] = name, number

    config = Config.model_validate(
        {
            "name": "test",
            "pool": {"path": "pool.jsonl"},
            "target": {"model": policy.model},
            "output": {"path": "out"},
            "select": {"method": "steps", **settings},
        }
    )
    where = Tokenizer(policy, RenderConfig(), {}, policy.model)
    context = SelectContext(storage, config, store, frozenset({tokenizer.eos_token_id}), where)
    counts = select_partition(context, SelectPartition("b", ["shard.parquet"], "kept.parquet"))
    with storage.open("kept.parquet") as file:
        kept = pa.parquet.read_table(file).to_pylist()
    assert {row["prompt_id"]: (row["candidate_id"], pytest.approx(row["select_score"])) for row in kept} == best
    assert counts.nothing_counted == sum(number is None for number in expected.values())

    # A report on another choice has the same numbers, of all prompts or of those that are drawn by their ids.
    grape = config.model_copy(update={"select": config.select.model_copy(update={"method": "grape"})})
    reports = []
    for share in (1.0, 0.2):
        observer = Report()
        told = replace(context, config=grape, cut_share=share)
        select_partition(told, SelectPartition("b", ["shard.parquet"], "grape.parquet"), observer=observer)
        reports.append(observer.found)
    whole, some = reports
    assert {name: number for name, (number, _) in whole.items() if number is not None} == {
        name: pytest.approx(number) for name, number in expected.items() if number is not None
    }
    drawn = {name for name in whole if is_drawn(name[:2], 0.2, b"report steps")}
    assert 0 < len(drawn) < len(whole)
    assert {name: found for name, found in some.items() if name in drawn} == {
        name: found for name, found in whole.items() if name in drawn
    }
    assert all(some[name] == (None, -1) for name in whole.keys() - drawn)
