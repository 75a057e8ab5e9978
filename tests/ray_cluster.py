"""A real Ray cluster for tests: head and workers as separate processes, with a token, ended by SIGTERM."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.jobs import MARK, ROOT

RAY = Path(sys.executable).parent / "ray"


_given: set[int] = set()


def free_port() -> int:
    """A port that nobody listens on now, another one at each call."""
    while True:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port: int = found.getsockname()[1]
        if port not in _given:
            _given.add(port)
            return port


@dataclass
class RayCluster:
    """A head with its Jobs API and the workers that joined it. `environment` is what clients need."""

    folder: Path
    scratch: str  # short: socket paths
    gcs_port: int = field(default_factory=free_port)
    dashboard_port: int = field(default_factory=free_port)
    metrics_port: int = field(default_factory=free_port)
    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    nodes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        token = self.folder / "ray-token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.token = token

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.dashboard_port}"

    @property
    def environment(self) -> dict[str, str]:
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.token)}

    def start_node(self, *arguments: str, num_cpus: int) -> subprocess.Popen[bytes]:
        """`ray start --block ARGUMENTS` as a child process of this one."""
        environment = {**os.environ, **self.environment, MARK: self.mark, "RAY_USAGE_STATS_ENABLED": "0"}
        environment |= {"OMP_NUM_THREADS": "1", "PREFECT_HOME": str(self.folder / "prefect"), "PYTHONPATH": str(ROOT)}
        environment["RAY_health_check_period_ms"] = "500"  # a lost node is noticed in seconds, a busy one is not lost
        environment["PATH"] = f"{RAY.parent}{os.pathsep}{environment['PATH']}"
        agent = f"--dashboard-agent-listen-port={free_port()}"
        log = (self.folder / f"node-{len(self.nodes)}.log").open("wb")
        process = subprocess.Popen(
            [
                str(RAY),
                "start",
                "--block",
                f"--num-cpus={num_cpus}",
                "--object-store-memory=100000000",
                agent,
                *arguments,
            ],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=self.folder,
        )
        self.nodes.append(process)
        return process

    def start_worker(self, num_cpus: int, seconds: float = 120, *arguments: str) -> subprocess.Popen[bytes]:
        """A further node that has joined, started with `arguments`.

        With a temporary folder of its own: in the head's, each node would unpack a job's working dir again, under the
        feet of the other's processes.
        """
        scratch = f"--temp-dir={self.scratch}-{len(self.nodes)}"
        node = self.start_node(f"--address=127.0.0.1:{self.gcs_port}", scratch, *arguments, num_cpus=num_cpus)
        log = self.folder / f"node-{len(self.nodes) - 1}.log"
        deadline = time.monotonic() + seconds
        while "block forever" not in log.read_text():
            joining = node.poll() is None and time.monotonic() < deadline
            assert joining, log.read_text()[-2000:]
            time.sleep(0.2)
        return node

    def wait_ready(self, seconds: float = 180) -> None:
        """Until the Jobs API answers, with or without 401."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/api/version", timeout=5)
                return
            except urllib.error.HTTPError as error:
                if error.code in (401, 403):
                    return
            except OSError:
                pass
            alive = self.nodes[0].poll() is None and time.monotonic() < deadline
            assert alive, (self.folder / "node-0.log").read_text()[-2000:]
            time.sleep(0.5)

    def processes(self) -> list[int]:
        """Living processes of the cluster and of all that they started."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                        found.append(int(entry.name))
                except OSError:
                    continue
        return found

    def kill_node(self, node: subprocess.Popen[bytes]) -> None:
        """SIGKILL to a node and to everything in its session, as a machine that is lost."""
        os.killpg(node.pid, signal.SIGKILL)
        for pid in self.processes():
            try:
                if _session(pid) == node.pid:
                    os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        node.wait()

    def close(self) -> None:
        """SIGTERM to every node, then SIGKILL to what is left after 20 s."""
        for node in reversed(self.nodes):
            if node.poll() is None:
                node.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + 20
        while self.processes() and time.monotonic() < deadline:
            for node in self.nodes:
                node.poll()
            time.sleep(0.5)
        for pid in self.processes():
            try:
                os.kill(pid, signal.SIGKILL)
            except OSError:
                continue
        for node in self.nodes:
            node.wait()


def _session(pid: int) -> int:
    return os.getsid(pid)


@contextmanager
def ray_cluster(
    folder: Path, head_cpus: int = 4, *arguments: str, autoscaling: Callable[[int], dict[str, Any]] | None = None
) -> Iterator[RayCluster]:
    """A head, started with `arguments`, that is ready; nothing of it is left after the block.

    `autoscaling` makes the autoscaler's config from the port of the GCS.
    """
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as scratch:
        cluster = RayCluster(folder, f"{scratch}/n")
        if autoscaling is not None:
            written = folder / "autoscaling.json"
            written.write_text(json.dumps(autoscaling(cluster.gcs_port)))
            arguments = (*arguments, f"--autoscaling-config={written}")
        try:
            cluster.start_node(
                "--head",
                "--node-ip-address=127.0.0.1",
                f"--port={cluster.gcs_port}",
                "--dashboard-host=127.0.0.1",
                f"--dashboard-port={cluster.dashboard_port}",
                f"--metrics-export-port={cluster.metrics_port}",
                f"--ray-client-server-port={free_port()}",
                f"--temp-dir={cluster.scratch}",
                *arguments,
                num_cpus=head_cpus,
            )
            cluster.wait_ready()
            yield cluster
        finally:
            cluster.close()
