"""The inverse of a release: weighed again under the config that made it, drawn releases give the same weights, bit for
bit. Real templates render the rows, a real prepare makes the shards; only the log-probabilities are drawn."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config, RenderConfig
from grape_service.prepare.result import Prepared
from grape_service.release.proof import RowProof
from grape_service.release.rows import final_batches, kept_rows
from grape_service.render.loading import load_renderer
from grape_service.render.renderer import Renderer
from grape_service.rows.columns import SHARD, computed_fields, kept_columns, needed_fields, release_schema
from grape_service.rows.ragged import list_offsets_and_values, offsets_from_lengths, segment_sums
from grape_service.rows.statistics import LOGPROB
from grape_service.score.store import ScoreStore
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.storage.parquet import array_of, read_tables, write_parquet
from grape_service.storage.storage import Storage
from grape_service.weigh.counts import dataset_factor
from grape_service.weigh.lookup import Stores
from grape_service.weigh.partition import WeighContext, WeighPartition, weigh_partition
from grape_service.weigh.rescore import Group, write_group_shards
from tests import tiny_models
from tests.prepared_pools import all_rows, make_config, prepare, write_jsonl

TRIMMED = tiny_models.CHATML.replace("(message.content or '')", "(message.content or '') | trim")
OTHER_END = tiny_models.CHATML.replace(
    '<|im_end|>\\n\' }}"\n    "{%- endfor', '<|endoftext|>\\n\' }}"\n    "{%- endfor'
)
TOOLS = [{"type": "function", "function": {"name": "add", "description": "adds", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": 2}}}
HOT = 0.5
PREFILLED = {2: "Well: ", 3: "Well", 6: "Well", 8: "Well", 11: "Well:"}
"""The prompts whose policy was given the beginning of its turn; one of them offers tools."""


def pool_rows(renderer: Renderer) -> Iterator[dict[str, Any]]:
    """Prompts that the target trims alike, with candidates of every kind."""
    end = renderer.turn_end_id

    def ids_of(text: str) -> list[int]:
        return renderer.tokenizer.encode(text, add_special_tokens=False)

    for number in range(12):
        asked = f"What is {number // 2} + 1?" + ("\n\n" if number % 2 else "")
        prompt: Any = asked
        if number % 3 == 1:
            prompt = [{"role": "system", "content": "Be short."}, {"role": "user", "content": asked}]
        if number % 3 == 2:
            prompt = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
            prompt += [{"role": "user", "content": asked}]
        base = {"prompt": prompt, "prompt_id": f"p{number}", **({"tools": TOOLS} if number % 4 < 2 else {})}
        if number in PREFILLED:
            base["prefill"] = PREFILLED[number]
        # Recorded: with its turn end, which may be certain, without it, cut off, at a temperature, from a cut support.
        for place, (tail, last, sampling) in enumerate(
            [
                ([end], -0.25, None),
                ([end], 0.0, None),
                ([], None, None),
                ([end], -0.0, {"temperature": HOT}),
                ([], None, {"temperature": HOT}),
                ([end], -1.0, {"top_p": 0.9}),
            ]
        ):
            ids = [*ids_of(f"It is {number}, {place}."), *tail]
            recorded = [-0.125 * (1 + i % 7) for i in range(len(ids) - len(tail))] + ([last] if tail else [])
            row = {"response": f"It is {number}, {place}.", "source": "column", "response_ids": ids}
            yield {**base, **row, "behavior_logprobs": recorded, **({"sampling": sampling} if sampling else {})}
        cut = {"response": f"The ans{number}", "response_ids": ids_of(f"The ans{number}"), "finish_reason": "length"}
        yield {**base, **cut, "source": "column", "behavior_logprobs": [-0.5] * len(cut["response_ids"])}
        for source in ("same", "other", None):
            yield {**base, "response": f"{source} says {number}.", "source": source}
            yield {**base, "response": f'<tool_call>\n{{"name": "{source}"}}\n</tool_call>', "source": source}
            if "tools" in base:
                turns = [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": f"{number}"}]
                yield {
                    **base,
                    "response": [*turns, {"role": "assistant", "content": f"So {source}."}],
                    "source": source,
                }
                only = [{"role": "assistant", "content": f"I, {source}, add.", "tool_calls": [CALL]}]
                yield {**base, "response": only, "source": source}


@dataclass(repr=False)
class Made:
    """What all draws share."""

    folder: Path
    renderer: Renderer
    prepared: Prepared
    rows: pa.Table
    prompts: list[str]


@cache
def made(folder: Path) -> Made:
    for name, template in (("target", TRIMMED), ("same", tiny_models.CHATML), ("other", OTHER_END)):
        tokenizer = tiny_models.make_tokenizer(folder / name)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(str(folder / name))
    policy = PolicyConfig(model=str(folder / "target"))
    renderer = load_renderer(policy.model, policy, RenderConfig())
    config = make_config(
        write_jsonl(folder / "pool.jsonl", list(pool_rows(renderer))), pool={"truncated": "keep", "max_reject_share": 0}
    )
    storage = Storage(str(folder / "workspace"))
    _, prepared = prepare(config, storage, renderer)
    rows = all_rows(storage, prepared).combine_chunks()
    return Made(folder, renderer, prepared, rows, sorted(set(rows["prompt_id"].to_pylist())))


def scores_of(keys: list[bytes], lengths: list[int], seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Statistics that depend on nothing but a row's key and a policy's seed; certain tokens among them."""
    flat: dict[str, list[np.ndarray]] = {LOGPROB: [], "top20_entropy": []}
    for key, length in zip(keys, lengths, strict=True):
        draw = np.random.default_rng([seed, *hashlib.sha256(key).digest()[:8]])
        values = -draw.exponential(0.7, length).astype(np.float32)
        flat[LOGPROB].append(np.where(draw.random(length) < 0.2, np.float32(0), values))
        flat["top20_entropy"].append(draw.uniform(0, 3, length).astype(np.float32))
    return {name: np.concatenate(parts) for name, parts in flat.items()}, offsets_from_lengths(lengths)


