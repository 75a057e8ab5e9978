"""The options of storage, those that are refused, and how long a server's first answer is awaited."""

from __future__ import annotations

import re
from typing import Any

from grape_service.addresses import is_http_address
from grape_service.display import nearest
from grape_service.errors import UserError

StorageOptions = dict[str, Any]
"""Options of a storage by name: those of OPTIONS."""
OPTIONS: dict[str, tuple[type, ...]] = {
    "endpoint_url": (str,),
    "profile": (str,),
    "anon": (bool,),
    "use_ssl": (bool,),
    "requester_pays": (bool,),
    "retry_seconds": (int, float),
    "client_kwargs": (dict,),
    "config_kwargs": (dict,),
    "s3_additional_kwargs": (dict,),
    "cache_regions": (bool,),
    "default_block_size": (int,),
    "default_fill_cache": (bool,),
    "default_cache_type": (str,),
    "version_aware": (bool,),
    "max_concurrency": (int,),
    "fixed_upload_size": (bool,),
}
"""Those of s3fs, less its secrets, and `retry_seconds`."""

_WORDS = {str: "a text", bool: "true or false", int: "a number", dict: "a mapping"}
_SECRET_OPTION = re.compile(r"key|secret|token|username|password|aws_.*|.*(secret|token|password|customerkey).*", re.I)


def check_options(options: StorageOptions | None) -> None:
    """Raises UserError for a secret, an unknown option, a value of another type, and an invalid address."""
    options = options or {}
    refuse_secrets(options)
    for name, value in options.items():
        if name not in OPTIONS:
            raise UserError(f"unknown key 'storage.{name}'; {nearest(name, list(OPTIONS), 'known keys here')}")
        kinds = OPTIONS[name]
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise UserError(f"'storage.{name}' must be {_WORDS[kinds[0]]}, not {value!r}")
    for place in (options, options.get("client_kwargs") or {}):
        url = place.get("endpoint_url")
        if url is not None and not is_http_address(url):
            raise UserError(f"the endpoint '{url}' is not a valid address: write http://host:port or https://host")


def refuse_secrets(options: StorageOptions | None) -> None:
    """Raises UserError when storage options hold a secret, at any depth: those come from the environment."""
    for name, value in (options or {}).items():
        if _SECRET_OPTION.fullmatch(name):
            raise UserError(f"storage.{name} is a secret: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
        if isinstance(value, str) and re.match(r"\w+://[^/]*@", value):
            raise UserError(f"storage.{name} holds a password: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
        if isinstance(value, dict):
            refuse_secrets(value)


FIRST_ANSWER_SECONDS = 5.0
"""Of a server that has never answered this process: most likely the address is wrong, or the server is not up, and
somebody waits for the sentence that says so."""

_first_answer_seconds: float | None = FIRST_ANSWER_SECONDS


def first_answer_seconds() -> float | None:
    """None: as long as for a server that has answered before."""
    return _first_answer_seconds


def wait_for_first_answer() -> None:
    """From now on wait for it as long as for any: a worker may start while a server is away that its run has seen."""
    global _first_answer_seconds
    _first_answer_seconds = None
