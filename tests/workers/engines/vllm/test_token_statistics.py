"""Statistics of tokens from logits: PyTorch's operations and the Triton kernel against float64 loops."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from grape_service.rows.statistics import MAX_RANK, STATISTICS
from workers.engines.token_statistics import token_statistics

pytestmark = pytest.mark.vllm


def loops(logits: list[float], target: int, temperature: float) -> list[float]:
    """The four statistics of one row, in Python's float64."""
    rank = 1 + sum(value > logits[target] for value in logits)
    heated = [value / temperature for value in logits]

    def entropy(values: list[float]) -> tuple[float, float]:
        largest = max(values)
        log_sum = largest + math.log(math.fsum(math.exp(value - largest) for value in values))
        terms = (math.exp(value - log_sum) * (value - log_sum) for value in values if value > -math.inf)
        return -math.fsum(terms), log_sum

    whole, log_sum = entropy(heated)
    top, _ = entropy(sorted(heated, reverse=True)[:20])
    return [heated[target] - log_sum, whole, min(rank, MAX_RANK), top]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 4),
    vocab=st.integers(1, 3000),
    scale=st.floats(0, 100),
    temperature=st.one_of(st.none(), st.floats(0.1, 10)),
    seed=st.integers(0, 2**20),
)
@example(rows=2, vocab=1, scale=1.0, temperature=None, seed=0)
@example(rows=3, vocab=1024, scale=0.0, temperature=None, seed=0)
@example(rows=3, vocab=1555, scale=30.0, temperature=0.2, seed=0)
def test_against_float64_loops(rows: int, vocab: int, scale: float, temperature: float | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_RV = (scale * torch.randn(rows, vocab + 3, generator=generator))[:, :vocab]
    logits_RV[0, 1:] = -torch.inf
    targets_R = torch.randint(0, vocab, (rows,), generator=generator)
    targets_R[0] = 0
    heat = None if temperature is None else torch.full((rows,), temperature)
    found_RS = token_statistics(logits_RV, targets_R, heat, STATISTICS)
    heat_float = 1.0 if heat is None else float(heat[0])
    for row in range(rows):
        expected = loops(logits_RV[row].double().tolist(), int(targets_R[row]), heat_float)
        assert found_RS[row].tolist() == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert found_RS[row, 2] == expected[2]
    for place, name in enumerate(STATISTICS[1:], start=1):
        alone_RS = token_statistics(logits_RV, targets_R, heat, ("logprob", name))
        torch.testing.assert_close(alone_RS, found_RS[:, [0, place]], rtol=1e-6, atol=1e-6)


def test_half_precision_ties_and_a_rank_beyond_the_last() -> None:
    logits_RV = torch.zeros(2, 70_000, dtype=torch.bfloat16)
    logits_RV[0, :69_000] = 1.0
    logits_RV[1, :3] = 2.0
    found_RS = token_statistics(logits_RV, torch.tensor([69_500, 1]), None, STATISTICS)
    assert found_RS[:, 2].tolist() == [MAX_RANK, 1]
    expected = loops(logits_RV[1].double().tolist(), 1, 1.0)
    assert found_RS[1].tolist() == pytest.approx(expected, abs=1e-4)
    assert found_RS[0, 3].item() == pytest.approx(math.log(20), abs=1e-5)


IN_THE_INTERPRETER = """
import torch
from grape_service.rows.statistics import STATISTICS
from workers.engines.token_statistics import BLOCK, fused_token_statistics, plain_token_statistics
generator = torch.Generator().manual_seed(0)
for dtype in (torch.bfloat16, torch.float32):
    for vocab in (1, 100, BLOCK, 2 * BLOCK + 9):
        for heat in (None, torch.tensor([1.0, 0.3, 2.0, 1.0])):
            logits = (10 * torch.randn(4, vocab + 3, generator=generator)).to(dtype)[:, :vocab]
            logits[0, 1:] = float("-inf")
            logits[3, : vocab // 2] = 3.0
            targets = torch.tensor([0, vocab - 1, vocab // 2, 0])
            wide = logits.double() / (1.0 if heat is None else heat[:, None].double())
            logp = torch.log_softmax(wide, dim=1)
            entropy = torch.special.entr(logp.exp()).sum(1)
            rank = 1 + (logits > logits.gather(1, targets[:, None])).sum(1)
            top = torch.log_softmax(wide.topk(min(20, vocab), dim=1).values, dim=1).exp()
            expected = [logp.gather(1, targets[:, None]).squeeze(1), entropy, rank, torch.special.entr(top).sum(1)]
            expected = torch.stack([one.double() for one in expected], dim=1)
            fused = fused_token_statistics(logits, targets, heat, STATISTICS).double()
            torch.testing.assert_close(fused, expected, rtol=0, atol=1e-4)
            some = fused_token_statistics(logits, targets, heat, ("logprob", "rank")).double()
            torch.testing.assert_close(some, expected[:, [0, 2]], rtol=0, atol=1e-4)
"""

FOR_AN_H100 = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workers.engines.token_statistics import BLOCK
from workers.engines.token_statistics_kernel import row_statistics
for heated in (True, False):
    for logits in ("*bf16", "*fp32"):
        constants = {"HEATED": heated, "WITH_TOP": heated, "TOP": 20, "MAX_RANK": 65535, "BLOCK": BLOCK}
        types = {"logits": logits, "row_stride": "i32", "targets": "*i64", "found": "*fp32", "rows": "i32"}
        types |= {"temperatures": "*fp32" if heated else logits, "vocab": "i32"} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(row_statistics, signature=types, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8}).asm["cubin"]
"""


@pytest.mark.parametrize(
    ("code", "interpret"), [(IN_THE_INTERPRETER, "1"), (FOR_AN_H100, "0")], ids=["values", "compiles_for_h100"]
)
def test_the_triton_kernel_without_a_gpu(code: str, interpret: str, tmp_path: Path) -> None:
    """Its values in Triton's interpreter, and that it compiles; both in a process of their own."""
    pytest.importorskip("triton", reason="Triton is not installed: run make test-vllm")
    environment = os.environ | {
        "TRITON_INTERPRET": interpret,
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": str(Path(__file__).resolve().parents[4]),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
