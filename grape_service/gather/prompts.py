"""The prompts of a pool: what gather samples for."""

from __future__ import annotations

from grape_service.config.policy import PolicyConfig
from grape_service.config.pool import PoolGroup
from grape_service.config.schema import Config

PROMPT_TOKENS = 2**14
"""Of a unit: some tens of prompts, whose samples are made together and written together."""
REFERENCES = ("answer", "solution", "final_answer", "ground_truth", "reference")
"""Columns beside prompts that hold what is right; elsewhere some of these names are a response's."""


def carried(config: Config, group: PoolGroup) -> list[str]:
    """What is carried along with prompts, and never taken for a response, unless the config says so."""
    assert config.gather is not None
    said = [name for names in group.columns.values() for name in ([names] if isinstance(names, str) else names)]
    answer = config.gather.verify.answer
    return list(dict.fromkeys([*group.carry, *([answer] if answer else []), *(n for n in REFERENCES if n not in said)]))


def prompts_config(config: Config, policy: PolicyConfig) -> Config:
    """A config whose prepared pool is the prompts alone, as the policy renders them."""
    assert config.gather is not None
    groups = [
        group.model_copy(update={"shape": "prompts", "where": [], "carry": carried(config, group)})
        for group in config.pool.groups
    ]
    pool = config.pool.model_copy(update={"path": groups, "columns": {}, "where": [], "carry": [], "shape": "prompts"})
    workers = config.workers.model_copy(update={"shard_tokens": min(PROMPT_TOKENS, config.workers.shard_tokens)})
    render = config.render
    if config.has_own_template(policy):
        render = render.model_copy(update={"chat_template": None})
    update = {"target": policy, "pool": pool, "workers": workers, "render": render}
    return config.model_copy(update={**update, "gather": None, "behavior": None, "weights": None, "train": None})
