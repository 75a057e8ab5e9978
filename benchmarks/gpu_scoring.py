"""How close scoring comes to the chip, and what precision does to the choice.

    python benchmarks/gpu_scoring.py --size 7b                    # measure what is not measured yet, then the table
    python benchmarks/gpu_scoring.py --size tiny --device cpu     # the same code at toy size: no figure of it counts
    python benchmarks/gpu_scoring.py --size 7b --profile head     # where the time goes too, by kind of kernel
    python benchmarks/gpu_scoring.py --size 7b --ways head head@max_num_batched_tokens=32768 head@enforce_eager=false
    python benchmarks/gpu_scoring.py --choice MODEL_FOLDER        # winners in bf16 and fp8 against float32

Models of Qwen2.5's shapes are made here with random weights. Each engine runs in its own process, one after
the other on the same device, and ways with the same engine share it; the next process imports vLLM while one
measures. Every figure is a line of the results file, and what has a line is not measured again: a run that was
interrupted resumes where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.score_choice import choice_lines, compare_choices
from grape_service.config.policy import PolicyConfig
from grape_service.rows.ragged import TokenBatch
from grape_service.rows.statistics import ENTROPY, RANK, TOP20_ENTROPY

SHAPES: dict[str, dict[str, Any]] = {
    # hidden, intermediate, layers, heads, key-value heads, vocabulary, tied embeddings
    "tiny": dict(zip(("hidden_size", "intermediate_size", "num_hidden_layers"), (64, 128, 2), strict=True))
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 512, "tie_word_embeddings": True},
    "0.5b": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "1.5b": {"hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28, "num_attention_heads": 12}
    | {"num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    | {"num_key_value_heads": 4, "vocab_size": 152064, "tie_word_embeddings": False},
}
CANDIDATES = 8
WORKLOADS = {"200/400": (200, 400), "200/50": (200, 50), "1500/300": (1500, 300), "500/8000": (500, 8000)}
"""Median tokens of prompt and response."""
WORKLOAD_TOKENS = {"tiny": 6_000, "0.5b": 1_200_000, "1.5b": 600_000, "7b": 290_000}
"""About how many tokens a measurement takes, prompts counted for each candidate."""
WAYS: dict[str, tuple[str, dict[str, Any], str, tuple[str, ...]]] = {
    # name: (dtype or quantization, engine arguments, what is scored, statistics beside log-probabilities)
    "prompt_logprobs": ("bf16", {"scoring_head": False}, "response", ()),
    "head": ("bf16", {}, "response", ()),
    "head, all statistics": ("bf16", {}, "response", (ENTROPY, RANK, TOP20_ENTROPY)),
    "head, entropy and rank": ("bf16", {}, "response", (ENTROPY, RANK)),
    "prefill, cache": ("bf16", {}, "last token", ()),
    "head, fp8": ("fp8", {}, "response", ()),
    "prompt_logprobs, fp8": ("fp8", {"scoring_head": False}, "response", ()),
    "head, no cache": ("bf16", {"enable_prefix_caching": False}, "response", ()),
    "prefill, no cache": ("bf16", {"enable_prefix_caching": False}, "last token", ()),
}
"""In the order in which they are measured."""
BASELINE = "prompt_logprobs"


@dataclass(frozen=True)
class Way:
    """One engine configuration and what it is asked for."""

    name: str
    precision: str
    engine_args: dict[str, Any]
    scored: str
    statistics: tuple[str, ...]

    @property
    def engine(self) -> str:
        """The same text for ways that one engine can measure."""
        return json.dumps([self.precision, self.engine_args], sort_keys=True)

    @classmethod
    def parse(cls, text: str) -> Way:
        """A key of WAYS, with more engine arguments behind an @: head@enforce_eager=false,max_num_seqs=512."""
        name, _, extra = text.partition("@")
        precision, engine_args, scored, statistics = WAYS[name]
        more = dict(pair.split("=", 1) for pair in extra.split(",")) if extra else {}
        parsed = {key: json.loads(value) if _is_json(value) else value for key, value in more.items()}
        return cls(text, precision, {**engine_args, **parsed}, scored, statistics)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def make_model(size: str, folder: Path) -> str:
    """config.json of Qwen2 shapes; the weights are made up by vLLM (load_format dummy)."""
    from transformers import Qwen2Config

    config = Qwen2Config(**SHAPES[size], max_position_embeddings=32768, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(folder)
    return str(folder)


def make_batch(size: str, workload: str) -> TokenBatch:
    """Random tokens; lengths log-normal about the medians; a prompt's candidates next to each other."""
    generator = np.random.default_rng(0)
    prompt_median, response_median = WORKLOADS[workload]
    if size == "tiny":
        prompt_median, response_median = prompt_median // 4, max(4, response_median // 20)
    prompts = max(2, round(WORKLOAD_TOKENS[size] / (CANDIDATES * (prompt_median + response_median))))
    vocab = SHAPES[size]["vocab_size"]
    rows = []
    for _ in range(prompts):
        prompt = generator.integers(0, vocab, _length(generator, prompt_median)).tolist()
        for _ in range(CANDIDATES):
            response = generator.integers(0, vocab, _length(generator, response_median)).tolist()
            rows.append((prompt + response, [False] * len(prompt) + [True] * len(response)))
    return TokenBatch.from_rows(rows)


