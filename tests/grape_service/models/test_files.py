"""Model files and the ids of policies."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.models import digests
from grape_service.models.digests import cache_folder, content_digest
from grape_service.models.files import ModelFiles, policy_id, resolve_model
from grape_service.storage.storage import Storage


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAPE_CACHE", str(tmp_path / "cache"))


def _file_of(tensor: dict[str, Any]) -> bytes:
    """A safetensors file with the header of one tensor and no values."""
    header = json.dumps({"a": tensor}).encode()
    return struct.pack("<Q", len(header)) + header


def write_model(folder: Path, seed: int = 0, **config: Any) -> str:
    """A folder that looks like a model: a config and two weight files with 24 parameters."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    settings = {"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 128, **config}
    (folder / "config.json").write_text(json.dumps(settings))
    random = np.random.default_rng(seed)
    for part, shape in (("model-00001-of-00002", (3, 4)), ("model-00002-of-00002", (12,))):
        save_file({part: random.random(shape, dtype=np.float32)}, str(folder / f"{part}.safetensors"))
    return str(folder)


def files_of(model: str, **settings: Any) -> ModelFiles:
    return resolve_model(PolicyConfig(model=model, **settings))


def id_of(model: str, temperature: float = 1.0, **settings: Any) -> str:
    policy = PolicyConfig(model=model, **settings)
    return policy_id(policy, resolve_model(policy), temperature)


def test_a_local_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "My Model_1.5")
    files = files_of(folder)
    assert files.folder == folder
    assert (files.name, files.revision, files.adapter_folder) == (folder, None, None)
    assert (files.num_parameters, files.architecture) == (24, "LlamaForCausalLM")
    assert id_of(folder).startswith("my-model-1-5-")
    assert len(id_of(folder)) == len("my-model-1-5-") + 12


def test_an_id_follows_contents_not_places(tmp_path: Path) -> None:
    one = id_of(write_model(tmp_path / "a" / "model"))
    assert one == id_of(write_model(tmp_path / "b" / "model"))
    assert one == id_of(write_model(tmp_path / "c" / "model", transformers_version="9.9"))
    assert one != id_of(write_model(tmp_path / "d" / "model", seed=1))
    assert one != id_of(write_model(tmp_path / "e" / "model", rope_theta=5.0))


def test_an_id_holds_what_scores_depend_on_and_nothing_else(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    ids = [
        id_of(model),
        id_of(model, dtype="float32"),
        id_of(model, quantization="fp8"),
        id_of(model, temperature=0.7),
        id_of(model, adapter=write_adapter(tmp_path / "adapter")),
        id_of(model, adapter=write_adapter(tmp_path / "other", rank=8)),
    ]
    assert len(set(ids)) == len(ids)
    assert id_of(model, temperature=1.0) == ids[0]
    assert id_of(model, system_prompt="Be brief.", engine="transformers", engine_args={"device": "cpu"}) == ids[0]


def write_adapter(folder: Path, rank: int = 4) -> str:
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"r": rank}))
    save_file({"lora_A": np.ones((rank, 4), dtype=np.float32)}, str(folder / "adapter_model.safetensors"))
    return str(folder)


def test_weights_are_read_once_and_again_when_they_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    folder = Path(write_model(tmp_path / "model"))
    before = files_of(str(folder)).weights_digest
    remembered = sorted((cache_folder() / "digests").iterdir())
    assert len(remembered) == 2
    for path in remembered:  # what is remembered is what is used
        path.write_text("0" * 64)
    assert files_of(str(folder)).weights_digest != before
    for path in folder.glob("*.safetensors"):
        os.utime(path, ns=(1, 1))
    assert files_of(str(folder)).weights_digest == before


def test_a_file_of_the_same_size_and_time_of_writing_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    os.utime(path, ns=(1, 1))
    first = content_digest(path)
    assert not (cache_folder() / "digests").exists(), "the file is young: nothing of it is remembered"
    monkeypatch.setattr(digests, "SETTLED_NS", 0)
    assert content_digest(path) == first
    time.sleep(0.02)  # more than a tick of the file system's clock
    path.write_bytes(b"two")
    os.utime(path, ns=(1, 1))
    assert content_digest(path) != first


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model")
    expected = files_of(model)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPE_CACHE", str(tmp_path / "file"))
    assert files_of(model) == expected


def test_an_s3_folder_is_downloaded_once_for_each_state(tmp_path: Path, s3_url: str) -> None:
    local = write_model(tmp_path / "model")
    storage = Storage(f"{s3_url}/models/model")
    for path in Path(local).iterdir():
        storage.write(path.name, path.read_bytes())
    files = files_of(storage.root)
    assert Path(files.folder).parent == cache_folder() / "models"
    assert replace(files, folder=local, name=local) == files_of(local)
    assert id_of(storage.root) == id_of(local)

    marker = Path(files.folder) / "marker"
    marker.write_text("still the same download")
    assert files_of(storage.root).folder == files.folder
    assert marker.exists()

    storage.write("config.json", b'{"architectures": ["OtherForCausalLM"]}')
    changed = files_of(storage.root)
    assert changed.folder != files.folder
    assert changed.architecture == "OtherForCausalLM"
    assert not [path for path in (cache_folder() / "models").iterdir() if path.name.startswith(".tmp-")]


def test_a_download_that_lost_a_part_is_made_again(tmp_path: Path, s3_url: str) -> None:
    local = write_model(tmp_path / "model")
    storage = Storage(f"{s3_url}/models/damaged")
    for path in Path(local).iterdir():
        storage.write(path.name, path.read_bytes())
    whole = id_of(storage.root)
    config = Path(files_of(storage.root).folder) / "config.json"
    config.write_bytes(config.read_bytes()[:-1] + b" }")
    assert id_of(storage.root) == whole


