"""Webhooks: one client that tells a webhook how a run ended, starts a trainer behind one and asks for its state.

Bodies are JSON, signed with GRAPE_WEBHOOK_SECRET where that is set. An address may hold a token, so messages name its
host alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import orjson

from grape_service.config.schema import Config, NotifyConfig
from grape_service.errors import StageError, UserError
from grape_service.json_types import JsonObject
from grape_service.progress.reporter import reporter

SECRET = "GRAPE_WEBHOOK_SECRET"
ADDRESS = "GRAPE_WEBHOOK"
"""Environment: the webhook's address, where the config names none."""
SIGNATURE = "X-Grape-Signature"
TRIES = 5
FIRST_PAUSE_SECONDS = 1.0
TIMEOUT_SECONDS = 30.0
MAX_ANSWER_BYTES = 2**20


class WebhookError(Exception):
    """A request that failed for good. `transient`: the same request may succeed later."""

    def __init__(self, host: str, problem: str, transient: bool):
        super().__init__(f"the webhook at {host} {problem}")
        self.transient = transient


def request_json(
    method: str,
    url: str,
    body: Any = None,
    key: str | None = None,
    pause: float = FIRST_PAUSE_SECONDS,
    timeout: float = TIMEOUT_SECONDS,
    tries: int = TRIES,
) -> JsonObject:
    """Send `body` as JSON; the answer's JSON object, {} if it holds none. Raises WebhookError and nothing else.

    Answers of 5xx, 408 and 429 and connections that fail are tried again with growing pauses, others are final, and
    redirects are not followed: a signed body goes to the address that was given and to no other. With
    GRAPE_WEBHOOK_SECRET set, the header X-Grape-Signature is `sha256=` and the hex HMAC-SHA256 of the body. The same
    `key` asks for the same effect.
    """
    import httpx

    headers = {"Accept": "application/json", "Accept-Encoding": "identity", "User-Agent": "grape-service"}
    content = None
    if body is not None:
        content = _json(body)
        headers["Content-Type"] = "application/json"
        if secret := os.environ.get(SECRET):
            headers[SIGNATURE] = f"sha256={signature(secret, content)}"
    if key is not None:
        headers["Idempotency-Key"] = key
    try:
        address = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError):
        raise WebhookError("no host", "has an address that is no URL", transient=False) from None
    host = address.host or "no host"
    if address.scheme not in ("http", "https") or not address.host:
        raise WebhookError(host, "has an address that is not http:// or https://", transient=False)
    use_proxies = not (host == "localhost" or host.startswith("127.") or host == "::1")

    def call() -> tuple[int, JsonObject]:
        with httpx.stream(
            method, address, content=content, headers=headers, timeout=timeout, trust_env=use_proxies
        ) as answer:
            return answer.status_code, _object_in(answer) if answer.is_success else {}

    problem, transient = "", True
    for attempt in range(tries):
        if attempt:
            time.sleep(pause * 2 ** (attempt - 1))
        try:
            status, value = _within(timeout, call)
            if 200 <= status < 300:
                return value
            problem, transient = f"answers {status}", _is_transient(status)
        except (httpx.TransportError, TimeoutError) as error:
            problem, transient = f"does not answer ({type(error).__name__})", True
        except Exception as error:  # whatever an address or an answer can do: the caller decides what it means
            problem, transient = f"cannot be called ({type(error).__name__})", False
        if not transient:
            break
    raise WebhookError(host, problem, transient)


def _within(seconds: float, call: Callable[[], tuple[int, JsonObject]]) -> tuple[int, JsonObject]:
    """What `call` gives, in a thread of its own: an answer that trickles, or a name that does not resolve, is left
    alone after `seconds`. Raises what it raises, and TimeoutError."""
    ended: list[tuple[int, JsonObject] | Exception] = []

    def work() -> None:
        try:
            ended.append(call())
        except Exception as error:
            ended.append(error)

    thread = threading.Thread(target=work, name="webhook", daemon=True)
    thread.start()
    thread.join(seconds)
    if not ended:
        raise TimeoutError
    if isinstance(ended[0], Exception):
        raise ended[0]
    return ended[0]


