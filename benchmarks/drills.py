"""What surrounds a run fails: the Prefect server, the flow's process, its worker, S3, the head of a Ray cluster.

    python benchmarks/drills.py server-away flow-dies        # or: all
    python benchmarks/drills.py starting-dies --keep DIR

Each drill uses a real server, worker, cluster and S3 of its own, prints one JSON line with its figures in seconds, and
ends with status 1 where something is not as docs/operations.md says. The longest takes 8 minutes.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import orjson

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests import tiny_models
from tests.flows.test_many_runs import many_runs
from tests.grape_service.test_webhooks import Receiver
from tests.jobs import Job, pool_rows, tiny_job, write_jsonl
from tests.postgres import postgres
from tests.prefect_service import Service, prefect_service
from tests.ray_cluster import RayCluster, ray_cluster
from tests.seaweed import BUCKET, running_server

SLOW = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine"}
PROMPTS = 60
AWAY_SECONDS = 120.0
S3_AWAY_SECONDS = 60.0


def expect(holds: bool, what: str) -> None:
    """Ends the drill where something is not as it should be."""
    if not holds:
        raise SystemExit(f"drill: {what}")


@contextmanager
def service_of(folder: Path, retry_delay: int = 10, **over: Any) -> Iterator[Service]:
    """A Prefect service for a pool of PROMPTS prompts; no worker yet."""
    model = str(tiny_models.make_model(folder / "model", arch="llama"))
    with prefect_service(folder, model, retry_delay, **over) as service:
        write_jsonl(service.job.folder / "pool" / "pool.jsonl", pool_rows(PROMPTS))
        yield service


def start(service: Service, seconds: float, **config: Any) -> str:
    """A run of curate whose engine takes `seconds` longer for each call; its id."""
    environment = dict(service.deployment("curate/curate")["job_variables"]["env"])
    environment |= SLOW | {"DRILL_SECONDS": str(seconds)}
    parameters = {"config": {**service.job.config, **config}, "until": "select", "force": True}
    return service.run("curate/curate", parameters=parameters, job_variables={"env": environment})


def await_pid(service: Service, run_id: str, other: int | None = None, seconds: float = 400) -> int:
    """The same, once there is one that is not `other`."""

    def found() -> int | None:
        pid = service.process_of(run_id)
        return None if pid == other else pid

    pid: int = service.wait(found, seconds, f"no process has the run {run_id}")
    return pid


def state_is(service: Service, run_id: str, *names: str) -> Callable[[], bool]:
    return lambda: service.state(run_id)["state_name"] in names


def states(service: Service, run_id: str) -> list[str]:
    found = service.client.get("/flow_run_states/", params={"flow_run_id": run_id}).json()
    return [one["name"] for one in sorted(found, key=lambda one: one["timestamp"])]


def await_scores(service: Service, folder: Path, seconds: float = 300) -> None:
    """Until something is scored."""
    service.wait(lambda: any(folder.rglob("scores/**/*.parquet")), seconds, "nothing is scored")


def server_away(folder: Path) -> dict[str, Any]:
    """The Prefect server is away for two minutes while a run goes on, which is cancelled afterwards."""
    with service_of(folder) as service:
        service.start_worker()
        run_id = start(service, 8.0)
        await_scores(service, folder)
        waiting = start(service, 0.0)  # for the only slot
        service.kill_server()
        time.sleep(AWAY_SECONDS)
        pid = service.process_of(run_id)
        expect(pid is not None, "the run ended with the server")
        service.start_server()
        back = time.monotonic()
        while time.monotonic() - back < 100:  # the automations have looked, and the worker too
            expect(service.state(run_id)["state_name"] == "Running", f"the run is {states(service, run_id)}")
            expect(service.state(waiting)["state_type"] == "SCHEDULED", "its slot was given away")
            time.sleep(2)
        beats = heartbeats_since(service, run_id, 100)
        service.client.post(f"/flow_runs/{run_id}/set_state", json={"state": {"type": "CANCELLING"}})
        asked = time.monotonic()
        service.wait(state_is(service, run_id, "Cancelled"), 120, f"it is not cancelled: {states(service, run_id)}")
        service.wait(lambda: service.process_of(run_id) is None, 60, "its process is left")
        cancelled = time.monotonic() - asked
        took = time.monotonic()
        service.wait(lambda: service.state(waiting)["state_type"] != "SCHEDULED", 120, "the next run does not start")
        return {
            "away": AWAY_SECONDS,
            "heartbeats_after": beats,
            "cancelled_after": cancelled,
            "next_run_after": time.monotonic() - took,
        }


def heartbeats_since(service: Service, run_id: str, seconds: float) -> int:
    """Heartbeats of a run that the server got in the last `seconds`."""
    since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() - seconds))
    body = {
        "filter": {
            "event": {"name": ["prefect.flow-run.heartbeat"]},
            "resource": {"id": [f"prefect.flow-run.{run_id}"]},
            "occurred": {"since": since},
        }
    }
    return int(service.client.post("/events/filter", json=body).json()["total"])


def flow_dies(folder: Path) -> dict[str, Any]:
    """The process of a flow whose job is on a cluster gets SIGKILL: the next try has the same job."""
    (folder / "cluster").mkdir()
    with ray_cluster(folder / "cluster", 4) as cluster:
        workers = {"shard_tokens": 400, "ray_address": cluster.address}
        with service_of(folder, workers=workers) as service:
            service.job.environment |= cluster.environment
            service.start_worker()
            run_id = start(service, 0.0)
            pid = await_pid(service, run_id)
            service.wait(lambda: jobs(service, cluster), 200, "no job is submitted")
            await_scores(service, folder)
            before = service.state(run_id)["parameters"]
            os.kill(pid, signal.SIGKILL)
            killed = time.monotonic()
            await_pid(service, run_id, other=pid)
            again = time.monotonic() - killed
            run = service.wait_final_after_crash(run_id, 500)
            expect(run["state_type"] == "COMPLETED", f"{states(service, run_id)}: {service.logs(run_id)[-3:]}")
            expect(run["parameters"] == before, "the parameters changed")
            expect(run["parameters"]["until"] == "select" and run["parameters"]["force"], "they are the deployment's")
            found = jobs(service, cluster)
            expect(len(found) == 1 and run_id in found[0]["id"], f"jobs: {found}")
            expect(not list((folder / "datasets").rglob("manifest.json")), "it released")
            return {"started_again_after": again, "tries": run["run_count"], "jobs": len(found)}


def jobs(service: Service, cluster: RayCluster) -> list[dict[str, Any]]:
    done = service.job.grape("jobs", "list", "--address", cluster.address, "--json")
    found: list[dict[str, Any]] = orjson.loads(done.stdout)["jobs"] if done.returncode == 0 else []
    return found


def flow_dies_thrice(folder: Path) -> dict[str, Any]:
    """The process of a flow gets SIGKILL in every try: three, with pauses, and the webhook hears of the last."""
    receiver = Receiver()
    with service_of(folder, retry_delay=10, notify={"webhook": receiver.url}) as service:
        service.start_worker()
        run_id = start(service, 2.0)
        pid: int | None = None
        starts: list[float] = []
        for _ in range(3):
            pid = await_pid(service, run_id, other=pid)
            service.wait(state_is(service, run_id, "Running", "Retrying", "Rerunning"), 200, "it does not run")
            starts.append(time.monotonic())
            time.sleep(5)
            os.kill(pid, signal.SIGKILL)
        service.wait(lambda: service.state(run_id)["state_name"] == "Failed", 300, f"{states(service, run_id)}")
        run = service.state(run_id)
        told = [orjson.loads(body) for _, body in receiver.got]
        expect(len(told) == 1 and told[0]["event"] == "failed", f"the webhook heard {told}")
        expect("ended without a word in 3 of 3 tries" in told[0]["error"], told[0]["error"])
        time.sleep(60)
        expect(service.state(run_id)["state_name"] == "Failed", "it is started again")
        return {"tries": run["run_count"] - 1, "between_tries": [round(b - a) for a, b in pairwise(starts)]}


def starting_dies(folder: Path) -> dict[str, Any]:
    """Worker and flow get SIGKILL after the worker took the run and before it runs; then there is another worker."""
    with service_of(folder) as service:
        worker = service.start_worker()
        run_id = start(service, 0.0)
        service.wait(
            state_is(service, run_id, "Pending", "Submitting", "InfrastructurePending"), 200, "nobody takes it"
        )
        killed = time.monotonic()
        for pid, line in service.job.processes().items():
            if pid == worker.pid or "prefect.engine" in line or "flow-run execute" in line:
                os.kill(pid, signal.SIGKILL)
        stuck = service.state(run_id)["state_type"]
        service.start_worker()
        run = service.wait_final(run_id, 900)
        expect(run["state_type"] == "COMPLETED", f"{states(service, run_id)}: {service.logs(run_id)[-3:]}")
        return {"was": stuck, "completed_after": time.monotonic() - killed, "states": states(service, run_id)}


def worker_dies(folder: Path) -> dict[str, Any]:
    """Worker and flow get SIGKILL in the middle of a run; then there is another worker."""
    with service_of(folder) as service:
        worker = service.start_worker()
        run_id = start(service, 1.0)
        await_scores(service, folder)
        killed = time.monotonic()
        for pid, _ in service.job.processes().items():
            if pid != service.server.pid and os.getsid(pid) != service.server.pid:
                os.kill(pid, signal.SIGKILL)
        worker.wait()
        service.start_worker()
        service.wait(lambda: "AwaitingRetry" in states(service, run_id), 500, "nobody sees that it is gone")
        noticed = time.monotonic() - killed
        run = service.wait_final_after_crash(run_id, 500)
        expect(run["state_type"] == "COMPLETED", f"{states(service, run_id)}: {service.logs(run_id)[-3:]}")
        return {"noticed_after": noticed, "completed_after": time.monotonic() - killed, "tries": run["run_count"]}


NO_NAME = """
import os, socket, time
resolve = socket.getaddrinfo
def getaddrinfo(host, *more, **named):
    if host == "storage.drill":
        if time.time() < float(os.environ["DRILL_RESOLVES_AT"]):
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        host = "127.0.0.1"
    return resolve(host, *more, **named)