def _length(generator: np.random.Generator, median: int) -> int:
    return int(np.clip(median * np.exp(generator.normal(0, 0.4)), 2, 4 * median))


def last_token_only(batch: TokenBatch) -> TokenBatch:
    """The same sequences with just their last token to score: prefill and next to no head."""
    mask = np.zeros_like(batch.mask)
    mask[batch.offsets[1:] - 1] = True
    return TokenBatch(batch.input_ids, mask, batch.offsets, (batch.lengths - 1).astype(np.int32))


def useful_flops(size: str, batch: TokenBatch) -> float:
    """2 FLOP a weight, once for each distinct token (a prompt's once for all its candidates), and the output head
    for response tokens only. Attention's own products are not counted."""
    shape = SHAPES[size]
    hidden, inner, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    key_value = hidden // shape["num_attention_heads"] * shape["num_key_value_heads"]
    trunk = layers * (2 * hidden * hidden + 2 * hidden * key_value + 3 * hidden * inner)
    prompts = batch.prompt_lens[::CANDIDATES].sum()
    distinct = int(prompts) + int(batch.mask.sum())
    return 2.0 * trunk * distinct + 2.0 * hidden * shape["vocab_size"] * int(batch.mask.sum())


def matrix_product_rate(device: str) -> float:
    """bf16 FLOP/s of the device's best of some square products."""
    import torch

    size = 8192 if device == "cuda" else 512
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    best = 0.0
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(5):
            left @ left
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 5 * 2 * size**3 / (time.perf_counter() - start))
    return best


def measure(size: str, steps: list[dict[str, Any]], device: str) -> Iterator[dict[str, Any]]:
    """In a process of its own: start the engine that the steps share and run each step twice, the better run counts.

    A step says `way`, `workload`, and whether to `profile` a third run, which comes after all other steps.
    """
    from workers.engines.vllm.engine import VllmEngine

    engine_of = Way.parse(steps[0]["way"])
    with tempfile.TemporaryDirectory() as folder:
        policy = PolicyConfig(
            model=make_model(size, Path(folder)),
            dtype="bfloat16",
            quantization="fp8" if engine_of.precision == "fp8" else None,
            engine_args={
                "load_format": "dummy",
                "max_model_len": 32768 if size != "tiny" else 4096,
                **engine_of.engine_args,
            },
        )
        started = time.perf_counter()
        engine = VllmEngine(policy, folder)
        start_seconds = time.perf_counter() - started
        wanted_path = "prompt_logprobs" if "scoring_head" in engine_of.engine_args else "head"
        assert engine.description.path == wanted_path, engine.description.extra.get("why_not_head")
        warm: set[str] = set()
        to_profile: list[tuple[dict[str, Any], TokenBatch, tuple[str, ...]]] = []
        for step in steps:
            way, batch = Way.parse(step["way"]), make_batch(size, step["workload"])
            asked = batch if way.scored == "response" else last_token_only(batch)
            if way.name not in warm:
                engine.score_statistics(asked.take(np.arange(min(4 * CANDIDATES, len(asked)))), way.statistics)
                warm.add(way.name)
            seconds, hits = [], 0.0
            for _ in range(2):
                engine.forget_cached_prompts()
                before = engine.stats()["cached_tokens"]
                began = time.perf_counter()
                scores = engine.score_statistics(asked, way.statistics)
                seconds.append(time.perf_counter() - began)
                hits = engine.stats()["cached_tokens"] - before
                assert all(np.isfinite(values).all() for values in scores.values())
            line = {
                "size": size,
                "workload": step["workload"],
                "way": way.name,
                "device": engine.description.device,
                "vllm": engine.description.version,
                "tokens": batch.num_tokens,
                "response_tokens": int(batch.mask.sum()),
                "cached_tokens": int(hits),
                "rescored_rows": int(engine.stats()["rescored_rows"]),
                "seconds": min(seconds),
                "other_run_seconds": max(seconds),
                "start_seconds": start_seconds,
                "tokens_per_second": batch.num_tokens / min(seconds),
                "useful_flops": useful_flops(size, batch) / min(seconds),
            }
            yield line
            if step["profile"]:
                to_profile.append((line, asked, way.statistics))
        for line, asked, statistics in to_profile:
            yield {**line, "profile": profile_of(engine, asked, statistics, device)}
        engine.close()


