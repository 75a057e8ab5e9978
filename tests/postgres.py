"""A real Postgres in a folder of its own, for tests and benchmarks; Debian's package `postgresql` has it."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.ray_cluster import free_port

PROGRAMS = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))


def missing() -> str | None:
    """Why there is no Postgres here; None where there is one."""
    return None if PROGRAMS or shutil.which("initdb") else "Postgres is not installed: apt-get install postgresql"


class Postgres:
    """A server on loopback and its database `prefect`. It refuses to run as root: then its user is postgres."""

    def __init__(self, folder: Path):
        self.folder, self.port = folder / "postgres", free_port()
        self.bin = PROGRAMS[-1].parent if PROGRAMS else Path(str(shutil.which("initdb"))).parent
        self.user: dict[str, Any] = {}
        self.folder.mkdir()
        if os.getuid() == 0:
            owner = pwd.getpwnam("postgres")
            self.user = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
            os.chown(self.folder, owner.pw_uid, owner.pw_gid)
        self.run("initdb", "-D", str(self.folder / "data"), "-U", "prefect", "--auth=trust", "--no-sync")
        self.process = subprocess.Popen(
            [
                *(self.bin / "postgres", "-D", self.folder / "data", "-k", self.folder, "-c", "fsync=off"),
                *("-h", "127.0.0.1", "-p", str(self.port)),
            ],
            stderr=(self.folder / "log").open("wb"),
            cwd=self.folder,
            **self.user,
        )
        self.run("pg_isready", *self.where, wait=True)
        self.run("createdb", *self.where, "prefect")

    @property
    def where(self) -> list[str]:
        return ["-h", "127.0.0.1", "-p", str(self.port), "-U", "prefect"]

    @property
    def url(self) -> str:
        """What Prefect is told."""
        return f"postgresql+asyncpg://prefect@127.0.0.1:{self.port}/prefect"

    def run(self, program: str, *arguments: str, wait: bool = False) -> str:
        """One of Postgres' programs to its end; what it says. `wait`: until it succeeds."""
        for _ in range(120 if wait else 1):
            command = [self.bin / program, *arguments]
            done = subprocess.run(command, capture_output=True, text=True, cwd=self.folder, timeout=120, **self.user)
            if done.returncode == 0:
                return done.stdout
            time.sleep(0.25 if wait else 0)
        raise AssertionError(f"{program}: {done.stdout}{done.stderr}")

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(30)


@contextmanager
def postgres(folder: Path) -> Iterator[Postgres]:
    """One that is up; every user may enter its folder."""
    server = Postgres(folder)
    try:
        yield server
    finally:
        server.close()
