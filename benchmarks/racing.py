"""What racing saves: the same pools scored with `score.race` off, exact and at a risk, side by side in one run.

    python -m benchmarks.racing [--quick] [--engine transformers|vllm] [--risk 0.001] [--sizes quickstart,400x4]

Pools: the quickstart's, and made ones of prompts of 100 tokens with 4 and 16 candidates of 400 and 2,000 tokens: pieces
of this repository's text in which a share of the tokens, another for each candidate, is replaced by random ones. The
model is SmolLM2-135M-Instruct in float32. `--quick` takes fewer prompts and leaves 2000x16 out.

For each way: the share of response tokens that were scored, of useful FLOP and of seconds, against `off`, and of how
many prompts the same candidate is kept. FLOP are 2 a weight of the layers for each token that went through them (those
that were read again are among them, those from a cache are not) and 2 a weight of the output head for a scored token;
attention's own products are not counted. Exit status 1 where exact racing keeps another candidate.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.transformers_engine import ROOT, model_folder, text_tokens
from grape_service.config.loading import load_config, parse_config
from grape_service.config.schema import Config
from grape_service.rows.columns import LOSS_TOKEN, SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import TokenBatch
from grape_service.score.shards import shards_of_pool
from grape_service.score.stopped import stopped_store
from grape_service.score.store import ScoreStore
from grape_service.select.counts import SelectCounts
from grape_service.select.partition import SelectContext, SelectPartition, select_partition
from grape_service.select.race_rows import Race
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from workers.engines.choose import load_engine
from workers.run import Run
from workers.scoring.actor import ScoringActor, ScoringSpec
from workers.scoring.rows import read_rows, token_batch
from workers.scoring.work import Unit

PROMPT_TOKENS = 100
LARGEST_NOISE = 0.3
"""Share of random tokens in the worst candidate of a made prompt."""


@dataclass
class Pool:
    """Shards of one partition in a storage."""

    name: str
    storage: Storage
    partition: str
    paths: list[str]

    @property
    def batch(self) -> TokenBatch:
        """All rows."""
        return token_batch(pa.concat_tables([read_rows(self.storage, path) for path in self.paths]))


@dataclass
class Outcome:
    """What one way of scoring a pool took, and what it keeps."""

    loss_tokens: int
    flops: float
    seconds: float
    kept: set[tuple[str, str]]
    counts: SelectCounts


def quickstart_pool(folder: Path, model: str) -> Pool:
    """The quickstart's pool, prepared for the model."""
    config = load_config(ROOT / "examples/quickstart/grape.yaml", [f"pool.path={ROOT}/examples/quickstart/pool/"])
    target = config.target.model_copy(update={"model": model})
    config = config.model_copy(update={"target": target, "behavior": None, "weights": None})
    storage = Storage(str(folder))
    run = Run(config, "racing", "racing", storage, storage)
    prepared = runpy.run_path(str(ROOT / "examples/plain_loop.py"))["prepare"](run)
    (shards,) = shards_of_pool(prepared)
    return Pool("quickstart", storage, shards.partition, list(shards.paths))


def made_pool(folder: Path, text: list[int], length: int, candidates: int, prompts: int) -> Pool:
    """Prompts with candidates of about `length` tokens, each with its share of random tokens."""
    random = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for prompt in range(prompts):
        begin = int(random.integers(0, len(text) - PROMPT_TOKENS))
        question = text[begin : begin + PROMPT_TOKENS]
        for candidate in range(candidates):
            size = int(length * random.uniform(0.8, 1.2))
            begin = int(random.integers(0, len(text) - size))
            answer = np.array(text[begin : begin + size])
            noisy = random.random(size) < random.uniform(0, LARGEST_NOISE)
            answer[noisy] = random.choice(text, int(noisy.sum()))
            ids, mask = [*question, *answer.tolist()], [0] * PROMPT_TOKENS + [LOSS_TOKEN] * size
            key = row_keys(np.array(ids, np.int32), np.array(mask, np.uint8), np.array([0, len(ids)]))[0].as_py()
            row = {"row_key": key, "prompt_id": f"p{prompt}", "candidate_id": f"c{candidate:02}", "truncated": False}
            row |= {"source": f"s{candidate % 4}", "input_ids": ids, "loss_mask": mask, "prompt_len": PROMPT_TOKENS}
            rows.append({**row, "messages": "[]", "num_prompt_messages": 1})
    storage = Storage(str(folder))
    write_parquet(storage, "shards/b/shard-00000.parquet", SHARD, [pa.Table.from_pylist(rows, schema=SHARD)])
    return Pool(f"{length}x{candidates}", storage, "b", ["shards/b/shard-00000.parquet"])


def config_of(model: str, engine: str, race: Any) -> Config:
    return parse_config(
        {
            "name": "racing",
            "pool": {"path": "unused"},
            "target": {"model": model, "dtype": "float32", "engine": engine, "engine_args": {}},
            "output": {"path": "unused"},
            "score": {"race": race},
        }
    )


