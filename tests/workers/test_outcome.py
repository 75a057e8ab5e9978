"""A run in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from grape_service.config.loading import parse_config
from grape_service.release.tags import move_tag
from grape_service.storage.storage import Storage
from tests.grape_service.release.made_up import publish_version, rows
from workers.outcome import Outcome
from workers.run import Run
from workers.stages.release import point_tags

pytestmark = pytest.mark.quick


def test_rows_that_were_filtered_and_left_out_are_told() -> None:
    counts = {"pool": {"filtered": 63, "left_out": 1}}
    sentence = Outcome("r@v0001", "v0001", 30, 30, 2, 0, 61.4, scored=127, counts=counts).sentence()
    assert sentence == (
        "30 rows of 30 prompts released; of the pool's rows 63 filtered out, 1 left out as duplicate, truncated or too "
        "long, 2 rejected, 0 failed; 127 rows scored, 0 reused; 1 min 01 s"
    )


def test_an_unchanged_run_tells_which_tag_it_moved_back(tmp_path: Path) -> None:
    output = Storage(str(tmp_path))
    for start in (0, 10):
        publish_version(output, parts=[rows(start, start + 5)], tags=("latest",))
    values = {"name": "math-sft", "pool": {"path": "p"}, "target": {"model": "m"}, "output": {"path": str(tmp_path)}}
    run = Run(parse_config(values), "math-sft", "a-run", output, output)
    point_tags(run, "v0001")
    assert run.tags_moved == {"latest": "v0002"}
    outcome = Outcome("r@v0001", "v0001", is_new=False, tags_moved=run.tags_moved)
    assert outcome.sentence().endswith(
        "; nothing changed, so this is the existing version v0001; latest points to it now (before: v0002)"
    )
    move_tag(output, "math-sft", "latest", "v0001")
    run.tags_moved.clear()
    point_tags(run, "v0001")
    assert run.tags_moved == {}
