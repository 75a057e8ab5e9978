"""docs/pools.md: every example is read, and its config says the same as what is found."""

from __future__ import annotations

import re
from pathlib import Path

import orjson
import pytest
import yaml

from grape_service.storage.storage import Storage
from tests.prepared_pools import all_rows, make_config, prepare

pytestmark = pytest.mark.quick

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "pools.md").read_text()
EXAMPLES = re.findall(r"```json\n(.*?)```(?:\n+```yaml\n(.*?)```)?", PAGE, re.S)


@pytest.mark.parametrize(("lines", "config"), EXAMPLES, ids=[lines[:40] for lines, _ in EXAMPLES])
def test_an_example_of_the_page_is_read(tmp_path: Path, lines: str, config: str) -> None:
    rows = [orjson.loads(line) for line in lines.strip().split("\n")]
    assert len(rows) == 3
    for number, row in enumerate(rows):  # a page may show rows of several files
        (tmp_path / "pool").mkdir(exist_ok=True)
        (tmp_path / "pool" / f"{number}.jsonl").write_bytes(orjson.dumps(row))
    _, found = prepare(make_config(tmp_path / "pool"), Storage(str(tmp_path / "auto")))
    assert found.rejects.total == 0
    assert found.rows >= 3
    if config and len({tuple(row) for row in rows}) == 1:
        (tmp_path / "one.jsonl").write_text(lines)
        said = {key: value for key, value in yaml.safe_load(config)["pool"].items() if key == "columns"}
        one, two = (Storage(str(tmp_path / name)) for name in ("one", "two"))
        _, said_rows = prepare(make_config(tmp_path / "one.jsonl", pool=said), one)
        _, found_rows = prepare(make_config(tmp_path / "one.jsonl"), two)
        assert all_rows(one, said_rows).equals(all_rows(two, found_rows))
