"""The main job for real: `grape run` in its own process, on a tiny model."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import orjson
import pytest

import grape_service
from grape_service.errors import UserError
from grape_service.weigh.counts import WeighCounts
from tests import tiny_models
from tests.jobs import Job, Terminal, pool_rows, tiny_job, write_jsonl

pytestmark = [pytest.mark.alone, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.make_model(tmp_path_factory.mktemp("model"), arch="llama")


def _table(job: Job, reference: str) -> list[dict]:
    return grape_service.load(reference).dataset.to_table().to_pylist()


def test_ten_prompts_end_to_end(tmp_path: Path, model: str) -> None:
    rows = pool_rows(10)
    rows.append({"prompt": "", "response": "nothing was asked", "source": "forum", "correct": True})
    config = {
        "pool": {"path": str(tmp_path / "pool"), "where": [{"column": "correct", "equals": True}]},
        "behavior": {"model": model, "system_prompt": "Answer well.", "dtype": "float32"},
        "weights": {"method": "pear"},
    }
    with tiny_job(tmp_path, model, rows, **config) as job:
        first = job.run()
        assert first["rows"] == 10
        assert first["prompts"] == 10
        assert first["rejected"] == 1
        assert first["scored"] == 30 + 10  # what the filter left, and the kept rows under the behavior policy
        released = _table(job, first["reference"])
        assert [row["grape_rank"] for row in released] == [1] * 10
        assert {row["num_candidates"] for row in released} == {3}
        assert all(row["correct"] for row in released)
        for row in released:
            mask = np.array(row["loss_mask"])
            weights = np.array(row["loss_weights"])
            assert row["weight_source"] == "pear"
            assert weights[mask][-1] == 1.0
            assert (weights[~mask] == 0).all()
            assert row["grape_score"] == pytest.approx(np.array(row["target_logprobs"])[mask][:-1].mean(), abs=1e-6)

        weigh = WeighCounts.from_json(grape_service.load(first["reference"]).manifest.counts["weigh"])
        assert weigh.self_weights_repeat.rows == 10
        assert weigh.scoring_noise is not None
        assert 0 <= weigh.scoring_noise < 1e-5

        done = job.grape("run", str(job.config_path), "--json")  # an unchanged pool starts no engine and says so
        again = orjson.loads(done.stdout)
        assert again["scored"] == 0
        assert again["version"] == first["version"]
        assert not again["is_new"]
        assert "nothing is left to do" in done.stderr
        assert "starting" not in done.stderr
        assert job.wait_gone(15) == {}

        job.config["weights"] = {"method": "pear", "level": "sequence"}
        other = job.run()
        assert other["scored"] == 0
        assert other["version"] == "v0002"
        assert grape_service.load(f"{tmp_path}/datasets/tiny").version == "v0002"


def test_a_pool_that_grew_and_was_cut_anew_scores_only_new_rows(tmp_path: Path, model: str) -> None:
    rows = pool_rows(20)
    with tiny_job(tmp_path, model, rows) as job:
        assert job.run()["scored"] == 80
        (tmp_path / "pool" / "pool.jsonl").unlink()
        more = [*reversed(rows), *pool_rows(2, start=20)]
        for number in range(3):
            write_jsonl(tmp_path / "pool" / f"part-{number}.jsonl", more[number::3])
        grown = job.run()
        assert grown["scored"] == 8
        assert grown["rows"] == 22


def test_the_number_of_workers_does_not_change_a_byte(tmp_path: Path, model: str) -> None:
    digests = []
    workers = {"shard_tokens": 400, "partition_bytes": 2000}
    with tiny_job(tmp_path, model, pool_rows(24), workers={**workers, "cpus": 1}) as job:
        first = job.run()
        job.config["workers"] = {**workers, "cpus": 4}
        second = job.run("--force")
        assert second["scored"] == 0
        for outcome in (first, second):
            manifest = grape_service.load(outcome["reference"]).manifest
            digests.append([(file.path, file.sha256) for file in manifest.files])
    assert len(digests[0]) > 1
    assert digests[0] == digests[1]


def test_a_damaged_version_stops_no_new_one(tmp_path: Path, model: str) -> None:
    with tiny_job(tmp_path, model, pool_rows(6)) as job:
        job.run()
        for path in (tmp_path / "datasets" / "tiny" / "versions" / "v0001" / "data").iterdir():
            path.write_bytes(path.read_bytes()[:-9] + b"different")
        second = grape_service.load(job.run("--force")["reference"])
        assert second.version == "v0002"
        changes = second.manifest.counts["changes"]
        assert changes["since"] == "v0001"
        assert "v0001/data/part-00000.parquet is not the file that its manifest names" in changes["unreadable"]
        assert not second.storage.exists(f"{second.folder}/changes.parquet")
        card = second.storage.read(f"{second.folder}/README.md").decode()
        assert "Since `v0001`: changes are not known, as" in card
        report = second.storage.read(f"{second.folder}/report.html").decode()
        assert "changes are not known, as" in report


def test_ctrl_c_ends_within_15_seconds_and_the_next_run_goes_on(tmp_path: Path, model: str) -> None:
    with tiny_job(tmp_path, model, pool_rows(60)) as job:
        job.environment = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine", "DRILL_SECONDS": "0.3"}
        process = job.start("run", str(job.config_path), "--json")
        wait_for_scores(job)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)
        assert process.returncode == 130
        assert job.wait_gone(15 - (time.monotonic() - started)) == {}
        stored = num_scores(job)
        assert 0 < stored < 240
        job.environment = {}
        assert job.run()["scored"] == 240 - stored


@pytest.mark.parametrize(("after", "presses"), [(0.0, 1), (1.0, 3)])
def test_ctrl_c_in_a_terminal_gives_the_prompt_back(tmp_path: Path, model: str, after: float, presses: int) -> None:
    """The terminal signals its whole foreground group, here while Ray starts: one sentence, nothing left."""
    with tiny_job(tmp_path, model, pool_rows(4)) as job:
        terminal = Terminal(job, "run", str(job.config_path), "--json")
        deadline = time.monotonic() + 120
        while not any("raylet" in line for line in job.processes().values()):
            assert time.monotonic() < deadline, "Ray does not start"
            terminal.read(0.05)
        terminal.read(after)
        started = time.monotonic()
        for _ in range(presses):
            terminal.press_ctrl_c()
            terminal.read(0.3)
        status, text = terminal.wait(30)
        seconds = time.monotonic() - started
        assert status == 130
        assert text.count("error: ") == 1, text
        said = text.rstrip("^C")  # the terminal's echo of those that came after the end
        assert said.endswith("error: stopped; run the same command again to resume\n")
        assert "Traceback" not in text, text
        assert job.wait_gone(1) == {}
        assert seconds < 8  # 5 on a quiet machine


def wait_for_scores(job: Job, files: int = 2, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while len(score_files(job)) < files:
        assert time.monotonic() < deadline, "no scores were stored"
        time.sleep(0.1)


def score_files(job: Job) -> list[Path]:
    return list((job.folder / "datasets" / ".grape" / "scores").glob("*/b*/[0-9]*.parquet"))


def num_scores(job: Job) -> int:
    import pyarrow.parquet as pq

    return sum(pq.ParquetFile(path).metadata.num_rows for path in score_files(job))


@pytest.mark.parametrize("process", ["gcs_server", pytest.param("raylet", marks=pytest.mark.long)])
def test_ray_that_is_killed_ends_the_run(tmp_path: Path, model: str, process: str) -> None:
    slow = {"GRAPE_ENGINE_CLASS": "tests.drill_engines:SlowEngine", "DRILL_SECONDS": "0.5"}
    with tiny_job(tmp_path, model, pool_rows(60), workers={"shard_tokens": 200}) as job:
        job.environment |= slow
        running = job.start("run", str(job.config_path))
        wait_for_scores(job)
        killed = [pid for pid, command in job.processes().items() if command.split(" ")[0].endswith(f"/{process}")]
        assert len(killed) == 1
        started = time.monotonic()
        os.kill(killed[0], signal.SIGKILL)
        _, err = running.communicate(timeout=60)
        assert time.monotonic() - started < 30
        assert running.returncode == 1, err[-2000:]
        assert "error: Ray ended in the middle of the run: run again; stored scores are reused" in err
        assert "Traceback" not in err
        assert job.wait_gone(15) == {}


def test_user_errors_are_one_sentence_and_status_2(tmp_path: Path, model: str) -> None:
    with tiny_job(tmp_path, model, pool_rows(2)) as job:
        job.config["pool"]["path"] = str(tmp_path / "nothing")
        done = job.grape("run", str(job.config_path))
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
        assert "nothing" in done.stderr.strip().splitlines()[-1]
    with pytest.raises(UserError, match="no"):
        grape_service.load(f"{tmp_path}/datasets/absent@v0001")
