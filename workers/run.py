"""One run: its config, where its files are, that it is alive, and what happened."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

from grape_service.config.policy import PolicyConfig
from grape_service.config.schema import Config
from grape_service.errors import StageError, UserError, best_effort
from grape_service.models.files import ModelFiles, PolicyFiles, policy_id, resolve_model
from grape_service.models.newest import resolved
from grape_service.models.vocabulary import refuse_unspelled
from grape_service.models.weights import check_policy
from grape_service.progress.reporter import reporter
from grape_service.release.manifest import FileList, PoolFile, Role, without_secrets
from grape_service.release.outputs import register_output
from grape_service.release.pools import Released
from grape_service.release.reference import Reference
from grape_service.release.rounds import Rounds
from grape_service.render.loading import load_renderer
from grape_service.render.renderer import Renderer
from grape_service.select.steps import Tokenizer
from grape_service.storage.probe import check_writable
from grape_service.storage.storage import Storage
from grape_service.storage.workspace import begin_workspace, open_workspace
from workers.logs import logs_in

HEARTBEAT_SECONDS = 20
"""How often runs/<run_id>/heartbeat.json is written; gc leaves runs alone whose heartbeat is young."""


EVENTS_IN_HEARTBEAT = 50
"""The last events, for whoever looks at a run that is under way."""
MAX_EVENTS = 1000
"""Events that a run keeps for the manifest; of those after them only the number."""


class Events:
    """What happened, oldest first: as many as a manifest can hold, then a line that says how many more there were."""

    def __init__(self) -> None:
        self.kept: list[dict[str, str]] = []
        self.left_out = 0

    def add(self, text: str) -> None:
        """Something that happens now."""
        self.extend([{"time": utc_now(), "event": text}])

    def extend(self, events: Iterable[dict[str, str]], left_out: int = 0) -> None:
        """Events from elsewhere, with their times, and how many more there were."""
        for event in events:
            if len(self.kept) < MAX_EVENTS:
                self.kept.append(event)
            else:
                self.left_out += 1
        self.left_out += left_out

    def to_json(self) -> list[dict[str, str]]:
        """All that is known, for the manifest."""
        if not self.left_out:
            return self.kept
        return [*self.kept, {"time": utc_now(), "event": f"{self.left_out:,} more events are left out"}]


@dataclass
class Run:
    """What every stage is given."""

    config: Config
    name: str  # of the dataset
    run_id: str
    workspace: Storage
    output: Storage
    started: float = field(default_factory=time.time)
    events: Events = field(default_factory=Events)
    checkpoints: dict[str, str] = field(default_factory=dict)  # by an address that moves, the folder it stands for
    candidates: Released = field(default_factory=dict)  # by what pool.path said, the version that it names
    round: RoundOf | None = None  # of a job with several
    prompts: list[PoolFile] = field(default_factory=list)  # files that candidates were sampled for
    many_files: dict[Role, tuple[str, FileList]] = field(default_factory=dict)
    """Of files that are more than a manifest lists, the folder of what was prepared of them, and their number."""
    gathered: dict[str, Any] = field(default_factory=dict)  # by policy, what was sampled
    tags_moved: dict[str, str] = field(default_factory=dict)  # to a version that was there, from where they were
    stage_seconds: dict[str, float] = field(default_factory=dict)
    engines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def folder(self) -> str:
        """The run's folder in the workspace."""
        return f"runs/{self.run_id}"

    @cached_property
    def target_files(self) -> ModelFiles:
        """The target's files on this machine."""
        return resolve_model(self.config.target, self.config.storage)

    @cached_property
    def target_renderer(self) -> Renderer:
        """The target's tokenizer and template."""
        return load_renderer(
            self.target_files.folder, self.config.target, self.config.render, storage_options=self.config.storage
        )

    @property
    def target_tokenizer(self) -> Tokenizer:
        """The target's tokenizer as tasks get it."""
        return Tokenizer(self.config.target, self.config.render, self.config.storage, self.target_files.folder)

    def policy_id(self, policy: PolicyConfig, temperature: float = 1.0) -> str:
        """Where the scores of a policy are kept."""
        return policy_id(policy, self.files_of(policy), temperature)

    def files_of(self, policy: PolicyConfig) -> ModelFiles:
        """The files of a policy's model on this machine."""
        return self.target_files if policy == self.config.target else resolve_model(policy, self.config.storage)

    def shared_files_of(self, policy: PolicyConfig) -> PolicyFiles:
        """The same files, for tasks on any machine."""
        return PolicyFiles(policy, self.files_of(policy).folder, self.config.storage)

    def renderer_of(self, policy: PolicyConfig) -> Renderer:
        """The tokenizer and template of the target, or of a behavior policy."""
        if policy == self.config.target:
            return self.target_renderer
        config, folder = self.config, self.files_of(policy).folder
        return load_renderer(folder, policy, config.render, config.has_own_template(policy), config.storage)

    def aligns(self, policy: PolicyConfig) -> bool:
        """Whether a behavior policy's tokens are compared with the target's by the bytes they cover. Raises UserError
        where one of the two tokenizers does not spell the bytes of a text."""
        behavior = self.config.behavior
        if behavior is None or behavior.align == "ids":
            return False
        ours, theirs = self.target_renderer.vocabulary, self.renderer_of(policy).vocabulary
        if ours.digest == theirs.digest:
            return False
        refuse_unspelled({self.config.target.model: ours, policy.model: theirs})
        return True

    def check_models(self) -> None:
        """Raises UserError for a policy whose files are not a whole model, before anything is scored."""
        config = self.config
        checked = set()
        for policy in [config.target, *(config.behavior.policies() if config.behavior else [])]:
            files = self.files_of(policy)
            same = f"{files.folder} {policy.model_dump_json(exclude={'system_prompt'})}"
            if same in checked:  # policies often share a model
                continue
            checked.add(same)
            renderer = self.renderer_of(policy)
            has_weights = config.weights is not None
            found = check_policy(
                policy, files.folder, files.quantization, renderer.tokenizer, renderer.vocabulary, has_weights
            )
            if found.unchecked:
                self.event(f"the weights of {policy.model} are not checked by name: {found.unchecked}")

    def event(self, text: str) -> None:
        """Something worth telling: shown, and kept for the manifest."""
        self.events.add(text)
        reporter().event(text)

    def delete_intermediate(self) -> None:
        """Delete what lay between the stages; the config and the failures of the run stay."""
        for name in ("todo", "windows", "kept", "rescore", "weighed"):
            self.workspace.delete_folder(f"{self.folder}/{name}")

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures a stage's seconds."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.stage_seconds[name] = self.stage_seconds.get(name, 0.0) + time.monotonic() - started


