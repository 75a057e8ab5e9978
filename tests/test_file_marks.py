"""Files that `make test` gives a process of their own have a test that it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.file_marks import ROOT, files_with, left_out, marks_of

pytestmark = pytest.mark.quick


def test_a_mark_of_every_test_is_one_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "test_x.py"
    head = "pytestmark = [pytest.mark.alone]\n\n@pytest.mark.long\n@pytest.mark.timeout(9)\ndef test_one(): ...\n\n"
    path.write_text(f"{head}def test_other(): ...\n")
    assert marks_of(path) == {"alone"}
    path.write_text(f"{head}@pytest.mark.long\ndef test_other(): ...\n")
    assert marks_of(path) == {"alone", "long"}
    assert left_out(path, "not vllm and not long")


def test_no_file_is_run_alone_of_which_every_test_is_long() -> None:
    files = files_with("alone")
    assert len(files) > 20
    assert not [file for file in files if (ROOT / file).read_text().count("def test_") == 0]
    assert "tests/flows/test_local_windows.py" not in files
