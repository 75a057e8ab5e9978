"""A method is one file: a copy of the package with one more module knows the method, its keys and its weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import grape_service
from grape_service.methods import SELECT, WEIGHTS

pytestmark = pytest.mark.quick

MODULE = '''
"""A share of each token's probability."""
import numpy as np
from pydantic import Field
from grape_service.methods.base import WeightsKeys, WeightsMethod

class ShareKeys(WeightsKeys):
    share: float = Field(0.5, gt=0)
    """For share: what a certain token weighs."""

METHOD = WeightsMethod(
    "share", ShareKeys, "made up", log_weights=lambda batch, config: batch.statistics["logprob"] + np.log(config.share)
)
'''

USE = """
import numpy as np, pyarrow as pa
from grape_service.config.document import config_page
from grape_service.config.methods import WeightsConfig, weights_settings
from grape_service.rows.method_batch import MethodBatch
from grape_service.weigh.batch import token_weights
config = WeightsConfig(method="share", share=0.25)
ids = pa.array(["p"])
batch = MethodBatch(np.zeros(1, np.int64), ids, ids, np.array([0, 2]), {"logprob": np.log([1.0, 0.5])}, {})
assert np.allclose(token_weights(batch, config).weights, [0.25, 0.125])
assert "| `share` | number | `0.5` |" in config_page()
assert weights_settings(config.model_dump())[1] == {
    "method": "share", "weight_clip": (-10.0, 5.0), "normalize": "none", "share": 0.25
}
try:
    WeightsConfig(method="pear", share=1)
except ValueError as error:
    assert "share belongs to method share" in str(error)
else:
    raise AssertionError("a key of another method was taken")
print("used")
"""


def test_a_module_is_all_that_a_method_needs(tmp_path: Path) -> None:
    package = tmp_path / "grape_service"
    shutil.copytree(Path(grape_service.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__"))
    (package / "methods" / "weights" / "share.py").write_text(MODULE)
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "used\n", done.stderr


def test_every_method_is_documented_with_its_source_and_statistics() -> None:
    page = (Path(grape_service.__file__).parent.parent / "docs" / "methods.md").read_text()
    for method in [*SELECT.values(), *WEIGHTS.values()]:
        wanted = [method.source.rsplit("arXiv ", 1)[1].split(",")[0], *method.statistics]
        rows = [line for line in page.splitlines() if line.startswith(f"| `{method.name}` |")]
        assert any(all(word in line for word in wanted) for line in rows), (method.name, wanted)
