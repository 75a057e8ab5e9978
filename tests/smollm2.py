"""The real language model of the tests: SmolLM2-135M-Instruct, the quickstart's model folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PREPARE_MODEL = Path(__file__).resolve().parents[1] / "examples" / "quickstart" / "prepare_model.py"


def smollm2_folder() -> Path:
    """A folder with float32 safetensors, tokenizer and chat template (ChatML with a default system message).

    Made once for the whole clone (about 20 seconds, 540 MB), by whichever process asks first.
    """
    spec = importlib.util.spec_from_file_location("quickstart_prepare_model", PREPARE_MODEL)
    assert spec is not None
    assert spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    folder: Path = prepare.DEFAULT_FOLDER
    prepare.prepare_model(folder)
    return folder
