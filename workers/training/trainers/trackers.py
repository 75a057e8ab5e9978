"""MLflow and Weights & Biases, as a job reports to them: open or go on with a run, send figures of steps, end it."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import orjson

from grape_service.addresses import ask_loopback_directly
from grape_service.errors import UserError, without_url_secrets
from workers.logs import hidden
from workers.training.records import StageRecord
from workers.training.tracking import VARIABLES, configured, missing

REQUEST_SECONDS = 10
"""How long a tracking server may take to answer."""
MAX_FIGURES = 1000
"""What MLflow takes in one request."""
MAX_DIGEST = 36
"""Characters of a dataset's digest in MLflow."""


@dataclass(frozen=True)
class Line:
    """The figures of one step, or of an evaluation after it."""

    step: int
    figures: dict[str, float]
    time: float  # seconds since 1970

    @property
    def key(self) -> tuple[str, int]:
        """What stands once in a run."""
        return "eval_loss" if "eval_loss" in self.figures else "loss", self.step


@dataclass(frozen=True)
class About:
    """What a job tells of itself once."""

    project: str  # the dataset's name: where no variable names an experiment or a project
    group: str  # name@version
    name: str
    tags: dict[str, str]
    settings: dict[str, str]
    dataset: dict[str, str]  # name, digest, address


class Tracker(Protocol):
    """One tracking server, asked from one thread. Every call raises whatever the library raises."""

    label: str

    def open(self, run_id: str | None, first_step: int) -> dict[str, str]:
        """Go on with a run, or begin one where it is unknown or None; where it is, with its id under `run`.

        first_step: the last step of which nothing is reported again.
        """

    def send(self, lines: Sequence[Line]) -> None:
        """Report lines; those that the run has are left out."""

    def close(self, is_finished: bool) -> None:
        """End the run."""


class Mlflow:
    """MLflow's tracking server, file store or database at MLFLOW_TRACKING_URI."""

    def __init__(self, about: About, folder: Path):
        self.about = about
        self.label = f"MLflow at {without_url_secrets(os.environ['MLFLOW_TRACKING_URI'])}"
        self.known: set[tuple[str, int]] = set()

    def open(self, run_id: str | None, first_step: int) -> dict[str, str]:
        self.client = _mlflow_client()
        run = self._run(run_id)
        self.run_id: str = run.info.run_id
        self.known = set()
        if run_id == self.run_id:
            self.client.update_run(self.run_id, status="RUNNING")
            for key in ("loss", "eval_loss"):
                self.known |= {(key, point.step) for point in self.client.get_metric_history(self.run_id, key)}
        self._describe()
        return {"run": self.run_id, "experiment": run.info.experiment_id}

    def _run(self, run_id: str | None) -> Any:
        from mlflow.exceptions import MlflowException

        if run_id is not None:
            try:
                run = self.client.get_run(run_id)
                if run.info.lifecycle_stage == "active":
                    return run
            except MlflowException as error:
                if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                    raise
        return self.client.create_run(self._experiment(), tags=self.about.tags, run_name=self.about.name)

    def _experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        if given := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return given
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or self.about.project
        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return self.client.create_experiment(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # else another job was faster
                    raise
                found = self.client.get_experiment_by_name(name)
        return found.experiment_id

    def _describe(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param

        params = [Param(key, value) for key, value in self.about.settings.items()]
        for start in range(0, len(params), 100):
            self.client.log_batch(self.run_id, params=params[start : start + 100])
        source = orjson.dumps({"uri": self.about.dataset["address"]}).decode()
        name, digest = self.about.dataset["name"], self.about.dataset["digest"][:MAX_DIGEST]
        dataset = Dataset(name=name, digest=digest, source_type="grape-service", source=source)
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])])

    def send(self, lines: Sequence[Line]) -> None:
        from mlflow.entities import Metric

        batch: list[Metric] = []
        for line in lines:
            if line.key in self.known:
                continue
            self.known.add(line.key)
            points = [
                Metric(_mlflow_name(name), value, int(line.time * 1000), line.step)
                for name, value in line.figures.items()
            ]
            if len(batch) + len(points) > MAX_FIGURES:
                self.client.log_batch(self.run_id, metrics=batch)
                batch = []
            batch += points
        if batch:
            self.client.log_batch(self.run_id, metrics=batch)

    def close(self, is_finished: bool) -> None:
        self.client.set_terminated(self.run_id, "FINISHED" if is_finished else "FAILED")


def _mlflow_client() -> Any:
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"  # with the password that the URI holds
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    # A server that is away is asked again by the reporter, which can tell of it; the library waits for minutes.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(REQUEST_SECONDS))
    from mlflow import MlflowClient

    return MlflowClient(os.environ["MLFLOW_TRACKING_URI"])


