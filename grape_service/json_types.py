"""A name for JSON whose keys are not ours to know: a section of a config, options of a library, what a server sends."""

from __future__ import annotations

from typing import Any

JsonObject = dict[str, Any]