socket.getaddrinfo = getaddrinfo
"""


def s3_away(folder: Path) -> dict[str, Any]:
    """The S3 endpoint refuses connections, or its name does not resolve, for a minute from the start of a flow on."""
    found: dict[str, Any] = {"away": S3_AWAY_SECONDS}
    (folder / "s3").mkdir()
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(NO_NAME)
    with running_server(folder / "s3") as s3:
        paths = {"output": {"path": f"s3://{BUCKET}/datasets"}, "workspace": f"s3://{BUCKET}/workspace"}
        os.environ.update(s3.environment)
        port = s3.endpoint.rpartition(":")[2]
        with service_of(folder, **paths) as service:
            service.job.environment["PYTHONPATH"] = f"{folder}/site:{ROOT}"
            service.job.environment["DRILL_RESOLVES_AT"] = "0"
            service.start_worker()
            for kind in ("refuses", "name"):
                run = {"name": f"tiny-{kind}"}
                environment = dict(service.deployment("curate/curate")["job_variables"]["env"])
                environment["PYTHONPATH"] = f"{folder}/site:{ROOT}"
                back = time.time() + S3_AWAY_SECONDS + 15
                if kind == "refuses":
                    s3.kill()
                else:
                    environment["DRILL_RESOLVES_AT"] = str(back)
                    environment["AWS_ENDPOINT_URL"] = f"http://storage.drill:{port}"
                parameters = {"config": {**service.job.config, **run}, "until": "select", "force": False}
                run_id = service.run("curate/curate", parameters=parameters, job_variables={"env": environment})
                service.wait(state_is(service, run_id, "Running"), 200, "it does not run")
                began = time.monotonic()
                job = Job(service.job.folder / kind, {**service.job.config, **run}, dict(service.job.environment))
                job.folder.mkdir()
                if kind == "name":
                    job.environment |= {name: environment[name] for name in ("DRILL_RESOLVES_AT", "AWS_ENDPOINT_URL")}
                job.environment.pop("PREFECT_API_URL")
                asked = time.monotonic()
                refused = job.grape("run", str(job.config_path))
                expect(refused.returncode == 2, refused.stderr)
                found[f"{kind}_said_in_a_terminal_after"] = time.monotonic() - asked
                found[f"{kind}_sentence"] = refused.stderr.strip().splitlines()[-1]
                if kind == "refuses":
                    time.sleep(max(0.0, S3_AWAY_SECONDS - (time.monotonic() - began)))
                    s3.start()
                ended = service.wait_final(run_id, 500)
                expect(ended["state_type"] == "COMPLETED", f"{states(service, run_id)}: {service.logs(run_id)[-3:]}")
                found[f"{kind}_completed_after"] = time.monotonic() - began
                found[f"{kind}_tries"] = ended["run_count"]
    return found


def head_dies(folder: Path) -> dict[str, Any]:
    """The head of a cluster gets SIGKILL under a run and comes back at the same address ten seconds later."""
    model = str(tiny_models.make_model(folder / "model", arch="llama"))
    with ray_cluster(folder, 4) as cluster, tiny_job(folder, model, pool_rows(PROMPTS)) as job:
        arguments = cluster.nodes[0].args
        job.environment = dict(cluster.environment)
        job.config["workers"] = {"shard_tokens": 400, "ray_address": cluster.address}
        process = job.start("run", str(job.config_path), "--json", "--set", "name=followed")
        deadline = time.monotonic() + 200
        while not any((folder / "datasets").rglob("shards/**/*.parquet")):
            expect(time.monotonic() < deadline and process.poll() is None, "nothing is prepared")
            time.sleep(0.2)
        cluster.kill_node(cluster.nodes[0])
        time.sleep(10)
        cluster.nodes.clear()
        cluster.start_node(*[part for part in arguments[3:] if not str(part).startswith("--num-cpus")], num_cpus=4)
        cluster.wait_ready()
        back = time.monotonic()
        _, err = process.communicate(timeout=400)
        expect(process.returncode == 0, err[-2000:])
        said = [line for line in err.splitlines() if "was started again" in line]
        expect(len(said) == 1, err[-2000:])
        followed = time.monotonic() - back
        again = time.monotonic()
        outcome = job.run("--set", "name=another", timeout=300)
        expect(outcome["rows"] == PROMPTS, str(outcome))
        return {"completed_after": followed, "said": said[0], "next_job_took": time.monotonic() - again}


def backup(folder: Path) -> dict[str, Any]:
    """A dump of Prefect's Postgres brings back runs that were deleted, as docs/operations.md says."""
    for one in (folder.parent, folder):  # Postgres has a user of its own
        one.chmod(0o755)
    with postgres(folder) as database, many_runs(folder, database) as service:
        runs = {run["id"] for run in service.client.post("/flow_runs/filter", json={}).json()}
        dump = str(database.folder / "prefect.dump")
        database.run("pg_dump", "-Fc", *database.where, "-f", dump, "prefect")
        service.kill_server()
        database.run("psql", *database.where, "-c", "DELETE FROM flow_run", "prefect")
        began = time.monotonic()
        database.run("pg_restore", "--clean", *database.where, "-d", "prefect", dump)
        restored = time.monotonic() - began
        service.start_server()
        expect({run["id"] for run in service.client.post("/flow_runs/filter", json={}).json()} == runs, "runs are lost")
        return {"runs": len(runs), "restored_in": restored}


DRILLS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "server-away": server_away,
    "flow-dies": flow_dies,
    "flow-dies-thrice": flow_dies_thrice,
    "starting-dies": starting_dies,
    "worker-dies": worker_dies,
    "s3-away": s3_away,
    "head-dies": head_dies,
    "backup": backup,
}


def main() -> None:
    """The drills that are named, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("drills", nargs="+", choices=[*DRILLS, "all"])
    parser.add_argument("--keep", type=Path, help="a folder for what they leave; default: a temporary one")
    given = parser.parse_args()
    for name in DRILLS if "all" in given.drills else given.drills:
        with tempfile.TemporaryDirectory(prefix="drill-", ignore_cleanup_errors=True) as scratch:
            folder = (given.keep or Path(scratch)) / name
            folder.mkdir(parents=True)
            found = DRILLS[name](folder)
        rounded = {key: round(value, 1) if isinstance(value, float) else value for key, value in found.items()}
        print(orjson.dumps({"drill": name, **rounded}).decode(), flush=True)


if __name__ == "__main__":
    main()