def put(store: ScoreStore, table: pa.Table, seed: int) -> None:
    offsets, mask = list_offsets_and_values(array_of(table, "loss_mask"))
    lengths = segment_sums(mask > 0, offsets)
    values, ends = scores_of(table["row_key"].to_pylist(), lengths.tolist(), seed)
    logprobs = values.pop(LOGPROB)
    store.write("b", table["row_key"], ends, logprobs, {}, statistics=values)


POLICY = {"engine": "transformers", "dtype": "float32"}
WEIGHTS: list[dict[str, Any]] = [
    {"method": "pear", "level": level, "center": center, "normalize": normalize}
    for level, center in (("token", "none"), ("token", "sequence"), ("block", "none"), ("sequence", "none"))
    for normalize in ("none", "sequence", "dataset")
    if not (level == "sequence" and normalize == "sequence")
] + [{"method": "entropy", "normalize": "dataset"}, {"method": "probability"}]


class Weighing:
    """One way to weigh rows, with the files and scores that it needs."""

    def __init__(self, shared: Made, storage: Storage, config: Config):
        self.shared, self.storage, self.config = shared, storage, config
        self.names = ("target", "hot", "same", "other")
        self.stores = {name: ScoreStore(storage, name) for name in self.names}

    def weigh(self, kept: str, out: str, number: int) -> tuple[float, bool]:
        """Kept rows to weighed rows; the factor of the dataset, and whether some behavior is not known."""
        behavior, shards = self.config.compared_behavior, []
        if behavior is not None:
            groups = [Group(f"behavior-{n}", p, p.model, p.model, 1.0, n) for n, p in enumerate(behavior.policies())]
            written = write_group_shards(
                self.storage, "b", kept, f"rescore-{number}", groups, behavior, RenderConfig(),
                self.shared.renderer.turn_end_id, 65536,
            )  # fmt: skip
            shards = [list(written[group.name].shards.paths) for group in groups]
            for seed, (paths, group) in enumerate(zip(shards, groups, strict=True)):
                name = Path(group.policy.model).name
                for table in read_tables(self.storage, paths):
                    there = ~self.stores[name].missing("b", table["row_key"])  # as when the release was made
                    if not there.all():
                        put(self.stores[name], table.filter(pa.array(~there)), seed + 10)
        ours = [self.stores[Path(p.model).name] for p in (behavior.policies() if behavior else [])]
        partition = WeighPartition("b", kept, shards, out)
        context = WeighContext(self.storage, self.config, Stores(None, ours, {HOT: self.stores["hot"]}))
        counts = weigh_partition(context, partition)
        return dataset_factor(counts, self.config.weights), bool(counts.unknown_tokens)


def read(storage: Storage, path: str) -> pa.Table:
    return pq.read_table(storage.full(path)).combine_chunks()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    memory = Path("/dev/shm")  # every file is synced to its disk, which would take most of the time
    if not os.access(memory, os.W_OK):
        yield made(tmp_path_factory.mktemp("inverse"))
        return
    with tempfile.TemporaryDirectory(dir=memory, prefix="grape-test-") as folder:
        yield made(Path(folder))


