"""Who scores kept rows, and with which rendering of their prompts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from grape_service.config.schema import Config
from grape_service.errors import StageError
from grape_service.report.statistics import SelectStatistics
from grape_service.select.counts import SelectCounts
from grape_service.weigh.rescore import write_group_shards
from tests import tiny_models
from workers.run import new_run
from workers.stages.select import Kept
from workers.stages.weigh import policy_groups

TEMPLATE = "{{ messages[0].content + '<|im_end|>' }}{{ messages[1].content if messages[1:] }}"


def test_a_behavior_of_the_targets_model_has_the_targets_template(tmp_path: Path) -> None:
    """As gather samples from it; another model has its own."""
    ours, other = (tiny_models.make_model(tmp_path / name, seed=seed) for seed, name in enumerate(("ours", "other")))
    policy = {"dtype": "float32", "engine": "transformers"}
    config = Config.model_validate(
        {
            "name": "x",
            "pool": {"path": str(tmp_path / "pool.jsonl")},
            "output": {"path": str(tmp_path / "out")},
            "render": {"chat_template": TEMPLATE},
            "target": {"model": ours, **policy},
            "behavior": {"sources": {"a": {"model": ours, **policy, "system_prompt": None}, "b": {"model": other}}},
            "weights": {"method": "pear"},
        }
    )
    with new_run(config) as run:
        groups = policy_groups(run, Kept({}, SelectCounts(), True, SelectStatistics.empty([])))
        assert [group.has_own_template for group in groups] == [False, True]
        assert [group.rendering == run.target_renderer.digest() for group in groups] == [True, False]
        for group in groups:
            foreign = replace(group, has_own_template=not group.has_own_template)
            with pytest.raises(StageError, match="is not that of the run: give every node the same model files"):
                write_group_shards(
                    run.workspace, "b", "kept.parquet", "out", [foreign], config.behavior, config.render, None, 65536
                )