def test_a_folder_that_changes_while_it_is_downloaded_is_a_sentence(
    tmp_path: Path, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = Storage(f"{s3_url}/models/changing")
    for path in Path(write_model(tmp_path / "model")).iterdir():
        storage.write(path.name, path.read_bytes())
    copy = shutil.copyfileobj

    def copy_and_change(*args: Any) -> None:
        copy(*args)
        storage.write("config.json", b'{"architectures": ["OtherForCausalLM"]}')

    monkeypatch.setattr(shutil, "copyfileobj", copy_and_change)
    with pytest.raises(UserError, match="changed while it was downloaded"):
        files_of(storage.root)
    monkeypatch.undo()


def test_a_snapshot_of_the_hub_is_named_by_its_commit_while_it_holds_what_the_hub_gave(tmp_path: Path) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository, snapshot = tmp_path / "hub" / "models--team--tiny", "snapshots/" + commit
    write_model(tmp_path / "model")
    (repository / "blobs").mkdir(parents=True)
    (repository / snapshot).mkdir(parents=True)
    for path in (tmp_path / "model").iterdir():
        content = path.read_bytes()
        large = hashlib.sha256(content).hexdigest()
        small = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        name = large if path.suffix == ".safetensors" else small
        (repository / "blobs" / name).write_bytes(content)
        (repository / snapshot / path.name).symlink_to(repository / "blobs" / name)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "from grape_service.config.policy import PolicyConfig\n"
        "from grape_service.models.files import policy_id, resolve_model\n"
        "policy = PolicyConfig(model='team/tiny')\n"
        "print(policy_id(policy, resolve_model(policy)))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}

    def found() -> str:
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
        ).stdout

    ids = [found()]
    for name in ("config.json", "model-00001-of-00002.safetensors"):
        path = (repository / snapshot / name).resolve()
        content = path.read_bytes()
        is_config = name == "config.json"
        path.write_bytes(json.dumps({**json.loads(content), "rope_theta": 7}).encode() if is_config else content + b"1")
        ids.append(found())
        path.write_bytes(content)
        assert found() == ids[0]
    assert len(set(ids)) == 3


def test_a_hub_model_out_of_the_local_hub_cache(tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads its environment once."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--team--tiny"
    write_model(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    code = (
        "import sys; from grape_service.config.policy import PolicyConfig\n"
        "from grape_service.models.files import policy_id, resolve_model\n"
        "for revision in (None, sys.argv[1]):\n"
        "    policy = PolicyConfig(model='team/tiny', revision=revision)\n"
        "    files = resolve_model(policy)\n"
        "    print(files.revision, files.folder, policy_id(policy, files))\n"
        "try:\n"
        "    resolve_model(PolicyConfig(model='team/other', revision='v2'))\n"
        "except Exception as error:\n"
        "    print(type(error).__name__, error)\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    done = subprocess.run(
        [sys.executable, "-c", code, commit], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    newest, pinned, missing = done.stdout.splitlines()
    assert newest == pinned
    assert newest.startswith(f"{commit} {repository / 'snapshots' / commit} tiny-")
    assert missing.startswith(
        "UserError model 'team/other' at revision 'v2' is neither a local folder nor in the local"
    )


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "has no config.json"),
        (lambda folder: folder.write_text("weights"), "is a file: give the folder"),
        (lambda folder: (write_model(folder), (folder / "config.json").write_text("{")), "config.json is not JSON"),
        (lambda folder: (folder.mkdir(), (folder / "config.json").write_text("{}")), "has no weight files"),
        (lambda folder: (folder.mkdir(), (folder / "m.gguf").write_text("")), "holds GGUF files"),
    ],
)
def test_what_is_not_a_model_is_a_sentence(tmp_path: Path, make: Any, sentence: str) -> None:
    make(tmp_path / "model")
    with pytest.raises(UserError, match=sentence) as raised:
        files_of(str(tmp_path / "model"))
    assert str(tmp_path / "model") in str(raised.value)


def test_what_is_not_an_adapter_is_a_sentence(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"adapter .* is not a LoRA folder"):
        files_of(model, adapter=model)
    with pytest.raises(UserError, match=r"adapter .*nowhere' does not exist"):
        files_of(model, adapter=str(tmp_path / "nowhere"))


def test_an_empty_s3_folder_is_a_sentence(s3_url: str) -> None:
    with pytest.raises(UserError, match="there is no file in that folder"):
        files_of(f"{s3_url}/nothing-here")


def test_without_a_home_the_cache_is_a_temporary_folder_of_this_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GRAPE_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "grape"
    monkeypatch.setenv("HOME", "/nonexistent")
    folder = cache_folder()
    assert folder == cache_folder() == tmp_path / f"grape-cache-{os.getuid()}"
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(UserError, match="set GRAPE_CACHE to a folder of your own"):
        cache_folder()


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 2**64 - 1),
        b"\x08",
        struct.pack("<Q", 7) + b'{"a":1}',
        struct.pack("<Q", 20) + b'{"a":{"dtype":"F32"}',
        _file_of({"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 2**62]}),
        _file_of({"dtype": "F32", "shape": [-2], "data_offsets": [0, 0]}),
        _file_of({"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}),
        _file_of({"dtype": "F32", "shape": "2", "data_offsets": [0, 8, 9]}),
    ],
)
def test_a_damaged_weight_file_is_a_sentence(data: bytes, tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (Path(folder) / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"copy (it|the file) again") as refused:
        files_of(folder)
    assert "\n" not in str(refused.value)
