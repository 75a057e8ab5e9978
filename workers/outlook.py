"""What a run has ahead of it, for its ETA: seconds of the stages without engine, tokens of those that score.

An estimate of stages that have not begun; each one's own rate takes over when it runs. How long engines take to
start is not part of it.
"""

from __future__ import annotations

from grape_service.checks.settings import enabled_checks
from grape_service.config import Config
from grape_service.prepare.prepared import Prepared
from grape_service.progress import Ahead, reporter
from workers.cluster import num_slots
from workers.run import Run

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


def look_ahead(run: Run, pool_bytes: int, prepared: Prepared | None) -> None:
    """Tell the reporter what is to come: all of it, or what follows prepare where that is done."""
    tokens = prepared.tokens if prepared else pool_bytes / POOL_BYTES_PER_TOKEN
    per_prompt = prepared.rows / max(1, prepared.prompts) if prepared else CANDIDATES_PER_PROMPT
    ahead = stages_ahead(run.config, tokens, per_prompt, num_slots(run.config.workers), done=prepared is not None)
    reporter().expect(ahead, earlier_rate(run))


def stages_ahead(config: Config, tokens: float, per_prompt: float, cores: int, done: bool) -> list[Ahead]:
    """The stages of a run over `tokens` tokens of a pool with `per_prompt` candidates a prompt; `done`: prepared."""
    kept = tokens * (1.0 if config.select.method == "all" else min(1.0, config.select.keep / per_prompt))

    def seconds(stage: str, amount: float) -> float:
        return CORE_SECONDS[stage] * amount / 1e6 / cores

    ahead = [] if done else [Ahead(stage, seconds(stage, tokens)) for stage in ("prepare", "shard")]
    if config.select.needs_scores:
        ahead.append(Ahead("score target", tokens=tokens))
    ahead.append(Ahead("select", seconds("select", tokens)))
    if enabled_checks(config.checks):
        ahead.append(Ahead("check", seconds("check", tokens)))
    if config.weights is not None and config.behavior is not None:
        policies = config.behavior.policies()
        part = kept / max(1, len(policies))  # sources are taken as equally large
        rendering = seconds("render behavior", part)
        ahead += [Ahead(f"score behavior-{place}", rendering, part) for place in range(len(policies))]
        ahead.append(Ahead("weigh", seconds("weigh", kept)))
    return [*ahead, Ahead("release", seconds("release", kept))]


def earlier_rate(run: Run) -> float | None:
    """Tokens a second at which the engines of an earlier run scored for this target, all together."""
    try:
        return float(run.workspace.read_json(rate_path(run.policy_id(run.config.target)))["tokens_per_second"])
    except FileNotFoundError:
        return None


def rate_path(policy_id: str) -> str:
    """Where a policy's last rate is kept, in the workspace."""
    return f"rates/{policy_id}.json"


def keep_rate(run: Run, store_id: str, tokens: int, seconds: float) -> None:
    """Remember how fast a policy was scored, for the ETA of the next run."""
    run.workspace.write_json(rate_path(store_id), {"tokens_per_second": tokens / max(seconds, 1e-9)})
