"""Models in a process beside this one, which looks at their weights and scores while this one does something else."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any

from grape_service.errors import StageError, UserError
from grape_service.models.imports import import_without_extras, is_own_process

if TYPE_CHECKING:  # the process beside is there before these are imported
    import numpy as np
    import numpy.typing as npt

    from grape_service.config.policy import PolicyConfig
    from grape_service.config.schema import Config
    from grape_service.models.weights import Weights
    from grape_service.rows.ragged import TokenBatch
    from workers.engines.base import Engine

    Scores = npt.NDArray[np.float32]
    Loaded = dict[str, Engine]


class ModelsInSideProcess:
    """The models of a config, for a command that looks at them: their weights, and scores of the engine of each.

    Where that is safe, as this process is a command's own and has not imported transformers yet, another is forked at
    once, which imports torch; this one then goes without it. Make it first of all, begin when the config is known, and
    close it.
    """

    def __init__(self) -> None:
        self._loaded: Loaded = {}
        is_safe = sys.platform == "linux" and is_own_process() and not {"torch", "transformers"} & set(sys.modules)
        self._beside = _Beside() if is_safe else None
        self._scores_beside = False

    def begin(self, config: Config) -> None:
        """Import transformers, and have the process beside look at local models and load engines that it will need."""
        from workers.engines.choose import imports_transformers

        recorded = config.behavior.recorded_sources.values() if config.behavior else ()
        engines = [own.policy for own in recorded if own.policy is not None]
        self._scores_beside = self._beside is not None and all(map(imports_transformers, engines))
        for function, policies in ((_weights, config.policies()), (_engine, engines if self._scores_beside else [])):
            for policy in policies:
                if self._beside is not None and Path(policy.model).is_dir():
                    self._ask(function, policy, str(Path(policy.model).resolve()))  # the answer comes again
        if is_own_process():
            import_without_extras(with_torch=config.runs_own_code or not self._scores_beside)

    def weights(self, policy: PolicyConfig, folder: str) -> Callable[[], Weights]:
        """Ask for what check_weights says of a policy's files: the function waits for it, and raises its UserError."""
        return self._ask(_weights, policy, folder)

    def scores(
        self, policy: PolicyConfig, folder: str, batch: TokenBatch, temperature: float
    ) -> Callable[[], npt.NDArray[np.float32]]:
        """Ask for the log-probabilities [L] of a batch: the function waits for them, and raises what the engine does.

        A process beside this one goes about it at once, as soon as its engine is loaded.
        """
        if not self._scores_beside:
            return partial(_called, _scores, self._loaded, policy, folder, batch, temperature)
        return self._ask(_scores, policy, folder, batch, temperature)

    def close(self) -> None:
        """End what was loaded."""
        for engine in self._loaded.values():
            engine.close()
        if self._beside is not None:
            self._beside.process.kill()

    def _ask(self, function: Callable[..., Any], policy: PolicyConfig, *arguments: Any) -> Callable[[], Any]:
        if self._beside is None:
            return partial(_called, function, self._loaded, policy, *arguments)
        return self._beside.ask(function, policy, *arguments).result


class _Beside:
    """The process beside. A thread takes its answers, which come in the order of the questions: without it a long
    answer and a long question would wait for each other.
    """

    def __init__(self) -> None:
        context = multiprocessing.get_context("fork")
        self._connection, other_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(other_end, self._connection), daemon=True)
        self.process.start()
        other_end.close()
        self._waiting: deque[tuple[str, Future[Any]]] = deque()
        self._receiver = Thread(target=self._receive, daemon=True)
        self._receiver.start()

    def ask(self, function: Callable[..., Any], policy: PolicyConfig, *arguments: Any) -> Future[Any]:
        """`function(loaded, policy, *arguments)` of the process; StageError where that has ended."""
        answer: Future[Any] = Future()
        self._waiting.append((policy.model, answer))
        try:
            self._connection.send((function, policy, arguments))
        except OSError:  # it has ended
            self._receiver.join()
            self._refuse_waiting()
        return answer

    def _receive(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                found = self._connection.recv()
                _, answer = self._waiting.popleft()
                answer.set_exception(found) if isinstance(found, Exception) else answer.set_result(found)
        self.process.join(timeout=5)
        self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        while self._waiting:
            model, answer = self._waiting.popleft()
            answer.set_exception(
                StageError(
                    f"the process that loads {model} ended with status {self.process.exitcode}: "
                    "it may have run out of memory"
                )
            )


def _called(function: Callable[..., Any], loaded: Loaded, policy: PolicyConfig, *arguments: Any) -> Any:
    """Raises UserError, and StageError for whatever else goes wrong."""
    try:
        return function(loaded, policy, *arguments)
    except (UserError, StageError):
        raise
    except Exception as error:
        raise StageError(f"looking at {policy.model} failed: {type(error).__name__}: {error}") from error


def _weights(loaded: Loaded, policy: PolicyConfig, folder: str) -> Weights:
    from grape_service.models.weights import check_weights

    return check_weights(folder, policy)


def _scores(loaded: Loaded, policy: PolicyConfig, folder: str, batch: TokenBatch, temperature: float) -> Scores:
    _engine(loaded, policy, folder)
    return loaded[_same(policy, folder)].score(batch, temperature)


def _engine(loaded: Loaded, policy: PolicyConfig, folder: str) -> None:
    from workers.engines.choose import load_engine

    if _same(policy, folder) not in loaded:
        loaded[_same(policy, folder)] = load_engine(policy, folder, for_few_rows=True)


def _same(policy: PolicyConfig, folder: str) -> str:
    """Of policies that take the same engine."""
    return f"{folder} {policy.model_dump_json(exclude={'system_prompt'})}"


def _serve(connection: Connection, other_end: Connection) -> None:
    """In the process: answer until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the command, which ends this process
    other_end.close()
    os.dup2(2, 1)
    import_without_extras()
    loaded: Loaded = {}
    with contextlib.suppress(EOFError):
        while True:
            function, policy, arguments = connection.recv()
            try:
                answer = _called(function, loaded, policy, *arguments)
            except (UserError, StageError) as error:
                answer = error
            connection.send(answer)
