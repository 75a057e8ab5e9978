"""The `grape` command. The one place that reaches up to flows and workers, when a command needs them."""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

from grape_service.addresses import ask_loopback_directly
from grape_service.cli.failing import fail, interrupt_sentence
from grape_service.models.imports import collect_rarely, take_process

INTERRUPTED = 130
"""Exit status after Ctrl-C."""
END_SECONDS = 4.0
"""How long a command that was stopped may take to end what it started, before that is ended for it."""


def main() -> None:
    """Run a command; exit with 0, 1 (a stage failed), 2 (a user error) or 130 (Ctrl-C)."""
    ask_loopback_directly()
    if _is_the_program():
        take_process()
    collect_rarely()
    atexit.register(gc.freeze)  # Python's end would look through every object, for a second where torch was imported
    if threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _interrupted)
    status: Any = 0
    try:
        status = _run()
    except BaseException:  # what a command that is stopped says on its way out is of no interest
        if not _interruptions:
            raise
    if _interruptions:
        _tell()
        _leave(INTERRUPTED)
    sys.exit(status if isinstance(status, int) else 0)


def _is_the_program() -> bool:
    """Whether this process was started as `grape` or `python -m grape_service.cli`; not where somebody's Python calls
    `main`."""
    program = sys.modules["__main__"]
    spec, file = getattr(program, "__spec__", None), getattr(program, "__file__", None)
    return (spec is not None and spec.name == f"{__name__}.__main__") or os.path.basename(file or "") == "grape"


def _run() -> Any:
    """Run a command; its exit status."""
    import typer

    from grape_service.cli.app import app
    from grape_service.cli.completion import rejoin_words
    from grape_service.cli.packages import missing_package
    from grape_service.errors import StageError, UserError

    # A mistake in the command line. Newer typers bring a click of their own, older ones import it.
    click_exception: Any = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
    rejoin_words()
    try:
        return app(prog_name="grape", standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        _interruptions.append(signal.SIGINT)
        return INTERRUPTED
    except (UserError, StageError) as error:
        if _interruptions:
            return INTERRUPTED
        return fail(str(error), 2 if isinstance(error, UserError) else 1)
    except ModuleNotFoundError as error:
        missing = missing_package(error)
        if missing is None:
            raise
        return fail(str(missing), 2)
    except click_exception as error:
        return _usage(error)


_interruptions: list[int] = []
_is_told = threading.Event()


def _interrupted(number: int, frame: FrameType | None) -> None:
    """Ctrl-C: the first stops the command, further ones change nothing, and the end does not wait for ever."""
    if _interruptions:
        return
    _interruptions.append(number)
    # Where it meets a callback of an import, or Ray's own code, that would be told, and the command go on.
    sys.unraisablehook = lambda told: None
    sys.excepthook = lambda kind, error, trace: None
    ctypes.CDLL(None).signal(signal.SIGABRT, _when_aborted)
    timer = threading.Timer(END_SECONDS, _end_at_once)
    timer.daemon = True
    timer.start()
    raise KeyboardInterrupt


def _end_at_once() -> None:
    """What the command started is still not gone: kill it, and leave."""
    workers_scratch = sys.modules.get("workers.cluster.scratch")
    if workers_scratch is not None:
        workers_scratch.end_own()
    bars = sys.modules.get("grape_service.progress.bars")
    if bars is not None:
        bars.stop_shown()  # or one more bar would follow the sentence, and the cursor stay hidden
    _tell()
    os._exit(INTERRUPTED)


def _tell() -> None:
    """Say once that the command was stopped."""
    if not _is_told.is_set():
        _is_told.set()
        fail(interrupt_sentence(), INTERRUPTED)


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _when_aborted(number: int) -> None:
    """Ray aborts a process whose Ray ends while it connects to it: that is the end that was asked for."""
    _end_at_once()


def _leave(status: int) -> None:
    """End this process without taking Python apart, in which Ray crashes where it was stopped while it started."""
    atexit._run_exitfuncs()  # Prefect's server ends here
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


TYPERS_WORDS = {
    "Input should be a valid integer, unable to parse string as an integer": "it should be a whole number",
    "Input should be a valid number, unable to parse string as a number": "it should be a number",
}


def _usage(error: Any) -> int:
    """What is wrong with a command line in one sentence; the help where there is nothing but `grape`."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return 2
    path = error.ctx.command_path if getattr(error, "ctx", None) is not None else "grape"
    sentence = error.format_message().strip().rstrip(".")
    for theirs, ours in TYPERS_WORDS.items():
        sentence = sentence.replace(theirs, ours)
    return fail(f"{sentence}; see `{path} --help`", 2)