def _json(body: Any) -> bytes:
    try:
        return orjson.dumps(body, default=str, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # half a surrogate pair, or a number of more than 64 bits
        return json.dumps(body, default=str, sort_keys=True).encode()


def _object_in(answer: Any) -> JsonObject:
    text = b""
    for piece in answer.iter_raw():
        text += piece
        if len(text) > MAX_ANSWER_BYTES:
            return {}
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError:
        return {}
    return value if isinstance(value, dict) else {}


def _is_transient(status: int) -> bool:
    return status >= 500 or status in (408, 429)


def signature(secret: str, data: bytes) -> str:
    """Hex HMAC-SHA256."""
    return hmac.new(os.fsencode(secret), data, hashlib.sha256).hexdigest()


# How a run ended


def notify(config: NotifyConfig | None, body: JsonObject, pause: float = FIRST_PAUSE_SECONDS) -> bool:
    """POST `body` to the webhook; whether it was taken. Reports a failure as an event, and raises nothing."""
    if config is None:
        return False
    address = config.webhook or os.environ.get(ADDRESS)
    if not address:
        reporter().event(f"no webhook was called: give notify.webhook or set {ADDRESS}")
        return False
    try:
        request_json("POST", address, body, pause=pause, timeout=10.0)
    except WebhookError as error:
        reporter().event(f"the run's end was not reported: {error}")
        return False
    return True


def completed(outcome: JsonObject, run_name: str) -> JsonObject:
    """The body for a run that completed."""
    return {"event": "completed", "name": run_name, **outcome}


def failed(error: BaseException, run_name: str, seconds: float) -> JsonObject:
    """The body for a run that did not; the error's type and, where it is one of ours, its sentence."""
    ours = isinstance(error, StageError | UserError)
    message = str(error) if ours else f"{type(error).__name__}; see the run's log"
    return {"event": "failed", "name": run_name, "error": message, "seconds": round(seconds, 3)}


TriedAgain = Callable[[Exception], bool]
_tried_again: ContextVar[TriedAgain] = ContextVar("tried again", default=lambda error: False)


@contextlib.contextmanager
def failures_may_be_tried_again(is_tried_again: TriedAgain) -> Iterator[None]:
    """Inside the block a failure after which somebody tries again, as `is_tried_again(error)` says, notifies nobody."""
    token = _tried_again.set(is_tried_again)
    try:
        yield
    finally:
        _tried_again.reset(token)


@contextlib.contextmanager
def notify_when_done(config: Config, name: str | None = None) -> Iterator[list[JsonObject]]:
    """Notifies config.notify at the end of the block: the block appends its outcome; an exception is a failure.

    `name`: of the dataset, where it is not the config's. A run that was stopped by a person or by Prefect notifies
    nobody, and one that is tried again neither.
    """
    started = time.monotonic()
    name = name or config.name
    outcomes: list[JsonObject] = []
    try:
        yield outcomes
    except Exception as error:
        if not _tried_again.get()(error):
            notify(config.notify, failed(error, name, time.monotonic() - started))
        raise
    if outcomes:
        notify(config.notify, completed(outcomes[-1], name))


# Trainers behind a webhook


def post_job(url: str, body: JsonObject, key: str) -> JsonObject:
    """Ask `url` to train; the answer's JSON, {} if it has none. The same `key` asks for the same job.

    Raises UserError when the address refuses it, StageError when it does not answer.
    """
    try:
        return request_json("POST", url, body, key)
    except WebhookError as error:
        raise _as_ours(error) from None


STATE_WORDS = {
    "running": "running queued pending waiting scheduled submitted created accepted starting initializing started "
    "in_progress processing training",
    "succeeded": "succeeded success successful completed complete finished done",
    "failed": "failed failure error errored crashed timeout timed_out expired",
    "cancelled": "cancelled canceled cancelling canceling stopped aborted terminated",
}
"""The words in which services tell a job's state, by what they mean; case, spaces and hyphens do not matter."""
_STATES = {word: state for state, words in STATE_WORDS.items() for word in words.split()}


class UnknownState(StageError):
    """A webhook's job tells its state in a word that is not one of STATE_WORDS, or not at all."""


def get_status(url: str, timeout: float = TIMEOUT_SECONDS, tries: int = TRIES) -> JsonObject:
    """{"state": running | succeeded | failed | cancelled, "word": the state as `url` words it, "checkpoint": ...,
    "error": ..., "metrics": ...} from `url`.

    Raises UnknownState for a word that is not in STATE_WORDS; UserError and StageError where there is no answer.
    """
    try:
        status = request_json("GET", url, timeout=timeout, tries=tries)
    except WebhookError as error:
        raise (StageError if error.transient else UserError)(str(error)) from None
    word = status.get("state")
    state = _STATES.get(word.strip().lower().replace("-", "_").replace(" ", "_")) if isinstance(word, str) else None
    if state is None:
        given = f"is {word!r}" if word is not None else "is not given"
        raise UnknownState(
            f"the state of the webhook's job {given}: known are {', '.join(STATE_WORDS)} and words like queued, "
            "pending, completed (docs/training.md)"
        )
    return {**status, "state": state, "word": word}


def _as_ours(error: WebhookError) -> Exception:
    if error.transient:
        return StageError(f"{error}: the training job was not started or its state is not known; run again")
    return UserError(f"{error}: the training job was refused; correct the address or what it expects")
