"""How much turned over between two versions, against plain counts over the changes in between."""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from typer.testing import CliRunner

from grape_service.cli.app import app
from grape_service.errors import UserError
from grape_service.release.changes import changes_between, count_changes
from grape_service.release.claim import claim_version
from grape_service.release.compare import compare
from grape_service.release.load import load
from grape_service.release.manifest import CHANGES_FILE, ManifestFields, Parents
from grape_service.release.turnover import MOST_RESTLESS, Restless, turnover
from grape_service.release.writer import publish, write_part, write_table
from grape_service.report.page import render_comparison
from grape_service.rows.columns import CHANGE, CHANGE_SIDE
from grape_service.storage.storage import Storage
from grape_service.ui.folder import Folder
from tests.grape_service.release.made_up import SCHEMA, batches, rows
from tests.grape_service.ui.made_folder import client_of

NAME = "math-sft"
Choices = dict[str, str]
"""Of each prompt the candidate that is kept."""


def as_side(choices: Choices) -> pa.Table:
    values = [
        {"prompt_id": prompt, "candidate_id": candidate, "source": candidate, "weight": 1.0, "row": place}
        for place, (prompt, candidate) in enumerate(sorted(choices.items()))
    ]
    return pa.Table.from_pylist(values, CHANGE_SIDE)


def publish_choices(storage: Storage, before: Choices | None, after: Choices, since: str | None) -> str:
    """A version whose changes are those of the choices; its data are made up."""
    with claim_version(storage, NAME) as claim:
        entries = [write_part(storage, claim.folder, 0, SCHEMA, batches(rows(0, 4), 4))]
        documents, counts = [], {}
        if before is not None:
            changes = changes_between(as_side(before), as_side(after))
            parts = [changes.slice(start, 7) for start in range(0, changes.num_rows, 7)]
            documents = [write_table(storage, claim.folder, CHANGES_FILE, CHANGE, parts)]
            counts = {"changes": {"since": since, **count_changes(changes).to_json()}}
        digest = hashlib.sha256(claim.version.encode()).hexdigest()
        fields = ManifestFields(content_digest=digest, parents=Parents(), counts=counts)
        return publish(storage, claim, SCHEMA, entries, fields, "<p>report</p>", documents).version


def test_prompts_that_keep_changing_are_counted_over_the_versions(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    dice = np.random.default_rng(0)
    choices: list[Choices] = []
    for step in range(5):
        prompts = range(step, 200 + step)  # one is gone and one is new in each version
        kept = {f"p{number:03d}": f"c{dice.integers(0, 1 + number % 4)}" for number in prompts}
        choices.append(kept)
    versions: list[str] = []
    for step, after in enumerate(choices):
        before = choices[step - 1] if step else None
        versions.append(publish_choices(storage, before, after, versions[-1] if versions else None))
    expected: Counter[str] = Counter()
    for before, after in itertools.pairwise(choices):
        expected.update(prompt for prompt in before.keys() & after.keys() if before[prompt] != after[prompt])
    found = turnover(storage, NAME, versions[0], versions[-1])
    assert found is not None
    assert found.versions == versions[:0:-1]
    assert found.prompts == [sum(times == number for times in expected.values()) for number in (1, 2, 3, 4)]
    order = sorted(((-times, prompt) for prompt, times in expected.items() if times > 1))[:MOST_RESTLESS]
    assert found.most == [Restless(prompt, -times) for times, prompt in order]
    assert found.most[0].times > 2
    last = count_changes(changes_between(as_side(choices[-2]), as_side(choices[-1])))
    assert found.churn[0] == last.churn
    one = turnover(storage, NAME, versions[-2], versions[-1])
    assert one is not None
    assert (one.prompts, one.most) == ([last.reasons["kept in the place of another"]], [])


def test_versions_that_do_not_follow_each_other_have_none(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    one, two = {"p": "a"}, {"p": "b"}
    first = publish_choices(storage, None, one, None)
    second = publish_choices(storage, one, two, first)
    assert turnover(storage, NAME, second, first) is None
    assert turnover(storage, NAME, second, second) is None
    storage.delete(f"{NAME}/versions/{second}/{CHANGES_FILE}")
    with pytest.raises(UserError, match=r"changes.parquet is missing"):
        turnover(storage, NAME, first, second)


def test_compare_the_comparison_and_the_page_tell_it(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    steps: list[Choices] = [{"<i>p": "a", "q": "a"}, {"<i>p": "b", "q": "a"}, {"<i>p": "c", "q": "a"}]
    versions = [publish_choices(storage, None, steps[0], None)]
    for before, after in itertools.pairwise(steps):
        versions.append(publish_choices(storage, before, after, versions[-1]))
    first, last = (load(f"{tmp_path}/{NAME}@{version}") for version in (versions[0], versions[-1]))
    found = compare(first, last)
    assert found["turnover"] == {
        "versions": ["v0003", "v0002"],
        "churn": [0.5, 0.5],
        "prompts": [0, 1],
        "most": [{"prompt_id": "<i>p", "times": 2}],
    }
    assert compare(last, first)["turnover"] is None
    done = CliRunner().invoke(app, ["compare", first.reference, last.reference])
    told = " ".join(done.stdout.split())
    assert "turnover: 50% of the rows new or gone in v0002, 50% of the rows new or gone in v0003" in told
    assert "<i>p" in told
    assert "2 of 2" in told
    page = render_comparison(found)
    assert "Prompts that keep changing their winner" in page
    assert "<code><bdi>&lt;i&gt;p</bdi></code>" in page
    answer = client_of(Folder(str(tmp_path))).get(f"/compare/{NAME}?a=v0001&b=v0003")
    assert answer.status_code == 200
    assert "50% of the rows are new or gone in" in answer.text
    assert "&lt;i&gt;p" in answer.text
    assert "<i>p" not in answer.text
