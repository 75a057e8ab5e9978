"""Tokens a second that a replica is expected to score: from earlier manifests, or from a stated table."""

from __future__ import annotations

import itertools
import math
import re
import socket
from dataclasses import dataclass
from typing import Any

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config
from grape_service.display import size_of_model
from grape_service.errors import UserError
from grape_service.models.files import policy_id, resolve_model
from grape_service.release.catalog import list_datasets, read_catalog
from grape_service.release.manifest import read_manifest
from grape_service.storage.storage import Storage

MAX_MANIFESTS = 50
"""The newest manifests of an output folder that are looked at."""
MIN_SECONDS = 1.0
"""An engine that scored for less says nothing about its throughput."""


@dataclass(frozen=True)
class Measured:
    """A measured throughput of a device, for models of one size."""

    parameters: float
    tokens_per_second: float


TABLE: dict[tuple[str, str], list[Measured]] = {
    ("H100", "bfloat16"): [Measured(0.49e9, 421_806), Measured(7.6e9, 59_655)],
    ("H100", "fp8"): [Measured(7.6e9, 82_999)],
    ("cpu", "float32"): [Measured(0.135e9, 400)],
}
"""One H100 80 GB: vLLM 0.26 with the engine's defaults, 8 candidates per prompt, medians of 200 and 400 tokens, all
tokens counted. Shorter responses, and longer prompts, go 2 to 2.6 times as fast (benchmarks/gpu_scoring.md).
cpu: two cores, transformers. Other sizes follow by tokens x parameters; other devices are not in the table."""


DEVICES = {"H100": "one H100 80 GB", "cpu": "two cores"}


@dataclass(frozen=True)
class Throughput:
    """Tokens a second of one replica, and where the figure comes from."""

    tokens_per_second: float
    device: str
    origin: str


def expected_throughput(config: Config, policy: PolicyConfig, device: str | None) -> Throughput:
    """For `policy` on `device`; None: where the run would score: on this machine, or on the cluster of earlier runs.

    What was measured on this machine goes before what was measured elsewhere, and that before the table. Raises
    UserError for a device without any figure, and for a cluster of which nothing is known.
    """
    if device is None and config.workers.ray_address != "auto":
        found = _from_manifests(config, policy, None)
        if found is None:
            raise UserError(
                f"no earlier manifest tells how fast {policy.model} is on the cluster at {config.workers.ray_address}: "
                f"give --device ({', '.join(sorted({name for name, _ in TABLE}))}) or --tokens-per-second"
            )
        return found
    device = device or device_here()
    return (
        _from_manifests(config, policy, device, host=socket.gethostname())
        or _from_manifests(config, policy, device)
        or _from_table(config, policy, device)
    )


def device_here() -> str:
    """What engines on this machine run on: its first GPU by name, or cpu."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _from_manifests(
    config: Config, policy: PolicyConfig, device: str | None, host: str | None = None
) -> Throughput | None:
    storage = Storage(config.output.path, config.storage)
    wanted = policy_id(policy, resolve_model(policy, config.storage))
    newest = [
        (entry.created, name, entry.version) for name in list_datasets(storage) for entry in read_catalog(storage, name)
    ]
    for _, name, version in sorted(newest, reverse=True)[:MAX_MANIFESTS]:
        try:
            engines = read_manifest(storage, name, version).statistics.get("engines") or []
        except UserError:  # a damaged version is no reason to plan nothing
            continue
        of_policy = [
            e
            for e in engines
            if e["policy_id"] == wanted
            and e.get("path") != "generate"  # a sampler's
            and (device is None or same_device(device, e["device"]))
            and (host is None or e.get("host") == host)
        ]
        seconds = sum(e["stats"].get("seconds", 0.0) for e in of_policy)
        if seconds >= MIN_SECONDS:
            rate = sum(e["stats"]["tokens"] for e in of_policy) / seconds
            where = "on this machine" if host else "by an earlier run"
            engines_of = f"{len(of_policy)} engine{'s' * (len(of_policy) > 1)}"
            origin = f"measured {where}: {name}@{version}, {engines_of} of this policy for {seconds:,.0f} s"
            return Throughput(rate, of_policy[0]["device"], origin)
    return None


def same_device(asked: str, found: str) -> bool:
    """Whether a device's full name is the one asked for: 'H100' is 'NVIDIA H100 80GB HBM3'."""
    return re.search(rf"(?<!\w){re.escape(asked.lower())}(?!\w)", found.lower()) is not None


def _from_table(config: Config, policy: PolicyConfig, device: str) -> Throughput:
    precision = policy.quantization or policy.dtype
    known = [key for key in TABLE if same_device(key[0], device) or same_device(device, key[0])]
    if not known:
        devices = ", ".join(sorted({name for name, _ in TABLE}))
        raise UserError(
            f"no earlier manifest and no table tells how fast {policy.model} is on '{device}': "
            f"give --tokens-per-second, or one of the devices {devices}"
        )
    key = next((key for key in known if key[1] == precision), known[0])
    parameters = resolve_model(policy, config.storage).num_parameters
    rate = interpolate(TABLE[key], parameters) * policy.tensor_parallel
    size = size_of_model(parameters)
    return Throughput(
        rate,
        key[0],
        f"the table of measured figures, {DEVICES[key[0]]}, {key[1]}, scaled to {size} parameters; "
        "a run of this config measures it",
    )


def interpolate(measured: list[Measured], parameters: float) -> float:
    """Tokens per second at a size: log-linear between two measured sizes, beyond them by 1 / parameters."""
    points = sorted(measured, key=lambda point: point.parameters)
    first, last = points[0], points[-1]
    if parameters <= first.parameters:
        return first.tokens_per_second * first.parameters / parameters
    if parameters >= last.parameters:
        return last.tokens_per_second * last.parameters / parameters
    left, right = next(pair for pair in itertools.pairwise(points) if parameters <= pair[1].parameters)
    share = math.log(parameters / left.parameters) / math.log(right.parameters / left.parameters)
    return left.tokens_per_second * (right.tokens_per_second / left.tokens_per_second) ** share


def actual_figures(engines: list[dict[str, Any]]) -> dict[str, Any]:
    """What the engines of a run did: tokens, seconds on the device, tokens per second, devices."""
    seconds = sum(e["stats"].get("seconds", 0.0) for e in engines)
    tokens = sum(e["stats"].get("tokens", 0.0) for e in engines)
    return {
        "tokens": int(tokens),
        "engine_seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "devices": sorted({e["device"] for e in engines}),
    }