KINDS = {
    "attention": ("attention", "flash", "fmha", "paged"),
    "matrix products": ("gemm", "cutlass", "cublas", "nvjet", "matmul", "mm_", "_mm", "linear", "addmm"),
    "scoring head (log-softmax)": ("row_logprob", "row_statistics", "logsumexp"),
    "quantization": ("quant", "fp8", "scaled"),
    "cache writes": ("reshape_and_cache",),
    "norms, activations, positions": ("norm", "silu", "act_and_mul", "rotary", "elementwise", "reduce", "mul", "add"),
}


def profile_of(engine: Any, batch: TokenBatch, statistics: tuple[str, ...], device: str) -> dict[str, float]:
    """Seconds on the device (on a CPU: in operators) by kind, what the head's range took, and what is left."""
    import torch
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    every_thread = torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    engine.forget_cached_prompts()
    with torch.profiler.profile(activities=activities, experimental_config=every_thread) as profiler:
        began = time.perf_counter()
        engine.score_statistics(batch, statistics)
        wall = time.perf_counter() - began
    kinds: dict[str, float] = {}
    busy = 0.0
    for event in profiler.key_averages():
        if event.key == "scoring head":
            total = event.device_time_total if device == "cuda" else event.cpu_time_total
            kinds["scoring head, all of it"] = max(kinds.get("scoring head, all of it", 0.0), total / 1e6)
            continue
        if device == "cuda":
            # A kernel's time stands in the operator that started it and in annotations too: kernels alone are counted.
            is_kernel = event.device_type == DeviceType.CUDA and not event.is_user_annotation
            taken = event.self_device_time_total if is_kernel else 0.0
        else:
            taken = event.self_cpu_time_total
        if taken > 0 and not event.key.startswith("ProfilerStep"):
            kind = next((kind for kind, names in KINDS.items() if any(n in event.key.lower() for n in names)), "other")
            kinds[kind] = kinds.get(kind, 0.0) + taken / 1e6
            busy += taken / 1e6
    return {
        "wall": wall,
        **dict(sorted(kinds.items(), key=lambda item: -item[1])),
        "device idle": max(0.0, wall - busy),
    }


class Child:
    """This file again in a new process: imports at once, and measures when `lines` is called."""

    def __init__(self, task: dict[str, Any], device: str) -> None:
        self._task = json.dumps(task)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", self._task, "--device", device],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def lines(self, seconds: float) -> Iterator[dict[str, Any]]:
        """Its lines of JSON as they come, for so many seconds at most. A failure is printed, and leaves no line."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        end = threading.Timer(seconds, self._process.kill)
        end.start()
        try:
            with contextlib.suppress(BrokenPipeError):  # it failed before it was asked
                self._process.stdin.write("go\n")
                self._process.stdin.flush()
            for text in self._process.stdout:
                if text.startswith("{") and text.endswith("}\n"):
                    yield json.loads(text)
            if self._process.wait() != 0:
                print(f"not measured (exit status {self._process.returncode}): {self._task}", file=sys.stderr)
        finally:
            end.cancel()
            self.stop()

    def stop(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.wait()


def be_a_child(task: dict[str, Any], device: str) -> None:
    """Import, wait for a line on standard input, then measure and print lines of JSON."""
    if task["what"] == "matrix product":
        import torch  # noqa: F401
    else:
        from workers.engines.vllm.engine import prepare_environment

        prepare_environment()
        import workers.engines.vllm.head  # noqa: F401
    if not sys.stdin.readline():
        return  # nobody is there any more
    if task["what"] == "choice":
        lines: Iterator[dict[str, Any]] = choice_lines(task["folder"], task["precision"], task["prompts"])
    elif task["what"] == "matrix product":
        lines = iter([{"way": "matrix product", "device": device, "flops": matrix_product_rate(device)}])
    else:
        lines = measure(task["size"], task["steps"], device)
    for line in lines:
        print("\n" + json.dumps(line), flush=True)


def run_children(tasks: list[dict[str, Any]], device: str, seconds: float) -> Iterator[dict[str, Any]]:
    """The lines of all tasks, one after the other, for so many seconds at most."""
    end = time.monotonic() + seconds
    ready = Child(tasks[0], device) if tasks else None
    for following in [*tasks[1:], None]:
        child, ready = ready, None
        if child is None:
            return
        if following is not None and time.monotonic() < end:
            ready = Child(following, device)
        yield from child.lines(max(0.0, end - time.monotonic()))


def print_table(lines: list[dict[str, Any]], size: str) -> None:
    """One table a workload: each way against prompt_logprobs, and the share of the matrix-product rate."""
    product = next((line["flops"] for line in reversed(lines) if line["way"] == "matrix product"), None)
    for workload in WORKLOADS:
        rows = {line["way"]: line for line in lines if line.get("size") == size and line.get("workload") == workload}
        if not rows:
            continue
        device = next(iter(rows.values()))["device"]
        print(f"\n{size}, median prompt/response tokens {workload}, {CANDIDATES} candidates, {device}")
        print("| way | tokens/s | against prompt_logprobs | useful TFLOP/s | of the bf16 matrix product | cached |")
        print("|---|---|---|---|---|---|")
        if product:
            print(f"| bf16 matrix product | | | {product / 1e12:.3g} | 100% | |")
        for way in [*WAYS, *sorted(set(rows) - set(WAYS))]:
            print(table_row(way, rows.get(way), rows.get(BASELINE), product))
        for way, line in rows.items():
            if "profile" in line:
                parts = ", ".join(f"{kind} {seconds:.3g} s" for kind, seconds in line["profile"].items())
                print(f"\n{way}: {parts}")


def table_row(way: str, line: dict[str, Any] | None, base: dict[str, Any] | None, product: float | None) -> str:
    """A way's row; the share of the matrix product only where the output head was computed."""
    if line is None:
        return f"| {way} | not measured | | | | |"
    rate = line["tokens_per_second"]
    ratio = f"{rate / base['tokens_per_second']:.2f}" if base else ""
    flops, share = "(no head)", ""
    if WAYS[way.partition("@")[0]][2] == "response":
        flops = f"{line['useful_flops'] / 1e12:.3g}"
        share = f"{line['useful_flops'] / product:.0%}" if product else ""
    return f"| {way} | {rate:,.0f} | {ratio} | {flops} | {share} | {line['cached_tokens'] / line['tokens']:.0%} |"


