"""Where an engine's time on a device goes, by kind of kernel."""

from __future__ import annotations

import time
from typing import Any

from grape_service.rows.ragged import TokenBatch

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
