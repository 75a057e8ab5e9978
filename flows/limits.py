"""Limits of scheduled runs, from the environment that a deployment gives them; none for `grape run`."""

from __future__ import annotations

import os

TIMEOUT_SECONDS = float(os.environ.get("GRAPE_FLOW_TIMEOUT_SECONDS") or 0) or None
"""A flow that takes longer fails; its scores are kept."""