def main() -> None:
    """Measures what the results file does not have yet and prints the tables of a size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="7b")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--ways", nargs="+", default=None, help="keys of WAYS, with @key=value,... for other settings")
    parser.add_argument("--results", type=Path, default=Path("gpu_scoring.jsonl"))
    parser.add_argument("--minutes", type=float, default=10, help="end after this time, whatever is not measured yet")
    parser.add_argument("--profile", metavar="WAY", nargs="+", default=[], help="ways to say of where the time goes")
    parser.add_argument("--choice", metavar="MODEL_FOLDER", help="compare winners between precisions instead")
    parser.add_argument("--prompts", type=int, default=30, help="of the comparison of winners")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is not None:
        be_a_child(json.loads(arguments.child), arguments.device)
        return

    def done_already() -> list[dict[str, Any]]:
        if not arguments.results.exists():
            return []
        return [json.loads(line) for line in arguments.results.read_text().splitlines()]

    if arguments.choice:
        tasks = choice_tasks(done_already(), arguments.choice, arguments.prompts, arguments.device)
    else:
        ways = arguments.ways or [way for way in WAYS if arguments.device == "cuda" or "fp8" not in way]
        steps = [
            {"way": way, "workload": workload, "profile": way in arguments.profile}
            for workload in arguments.workloads
            for way in ways
        ]
        tasks = way_tasks(done_already(), arguments.size, steps, arguments.device)
    for line in run_children(tasks, arguments.device, 60 * arguments.minutes):
        with arguments.results.open("a") as file:
            file.write(json.dumps(line) + "\n")
    if arguments.choice:
        choices = [line for line in done_already() if line.get("what") == "choice"]
        print(compare_choices([line for line in choices if line["folder"] == arguments.choice]))
    else:
        print_table([line for line in done_already() if "way" in line], arguments.size)


def choice_tasks(done: list[dict[str, Any]], folder: str, prompts: int, device: str) -> list[dict[str, Any]]:
    """A task for each precision that has no line yet."""
    have = {line["precision"] for line in done if line.get("what") == "choice" and line["folder"] == folder}
    return [
        {"what": "choice", "folder": folder, "precision": precision, "prompts": prompts}
        for precision in ("float32", "bfloat16", *(("fp8",) if device == "cuda" else ()))
        if precision not in have
    ]


def way_tasks(done: list[dict[str, Any]], size: str, steps: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """A task for each engine with the steps that have no line yet."""
    have = {
        (line["way"], line["workload"], profiled)
        for line in done
        if line.get("size") == size
        for profiled in {False, "profile" in line}
    }
    by_engine: dict[str, list[dict[str, Any]]] = {}
    for step in steps:
        if (step["way"], step["workload"], step["profile"]) not in have:
            by_engine.setdefault(Way.parse(step["way"]).engine, []).append(step)
    tasks: list[dict[str, Any]] = [{"what": "ways", "size": size, "steps": few} for few in by_engine.values()]
    if not any(line.get("way") == "matrix product" and line["device"] == device for line in done):
        tasks.insert(0, {"what": "matrix product"})
    return tasks


if __name__ == "__main__":
    main()
