"""log p from logits: PyTorch's operations and the Triton kernel against float64."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.engines.token_logprobs import token_logprobs

pytestmark = pytest.mark.vllm


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    vocab=st.integers(1, 300),
    scale=st.floats(0, 1000),
    temperature=st.one_of(st.none(), st.floats(0.1, 10)),
    seed=st.integers(0, 2**20),
)
def test_against_float64(rows: int, vocab: int, scale: float, temperature: float | None, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits_RV = (scale * torch.randn(rows, vocab + 3, generator=generator))[:, :vocab]
    targets_R = torch.randint(0, vocab, (rows,), generator=generator)
    heat = None if temperature is None else torch.full((rows,), temperature)
    expected = torch.log_softmax(logits_RV.double() / (temperature or 1.0), dim=1).gather(1, targets_R[:, None])
    logprobs_R = token_logprobs(logits_RV, targets_R, heat)
    assert (logprobs_R <= 0).all()
    # A float32 logit of 2,000 stands for 1.2e-4 around it: a difference of such logits is known no better.
    spacing = torch.finfo(torch.float32).eps * float((logits_RV.abs() / (temperature or 1.0)).max())
    torch.testing.assert_close(logprobs_R.double(), expected.squeeze(1), rtol=1e-5, atol=1e-5 + spacing)


IN_THE_INTERPRETER = """
import torch
from workers.engines.token_logprobs import BLOCK, fused_token_logprobs
generator = torch.Generator().manual_seed(0)
for dtype in (torch.bfloat16, torch.float32):
    for vocab in (1, 100, BLOCK, 2 * BLOCK + 9):
        for heat in (None, torch.tensor([1.0, 0.3, 2.0, 1.0])):
            logits = (10 * torch.randn(4, vocab + 3, generator=generator)).to(dtype)[:, :vocab]
            logits[0, 1:] = float("-inf")
            targets = torch.tensor([0, vocab - 1, vocab // 2, 0])
            wide = logits.double() / (1.0 if heat is None else heat[:, None].double())
            expected = torch.log_softmax(wide, dim=1).gather(1, targets[:, None]).squeeze(1)
            fused = fused_token_logprobs(logits, targets, heat).double()
            torch.testing.assert_close(fused, expected, rtol=0, atol=1e-4)
"""

FOR_AN_H100 = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from workers.engines.token_logprobs import BLOCK
from workers.engines.token_logprobs_kernel import row_logprob
for heated in (True, False):
    for logits in ("*bf16", "*fp32"):
        types = {"logits": logits, "row_stride": "i32", "targets": "*i64", "vocab": "i32", "logprobs": "*fp32"}
        types |= {"temperatures": "*fp32" if heated else logits, "HEATED": "constexpr", "BLOCK": "constexpr"}
        source = ASTSource(row_logprob, signature=types, constexprs={"HEATED": heated, "BLOCK": BLOCK})
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
