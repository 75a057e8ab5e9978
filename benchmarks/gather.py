"""Tokens a second of the gather stage's replica against vLLM's own generation, in turns in one run.

    VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python -m benchmarks.gather --model FOLDER [--prompts 16] [--samples 4]

The replica reads units of prompts, samples, and writes every sample with its log-probabilities to the store, two
units at a time, as the stage has it do. Beside it vLLM's LLM.generate makes the same responses: the same prompts,
seeds, parameters and engine settings, all of them in one call. Each turn samples anew; tokens are counted alike.
Exit status 1 where the median share is below --at-least.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from grape_service.config.gather import SamplingConfig, VerifyConfig
from grape_service.config.policy import PolicyConfig
from grape_service.gather.missing import Sampling
from grape_service.gather.samples import sample_key, sampler_id, seed_of
from grape_service.models.files import policy_id, resolve_model, text_digests
from grape_service.rows.columns import SHARD
from grape_service.rows.keys import row_keys
from grape_service.rows.ragged import list_array, offsets_from_lengths
from grape_service.storage.parquet import write_parquet
from grape_service.storage.storage import Storage
from workers.engines.vllm.engine import prepare_environment
from workers.scoring.sampling import SamplingActor, SamplingSpec
from workers.scoring.work import Unit

PROMPT_TOKENS = (24, 96)
"""Tokens of prompts, from and to."""
COLUMNS = pa.schema([SHARD.field(name) for name in ("row_key", "prompt_id", "candidate_id", "input_ids")])


def write_prompts(storage: Storage, number: int, per_unit: int) -> tuple[list[Unit], list[np.ndarray], list[bytes]]:
    """Units of prompts of random tokens, and the prompts with their keys."""
    random = np.random.default_rng(0)
    prompts = [random.integers(0, 5000, size=random.integers(*PROMPT_TOKENS)).astype(np.int32) for _ in range(number)]
    keys: list[bytes] = []
    units = []
    for start in range(0, number, per_unit):
        part = prompts[start : start + per_unit]
        offsets, flat = offsets_from_lengths([len(ids) for ids in part]), np.concatenate(part)
        found = row_keys(flat, np.zeros(len(flat), np.uint8), offsets)
        keys += found.to_pylist()
        names = [f"p{start + place}" for place in range(len(part))]
        columns = {"row_key": found, "prompt_id": names, "candidate_id": names}
        table = pa.table({**columns, "input_ids": list_array(offsets, flat, pa.int32())}).cast(COLUMNS)
        path = f"prompts/b-{len(units):05d}.parquet"
        write_parquet(storage, path, COLUMNS, [table])
        units.append(Unit(path, "b", len(part), len(part), check=True))
    return units, prompts, keys


class Bare:
    """vLLM's own offline engine, with the settings of ours."""

    def __init__(self, folder: str, dtype: str):
        from vllm import LLM

        self.llm = LLM(
            model=folder,
            dtype=dtype,
            enforce_eager=True,
            block_size=32,
            enable_prefix_caching=True,
            generation_config="vllm",
            distributed_executor_backend="uni",
        )

    def tokens(self, prompts: list[np.ndarray], seeds: list[int], config: SamplingConfig, stop_ids: list[int]) -> int:
        """Sample each prompt with its seed; how many tokens that made."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        params = [
            SamplingParams(
                temperature=config.temperature,
                max_tokens=config.max_tokens,
                seed=seed,
                stop_token_ids=stop_ids,
                ignore_eos=True,
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
            )
            for seed in seeds
        ]
        asked = [TokensPrompt(prompt_token_ids=ids.tolist()) for ids in prompts]
        made = self.llm.generate(asked, params, use_tqdm=False)
        return sum(len(one.outputs[0].token_ids) for one in made)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--per-unit", type=int, default=8)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--at-least", type=float, default=0.97)
    asked = parser.parse_args()
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    policy = PolicyConfig.model_validate({"model": asked.model, "engine": "vllm", "dtype": asked.dtype})
    files = resolve_model(policy, {})
    rates: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        storage = Storage(folder)
        units, prompts, keys = write_prompts(storage, asked.prompts, asked.per_unit)
        stop_ids = (2,)
        config = SamplingConfig(max_tokens=asked.max_tokens)
        sampling = Sampling("", config, asked.samples, stop_ids, VerifyConfig(), None)
        texts = text_digests(files.folder)
        spec: Any = SamplingSpec(policy, policy_id(policy, files), storage, "b", "exact", texts, sampling=sampling)
        prepare_environment()
        actor = SamplingActor(spec)
        with ThreadPoolExecutor(2) as threads, ThreadPoolExecutor(1) as alone:  # each engine has a thread of its own
            bare = alone.submit(Bare, files.folder, asked.dtype).result()
            actor.start()
            for turn in range(asked.turns + 1):
                own = config.model_copy(update={"seed": turn})
                sampler = sampler_id(spec.policy_id, own, stop_ids)
                actor.sampling = replace(sampling, sampler=sampler, config=own)
                each = range(asked.samples)
                seeds = [seed_of(sampler, sample_key(key, number)) % 2**63 for key in keys for number in each]
                of_seeds = [ids for ids in prompts for _ in each]
                measured: dict[str, float] = {}
                for which in ("bare", "stage") if turn % 2 else ("stage", "bare"):
                    begun = time.monotonic()
                    if which == "bare":
                        tokens = alone.submit(bare.tokens, of_seeds, seeds, own, list(stop_ids)).result()
                    else:
                        calls = range(turn * len(units), (turn + 1) * len(units))
                        found = threads.map(actor.score, calls, units, [sampler] * len(units))
                        tokens = sum(one.tokens for one in found if one is not None)
                    measured[which] = tokens / (time.monotonic() - begun)
                if turn:  # the first warms both up
                    rates.append((measured["stage"], measured["bare"]))
                    print(f"turn {turn}: {measured['stage']:,.0f} and {measured['bare']:,.0f} tokens/s", flush=True)
        actor.engine.close()
    return report(rates, asked.at_least)


def report(rates: list[tuple[float, float]], at_least: float) -> int:
    """Print each turn and the medians; 1 where the median share is below `at_least`."""
    table = Table(box=SIMPLE)
    for name in ("turn", "stage, tokens/s", "vLLM alone, tokens/s", "share"):
        table.add_column(name, justify="right")
    for number, (stage, bare) in enumerate(rates, start=1):
        table.add_row(str(number), f"{stage:,.0f}", f"{bare:,.0f}", f"{stage / bare:.3f}")
    share = statistics.median(stage / bare for stage, bare in rates)
    medians = [statistics.median(values) for values in zip(*rates, strict=True)]
    table.add_row("median", f"{medians[0]:,.0f}", f"{medians[1]:,.0f}", f"{share:.3f}")
    Console().print(table)
    return int(share < at_least)


if __name__ == "__main__":
    sys.exit(main())
