"""Temporary folders that stay are of one user alone."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

import pytest

from grape_service.errors import UserError
from grape_service.storage.temporary import temporary_folder

pytestmark = pytest.mark.quick


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_nobody_else_can_open_it(place: Path) -> None:
    folder = temporary_folder("grape-x")
    assert folder == place / f"grape-x-{os.getuid()}"
    folder.chmod(0o755)
    assert temporary_folder("grape-x") == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_one_of_another_user_is_refused(place: Path) -> None:
    own = place / "own"
    own.mkdir()
    (place / f"grape-link-{os.getuid()}").symlink_to(own)  # wherever its maker may have wanted us to write
    (place / f"grape-file-{os.getuid()}").touch()
    for name in ("grape-link", "grape-file"):
        with pytest.raises(UserError, match="belongs to another user: set TMPDIR to a folder of your own"):
            temporary_folder(name)
    if os.getuid() == 0:
        (place / "grape-other-0").mkdir()
        os.chown(place / "grape-other-0", 65534, 65534)
        with pytest.raises(UserError, match="belongs to another user"):
            temporary_folder("grape-other")
