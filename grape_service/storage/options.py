"""The options of storage: which there are, and what is refused before anything is asked of a server."""

from __future__ import annotations

import difflib
import re
from typing import Any

from grape_service.addresses import is_http_address
from grape_service.errors import UserError

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


def check_options(options: dict[str, Any] | None) -> None:
    """Raises UserError for a secret, an unknown option, a value of another type, and an invalid address."""
    options = options or {}
    refuse_secrets(options)
    for name, value in options.items():
        if name not in OPTIONS:
            near = difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"known keys here: {', '.join(OPTIONS)}"
            raise UserError(f"unknown key 'storage.{name}'; {hint}")
        kinds = OPTIONS[name]
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise UserError(f"'storage.{name}' must be {_WORDS[kinds[0]]}, not {value!r}")
    for place in (options, options.get("client_kwargs") or {}):
        url = place.get("endpoint_url")
        if url is not None and not is_http_address(url):
            raise UserError(f"the endpoint '{url}' is not a valid address: write http://host:port or https://host")


def refuse_secrets(options: dict[str, Any] | None) -> None:
    """Raises UserError when storage options hold a secret, at any depth: those come from the environment."""
    for name, value in (options or {}).items():
        if _SECRET_OPTION.fullmatch(name):
            raise UserError(f"storage.{name} is a secret: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
        if isinstance(value, str) and re.match(r"\w+://[^/]*@", value):
            raise UserError(f"storage.{name} holds a password: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY instead")
        if isinstance(value, dict):
            refuse_secrets(value)
