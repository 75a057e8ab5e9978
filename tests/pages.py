"""The commands of README, docs and examples: what stands in their blocks, and in their text where it has arguments."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").glob("*/README.md"))]
PROGRAMS = r"(?:(?:\.\./)*\.venv/bin/)?(?:grape|make|python|pip|pytest|prefect|ray|weed)"

SAME = {"CONFIG": "config.yaml", "FILE": "later-checkpoint.yaml", "s3://team/datasets/math-sft@v0003": "REF"}
"""Words for the same thing: a command is run once."""

LEFT_OUT = {
    r"^make (test|install|check|screenshots|mutants|clean|site)\b": "installs, tests or deletes the whole environment",
    r"^make quickstart\b|grape ui examples/quickstart": "CI begins with it, and it makes what the other shows",
    r"^make docs\b": "tests/grape_service/config/test_document.py has what it writes",
    r"ENGINE=vllm|out/vllm/": "wants vLLM: make test-vllm",
    r"\bpip install\b": "installs packages",
    r"--to hub\b": "wants the Hugging Face Hub: tests/grape_service/exports/test_hub.py",
    r"--address|^grape (submit|jobs)\b": "wants a cluster: tests/workers/cluster/test_submit.py",
    r"^(\S*/)?prefect |^grape deploy |flows\.automations": "wants a Prefect server: tests/flows/test_deployments.py",
    r"^ray ": "wants a cluster",
    r"benchmarks|^pytest ": "measures, for minutes to days",
    r"--install-completion": "changes the shell's own files: tests/grape_service/cli/test_shell.py",
}
"""Commands that are not run, by a pattern, and why."""


@dataclass(frozen=True)
class Command:
    """What a page has a reader type."""

    page: str
    text: str
    is_block: bool

    @property
    def name(self) -> str:
        first = self.text.splitlines()[0]
        return f"{self.page}: {first if len(first) <= 70 else first[:69] + '…'}"


def commands() -> list[Command]:
    """Every block of all pages in order, and every command with arguments in their text, each once."""
    found: dict[Command, None] = {}
    spans: set[str] = set()
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        text = re.sub(r"^## Not there yet\n.*?(?=^## |\Z)", "", page.read_text(), flags=re.S | re.M)
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.S | re.M):
            if language in ("", "sh", "bash"):
                found[Command(name, block.rstrip(), True)] = None
        for span in re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)):
            typed = span.replace("\\|", "|")
            same = re.sub("|".join(SAME), lambda match: SAME[match[0]], typed)
            if re.match(rf"{PROGRAMS} ", typed) and not _is_name(typed) and same not in spans:
                spans.add(same)
                found[Command(name, typed, False)] = None
    return list(found)


def left_out(line: str) -> str | None:
    """Why a line is not run; None for one that is."""
    return next((reason for pattern, reason in LEFT_OUT.items() if re.search(pattern, line)), None)


def _is_name(typed: str) -> bool:
    """Whether it names a command, `grape datasets list|show`, and does not say how it is called."""
    program, *words = typed.split()
    groups = ("datasets", "runs", "jobs")
    return program.endswith("grape") and len(words) <= (2 if words[0] in groups else 1) and words[0][0] != "-"
