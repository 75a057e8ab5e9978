"""Lineage from a version back to the pool and on to what was trained on it; the dataset card."""

from __future__ import annotations

import time

import yaml

from grape_service.release.lineage import UNFOLLOWED, lineage_tree, short_lineage, training_runs
from grape_service.release.load import load
from grape_service.release.manifest import CodeVersion, Parents, PolicyUse, PoolFile, columns_of
from grape_service.storage.storage import Storage, json_bytes
from tests.grape_service.release.made_up import publish_version, rows


def test_the_tree_tells_everything(any_storage: Storage) -> None:
    policy = PolicyUse(role="target", policy_id="abc", model="Qwen/Qwen2.5-7B", revision="r1", engine="vllm 0.32")
    made_from = Parents(
        pool=[PoolFile(path="s3://pool/a.jsonl", size=1234, etag="e1"), PoolFile(path="b.jsonl", size=1, digest="d1")],
        policies=[policy],
        libraries={"torch": "2.13.0", "pyarrow": "26.0.1"},
        code=CodeVersion(package_version="0.1.0", git_commit="c0ffee"),
    )
    counts = {"pool": 1000, "rejected": {"empty response": 7}}
    config = {"select": {"method": "grape"}}
    publish_version(any_storage, parts=[rows(0, 3)], parents=made_from, counts=counts, config=config)
    weighed = Parents(policies=[policy], release=f"{any_storage.root}/math-sft@v0001")
    publish_version(any_storage, parts=[rows(0, 3)], parents=weighed, tags=("best",))
    sft = {"state": "succeeded", "kind": "builtin", "checkpoint": "s3://ckpt/1", "metrics": {"loss": 1.5}}
    record = {"version": "v0002", "state": "succeeded", "stages": {"sft": sft, "rl": {"state": "waiting"}}}
    any_storage.write_json("math-sft/runs/sft-7.json", record)
    any_storage.write_json("math-sft/runs/sft-8.json", {**record, "version": "v0001"})
    any_storage.write("math-sft/runs/broken.json", b"{")

    release = load(f"{any_storage.root}/math-sft@v0002")
    short = short_lineage(release).render_text()
    tokens = f"3 rows, {release.manifest.tokens} tokens"
    assert short.splitlines() == [
        f"{any_storage.root}/math-sft@v0002  {tokens}  [best]",
        "├── target: Qwen/Qwen2.5-7B",
        f"├── weighed from {any_storage.root}/math-sft@v0001  {tokens}, grape  [latest]",
        "│   ├── pool: s3://pool/a.jsonl and 1 more file",
        "│   ├── target: Qwen/Qwen2.5-7B",
        "│   └── run sft-8: succeeded",
        "│       ├── sft: succeeded, loss 1.5",
        "│       │   └── s3://ckpt/1",
        "│       └── rl: waiting",
        "└── run sft-7: succeeded",
        "    ├── sft: succeeded, loss 1.5",
        "    │   └── s3://ckpt/1",
        "    └── rl: waiting",
    ]
    tree = lineage_tree(release)
    text = tree.render_text()
    lines = text.splitlines()
    assert lines[0].startswith(f"{any_storage.root}/math-sft@v0002  3 rows")
    assert lines[0].endswith("[best]")
    for part in (
        "target: Qwen/Qwen2.5-7B",
        "revision: r1",
        "engine: vllm 0.32",
        "pool: 2 files",
        "s3://pool/a.jsonl  1,234 bytes, etag e1",
        "b.jsonl  1 bytes, digest d1",
        "empty response: 7",
        "code: grape-service 0.1.0, commit c0ffee",
        "libraries: pyarrow 26.0.1, torch 2.13.0",
        "method: grape",
        "trained on it: sft-7, succeeded",
        "sft: succeeded",
        "checkpoint: s3://ckpt/1",
        "loss: 1.5",
        "rl: waiting",
    ):
        assert part in text
    assert any(f"weighed from {any_storage.root}/math-sft@v0001" in line for line in lines)
    runs = [line for line in lines if "trained on it" in line]
    assert ["sft-8" in run for run in runs] == [True, False]
    assert len(runs[0]) - len(runs[0].lstrip("│ ├└─")) > len(runs[1]) - len(runs[1].lstrip("│ ├└─"))
    assert b'"label"' in json_bytes(tree.to_json())


