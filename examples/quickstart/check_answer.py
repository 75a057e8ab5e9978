"""Decides whether an answer to one of the quickstart's questions is right, by the question's rule.

A rule in questions.json is either `expected` (a regular expression that the answer must match) with an optional
`forbidden` (one that it must not match), or `asserts`: Python expressions that must hold for the code in the answer.
"""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any


def is_right(response: str, rule: dict[str, Any]) -> bool:
    """Whether `response` satisfies `rule`."""
    if "asserts" in rule:
        return code_passes(python_code(response), rule["asserts"])
    if "forbidden" in rule and re.search(rule["forbidden"], response):
        return False
    return re.search(rule["expected"], response) is not None


def python_code(response: str) -> str:
    """The first fenced block of `response`, or else its lines from the first `def` on."""
    fenced = re.search(r"```(?:python|py)?\n(.*?)(?:```|\Z)", response, re.DOTALL)
    if fenced:
        return fenced[1]
    definition = re.search(r"^def .*", response, re.DOTALL | re.MULTILINE)
    return definition[0] if definition else ""


def code_passes(code: str, asserts: list[str]) -> bool:
    """Runs `code` and then each of `asserts` in a Python process of their own, for 5 seconds at most."""
    program = code + "\n" + "\n".join(f"assert {condition}" for condition in asserts)
    try:
        ended = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, timeout=5)
    except subprocess.TimeoutExpired:
        return False
    return ended.returncode == 0
