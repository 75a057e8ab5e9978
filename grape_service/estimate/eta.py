"""How long a run will still take: seconds of the stages without an engine, tokens of those that score.

An estimate for stages that have not begun; each one's own rate takes over when it runs. The start of engines is not
included.
"""

from __future__ import annotations

from grape_service.config.policy import BehaviorConfig
from grape_service.config.schema import Config
from grape_service.progress.reporter import Upcoming
from grape_service.storage.storage import Storage

CORE_SECONDS = {
    "prepare": 1.6,
    "shard": 0.2,
    "select": 0.1,
    "check": 0.5,
    "render behavior": 2.0,
    "weigh": 0.9,
    "release": 0.7,
}
"""Seconds of one core for a million tokens that a stage reads, about: benchmarks/pipeline.py, benchmarks/report.py."""
POOL_BYTES_PER_TOKEN = 5
CANDIDATES_PER_PROMPT = 8
"""What is supposed of a pool until it is counted."""


def upcoming_stages(config: Config, tokens: float, per_prompt: float, cores: int, done: bool) -> list[Upcoming]:
    """The stages of a run over `tokens` tokens of a pool with `per_prompt` candidates per prompt; `done`: prepared."""
    kept = tokens * (1.0 if config.select.method == "all" else min(1.0, config.select.usual_keep / per_prompt))

    def seconds(stage: str, amount: float) -> float:
        return CORE_SECONDS[stage] * amount / 1e6 / cores

    upcoming = [] if done else [Upcoming(stage, seconds(stage, tokens)) for stage in ("prepare", "shard")]
    if config.select.needs_scores:
        upcoming.append(Upcoming("score target", tokens=tokens))
    upcoming.append(Upcoming("select", seconds("select", tokens)))
    if config.checks.enabled():
        upcoming.append(Upcoming("check", seconds("check", tokens)))
    behavior = config.compared_behavior
    if behavior is not None:
        policies = behavior.policies()
        part = kept / max(1, len(policies))  # sources are taken as equally large
        rendering = seconds("render behavior", part)
        stages = [winners_stage(behavior, place) for place in range(len(policies))]
        upcoming += [Upcoming(stage, rendering, part) for stage in stages]
        upcoming.append(Upcoming("weigh", seconds("weigh", kept)))
    return [*upcoming, Upcoming("release", seconds("release", kept))]


def rate_path(policy_id: str) -> str:
    """Where a policy's last rate is kept, in the workspace."""
    return f"rates/{policy_id}.json"


def winners_stage(behavior: BehaviorConfig | None, place: int | None, temperature: float = 1.0) -> str:
    """What a user reads while kept rows are scored: under the behavior policy at `place`, or the target (None)."""
    if place is None:
        return "score winners under the target" + (f" at temperature {temperature:g}" if temperature != 1.0 else "")
    assert behavior is not None, "a behavior policy is of a behavior"
    policy = behavior.policies()[place]
    sources = [name for name, one in sorted((behavior.sources or {}).items()) if one == policy]
    return f"score winners under behavior policy {', '.join(sources) or policy.model}"


def earlier_rate(workspace: Storage, policy_id: str) -> float | None:
    """Tokens per second at which the engines of an earlier run scored for this policy, all together."""
    known = workspace.read_note(rate_path(policy_id), "tokens_per_second")
    return None if known is None else float(known["tokens_per_second"])


def record_rate(workspace: Storage, policy_id: str, tokens: int, seconds: float) -> None:
    """Remember how fast a policy was scored, for the ETA of the next run."""
    workspace.write_json(rate_path(policy_id), {"tokens_per_second": tokens / max(seconds, 1e-9)})