@dataclass(frozen=True)
class RoundOf:
    """Which round of several a run is, and the job's rounds up to it."""

    name: str
    job: Rounds


@contextlib.contextmanager
def heartbeat(beat: Callable[[], None]) -> Iterator[None]:
    """Call `beat` now and every HEARTBEAT_SECONDS until the block ends; a beat that fails stops nothing."""
    stop = threading.Event()

    def go_on() -> None:
        while True:
            with best_effort("write the heartbeat"):
                beat()
            if stop.wait(HEARTBEAT_SECONDS):
                return

    thread = threading.Thread(target=go_on, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)


@contextlib.contextmanager
def new_run(
    config: Config,
    reference: Reference | None = None,
    round_: RoundOf | None = None,
    candidates: Released | None = None,
) -> Iterator[Run]:
    """A run whose heartbeat beats inside the block. With `reference` it adds to that dataset, not to the config's.
    `candidates` are what its pool was found to be, where that names released candidates.

    Checkpoints that the config asks for by an address that moves are found here, once for the whole run, unless it is
    a round of a job that has found them.
    """
    config, found = resolved(config, round_.job.checkpoints if round_ is not None else None)
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}"
    workspace = open_workspace(config.workspace_path, config.storage)
    name, output = (reference.name, reference.path) if reference else (config.name, config.output.path)
    checkpoints = {asked: one.folder for asked, one in found.items()}
    run = Run(config, name, run_id, workspace, Storage(output, config.storage), checkpoints=checkpoints)
    run.candidates = candidates or {}
    run.round = round_
    check_writable(workspace)
    check_writable(run.output)
    begin_workspace(workspace)
    register_output(workspace, run.output)
    workspace.write_json(f"{run.folder}/config.json", without_secrets(config.model_dump(mode="json")))

    def beat() -> None:
        told = {"run_id": run_id, "time": time.time(), "pid": os.getpid(), "name": name}
        told |= {"started": run.started, **reporter().run.where(), "events": run.events.kept[-EVENTS_IN_HEARTBEAT:]}
        workspace.write_json(f"{run.folder}/heartbeat.json", told)

    end: dict[str, Any] = {"state": "succeeded", "error": ""}
    try:
        with heartbeat(beat):
            reporter().started(run_id)
            for asked, one in found.items():
                run.event(one.sentence(asked))
            for asked, version in run.candidates.items():
                run.event(f"the pool {asked} is {version}, every file as its manifest says")
            try:
                with logs_in(workspace, run.folder):
                    yield run
            except BaseException as error:
                end = _end_of(error)
                raise
            finally:
                with best_effort("write how the run ended"):
                    end |= {"run_id": run_id, "name": name, "started": run.started, "ended": time.time()}
                    end |= {"stage_seconds": run.stage_seconds, "events": run.events.to_json()}
                    workspace.write_json(f"{run.folder}/end.json", end)
    finally:
        with best_effort("delete the heartbeat"):
            workspace.delete(f"{run.folder}/heartbeat.json")


def _end_of(error: BaseException) -> dict[str, Any]:
    """How a run ended that did not succeed. Of errors that are not ours the type alone: a text may hold a secret."""
    if isinstance(error, UserError):
        return {"state": "refused", "error": str(error)}
    if isinstance(error, StageError):
        return {"state": "failed", "error": str(error)}
    return {"state": "failed" if isinstance(error, Exception) else "stopped", "error": type(error).__name__}


def utc_now() -> str:
    """The time as ISO 8601, seconds, UTC."""
    return datetime.now(UTC).isoformat(timespec="seconds")
