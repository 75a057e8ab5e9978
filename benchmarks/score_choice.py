"""What a precision does to the choice: winners and ranks in bf16 and fp8 against float32, on real weights.

Used by benchmarks/gpu_scoring.py --choice; the pool is the quickstart's.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grape_service.config.policy import PolicyConfig
from grape_service.rows.ragged import TokenBatch

POOL = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "pool"


def candidates(folder: str, prompts: int) -> Iterator[tuple[str, list[int], list[int]]]:
    """(prompt, its tokens, a response's tokens) of the example pool, a prompt's candidates next to each other."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    responses: dict[str, list[str]] = {}
    for file in sorted(POOL.glob("*.jsonl")):
        for row in map(json.loads, file.read_text().splitlines()):
            given = row["responses"] if "responses" in row else [row["response"]]
            texts = [one["response"] if isinstance(one, dict) else one for one in given]
            responses.setdefault(json.dumps(row["prompt"]), []).extend(text for text in texts if isinstance(text, str))
    for key, texts in list(responses.items())[:prompts]:
        prompt = json.loads(key)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        for text in dict.fromkeys(texts):
            if tokens := tokenizer(text, add_special_tokens=False)["input_ids"]:
                yield key, ids, tokens


def choice_lines(folder: str, precision: str, prompts: int) -> Iterator[dict[str, Any]]:
    """One line: every candidate's mean log-probability in a precision."""
    from workers.engines.vllm.engine import VllmEngine

    rows = list(candidates(folder, prompts))
    batch = TokenBatch.from_rows([(x + y, [False] * len(x) + [True] * len(y)) for _, x, y in rows])
    policy = PolicyConfig(
        model=folder,
        dtype="float32" if precision == "float32" else "bfloat16",
        quantization="fp8" if precision == "fp8" else None,
    )
    engine = VllmEngine(policy, folder)
    scores = engine.score(batch)
    yield {
        "what": "choice",
        "folder": folder,
        "precision": precision,
        "device": engine.description.device,
        "path": engine.description.path,
        "prompts": [prompt for prompt, _, _ in rows],
        "means": (np.add.reduceat(scores.astype(np.float64), batch.loss_offsets[:-1]) / batch.loss_lengths).tolist(),
        "logprobs": scores.astype(float).round(5).tolist(),
    }
    engine.close()


def compare_choices(lines: list[dict[str, Any]]) -> str:
    """A table: each precision against float32, and fp8 against bf16."""
    by_precision = {line["precision"]: line for line in lines}
    table = [
        "| precision | against | prompts with the same winner | rank correlation in a prompt | mean difference of a "
        "sequence's mean | largest | of a token, mean | device |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for precision, other in (("bfloat16", "float32"), ("fp8", "float32"), ("fp8", "bfloat16")):
        if precision not in by_precision or other not in by_precision:
            table.append(f"| {precision} | {other} | not measured | | | | | |")
            continue
        mine, theirs = by_precision[precision], by_precision[other]
        left, right = np.asarray(mine["means"]), np.asarray(theirs["means"])
        tokens = np.abs(np.asarray(mine["logprobs"]) - np.asarray(theirs["logprobs"]))
        _, groups = np.unique(mine["prompts"], return_inverse=True)
        members = [np.flatnonzero(groups == group) for group in range(groups.max() + 1)]
        members = [rows for rows in members if len(rows) > 1]
        same = np.mean([left[rows].argmax() == right[rows].argmax() for rows in members])
        ranks = np.mean([rank_correlation(left[rows], right[rows]) for rows in members])
        gap = np.abs(left - right)
        table.append(
            f"| {precision} | {other} | {same:.1%} of {len(members)} | {ranks:.4f} | {gap.mean():.4f} "
            f"| {gap.max():.4f} | {tokens.mean():.4f} | {mine['device']} |"
        )
    return "\n".join(table)


def rank_correlation(left: npt.NDArray[np.float64], right: npt.NDArray[np.float64]) -> float:
    """Spearman's rho of two lists without ties."""
    ranks = [np.argsort(np.argsort(values)).astype(np.float64) for values in (left, right)]
    return float(np.corrcoef(*ranks)[0, 1])