draws = st.fixed_dictionaries(
    {
        "prompts": st.sets(st.integers(0, 11), min_size=1, max_size=2),
        "seed": st.integers(0, 2**32),
        "share": st.sampled_from([0.1, 0.3, 1.0]),
        "weights": st.sampled_from(WEIGHTS),
        "first_weighed": st.booleans(),
        "missing": st.sampled_from(["uniform", "drop"]),
        "keep": st.sampled_from([1, 2, 99]),
        "stop_ids": st.booleans(),
    }
)


@settings(
    max_examples=500,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
    phases=[Phase.explicit, Phase.generate],
)
@given(draw=draws)
def test_a_release_weighed_again_gives_the_same_bits(shared: Made, draw: dict[str, Any]) -> None:
    folder = shared.folder / "draw"
    shutil.rmtree(folder, ignore_errors=True)
    storage = Storage(str(folder))
    behavior = {
        "sources": {
            "column": {"column": "behavior_logprobs", "recorded": "processed"},
            "same": {"model": str(shared.folder / "same"), "system_prompt": "Be brief.", **POLICY},
            "other": {"model": str(shared.folder / "other"), **POLICY},
        },
        "missing": draw["missing"],
    }
    config = make_config(
        "pool.jsonl",
        behavior=behavior,
        weights=draw["weights"],
        select={"keep": draw["keep"]},
        score={"statistics": ["logprob", "top20_entropy"]},
    )
    random = np.random.default_rng(draw["seed"])
    chosen = pa.array([shared.prompts[number] for number in sorted(draw["prompts"])])
    rows = shared.rows.filter(pc.is_in(shared.rows["prompt_id"], value_set=chosen))
    some = random.random(rows.num_rows) < draw["share"]
    some[0] = True
    rows = rows.filter(pa.array(some))
    write_parquet(storage, "shard.parquet", rows.schema, [rows])
    weighing = Weighing(shared, storage, config)
    for seed, name in enumerate(("target", "hot")):
        put(weighing.stores[name], rows, seed)

    # Without stop ids nothing tells of turn ends but the release's own columns.
    stop_ids = shared.renderer.stop_ids if draw["stop_ids"] else frozenset()
    context = SelectContext(storage, config, weighing.stores["target"], stop_ids)
    counts = select_partition(context, SelectPartition("b", ["shard.parquet"], "kept.parquet"))
    fields = computed_fields(config.statistics, has_select_score=False)
    factor, unknown = weighing.weigh("kept.parquet", "weighed.parquet", 0)
    compared = config.compared_behavior is not None
    known_is_said = unknown if compared and draw["first_weighed"] else True

    def release(path: str, factor: float, says_known: bool) -> pa.Table:
        extra = needed_fields(
            recorded=True,
            tools=bool(counts.kept_with_tools),
            not_told=bool(counts.kept_not_told),
            says_known=says_known,
            prefilled=bool(counts.kept_with_prefill),
        )
        renderer = shared.renderer if draw["seed"] % 4 == 0 else None
        proof = RowProof(counts.kept_rows, fields, stop_ids, renderer)
        batches = list(final_batches(storage, path, shared.prepared.message_fields, extra, factor, fields, proof.look))
        assert proof.rows == sum(batch.num_rows for batch in batches)
        return pa.Table.from_batches(batches, release_schema(shared.prepared.message_fields, extra, fields))

    first = read(storage, "weighed.parquet")
    path, by = ("weighed.parquet", factor) if draw["first_weighed"] else ("kept.parquet", 1.0)
    released = release(path, by, known_is_said)
    if released.num_rows == 0:
        return
    for row in released.to_pylist():
        prefill = PREFILLED.get(int(row["prompt_id"][1:]))
        assert row.get("prefill") == prefill
        assert any(m["role"] == "assistant" and m["content"].startswith(prefill or "") for m in row["messages"])
    kept = kept_rows(released, pa.schema([*SHARD, *kept_columns(fields)]), stop_ids, keep_scores=True)
    write_parquet(storage, "again.parquet", kept.schema, [kept])
    factor_again, unknown_again = weighing.weigh("again.parquet", "weighed-again.parquet", 1)
    again = read(storage, "weighed-again.parquet")
    if compared and draw["missing"] == "drop" and draw["first_weighed"]:
        assert again.num_rows == first.num_rows
    for name in ("candidate_id", "weight_source", "weights", *(["behavior_logprobs"] if compared else [])):
        one, other = (table[name].to_pylist() for table in (first, again))
        assert one == other, name
    assert (factor_again, unknown_again) == (factor, unknown)
    second = release("weighed-again.parquet", factor_again, known_is_said)
    if draw["first_weighed"]:
        assert second.equals(released)