def _mlflow_name(name: str) -> str:
    return re.sub(r"[^0-9A-Za-z_\-. /]", "_", name.replace("@", "_at_"))


def add_to_mlflow(where: dict[str, str], figures: dict[str, float], step: int) -> None:
    """Add figures of a step to a run that has ended, unless it has them."""
    from mlflow.entities import Metric

    client = _mlflow_client()
    known = client.get_run(where["run"]).data.metrics
    named = {_mlflow_name(name): value for name, value in figures.items()}
    now = int(time.time() * 1000)
    points = [Metric(name, value, now, step) for name, value in named.items() if known.get(name) != value]
    if points:
        client.log_batch(where["run"], metrics=points)


class Wandb:
    """Weights & Biases, online or offline as WANDB_MODE says. The console is not recorded: it may hold secrets."""

    def __init__(self, about: About, folder: Path):
        self.about, self.folder = about, folder
        server = os.environ.get("WANDB_BASE_URL")
        self.label = f"Weights & Biases at {without_url_secrets(server)}" if server else "Weights & Biases"
        self.run: Any = None

    def open(self, run_id: str | None, first_step: int) -> dict[str, str]:
        self.run = _wandb_run(
            run_id or uuid.uuid4().hex,
            project=os.environ.get("WANDB_PROJECT") or self.about.project,
            group=os.environ.get("WANDB_RUN_GROUP") or self.about.group,
            name=os.environ.get("WANDB_NAME") or self.about.name,
            job_type=self.about.tags["grape.stage"],
            config={**self.about.settings, **self.about.tags},
            dir=os.environ.get("WANDB_DIR") or str(self.folder),
        )
        # Offline nothing tells what was reported before; online it is the server.
        self.next_step = first_step + 1 if self.run.offline else self.run.starting_step
        where = {"run": self.run.id, "project": self.run.project}
        return {**where, "folder": self.run.settings.sync_dir} if self.run.offline else where

    def send(self, lines: Sequence[Line]) -> None:
        for line in lines:
            if line.step >= self.next_step:
                self.run.log(line.figures, step=line.step)
            elif "eval_loss" in line.figures:  # of the last step before a job went on: its row is closed
                self.run.summary.update(line.figures)

    def close(self, is_finished: bool) -> None:
        self.run.finish(exit_code=0 if is_finished else 1)


def _wandb_run(run_id: str, **how: Any) -> Any:
    import wandb

    quiet: dict[str, Any] = {"console": "off", "silent": True, "save_code": False}
    seconds = {"init_timeout": 2 * REQUEST_SECONDS, "login_timeout": REQUEST_SECONDS}
    settings = wandb.Settings(**quiet, **seconds, finish_timeout=2 * REQUEST_SECONDS)
    return wandb.init(id=run_id, resume="allow", reinit="finish_previous", settings=settings, **how)


def add_to_wandb(where: dict[str, str], figures: dict[str, float], step: int) -> None:
    """Add figures to the summary of a run that has ended."""
    folder = str(Path(where["folder"]).parents[1]) if "folder" in where else None
    run = _wandb_run(where["run"], project=where["project"], dir=os.environ.get("WANDB_DIR") or folder)
    run.summary.update(figures)
    run.finish()


TRACKERS: dict[str, type[Mlflow] | type[Wandb]] = {"mlflow": Mlflow, "wandb": Wandb}


def line_of(step: int, logs: dict[str, Any], at: float | None = None) -> Line:
    """A line of metrics as it is reported: its numbers."""
    numbers = {key: float(value) for key, value in logs.items() if key != "step" and isinstance(value, int | float)}
    return Line(step, numbers, time.time() if at is None else at)


def add_figures(stage: StageRecord, figures: dict[str, float], say: Callable[[str], None]) -> None:
    """Add figures of a job's checkpoint to the runs that its stage of the record names.

    What fails is said in one sentence, and so is a tracker that this process's environment does not configure.
    """
    step = ((stage.get("metrics") or {}).get("last") or {}).get("step", 0)
    wanted = configured(os.environ)
    ask_loopback_directly()
    for package, where in (stage.get("tracking") or {}).items():
        try:
            if package not in wanted:
                raise UserError(f"{VARIABLES[package][0]} is not set here")
            if problem := missing(package, wanted[package]):
                raise UserError(problem)
            (add_to_mlflow if package == "mlflow" else add_to_wandb)(where, figures, step)
        except Exception as error:  # of a library that is no part of training
            say(f"{', '.join(figures)} are not added to run {where['run']} of {package}: {reason(error)}")


def reason(error: BaseException) -> str:
    """The first cause of an error in one line, without secrets."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if isinstance(error, UserError):
        return str(error)
    text = " ".join((str(error).strip().splitlines() or [""])[0].split())
    return hidden(f"{type(error).__name__}: {text}" if text else type(error).__name__)[:200]
