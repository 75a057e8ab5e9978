"""How right the engine is on a GPU: the head's kernels against float64, its scores against transformers in float32.

    python benchmarks/gpu_exact.py kernels   --results exact.jsonl               # Triton kernels, needs no vLLM
    python benchmarks/gpu_exact.py reference --folder MODEL                      # a random model and its scores
    python benchmarks/gpu_exact.py engine    --folder MODEL --results exact.jsonl --way head
    python benchmarks/gpu_exact.py table     --results exact.jsonl

Random weights, Qwen2.5's shapes (--size as in gpu_scoring.py). The last norm's weights are 5, so that logits spread as
those of a trained model do: a standard deviation of about 3. --device cpu --size tiny only checks that it runs.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.gpu_scoring import Way
from benchmarks.gpu_workloads import CANDIDATES, SHAPES, make_batch
from grape_service.config.policy import PolicyConfig
from grape_service.rows.ragged import TokenBatch
from grape_service.rows.statistics import MAX_RANK, RANK, STATISTICS, TOP

ROWS = 128
VOCABULARIES = {"cuda": (152_064, 151_936, 32_000, 4_097, 50), "cpu": (4_097, 50)}


def expected_statistics(logits_RV: Any, targets_R: Any, temperatures_R: Any) -> Any:
    """The four statistics in float64 [R, 4], by PyTorch's operations on a wide copy."""
    import torch

    wide_RV = logits_RV.double()
    if temperatures_R is not None:
        wide_RV = wide_RV / temperatures_R[:, None].double()
    logp_RV = torch.log_softmax(wide_RV, dim=1)
    top_RK = torch.log_softmax(wide_RV.topk(min(TOP, wide_RV.shape[1]), dim=1).values, dim=1)
    above_R = (logits_RV > logits_RV.gather(1, targets_R[:, None])).sum(1)
    return torch.stack(
        [
            logp_RV.gather(1, targets_R[:, None]).squeeze(1),
            torch.special.entr(logp_RV.exp()).sum(1),
            (1 + above_R).clamp(max=MAX_RANK).double(),
            torch.special.entr(top_RK.exp()).sum(1),
        ],
        dim=1,
    )


