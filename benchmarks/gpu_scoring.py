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

from benchmarks.gpu_profile import profile_of
from benchmarks.gpu_workloads import (
    CANDIDATES,
    SHAPES,
    WORKLOADS,
    last_token_only,
    make_batch,
    make_model,
    useful_flops,
)
from benchmarks.score_choice import choice_lines, compare_choices
from grape_service.config.policy import PolicyConfig
from grape_service.rows.ragged import TokenBatch
from grape_service.rows.statistics import ENTROPY, RANK, TOP20_ENTROPY

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