def test_a_training_run_that_nobody_follows_is_not_said_to_run(any_storage: Storage) -> None:
    followed = {"holder": "x", "expires": time.time() + 60}
    states = {}
    for lease in (followed, {**followed, "expires": time.time() - 1}, None):
        sft = {"state": "running", "lease": lease, "stages": {"sft": {"state": "running"}}}
        any_storage.write_json("x/runs/sft.json", sft)
        stages = {"sft": {"state": "running", "run": "sft"}, "rl": {"state": "waiting"}}
        any_storage.write_json("x/runs/rl.json", {"state": "running", "lease": None, "stages": stages})
        any_storage.write_json("x/runs/done.json", {"state": "succeeded", "lease": None, "stages": None})
        found = {run["id"]: run for run in training_runs(any_storage, "x")}
        assert found["done"]["state"] == "succeeded"
        assert found["rl"]["stages"]["rl"]["state"] == "waiting"
        assert found["rl"]["state"] == found["rl"]["stages"]["sft"]["state"] == found["sft"]["state"]
        states[str(lease)] = found["sft"]["state"]
    assert list(states.values()) == ["running", UNFOLLOWED, UNFOLLOWED]


def test_a_parent_that_is_gone_or_goes_round_ends_the_tree(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    publish_version(storage, parts=[rows(0, 1)], parents=Parents(release=f"{tmp_path}/math-sft@v0002"))
    publish_version(storage, parts=[rows(0, 1)], parents=Parents(release=f"{tmp_path}/math-sft@v0001"))
    publish_version(storage, parts=[rows(0, 1)], parents=Parents(release=f"{tmp_path}/gone@v0009"))
    assert lineage_tree(load(f"{tmp_path}/math-sft@v0002")).render_text().count("weighed from") == 2
    assert short_lineage(load(f"{tmp_path}/math-sft@v0002")).render_text().count("weighed from") == 2
    assert "gone: " in lineage_tree(load(f"{tmp_path}/math-sft@v0003")).render_text()


def test_the_card_escapes_what_comes_from_outside(tmp_path) -> None:
    storage = Storage(str(tmp_path))
    publish_version(
        storage,
        parts=[rows(0, 3)],
        statistics={"sources": {"<script>alert(1)</script>": 2, "a|b`c": 1}},
        config={"select": {"method": "grape", "keep": 1}, "weights": {"method": "pear", "level": "token"}},
        parents=Parents(policies=[PolicyUse(role="target", policy_id="p", model="m\n---\nx: y")]),
    )
    card = storage.read("math-sft/versions/v0001/README.md").decode()
    assert "<script>" not in card
    assert "a&#124;b&#96;c" in card
    _, header, body = card.split("---\n", 2)
    assert yaml.safe_load(header)["configs"][0]["data_files"][0]["path"] == "data/part-*.parquet"
    assert "`loss_weights` are PEAR weights" in body
    assert "no longer a sample from its behavior policy" in body
    assert "without the weights" in body


def test_policies_that_differ_in_their_system_prompt_alone_are_one_model(tmp_path) -> None:
    from grape_service.release.card import render_card

    policies = [("target", "m-1"), ("behavior", "b-2"), ("behavior", "b-1"), ("behavior", "b-2"), ("behavior", "m-1")]
    uses = [{"role": role, "policy_id": policy_id, "model": policy_id[0]} for role, policy_id in policies]
    manifest = publish_version(Storage(str(tmp_path)), parts=[rows(0, 3)], parents={"policies": uses}).manifest
    assert [(use.role, use.policy_id) for use in manifest.parents.models] == [*policies[:3], policies[4]]
    assert render_card(manifest).count("- behavior: `b` `b-2`") == 1


def test_code_in_the_card_is_read_as_it_is(tmp_path) -> None:
    """No entities inside code spans; a name cannot end its span or its table cell."""
    import pyarrow as pa
    from markdown_it import MarkdownIt

    from grape_service.release.card import render_card

    storage = Storage(str(tmp_path))
    version = publish_version(storage, parts=[rows(0, 3)])
    odd = "a`b``<img src=x>|c\x1b"
    columns = [*columns_of(pa.schema([(odd, pa.list_(pa.int32()))])), *version.manifest.columns]
    card = render_card(version.manifest.model_copy(update={"columns": columns}))
    assert "`list<struct<role: string, content: string>>`" in card
    page = MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2])
    assert "<code>a`b``&lt;img src=x&gt;|c&lt;U+001B&gt;</code>" in page
    assert "<code>list&lt;int32&gt;</code>" in page
    assert "<img" not in page
