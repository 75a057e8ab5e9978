"""Engines in a process beside this one, which loads them while this one does something else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from grape_service.config.policy import PolicyConfig
from grape_service.errors import StageError, UserError
from grape_service.models.lean import import_lean
from grape_service.rows.ragged import TokenBatch
from workers.engines.base import Engine
from workers.engines.choose import imports_transformers, load_engine

Scores = npt.NDArray[np.float32]


class Engines:
    """Scores with the engine of each policy, which it loads once: here, or in a process beside this one.

    A process is forked where that is safe, as torch has not computed anything yet, and of use: local models of
    `policies` that are for transformers are loaded in it at once.
    """

    def __init__(self, policies: list[PolicyConfig]):
        is_fresh = "torch" not in sys.modules
        import_lean()
        self._loaded: dict[str, Engine] = {}
        self._beside: tuple[Any, Connection] | None = None
        self._num_asked = 0
        self._answers: list[Any] = []  # of the process beside, in the order of the questions
        wanted = [policy for policy in policies if imports_transformers(policy)]
        if len(wanted) == len(policies) and wanted and sys.platform == "linux" and is_fresh:
            context = multiprocessing.get_context("fork")
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, ours, wanted), daemon=True)
            process.start()
            theirs.close()
            self._beside = process, ours

    def ask(
        self, policy: PolicyConfig, folder: str, batch: TokenBatch, temperature: float
    ) -> Callable[[], npt.NDArray[np.float32]]:
        """Ask for the log-probabilities [L] of a batch, which the function waits for; it raises what the engine does.

        A process beside this one goes about it at once, as soon as its engine is loaded.
        """
        if self._beside is None:
            return partial(_score, self._loaded, policy, folder, batch, temperature)
        with contextlib.suppress(OSError):  # it has ended, which its answer shows
            self._beside[1].send((policy, folder, batch, temperature))
        self._num_asked += 1
        return partial(self._answer, self._num_asked, policy)

    def _answer(self, number: int, policy: PolicyConfig) -> Scores:
        """The answer to a question; those to earlier ones come first and are kept."""
        assert self._beside is not None
        process, connection = self._beside
        try:
            while len(self._answers) < number:
                self._answers.append(connection.recv())
        except (EOFError, OSError):
            process.join(timeout=5)
            raise StageError(
                f"the engine of {policy.model} ended with status {process.exitcode}: its memory may not suffice"
            ) from None
        answer = self._answers[number - 1]
        if isinstance(answer, Exception):
            raise answer
        scores: Scores = answer
        return scores

    def close(self) -> None:
        """End what was loaded."""
        for engine in self._loaded.values():
            engine.close()
        if self._beside is not None:
            self._beside[0].kill()


def _score(loaded: dict[str, Engine], policy: PolicyConfig, folder: str, batch: TokenBatch, temperature: float) -> Any:
    return _engine(loaded, policy, folder).score(batch, temperature)


def _engine(loaded: dict[str, Engine], policy: PolicyConfig, folder: str) -> Engine:
    same = f"{folder} {policy.model_dump_json(exclude={'system_prompt'})}"
    if same not in loaded:
        loaded[same] = load_engine(policy, folder, for_few_rows=True)
    return loaded[same]


def _serve(connection: Connection, other_end: Connection, policies: list[PolicyConfig]) -> None:
    """In the process: load local models, then answer until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends this process
    other_end.close()
    os.dup2(2, 1)
    loaded: dict[str, Engine] = {}
    for policy in policies:
        if Path(policy.model).is_dir():
            with contextlib.suppress(Exception):  # comes again where it is asked for
                _engine(loaded, policy, str(Path(policy.model).resolve()))
    with contextlib.suppress(EOFError):
        while True:
            policy, folder, batch, temperature = connection.recv()
            try:
                answer = _score(loaded, policy, folder, batch, temperature)
            except Exception as error:
                ours = isinstance(error, UserError | StageError)
                answer = error if ours else StageError(f"scoring with {policy.model} failed: {error!r}")
            connection.send(answer)