def check_kernels(device: str) -> Iterator[dict[str, Any]]:
    """The fused kernels (on a CPU: PyTorch's operations) on fresh random logits, and their speed at full size."""
    import torch

    from workers.engines.token_logprobs import fused_kernel_works, token_logprobs
    from workers.engines.token_statistics import fused_statistics_work, token_statistics

    here = torch.device(device, 0) if device == "cuda" else torch.device("cpu")
    fused = device == "cuda" and fused_kernel_works(here) and fused_statistics_work(here)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    yield {"what": "kernels work", "device": name, "fused": fused, "torch": torch.__version__}
    for dtype in (torch.bfloat16, torch.float32):
        for vocab in VOCABULARIES[device]:
            for scale in (1.0, 10.0):
                for hot in (False, True):
                    logits_RV = (scale * torch.randn(ROWS, vocab + 3, device=here)).to(dtype)[:, :vocab]
                    logits_RV[0, 1:] = -torch.inf
                    logits_RV[1, : vocab // 2] = 3.0
                    targets_R = torch.randint(0, vocab, (ROWS,), device=here)
                    targets_R[0] = 0
                    heat_R = 0.2 + 2 * torch.rand(ROWS, device=here) if hot else None
                    expected = expected_statistics(logits_RV, targets_R, heat_R)
                    alone = token_logprobs(logits_RV, targets_R, heat_R).double()
                    together = token_statistics(logits_RV, targets_R, heat_R, STATISTICS).double()
                    off = (together - expected).abs()
                    yield {
                        "what": "kernel",
                        "device": name,
                        "dtype": str(dtype).removeprefix("torch."),
                        "vocab": vocab,
                        "scale": scale,
                        "temperature": hot,
                        "logprob alone": float((alone - expected[:, 0]).abs().max()),
                        **{one: float(off[:, place].max()) for place, one in enumerate(STATISTICS)},
                        "wrong ranks": int((off[:, STATISTICS.index(RANK)] > 0).sum()),
                    }
    if device == "cuda":
        yield from time_kernels(name)


def time_kernels(name: str) -> Iterator[dict[str, Any]]:
    """Milliseconds for 1,536 rows of float32 logits of Qwen2.5's vocabulary, and the bytes a second that they read."""
    import torch
    from triton.testing import do_bench

    from workers.engines.token_logprobs import plain_token_logprobs, token_logprobs
    from workers.engines.token_statistics import plain_token_statistics, token_statistics

    logits_RV = 3 * torch.randn(1536, 152_064, device="cuda")
    targets_R = torch.randint(0, 152_064, (1536,), device="cuda")
    for kernel, run in {
        "logprob": lambda: token_logprobs(logits_RV, targets_R, None),
        "logprob, PyTorch's operations": lambda: plain_token_logprobs(logits_RV, targets_R, None),
        "logprob, entropy, rank": lambda: token_statistics(logits_RV, targets_R, None, STATISTICS[:3]),
        "all statistics": lambda: token_statistics(logits_RV, targets_R, None, STATISTICS),
        "all statistics, PyTorch's operations": lambda: plain_token_statistics(logits_RV, targets_R, None, STATISTICS),
        "a copy": logits_RV.clone,
    }.items():
        milliseconds = do_bench(run, return_mode="median")
        read = logits_RV.nbytes * (2 if kernel == "a copy" else 1)
        yield {
            "what": "kernel time",
            "device": name,
            "kernel": kernel,
            "milliseconds": milliseconds,
            "bytes_per_second": read / milliseconds * 1e3,
        }


def some_rows(size: str, prompts: int) -> TokenBatch:
    """The first prompts of gpu_scoring's 200/400 batch with all their candidates."""
    batch = make_batch(size, "200/400")
    return batch.take(np.arange(min(len(batch), prompts * CANDIDATES)))


def make_reference(size: str, folder: Path, prompts: int, device: str) -> None:
    """Save a random model, and what transformers in float32 says of its rows: MODEL/reference.npy [L, 4]."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    config = Qwen2Config(**SHAPES[size], max_position_embeddings=32768, architectures=["Qwen2ForCausalLM"])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.norm.weight.fill_(5.0)
    # Scored with weights that bf16 can hold: what is compared is the arithmetic, not the rounding of the file.
    model.to(torch.bfloat16).save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").to(device)
    batch, found = some_rows(size, prompts), []
    with torch.no_grad():
        for row in range(len(batch)):
            place = slice(batch.offsets[row], batch.offsets[row + 1])
            ids = torch.from_numpy(batch.input_ids[place].astype(np.int64)).to(device)
            targets = torch.from_numpy(np.flatnonzero(batch.mask[place])).to(device)
            hidden = model.model(ids[None]).last_hidden_state[0, targets - 1]
            found.append(expected_statistics(model.lm_head(hidden), ids[targets], None).cpu())
    np.save(folder / "reference.npy", torch.cat(found).numpy())


def check_engine(size: str, folder: Path, prompts: int, name: str) -> Iterator[dict[str, Any]]:
    """A way's scores against the reference: of each token, of each sequence's mean, and of each prompt's best."""
    from workers.engines.vllm.engine import VllmEngine

    way = Way.parse(name)
    batch = some_rows(size, prompts)
    expected_LS = np.load(folder / "reference.npy")
    policy = PolicyConfig(
        model=str(folder),
        dtype="bfloat16",
        quantization="fp8" if way.precision == "fp8" else None,
        engine_args={"max_model_len": 4096, **way.engine_args},
    )
    began = time.perf_counter()
    engine = VllmEngine(policy, str(folder))
    started = time.perf_counter() - began
    if engine.description.path == "head":
        found = engine.score_statistics(batch, STATISTICS)
        again = engine.score(batch)
    else:
        found = {STATISTICS[0]: engine.score(batch)}
        again = engine.score(batch)
    off_L = np.abs(found["logprob"].astype(np.float64) - expected_LS[:, 0])
    means = [sequence_means(values, batch) for values in (found["logprob"], expected_LS[:, 0])]
    best = [means_N.reshape(-1, CANDIDATES).argmax(1) for means_N in means]
    line: dict[str, Any] = {
        "what": "scores",
        "size": size,
        "way": way.name,
        "path": engine.description.path,
        "device": engine.description.device,
        "vllm": engine.description.version,
        "start_seconds": started,
        "sequences": len(batch),
        "tokens": len(off_L),
        "token, largest": float(off_L.max()),
        "token, mean": float(off_L.mean()),
        "sequence's mean, largest": float(np.abs(means[0] - means[1]).max()),
        "same best": int((best[0] == best[1]).sum()),
        "prompts": len(best[0]),
        "standard deviation of the reference": float(expected_LS[:, 0].std()),
        "same again, logprobs alone, largest difference": float(np.abs(again - found["logprob"]).max()),
    }
    for place, statistic in enumerate(STATISTICS[1:], start=1):
        if statistic in found:
            apart_L = np.abs(found[statistic].astype(np.float64) - expected_LS[:, place])
            line[statistic] = {"largest": float(apart_L.max()), "mean": float(apart_L.mean())}
            if statistic == RANK:
                relative = apart_L / expected_LS[:, place]
                line[statistic] |= {"relative, mean": float(relative.mean())}
    yield line
    engine.close()


def sequence_means(values_L: npt.NDArray[Any], batch: TokenBatch) -> npt.NDArray[np.float64]:
    sums: npt.NDArray[np.float64] = np.add.reduceat(values_L.astype(np.float64), batch.loss_offsets[:-1])
    return sums / batch.loss_lengths


def print_tables(lines: list[dict[str, Any]]) -> None:
    kernels = [line for line in lines if line["what"] == "kernel"]
    if kernels:
        print(
            "| logits | vocabulary | temperature | logprob alone | logprob | entropy | top-20 entropy | wrong ranks |"
        )
        print("|---|---|---|---|---|---|---|---|")
    for line in kernels:
        values = " | ".join(f"{line[name]:.1e}" for name in ("logprob alone", "logprob", "entropy", "top20_entropy"))
        logits = f"{line['dtype']}, deviation {line['scale']:g}"
        print(f"| {logits} | {line['vocab']:,} | {line['temperature']} | {values} | {line['wrong ranks']} |")
    for line in lines:
        if line["what"] == "kernel time":
            print(f"{line['kernel']}: {line['milliseconds']:.3f} ms, {line['bytes_per_second'] / 1e12:.2f} TB/s")
        elif line["what"] == "scores":
            print(json.dumps(line, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["kernels", "reference", "engine", "table"])
    parser.add_argument("--size", choices=list(SHAPES), default="0.5b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--way", default="head")
    parser.add_argument("--results", type=Path, default=Path("gpu_exact.jsonl"))
    arguments = parser.parse_args()
    if arguments.what == "reference":
        make_reference(arguments.size, arguments.folder, arguments.prompts, arguments.device)
    elif arguments.what == "table":
        print_tables([json.loads(line) for line in arguments.results.read_text().splitlines()])
    else:
        if arguments.what == "kernels":
            lines = check_kernels(arguments.device)
        else:
            lines = check_engine(arguments.size, arguments.folder, arguments.prompts, arguments.way)
        for line in lines:
            with arguments.results.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
