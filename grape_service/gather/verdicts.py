"""Verdicts: whether a sampled response is right, wrong or unknown, why, and what said so.

Judges run in a process of their own, which is killed when a response takes longer than the limit: in a thread a judge
that hangs could not be stopped. A response is text to a judge and is never run as code.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing.connection import Connection
from typing import Any, Literal

from grape_service.config.gather import VerifyConfig
from grape_service.config.own_methods import function_at
from grape_service.config.own_sources import sources_of
from grape_service.errors import UserError
from grape_service.keys import digest_of
from grape_service.rows.candidate import Row

Word = Literal["right", "wrong", "unknown"]
WORDS: tuple[Word, ...] = ("right", "wrong", "unknown")
START_SECONDS = 60.0
"""A judge's imports may take so long before its first verdict."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says of a response."""

    word: Word
    reason: str


@dataclass(frozen=True)
class Question:
    """A response to be judged."""

    response: str
    answer: str | None  # of the answer column, as text
    row: Row  # the pool row's other columns, for functions


Judge = Callable[[Question], Verdict]


def exact(question: Question) -> Verdict:
    """Right where the response is the answer, but for white space at its ends."""
    if question.answer is None:
        return Verdict("unknown", "no answer in the pool")
    same = question.response.strip() == question.answer.strip()
    return Verdict("right", "is the answer") if same else Verdict("wrong", "is not the answer")


def regex(question: Question, pattern: re.Pattern[str], has_answer: bool) -> Verdict:
    """Right where the first group of the pattern's last match is the answer; without answers, where it matches."""
    matches = list(pattern.finditer(question.response))
    if not matches:
        return Verdict("wrong", "the pattern is not in it")
    if not has_answer:
        return Verdict("right", "the pattern is in it")
    if question.answer is None:
        return Verdict("unknown", "no answer in the pool")
    found = matches[-1].group(1 if pattern.groups else 0)
    return exact(Question(found or "", question.answer, question.row))


def math(question: Question) -> Verdict:
    """Right where math-verify finds the last expression of the response equal to the answer."""
    from math_verify import parse, verify

    if question.answer is None:
        return Verdict("unknown", "no answer in the pool")
    gold = parse(question.answer, parsing_timeout=None) or parse(f"${question.answer}$", parsing_timeout=None)
    if not gold:
        return Verdict("unknown", "the pool's answer is no mathematical expression")
    found = parse(question.response, parsing_timeout=None)
    if not found:
        return Verdict("wrong", "it has no mathematical expression")
    return Verdict("right", "equal") if verify(gold, found, timeout_seconds=None) else Verdict("wrong", "not equal")


def _function(question: Question, function: Callable[..., Any]) -> Verdict:
    said = function(question.response, question.answer, question.row)
    if isinstance(said, str) and said in WORDS:
        return Verdict(said, "the function says so")
    if said is None:
        return Verdict("unknown", "the function does not say")
    if isinstance(said, bool):
        return Verdict("right" if said else "wrong", "the function says so")
    return Verdict("unknown", f"the function gave {type(said).__name__}, not True, False, None or one of {WORDS}")


def judge_of(config: VerifyConfig) -> Judge:
    """The judge of a config. Raises UserError for a function that cannot be imported, and for a missing package."""
    if config.method == "exact":
        return exact
    if config.method == "regex":
        assert config.pattern is not None
        return partial(regex, pattern=re.compile(config.pattern), has_answer=config.answer is not None)
    if config.method == "math":
        if importlib.util.find_spec("math_verify") is None:
            raise UserError("gather.verify.method math needs the package math-verify, of the extra train")
        return math
    return partial(_function, function=_function_of(config))


def _function_of(config: VerifyConfig) -> Callable[..., Any]:
    return function_at(config.method, f"gather.verify.method '{config.method}'")


def verifier_name(config: VerifyConfig) -> str:
    """What says so, with its version: 'math (math-verify 0.8.0)', 'mine:judge (source 0123456789ab)'.

    Raises UserError for a function that cannot be imported.
    """
    package = {"math": "math-verify"}.get(config.method, config.method.split(".")[0].split(":")[0])
    own = "grape-service" if config.method in ("exact", "regex") else package
    versions = []
    with contextlib.suppress(PackageNotFoundError):
        versions.append(f"{own} {version(own)}")
    if config.is_own:
        _function_of(config)
        versions.append(f"source {digest_of(sources_of(config.method), 12)}")
    return f"{config.method} ({', '.join(versions)})" if versions else config.method


class Verifier:
    """Judges responses in a process of its own; one that hangs or dies there is unknown, and the next has a new one."""

    def __init__(self, config: VerifyConfig):
        self._config = config
        self._name = verifier_name(config)
        self._process: Any = None
        self._connection: Connection | None = None

    @property
    def name(self) -> str:
        """For the column `verifier`."""
        return self._name

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def verdicts(self, questions: Iterable[Question]) -> Iterator[Verdict]:
        """The verdict of each response, in order. Raises UserError where there is no such judge."""
        for question in questions:
            yield self._verdict(question)

    def _verdict(self, question: Question) -> Verdict:
        seconds = self._config.seconds
        connection = self._connection or self._begin()
        try:
            connection.send(question)
            if not connection.poll(seconds):
                self._end()
                return Verdict("unknown", f"not judged within {seconds:g} seconds")
            word, reason = connection.recv()
        except (EOFError, OSError):
            self._end()
            return Verdict("unknown", "the judge's process died")
        return Verdict(word, reason)

    def _begin(self) -> Connection:
        context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
        self._connection, other_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(other_end, self._config), daemon=True)
        self._process.start()
        other_end.close()
        if not self._connection.poll(START_SECONDS):
            self._end()
            raise UserError(f"gather.verify: the judge {self._name} did not start within {START_SECONDS:g} seconds")
        try:
            refused = self._connection.recv()
        except EOFError:
            self._end()
            raise UserError(f"gather.verify: the process of the judge {self._name} died as it started") from None
        if refused is not None:
            self._end()
            raise UserError(refused)
        return self._connection

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None


def _serve(connection: Connection, config: VerifyConfig) -> None:
    """In the process: answer questions until the other end is closed."""
    try:
        judge = judge_of(config)
    except UserError as error:
        connection.send(str(error))
        return
    connection.send(None)
    with contextlib.suppress(EOFError, OSError):
        while True:
            question = connection.recv()
            try:
                verdict = judge(question)
            except Exception as error:
                verdict = Verdict("unknown", f"{type(error).__name__}: {str(error)[:200]}")
            connection.send((verdict.word, verdict.reason))
