"""What import_without_extras leaves out makes no difference to what is there."""

from __future__ import annotations

import subprocess
import sys

LISTS = """
from pathlib import Path
from grape_service.models.imports import import_without_extras
import_without_extras()
import transformers
from transformers.utils import import_utils
models = transformers.models
file = models.__file__
own = type(models)(models.__name__, file, import_utils.define_import_structure(file))
assert len(own._class_to_module) > 1000
assert models._class_to_module == own._class_to_module
assert models._import_structure == own._import_structure
"""


def test_transformers_lists_the_same_models() -> None:
    subprocess.run([sys.executable, "-c", LISTS], check=True, timeout=120)
