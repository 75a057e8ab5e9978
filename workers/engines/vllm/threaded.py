"""The one thread that owns vLLM, which takes calls from no other: what the engine and the sampler are built on."""

from __future__ import annotations

import queue
import threading
import traceback
from abc import ABC, abstractmethod
from concurrent.futures import Future
from typing import Any, Generic, Protocol, TypeVar

from workers.engines.base import OutOfMemory


class Job(Protocol):
    """What a caller hands over; it waits for the answer."""

    @property
    def answer(self) -> Future[Any]: ...


J = TypeVar("J", bound=Job)


class ThreadedVllm(ABC, Generic[J]):
    """Starts vLLM in a thread of its own, hands it jobs, and answers every one, however the thread ends."""

    def __init__(self) -> None:
        """Starts the thread and waits for vLLM: the last thing that a subclass does. Raises what `_start` raised, or
        OutOfMemory where it says that."""
        self._inbox: queue.SimpleQueue[J | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._open: dict[int, J] = {}  # jobs whose callers wait, by their id
        self._ended: Exception | None = None
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(started,), name="vllm", daemon=True)
        self._thread.start()
        started.result()

    @property
    def is_usable(self) -> bool:
        """False once a step failed in a way that leaves the cache's content unknown, and after `close`."""
        return self._ended is None

    def close(self) -> None:
        """End the thread once its step is done. Calls that wait get an error."""
        self._inbox.put(None)
        self._thread.join()

    def _answer(self, job: J) -> Any:
        """Hand over a job and wait for its answer. Raises RuntimeError where the thread has ended."""
        with self._lock:
            if self._ended is not None:
                raise RuntimeError(f"the vLLM engine stopped: {self._ended}") from self._ended
            self._open[id(job)] = job
            self._inbox.put(job)
        try:
            return job.answer.result()
        finally:
            with self._lock:
                del self._open[id(job)]

    # What follows runs in the thread.

    @abstractmethod
    def _start(self) -> None:
        """Start vLLM."""

    @abstractmethod
    def _step(self) -> bool:
        """Take jobs and do a step of vLLM's; False once `_inbox` gave None. Raises where vLLM cannot be used again."""

    @abstractmethod
    def _shut_down(self) -> None:
        """End vLLM."""

    def _run(self, started: Future[None]) -> None:
        try:
            self._start()
        except BaseException as error:
            started.set_exception(out_of_memory(error) or error)
            return
        started.set_result(None)
        ended: Exception = RuntimeError("the engine was closed")
        try:
            while self._step():
                pass
        except Exception as error:
            traceback.clear_frames(error.__traceback__)  # they hold the model, its cache and what the step had made
            ended = error
        with self._lock:
            self._ended = ended
            left = list(self._open.values())
        for job in left:
            if not job.answer.done():
                job.answer.set_exception(out_of_memory(ended) or ended)
        self._shut_down()


def out_of_memory(error: BaseException) -> OutOfMemory | None:
    """The error as OutOfMemory if that is what it says."""
    text = str(error).lower()
    if "out of memory" in text or "can't allocate memory" in text:
        return OutOfMemory(str(error).splitlines()[0])
    return None
