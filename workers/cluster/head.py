"""The head process of a private Ray, as a child of the run: everything listens on loopback alone.

`ray start` and `ray.init` replace a loopback address by that of the machine's network, so Ray's own Node is made
here. The process lives until its standard input ends, which it does when the run is gone, killed included.
"""

from __future__ import annotations

import json
import os
import select
import sys
from typing import Any

from ray._private.node import Node
from ray._private.parameter import RayParams

from grape_service.storage.options import StorageOptions

LOOPBACK = "127.0.0.1"
LOOK_SECONDS = 1.0
"""How often it is seen whether Ray's processes are alive."""


class PrivateNode(Node):
    """A node that starts no dashboard, unless jobs are to be submitted to it."""

    def start_api_server(self, *, include_dashboard: bool | None, raise_on_failure: bool) -> None:
        if include_dashboard:
            super().start_api_server(include_dashboard=True, raise_on_failure=raise_on_failure)


def start(
    folder: str, num_cpus: int, dashboard_port: int | None, object_store_bytes: int
) -> tuple[PrivateNode, dict[str, Any]]:
    """Start Ray in `folder`; its node, its address, and that of its Jobs API where a dashboard port is given."""
    options: StorageOptions = {
        "node_ip_address": LOOPBACK,
        "num_cpus": num_cpus,
        "object_store_memory": object_store_bytes,
        "temp_dir": folder,
        "session_name": "session",  # socket paths have at most 103 bytes: see scratch.py
        "include_dashboard": dashboard_port is not None,
        "dashboard_host": LOOPBACK,
        "dashboard_port": dashboard_port or 0,
        "dashboard_agent_listen_port": 0,
        "include_log_monitor": False,
        "no_monitor": True,
    }
    node = PrivateNode(RayParams(**options), head=True, shutdown_at_exit=False, spawn_reaper=True)
    return node, {"address": node.address, "jobs": f"http://{LOOPBACK}:{dashboard_port}" if dashboard_port else None}


def main() -> None:
    """Start with the arguments of standard input's first line, say where Ray is, end when standard input ends.

    A Ray of which a process is gone is of no use: then this ends too, by which the run knows.
    """
    node, found = start(**json.loads(sys.stdin.readline()))
    print(json.dumps(found), flush=True)
    while not node.dead_processes():
        if select.select([sys.stdin], [], [], LOOK_SECONDS)[0] and not sys.stdin.read(1):
            break
    from workers.cluster.scratch import MARK, end_processes, remove

    scratch = os.environ[MARK]
    end_processes(scratch)
    remove(scratch)
    os._exit(0)


if __name__ == "__main__":
    main()
