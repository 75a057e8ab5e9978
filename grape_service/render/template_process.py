"""The process that renders chat templates: `python template_process.py BYTES`, run by sandbox.py and nothing else.

It renders as transformers does (the same sandbox, filters and variables), reads requests from standard input and
writes texts to standard output, and may hold BYTES of memory. Template and messages are other people's: this process
has nothing to lose.
"""

from __future__ import annotations

import json
import marshal
import os
import resource
import signal
import struct
import sys
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from grape_service.rows.candidate import Message

LENGTH = struct.Struct("<Q")
RENDERED, FAILED, NOT_A_TEMPLATE, TOO_MUCH, TOO_LONG = b"R", b"F", b"N", b"T", b"L"
MAX_ADDED = 128 * 2**10
"""Characters that a rendering may have beside those of its template and what the conversation accounts for: whoever
asked turns all of them into tokens, at about 2 s and 200 MB a million."""
MAX_TIMES = 16
"""Characters of a rendering for each one of the conversation, as Python writes it: JSON's escapes take 12 for one."""
THOUGHTS = ("reasoning_content", "thinking", "reasoning")


class Generation(Extension):
    """`{% generation %}` marks what an assistant wrote; nobody asks for the places here."""

    tags = {"generation"}

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller: Any) -> Any:
        return caller()


class Namespace(jinja2.utils.Namespace):
    """A namespace without names that lead to Python's internals."""

    def __init__(*args: Any, **values: Any) -> None:
        self, *rest = args
        for name in (own := dict(*rest, **values)):
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, own)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class Dict:
    """dict, without its attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


def _raise(message: Any) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment(today: datetime) -> Any:
    """transformers' environment of chat templates, on one day."""
    sandbox: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    sandbox.filters["tojson"] = _to_json
    sandbox.globals |= {
        "raise_exception": _raise,
        "strftime_now": today.strftime,
        "dict": Dict(),
        "namespace": Namespace,
    }
    return sandbox


def with_all_names(message: Message) -> dict[str, Any]:
    """A message with its thoughts under the names that templates read, as transformers gives them."""
    thoughts = next((message[name] for name in THOUGHTS if message.get(name) is not None), None)
    return message if thoughts is None else {"thinking": thoughts, **message, "reasoning_content": thoughts}


def _is_too_long(text: str, source: str, values: dict[str, Any]) -> bool:
    most = MAX_ADDED + len(source)
    return len(text) > most and len(text) > most + MAX_TIMES * len(repr(values))


def _read(length: int) -> bytes:
    parts = []
    while length:
        part = os.read(0, min(length, 1 << 20))
        if not part:
            os._exit(0)  # whoever asked is gone
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def _answer(kind: bytes, text: str) -> None:
    data = kind + text.encode("utf-8", "surrogatepass")
    data = LENGTH.pack(len(data)) + data
    while data:
        data = data[os.write(1, data) :]


def main() -> None:
    """Answers requests (number, source or None, values): a template's source comes with its first request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for whoever asked
    bytes_ = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (bytes_, bytes_))
    sandbox = environment(datetime.fromisoformat(sys.argv[2]))
    sources: dict[int, str] = {}
    templates: dict[int, Any] = {}
    while True:
        number, source, values = marshal.loads(_read(LENGTH.unpack(_read(LENGTH.size))[0]))
        try:
            if source is not None:
                sources[number] = source
            if number not in templates:
                templates[number] = sandbox.from_string(sources[number])
            values["messages"] = [with_all_names(message) for message in values["messages"]]
            text = templates[number].render(**values)
            if _is_too_long(text, sources[number], values):
                _answer(TOO_LONG, "")
            else:
                _answer(RENDERED, text)
        except MemoryError:
            _answer(TOO_MUCH, "")
        except jinja2.TemplateSyntaxError as error:
            _answer(NOT_A_TEMPLATE, f"{type(error).__name__}: {error}")
        except Exception as error:  # a template is a program of others: whatever it raises is about its input
            _answer(FAILED, f"{type(error).__name__}: {error}"[:2000])


if __name__ == "__main__":
    main()
