"""A cluster whose folders other users can write to is refused, by a second user's own hands; closed ones are not."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest

from grape_service.errors import UserError
from tests import tiny_models
from tests.jobs import ROOT, pool_rows, tiny_job
from tests.ray_cluster import RAY, ray_cluster
from workers.cluster.closed import PACKAGES, opened_at, refuse_open_folders
from workers.cluster.jobs import job_server
from workers.cluster.ray import private_ray

pytestmark = [pytest.mark.alone, pytest.mark.timeout(300)]
NOBODY = 65534
as_root = pytest.mark.skipif(os.getuid() != 0, reason="acts as a second user, which only root can")


@pytest.fixture
def entered() -> Iterator[Path]:
    """A folder that every user may enter, as pytest's own is not."""
    made = Path(tempfile.mkdtemp(prefix="grape-closed-", dir="/tmp"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def nobody_writes(folder: Path) -> bool:
    """Whether a second user puts a module of its own in the place of one in a folder."""
    line = 'rm -f "$1/module.py" && echo "import os" >"$1/module.py"'
    command = ["sh", "-c", line, "sh", str(folder)]
    return not subprocess.run(command, user=NOBODY, group=NOBODY, extra_groups=[], capture_output=True).returncode


@as_root
@pytest.mark.parametrize(
    ("modes", "is_open"),
    [
        ({"a": 0o755, "a/b": 0o755}, False),
        ({"a": 0o755, "a/b": 0o777}, True),
        ({"a": 0o700, "a/b": 0o777}, False),
        ({"a": 0o711, "a/b": 0o733}, True),
        ({"a": 0o1777, "a/b": 0o755}, False),
        ({"a": 0o777, "a/b": 0o755}, True),
    ],
)
def test_what_is_called_open_is_what_a_second_user_can_write_to(
    entered: Path, modes: dict[str, int], is_open: bool
) -> None:
    (entered / "a" / "b").mkdir(parents=True)
    for name, mode in modes.items():
        (entered / name).chmod(mode)
    assert (opened_at(entered / "a" / "b") is not None) == is_open
    written = nobody_writes(entered / "a" / "b")
    renamed = not subprocess.run(
        ["mv", str(entered / "a" / "b"), str(entered / "a" / "c")], user=NOBODY, group=NOBODY, capture_output=True
    ).returncode
    assert (written or renamed) == is_open


@as_root
def test_a_folder_of_another_user_and_groups_with_members(entered: Path) -> None:
    folder = entered / "theirs" / "ray"
    folder.mkdir(parents=True)
    os.chown(folder.parent, NOBODY, NOBODY)
    assert "belongs to the user nobody" in str(opened_at(folder))
    os.chown(folder.parent, 0, 54321)
    folder.parent.chmod(0o775)  # a group of which nobody knows who is in it
    assert "mode 0775" in str(opened_at(folder))
    os.chown(folder.parent, 0, 0)
    assert opened_at(folder) is None
    os.chown(folder.parent, NOBODY, NOBODY)
    os.chown(folder, NOBODY, NOBODY)  # Ray runs as that user, and we only submit
    folder.parent.chmod(0o700)
    assert opened_at(folder) is None


def test_the_set_up_that_the_pages_show_is_closed(tmp_path: Path, entered: Path) -> None:
    text = (ROOT / "deploy" / "README.md").read_text()
    lines = re.search(r"```\n(export RAY_AUTH_MODE=token .*?)```", text, re.DOTALL).group(1)
    script = lines.replace("/var/tmp", str(entered)) + "echo $RAY_TMPDIR"
    folder = subprocess.run(
        ["bash", "-ec", script], env={**os.environ, "HOME": str(tmp_path)}, capture_output=True, text=True, check=True
    ).stdout.strip()
    assert Path(folder).parent == entered
    (Path(folder) / "ray").mkdir()
    (Path(folder) / "ray").chmod(0o777)
    assert opened_at(Path(folder) / "ray") is None
    token = tmp_path / ".ray" / "auth_token"
    assert len(token.read_text().strip()) == 64
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    for name in ("Dockerfile.cpu", "Dockerfile.cuda"):
        image = (ROOT / "deploy" / "docker" / name).read_text()
        assert "install -d -m 700 -o grape /ray" in image
        assert " RAY_TMPDIR=/ray " in image


@as_root
def test_an_open_cluster_is_refused_by_check_submit_and_the_job(tmp_path: Path, entered: Path) -> None:
    session = f"--temp-dir={entered}/ray"
    model = tiny_models.make_model(tmp_path / "model", arch="llama")
    with ray_cluster(tmp_path, 2, session) as cluster, tiny_job(tmp_path, model, pool_rows(2)) as job:
        packages = next((entered / "ray").glob("session_2*")) / PACKAGES
        package = packages / "_ray_pkg_0123456789abcdef"
        package.mkdir(parents=True)
        (package / "module.py").touch()
        for folder in (packages, package):  # as Ray makes the first, and its umask may make the second
            folder.chmod(0o777)
        assert nobody_writes(package), "the drill itself"
        job.environment = cluster.environment
        job.config["workers"] = {"shard_tokens": 400, "ray_address": cluster.address}
        for command in (
            ["check", str(job.config_path)],
            ["submit", str(job.config_path), "--address", cluster.address],
        ):
            refused = job.grape(*command)
            last = refused.stderr.strip().splitlines()[-1]
            assert refused.returncode == 2, refused.stderr[-2000:]
            assert f"other users of this machine can write into Ray's folder {entered}/ray/session_" in last
            assert f"{entered}/ray has mode 0777; start Ray with RAY_TMPDIR" in last
        listed = job.grape("jobs", "list", "--address", cluster.address, "--json")
        assert orjson.loads(listed.stdout) == {"jobs": []}  # none was submitted

        # A job that somebody submits past us refuses as its first act.
        job.config["workers"] = {"shard_tokens": 400}
        runtime = {"env_vars": {"GRAPE_IN_CLUSTER": "1", "PYTHONPATH": str(ROOT)}}
        job_options = ["--runtime-env-json", orjson.dumps(runtime).decode(), "--entrypoint-num-cpus=0"]
        command = ["python", "-m", "grape_service.cli", "run", str(job.config_path)]
        deadline = time.monotonic() + 60
        while True:  # until the head's agent has started, Ray takes no job
            done = subprocess.run(
                [RAY, "job", "submit", f"--address={cluster.address}", *job_options, "--", *command],
                env=job.environ(),
                capture_output=True,
                text=True,
                timeout=120,
            )
            if "No available agent" not in done.stderr or time.monotonic() > deadline:
                break
            time.sleep(1)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "error: other users of this machine can write into Ray's folder" in done.stdout
    assert not list((tmp_path / "datasets").rglob("*.parquet"))


@as_root
def test_our_own_ray_is_closed() -> None:
    with private_ray(2, with_jobs=True) as private, job_server(str(private.jobs)) as server:
        assert server.refuse_open_folders() == (1, 1)
        session = Path(server._sessions()[0])
        assert session.stat().st_mode & 0o777 == 0o777  # Ray's own choice
        assert not nobody_writes(session)


def test_a_folder_that_is_not_there_is_not_on_this_machine() -> None:
    assert refuse_open_folders("/nowhere/ray/session_1") is False
    with pytest.raises(UserError, match="has mode 1777"):
        refuse_open_folders("/tmp")
