"""The pages of `grape ui`: what they say, what they refuse, and that they write nothing."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from grape_service.errors import UserError
from grape_service.storage.storage import Storage
from grape_service.ui import folder_pages, version_pages
from grape_service.ui.folder import Folder
from tests.grape_service.release.made_up import publish_version, rows
from tests.grape_service.ui.made_folder import HOSTILE, POOL, TABS, client_of
from tests.grape_service.ui.seen import text_of

HOSTILE_VERSION = "/datasets/hostile/v0001"


def state_of(folder: Path) -> dict[str, tuple[int, int]]:
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in sorted(folder.rglob("*"))}


def test_candidates_are_no_training_set(tmp_path: Path) -> None:
    counts = {"gather": {"<b>self": {"samples": 80, "right": 3, "audit": {"mean": 1e-05}}}}
    config = {"gather": {"policies": {"<b>self": {"model": "tiny"}}}}
    publish_version(Storage(str(tmp_path)), "sums", kind="candidates", counts=counts, config=config)
    client = client_of(Folder(str(tmp_path)))
    assert "candidates, 80 rows" in text_of(client, "/datasets/sums")
    assert "Candidates that gather sampled" in text_of(client, "/datasets/sums/v0001")
    assert "<b>self tiny 80 3" in text_of(client, "/datasets/sums/v0001/card")
    assert "data/part-00000.parquet" in text_of(client, "/datasets/sums/v0001/files")
    for page in ("rows", "rows/1", "left-out"):
        assert "holds candidates that gather sampled, and no training set" in text_of(
            client, f"/datasets/sums/v0001/{page}", 404
        )


def test_all_datasets_are_searched_and_sorted(client: TestClient) -> None:
    page = text_of(client, "/")
    assert "2 datasets" in page
    assert "pool v0002 of 2" in page
    found = client.get("/?q=POOL+grape").text
    assert "/datasets/pool/v0002" in found
    assert "/datasets/hostile" not in found
    assert "No dataset has" in text_of(client, "/?q=nothing")
    names = [
        re.findall(r'<a href="/datasets/(\w+)">', client.get(f"/?sort=name&order={order}").text)
        for order in ("up", "down")
    ]
    assert names == [["hostile", "pool"], ["pool", "hostile"]]
    assert client.get("/?sort=__class__&order=x").status_code == 200


def test_many_datasets_come_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = Storage(str(tmp_path))
    for number in range(5):
        publish_version(storage, f"set-{number}", parts=[rows(0, 5 - number)])
    monkeypatch.setattr(folder_pages, "LISTED", 2)
    client = client_of(Folder(str(tmp_path)))
    links = r'<a href="/datasets/(set-\d)">'
    for query, expected in (
        ("", ["set-0", "set-1"]),
        ("?start=4", ["set-4"]),
        ("?sort=rows&order=up&start=2", ["set-2", "set-1"]),
        ("?q=set-3", ["set-3"]),
        ("?start=99", []),
    ):
        assert re.findall(links, client.get(f"/{query}").text) == expected
    assert "1 to 2 of 5 datasets" in text_of(client, "/")
    assert 'rel="next"' in client.get("/").text

    publish_version(storage, "set-1", parts=[rows(0, 9)])  # the page shows what is there now, its order may be older
    newest = client.get("/?sort=rows").text
    assert re.findall(links, newest) == ["set-0", "set-1"]
    assert "/datasets/set-1/v0002" in newest
    monkeypatch.setattr(folder_pages, "MAX_AGE", 0.001)
    assert re.findall(links, client.get("/?sort=rows").text) == ["set-1", "set-0"]


def test_a_dataset_its_tags_and_what_changed(client: TestClient) -> None:
    page = text_of(client, "/datasets/pool")
    assert "2 versions" in page
    assert "changes since v0001" in page
    changes = text_of(client, "/compare/pool?a=v0001&b=v0002")
    assert "10 prompts with another choice" in changes
    assert "20 with the same" in changes
    assert "target.model" in changes
    assert "two versions of pool are needed" in text_of(client, "/compare/pool", 404).lower()


def test_a_tag_leads_to_its_version(client: TestClient, tmp_path: Path) -> None:
    publish_version(Storage(str(tmp_path)), parts=[rows(0, 3)], tags=("latest", "diff"))
    other = client_of(Folder(str(tmp_path)))
    answer = other.get("/datasets/math-sft/diff", follow_redirects=False)
    assert answer.headers["location"] == "/datasets/math-sft/v0001"
    assert "3 rows" in text_of(other, "/datasets/math-sft/diff")


def test_a_version_its_lineage_and_its_files(client: TestClient) -> None:
    page = text_of(client, POOL)
    assert "made by grape, keep 1 for the target one" in page
    assert "released" in page
    assert 'class="lineage"' in client.get(POOL).text
    assert "Verified just now" in text_of(client, f"{POOL}/files")
    assert "pool v0001" in text_of(client, f"{POOL}/card")
    assert "<code>list&lt;int32&gt;</code>" in client.get(f"{POOL}/card").text
    config = text_of(client, f"{HOSTILE_VERSION}/config")
    assert "hunter2" not in config
    assert "***" in config


def test_what_was_left_out_has_examples(client: TestClient) -> None:
    page = text_of(client, f"{POOL}/left-out")
    assert "not JSON" in page
    assert "b.jsonl" in page
    assert "The page of each row shows the candidates of its prompt that were not chosen" in page


def test_versions_are_told_apart(client: TestClient) -> None:
    page = text_of(client, "/datasets/pool")
    assert "grape, keep 1 for one" in page
    assert "since v0001: target one -> two" in page or "; since v0001: " in page


def test_a_damaged_or_missing_object_is_a_sentence(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    for _ in range(4):
        publish_version(storage, parts=[rows(0, 30)], parents={"workspace": str(tmp_path / "w"), "prepare_id": "x"})
    publish_version(
        storage,
        "statistics",
        parts=[rows(0, 3)],
        statistics={"report": {"select": {"contested": "x"}}},
        counts={"pool": 3},
    )
    folder = "math-sft/versions"
    storage.write(f"{folder}/v0001/data/part-00000.parquet", b"nothing")
    storage.delete(f"{folder}/v0002/data/part-00000.parquet")
    storage.write(f"{folder}/v0003/manifest.json", b'{"format": 1')
    storage.write(f"{folder}/v0004/report.html", b"<script>window.hacked=1</script>")
    storage.delete(f"{folder}/v0004/README.md")
    storage.write("math-sft/tags/broken.json", b"[]")
    storage.write("w/prepared/x/prepared.json", b"{}")
    client = client_of(Folder(str(tmp_path), workspace=str(tmp_path / "w")))
    said = {
        "/datasets/math-sft/v0001/rows": (404, "is not readable Parquet"),
        "/datasets/math-sft/v0001/rows/0": (404, "is not readable Parquet"),
        "/datasets/math-sft/v0001/files": (200, "1 file not as the manifest says"),
        "/datasets/math-sft/v0002/rows": (404, "part-00000.parquet is missing"),
        "/datasets/math-sft/v0003": (404, "is not JSON"),
        "/datasets/math-sft/v0004/report": (404, "has other contents than its manifest says"),
        "/datasets/math-sft/v0004/report.html": (404, "has other contents than its manifest says"),
        "/datasets/math-sft/v0004/card": (404, "README.md is missing"),
        "/datasets/math-sft/v0004/rows/0": (200, "is damaged"),
        "/datasets/math-sft": (200, "is not a tag"),
        "/datasets/math-sft/v0099": (404, "has no version v0099"),
        "/datasets/math-sft/no-tag": (404, "has no tag 'no-tag': its tags are broken, latest"),
        "/datasets/nothing": (404, "there is no dataset 'nothing'"),
        "/datasets/statistics/v0001": (200, "not those of a release that this program knows"),
        "/datasets/statistics/v0001/left-out": (200, "not those of a release"),
        "/compare/math-sft?a=v0001&b=v0004": (404, "is not readable parquet"),
        "/no/such/page": (404, "there is no page /no/such/page"),
        "/datasets/math-sft/v0004/rows?min_weight=much": (404, "write a number such as 0.5"),
    }
    for path, (status, sentence) in said.items():
        page = text_of(client, path, status)
        assert sentence.lower() in page.lower(), (path, page)
        assert "Traceback" not in page


@pytest.mark.parametrize(
    "path",
    [
        "/datasets/..%2F..%2Fetc/v0001",
        "/datasets/%2e%2e/v0001",
        "/datasets/pool/..%2f..%2f..%2fsecret",
        "/datasets/pool/v0001/..%2f..%2fmanifest.json",
        "/static/..%2f..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/compare/pool?a=../v0001&b=v0002",
        "/datasets/pool%00/v0001",
        "/datasets/pool/v0001/rows/..%2f..%2fx",
    ],
)
def test_no_path_climbs_out(client: TestClient, datasets: Path, path: str) -> None:
    (datasets.parent / "secret").mkdir(exist_ok=True)
    answer = client.get(path)
    assert answer.status_code in (404, 422)
    assert "def create_app" not in answer.text


def test_one_dataset_shows_no_other(datasets: Path) -> None:
    client = client_of(Folder(str(datasets / "pool")))
    assert "1 dataset" in text_of(client, "/")
    assert client.get("/datasets/hostile").status_code == 404
    assert client.get("/datasets/hostile/v0001/rows").status_code == 404
    assert client.get("/compare/hostile?a=v0001&b=v0001").status_code == 404


def test_every_page_has_a_strict_policy_and_shows_text_as_text(client: TestClient) -> None:
    for base in (POOL, HOSTILE_VERSION):
        for tab in TABS:
            answer = client.get(f"{base}{tab}")
            if tab.startswith("/report") and answer.status_code == 404:
                continue
            assert answer.status_code == 200, (base, tab, answer.text)
            policy = answer.headers["content-security-policy"]
            if tab == "/report.html":
                assert policy.startswith("sandbox allow-scripts; default-src 'none'")
                continue
            assert policy.startswith("default-src 'none'")
            assert "unsafe" not in policy
            assert "<script>" not in answer.text
            assert "<img" not in answer.text
            assert "style=" not in answer.text
            assert "\u202e" not in answer.text
            assert answer.headers["x-content-type-options"] == "nosniff"
    assert html.escape(HOSTILE) in client.get(f"{HOSTILE_VERSION}/rows").text.replace("&#39;", "&#x27;")


def test_it_writes_nothing(client: TestClient, datasets: Path) -> None:
    before = state_of(datasets.parent)
    for base in (POOL, HOSTILE_VERSION):
        for tab in TABS:
            client.get(f"{base}{tab}")
    for path in ("/", "/runs", "/datasets/pool", "/compare/pool?a=v0001&b=v0002"):
        client.get(path)
    assert state_of(datasets.parent) == before
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert client.request(method, "/").status_code == 405


def test_head_is_answered_and_a_bad_number_is_a_page(client: TestClient) -> None:
    for path in ("/", "/datasets/pool", f"{POOL}/rows", "/static/ui.css"):
        assert client.head(path).status_code == 200
    for path, sentence in (
        (f"{POOL}/rows/many", "'number' of this address is 'many': write a whole number from 0 on"),
        (f"{POOL}/rows?start=-1", "'start' of this address is '-1'"),
        (f"{POOL}/rows?start={10**30}", "write a whole number from 0 on"),
        ("/datasets/pool?start=x", "'start' of this address is 'x'"),
        (f"{POOL}/files?verified=perhaps", "write true or false"),
        (f"{POOL}/prompt", "this address needs 'id'"),
    ):
        assert sentence in text_of(client, path, 422).replace("This address", "this address")
    assert "write a number such as 0.5" in text_of(client, f"{POOL}/rows?min_weight=nan", 404)


def test_versions_come_in_pages(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_pages, "LISTED", 1)
    first, second = client.get("/datasets/pool").text, client.get("/datasets/pool?start=1").text
    links = r'<a class="version" href="/datasets/pool/(v\d+)">'
    assert (re.findall(links, first), re.findall(links, second)) == (["v0002"], ["v0001"])
    assert "changes since v0001" in first
    assert ('rel="next"' in first, 'rel="next"' in second) == (True, False)


def test_what_nobody_thought_of_is_a_sentence_too(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version_pages, "drawing_of", lambda release: 1 / 0)
    page = text_of(client, POOL, 500)
    assert "cannot be made (ZeroDivisionError)" in page


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no folder"):
        Folder(str(tmp_path / "nowhere"))
    assert "There is no dataset here yet" in text_of(client_of(Folder(str(tmp_path))), "/")


def test_on_s3(s3_url: str) -> None:
    publish_version(Storage(s3_url), parts=[rows(0, 60)])
    client = client_of(Folder(s3_url))
    assert "60" in text_of(client, "/")
    assert "Rows 0 to 49 of 60" in text_of(client, "/datasets/math-sft/v0001/rows")
    assert "Verified just now" in text_of(client, "/datasets/math-sft/v0001/files")
    assert os.environ["AWS_SECRET_ACCESS_KEY"] not in client.get("/datasets/math-sft/v0001").text
