"""What a user does wrong ends with one plain sentence that names it, exit status 2 and no traceback."""

from __future__ import annotations

import errno
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from grape_service.cli import main
from grape_service.cli.output import write_file
from grape_service.errors import StageError, UserError
from tests.jobs import Job
from tests.website import PAGE, website

BASE: dict[str, Any] = {
    "name": "x",
    "pool": {"path": "pool.jsonl"},
    "target": {"model": "model"},
    "output": {"path": "out"},
}


def grape(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of `grape ARGUMENTS` in this process."""
    monkeypatch.setattr(sys, "argv", ["grape", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({"slect": {}}, "unknown key 'slect'; did you mean 'select'?"),
    ({"pool": {"path": "p", "colums": {}}}, "unknown key 'pool.colums'; did you mean 'columns'?"),
    ({"pool": {"path": "p", "columns": {"promt": "x"}}}, "'promt' is not one of our columns"),
    ({"pool": {"path": "p", "where": [{"column": "a"}]}}, "the filter on 'a' needs a condition"),
    ({"name": "../x"}, "'../x' is not a dataset name"),
    ({"name": None}, "'name'"),
    ({"target": {}}, "the key 'target.model' is missing"),
    ({"target": {"model": "m", "dtype": "bf16"}}, "'bfloat16'"),
    ({"target": {"model": "m", "engine": "vlm"}}, "'vllm'"),
    ({"select": {"keep": 0}}, "'select.keep'"),
    ({"select": {"method": "best"}}, "'best' is not a method"),
    ({"weights": {"method": "pear"}}, "pear needs a behavior"),
    ({"behavior": {"model": "m", "column": "c"}}, "exactly one of: column, model, sources"),
    ({"behavior": {"sources": {"a": {"modl": "m"}}}}, "unknown key 'behavior.sources.a.modl'"),
    (
        {"behavior": {"model": "m"}, "weights": {"level": "sequence", "center": "sequence"}},
        "level sequence refuses center",
    ),
    ({"behavior": {"model": "m"}, "weights": {"ratio_clip": [1, 0]}}, "lower bound first"),
    (
        {"behavior": {"model": "m"}, "weights": {}, "target": {"model": "m", "quantization": "fp8"}},
        "not made from quantised scores",
    ),
    ({"workers": {"replicas": "two"}}, "'workers.replicas'"),
    ({"workers": {"replicas": 0}}, "'workers.replicas': should be at least 1 (it is 0)"),
    ({"select": {"method": "pear"}}, "select.method: 'pear' makes weights: set it as weights.method"),
    ({"weights": {"method": "grape"}}, "weights.method: 'grape' selects rows: set it as select.method"),
    ({"notify": {"webhook": "slack"}}, "'notify.webhook': should be an address, such as https://hooks.example.com"),
    ({"workspace": " "}, "workspace is empty"),
    ({"train": {"sft": {"learnin_rate": 1}}}, "unknown key 'train.sft.learnin_rate'; did you mean 'learning_rate'?"),
    ({"train": {}}, "'train': there is nothing to do"),
    ({"select": 3}, "'select': should be a section with keys of its own (it is 3)"),
    ({"pool": "pool.jsonl"}, "'pool': should be a section with keys of its own"),
    ({"target": "model"}, "'target': should be a section"),
    ({"output": "out"}, "'output': should be a section"),
    ({"behavior": "m"}, "'behavior': should be a section"),
    ({"behavior": {"sources": {"a": 3}}}, "'behavior.sources.a': should be a section"),
    ({"pool": {"path": "p", "where": 3}}, "'pool.where': should be a list, such as [a, b] (it is 3)"),
    ({"pool": {"path": "p", "where": [{"column": "a", "equal": 1}]}}, "did you mean 'equals'?"),
    ({"select": {"keep": "two"}}, "'select.keep': should be a whole number (it is 'two')"),
    ({"select": {"keep": {"colum": "n"}}}, "unknown key 'select.keep.colum'; did you mean 'column'?"),
    ({"behavior": {"model": "m"}, "weights": {"ratio_clip": "x"}}, "should be a list of two, [lower, upper]"),
    ({"workers": {"max_failed_share": 2}}, "'workers.max_failed_share': should be at most 1 (it is 2)"),
    ({"train": {"sft": {"epochs": -1}}}, "'train.sft.epochs': should be above 0 (it is -1)"),
    ({"train": {"rl": {"rewards": [{"type": "mth"}]}}}, "'train.rl.rewards.0.type': should be 'math', 'exact'"),
    ({"train": {"sft": {"lora": {"rank": 8}}}}, "unknown key 'train.sft.lora.rank'; known keys here: alpha"),
    ({"checks": {"nearduplicates": {}}}, "did you mean 'near_duplicates'?"),
    ({"gather": {"policies": {"a": {"model": "m", "samples": "x"}}}}, "'gather.policies.a.samples': should be a whole"),
    ({"gather": {"policies": []}}, "'gather.policies': should be a section"),
    ({"weights": {"method": "paer"}, "behavior": {"model": "m"}}, "'paer' is not a method"),
    ({"render": {"system": "x"}}, "unknown key 'render.system'; known keys here: chat_template"),
    ({"storage": {"endpoint_url": 3}}, "'storage.endpoint_url' must be a text, not 3"),
]


@pytest.mark.parametrize(("over", "sentence"), MISTAKES, ids=[sentence[:40] for _, sentence in MISTAKES])
def test_mistakes_in_a_config(
    over: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**BASE, **over}))
    status, out, err = grape(monkeypatch, capsys, "run", str(path), "--json")
    assert status == 2
    assert out == ""
    assert sentence in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1
    assert not re.search(r"[A-Z][a-z]+[A-Z]\w+|valid |instance|input should", err.replace(str(tmp_path), ""))


def test_config_files_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = grape(monkeypatch, capsys, "run", str(tmp_path / "absent.yaml"))
    assert (status, "there is no config file" in err) == (2, True)
    (tmp_path / "broken.yaml").write_text("name: [x\npool: ]")
    status, _, err = grape(monkeypatch, capsys, "run", str(tmp_path / "broken.yaml"))
    assert (status, "is not YAML" in err) == (2, True)
    (tmp_path / "empty.yaml").write_text("")
    status, _, err = grape(monkeypatch, capsys, "run", str(tmp_path / "empty.yaml"))
    assert (status, "holds no config" in err) == (2, True)


def test_a_secret_in_the_config_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({**BASE, "output": {"path": "s3://b/x"}, "storage": {"secret": "hush"}}))
    status, _, err = grape(monkeypatch, capsys, "check", str(path))
    assert status == 2
    assert "storage.secret is a secret" in err
    assert "hush" not in err


def test_check_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(BASE))
    status, out, err = grape(monkeypatch, capsys, "check", str(path), "--json")
    assert status == 2
    assert "pool.jsonl" in err
    assert '"what": "target"' in out


def test_a_folder_without_write_access(tmp_path: Path) -> None:
    """In processes of their own: a flow in this one would end processes that later tests fork with status 1."""
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "pool.jsonl").write_text('{"prompt": "q", "response": "a"}\n')  # which is looked at first
    for output in ("/proc/grape-may-not-write-here", str(tmp_path / "file" / "below")):  # root may not either
        job = Job(tmp_path, {**BASE, "output": {"path": output}})
        done = job.grape("run", str(job.config_path))
        assert done.returncode == 2
        assert output in done.stderr
        assert "Traceback" not in done.stderr


def test_references_that_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for reference in (f"{tmp_path}/absent", f"{tmp_path}/../../x@v1", f"{tmp_path}/x@", "ftp://host/x@v0001"):
        status, _, err = grape(monkeypatch, capsys, "datasets", "show", reference)
        assert status == 2, reference
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "command",
    [
        "run",
        "check",
        "plan",
        "score",
        "select",
        "weigh",
        "submit",
        "deploy",
        "train",
        "export",
        "report",
        "explain",
        "compare",
    ]
    + [f"datasets {name}" for name in ("list", "show", "diff", "tag", "verify", "gc")],
)
def test_help_has_an_example(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TERMINAL_WIDTH", "200")
    status, out, _ = grape(monkeypatch, capsys, *command.split(), "--help")
    assert status == 0
    assert f"Example: grape {command}" in out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("frobnicate", "No such command 'frobnicate'"),
        ("run", "; see `grape run --help`"),
        ("run config.yaml --jsn", "--jsn"),
        ("run config.yaml another.yaml", "another.yaml"),
        ("datasets shw", "shw"),
        ("plan config.yaml --replicas two", "--replicas"),
        ("rows r@v0001 --limit 0", "--limit"),
        ("datasets diff r@v0001", "Missing argument 'B'"),
        ("export r@v0001 out", "Missing option '--to'"),
        ("runs logs", "Missing argument 'RUN'"),
        ("train r@v0001", "Missing option '--config'"),
        ("ui datasets --port 99999", "--port"),
        ("ui datasets --port 80x", "Invalid value for '--port': it should be a whole number"),
        ("export r@v0001 --to trl out --eval-share x", "Invalid value for '--eval-share': it should be a number"),
        ("init pool.jsonl", "Missing option '--model'"),
        ("datasets gc datasets --keep-days -1", "--keep-days"),
        ("schema x", "unexpected extra argument"),
        ("runn config.yaml", "Did you mean 'run'"),
        ("check config.yaml --sett a=b", "--set"),
    ],
)
def test_mistakes_in_a_command_line(
    arguments: str, sentence: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = grape(monkeypatch, capsys, *arguments.split())
    assert (status, out) == (2, "")
    assert sentence in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1


def test_nothing_but_grape_shows_the_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = grape(monkeypatch, capsys)
    assert status == 2
    assert "datasets" in out + err
    assert "Traceback" not in err


@pytest.mark.parametrize("page", [PAGE, b'{"ok": true}'])
def test_another_server_than_rays_or_prefects(page: bytes, tmp_path: Path) -> None:
    """In processes of their own: Ray and Prefect keep what they are told once."""
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(BASE))
    with website(page=page) as address:
        for arguments, server in (
            (["jobs", "list", "--address", address], "is not a Ray head"),
            (["submit", str(path), "--address", address], "is not a Ray head"),
            (["run", str(path)], "is not a Prefect server"),
            (["deploy", str(path), "--pool", "grape"], "is not a Prefect server"),
        ):
            done = subprocess.run(
                [sys.executable, "-m", "grape_service.cli", *arguments],
                env={**os.environ, "PREFECT_API_URL": f"{address}/api", "PREFECT_HOME": str(tmp_path)},
                capture_output=True,
                text=True,
                timeout=60,
            )
            assert done.returncode == 2, done.stderr
            assert done.stderr.startswith(f"error: {address}")
            assert server in done.stderr
            assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("address", ["localhost:8265", "nonsense", "http://[::1", "http://head:99999", "ftp://head"])
def test_invalid_addresses(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(BASE))
    monkeypatch.setenv("PREFECT_API_URL", address)
    for arguments, sentence in (
        (["jobs", "list", "--address", address], f"'{address}' is not an address of Ray's Jobs API"),
        (["run", str(path), "--set", f"workers.ray_address={address}"], "is not an address of Ray's Jobs API"),
        (["run", str(path)], f"PREFECT_API_URL '{address}' is not a valid address"),
        (
            ["datasets", "list", "s3://bucket/x", "--endpoint", address],
            f"the endpoint '{address}' is not a valid address",
        ),
    ):
        status, _, err = grape(monkeypatch, capsys, *arguments)
        assert (status, err.count("\n")) == (2, 1), err
        assert sentence in err


def test_ctrl_c_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    os.mkfifo(path)
    command = [sys.executable, "-m", "grape_service.cli", "check", str(path), "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        writer = opened_when_read(path)
        while state_of(process) not in "SZ":  # between opening and reading, Python would see the signal after the read
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        os.close(writer)
    finally:
        process.kill()
    assert (process.returncode, out) == (130, "")
    assert err == "error: stopped; run the same command again to resume\n"


def state_of(process: subprocess.Popen[str]) -> str:
    """Linux's letter for what a process does: R runs or could, S waits."""
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def opened_when_read(fifo: Path, seconds: float = 60) -> int:
    """A descriptor of the writing end, once somebody reads."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO or time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def test_where_no_file_can_be_written(tmp_path: Path) -> None:
    for path in (tmp_path / "absent" / "report.html", tmp_path, tmp_path / ("long" * 100)):
        with pytest.raises(UserError, match=r"there is no folder|cannot be written"):
            write_file(path, "page")
    assert write_file(tmp_path / "page.html", "half \ud800").is_file()


DOUBLING = "b0: &b0 [x]\n" + "".join(f"b{n + 1}: &b{n + 1} [*b{n}, *b{n}]\n" for n in range(40))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[" * 100_000, "is nested deeper than 50 levels"),
        ("name: " + "[" * 60 + "]" * 60, "is nested deeper than 50 levels"),
        ("a: &a [*a]", "is nested deeper than 50 levels"),
        (
            "b0: &b0 [x]\n" + "".join(f"b{n + 1}: &b{n + 1} [*b{n}, *b{n}]\n" for n in range(40)),
            "more than 100,000 values",
        ),
        ("# " + "x" * 2**21, "is larger than 1 MiB"),
        ("name: \x1b[31mred", "is not YAML"),
        ('"a\\e[31mb": 1', "unknown key 'a<U+001B>[31mb'"),
    ],
)
def test_texts_that_are_no_config(
    text: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    status, _, err = grape(monkeypatch, capsys, "run", str(path))
    assert status == 2
    assert sentence in err
    assert len(err) < 1000
    assert "\x1b" not in err


@pytest.mark.parametrize("command", ["list", "gc"])
def test_a_folder_without_datasets(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, _, err = grape(monkeypatch, capsys, "datasets", command, str(tmp_path / "nowhere"))
    assert (status, f"there is no dataset in {tmp_path}/nowhere" in err) == (2, True)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://user:pa55@host/pool.jsonl is gone", "https://***@host/pool.jsonl is gone"),
        ("'s3://key:pa/55@host/x'", "'s3://***@host/x'"),
        ("http://host/x?token=pa55&n=1 twice", "http://host/x?*** twice"),
        ("s3://team/datasets/x@v0001", "s3://team/datasets/x@v0001"),
        ("http://head:8265/x@y", "http://head:8265/x@y"),
        ("s3://team/pool-?.jsonl", "s3://team/pool-?.jsonl"),
    ],
)
def test_a_url_in_a_sentence_loses_its_secrets(text: str, shown: str) -> None:
    assert str(UserError(text)) == str(StageError(text)) == shown