def scored(pool: Pool, engine: Any, config: Config, way: str, sizes: tuple[int, int]) -> Outcome:
    """Score a pool in one way, from nothing; `sizes` are weights of the layers and of the output head."""
    race = Race.of(config.select, config.score)
    actor = ScoringActor(ScoringSpec(config.target, way, pool.storage, "racing", "compatible", {}))
    actor.engine = engine
    if hasattr(engine, "forget_cached_prompts"):
        engine.forget_cached_prompts()
    before = engine.stats()
    for number, path in enumerate(pool.paths):
        actor.score(number, Unit(path, pool.partition, 0, 0, check=False, race=race), way)
    after = engine.stats()
    computed, seconds = (
        after[name] - before[name] - (after["cached_tokens"] - before["cached_tokens"]) * (name == "tokens")
        for name in ("tokens", "seconds")
    )
    store = ScoreStore(pool.storage, way)
    stopped = stopped_store(store) if race is not None else None
    context = SelectContext(pool.storage, config, store, frozenset(), None, stopped)
    counts = select_partition(context, SelectPartition(pool.partition, pool.paths, f"{way}.parquet"))
    with pq.ParquetFile(pool.storage.full(f"{way}.parquet")) as file:
        ids = file.read(columns=["prompt_id", "candidate_id"]).to_pylist()
    loss = counts.loss_tokens - counts.stopped_tokens
    flops = 2.0 * sizes[0] * computed + 2.0 * sizes[1] * loss
    return Outcome(loss, flops, seconds, {(row["prompt_id"], row["candidate_id"]) for row in ids}, counts)


def model_sizes(folder: str) -> tuple[int, int]:
    """Weights of a Llama's layers, and of its output head."""
    config = orjson.loads((Path(folder) / "config.json").read_bytes())
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    of_keys = hidden // heads * config["num_key_value_heads"]
    layer = 2 * hidden * hidden + 2 * hidden * of_keys + 3 * hidden * inner
    return config["num_hidden_layers"] * layer, hidden * config["vocab_size"]


def pools(scratch: Path, model: str, args: argparse.Namespace) -> Iterator[Pool]:
    """The pools that are asked for."""
    if "quickstart" in args.sizes:
        yield quickstart_pool(scratch / "quickstart", model)
    vocabulary = orjson.loads((Path(model) / "config.json").read_bytes())["vocab_size"]
    text = text_tokens(model, vocabulary)
    for size in (one for one in args.sizes if one != "quickstart"):
        length, candidates = map(int, size.split("x"))
        yield made_pool(scratch / size, text, length, candidates, args.prompts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one prompt a made pool, and no 2000x16")
    parser.add_argument("--engine", default="transformers", choices=["transformers", "vllm"])
    parser.add_argument("--risk", type=float, default=0.001)
    parser.add_argument("--sizes", type=lambda text: text.split(","), help="pools: quickstart, tokens x candidates")
    parser.add_argument("--prompts", type=int, help="of a made pool")
    args = parser.parse_args()
    args.prompts = args.prompts or (1 if args.quick else 4)
    default = ["quickstart", "400x4", "400x16", "2000x4", *([] if args.quick else ["2000x16"])]
    args.sizes = args.sizes or default
    console, wrong = Console(width=120), 0
    with tempfile.TemporaryDirectory() as scratch:
        model, what = model_folder(None, scratch)
        ways = {"off": "off", "exact": "exact", "risk": {"risk": args.risk, "audit": 0.0}}
        configs = {way: config_of(model, args.engine, race) for way, race in ways.items()}
        engine = load_engine(configs["off"].target, model)
        sizes = model_sizes(model)
        table = Table(title=f"{what}, float32, {args.engine} on CPU", box=SIMPLE)
        for name in ("pool", "prompts", "race", "response tokens", "FLOP", "seconds", "same kept"):
            table.add_column(name, justify="left" if name in ("pool", "race") else "right", no_wrap=True)
        for pool in pools(Path(scratch), model, args):
            console.print(f"{pool.name}: {pool.batch.num_tokens:,} tokens", highlight=False)
            engine.score(pool.batch.take(np.arange(1)))  # the first call of a shape is slower
            found = {way: scored(pool, engine, config, way, sizes) for way, config in configs.items()}
            off = found["off"]
            prompts = len({prompt for prompt, _ in off.kept})
            for way, one in found.items():
                shares = (one.loss_tokens / off.loss_tokens, one.flops / off.flops, one.seconds / off.seconds)
                same = len(one.kept & off.kept)
                wrong += (way == "exact") * (prompts - same)
                table.add_row(
                    *(pool.name, str(prompts), f"{way} {args.risk:g}" if way == "risk" else way),
                    *(
                        f"{share:.1%}" if way != "off" else text
                        for share, text in zip(
                            shares, (f"{off.loss_tokens:,}", f"{off.flops:.2e}", f"{off.seconds:.1f}"), strict=True
                        )
                    ),
                    f"{same}/{prompts}",
                )
            console.print(table)
        engine.close()
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
