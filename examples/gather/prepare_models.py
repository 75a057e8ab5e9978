"""Makes the example's two models: the quickstart's, and a smaller one, which is that without four of its thirty layers.

    python examples/gather/prepare_models.py

The smaller one writes as fluently and calculates worse. No model hub is asked; a folder that is complete is left alone.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
sys.path.insert(0, str(FOLDER.parent / "quickstart"))

from prepare_model import DEFAULT_FOLDER, prepare_model  # noqa: E402

SMALLER = FOLDER / "out" / "smaller"
LEFT_OUT = (4, 5, 7, 23)
"""Without one of these, each alone, right answers to prompts.jsonl lose the least probability."""


def make_smaller(folder: Path) -> None:
    """Writes the quickstart's model without the layers in LEFT_OUT into the empty `folder`."""
    from torch import nn
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(DEFAULT_FOLDER, dtype="float32")
    kept = [layer for number, layer in enumerate(model.model.layers) if number not in LEFT_OUT]
    model.model.layers = nn.ModuleList(kept)
    model.config.num_hidden_layers = len(kept)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEFAULT_FOLDER).save_pretrained(folder)


def main() -> None:
    for folder, made in ((DEFAULT_FOLDER, prepare_model()), (SMALLER, prepare_model(SMALLER, make_smaller))):
        print(f"model: {os.path.relpath(folder)} ({'made now' if made else 'already there'})")


if __name__ == "__main__":
    main()
