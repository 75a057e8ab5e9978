"""Model files: where a policy's weights are on this machine, and what names them.

`resolve_model` makes a local folder of a hub id or an s3:// folder; `policy_id` names what scores belong to.
Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from grape_service import keys
from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.keys import digest_of, files_of_key
from grape_service.models.digests import cache_folder, content_digest, content_digests
from grape_service.models.headers import file_headers, is_pickle, weight_file_names
from grape_service.models.hub import proves_its_commit
from grape_service.models.weights import quantization_of, refuse_architecture
from grape_service.storage.files import FileInfo
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import Storage

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
LISTING_FILE = ".grape-listing.json"


@dataclass(frozen=True)
class ModelFiles:
    """A model on local disk."""

    folder: str  # local, with config.json and weights
    name: str  # as the config has it: hub id, folder or s3:// folder
    revision: str | None  # the hub commit, 40 hex digits; None for other places
    weights_digest: str  # of the weight files' contents; of repository and commit where those are as on the hub
    config_digest: str  # of config.json without keys that change no score
    others_digest: str | None  # of what scores may depend on beside those two, such as code; None as on the hub
    adapter_folder: str | None  # local
    adapter_digest: str | None
    num_parameters: int  # from the safetensors headers; of other formats a guess from their size
    architecture: str  # such as LlamaForCausalLM
    quantization: str | None  # what its own config.json says of quantised weights, such as fp8


def resolve_model(policy: PolicyConfig, storage_options: StorageOptions | None = None) -> ModelFiles:
    """The policy's model and adapter as local folders, downloaded where needed and not yet there.

    A local folder is taken as it is, a hub id through huggingface_hub (HF_HUB_OFFLINE is honoured), an s3://
    folder is downloaded once. Raises UserError where there is no such model or it cannot be used.
    """
    patterns = [*HUB_PATTERNS, "*.py"] if policy.trust_remote_code else HUB_PATTERNS
    folder, revision = _local_folder(policy.model, policy.revision, "model", patterns, storage_options or {})
    config = _read_config(folder, policy.model)
    refuse_architecture(config, policy.model)
    weights = weight_files(folder)
    if not weights:
        raise UserError(f"model '{policy.model}' has no weight files: its folder needs .safetensors files")
    _refuse_pickle(weight_file_names(folder) or [weights[0].name], "model", policy.model, policy.allow_pickle)
    adapter_folder = adapter_digest = None
    if policy.adapter is not None:
        adapter_folder, _ = _local_folder(policy.adapter, None, "adapter", HUB_PATTERNS, storage_options or {})
        if not (adapter_folder / "adapter_config.json").is_file():
            raise UserError(f"adapter '{policy.adapter}' is not a LoRA folder: it has no adapter_config.json")
        if not weight_files(adapter_folder):
            raise UserError(f"adapter '{policy.adapter}' has no weight files: it needs adapter_model.safetensors")
        names = [path.name for path in weight_files(adapter_folder)]
        _refuse_pickle(names, "adapter", policy.adapter, policy.allow_pickle)
        adapter_digest = keys.adapter_key(
            files_digest(weight_files(adapter_folder)),
            content_digest(adapter_folder / "adapter_config.json"),
            _others_digest(adapter_folder),
        )
    is_as_on_the_hub = revision is not None and proves_its_commit(folder, file_names(folder))
    return ModelFiles(
        folder=str(folder),
        name=policy.model,
        revision=revision,
        weights_digest=digest_of(["hub", policy.model, revision]) if is_as_on_the_hub else files_digest(weights),
        config_digest=digest_of([{key: config[key] for key in config if key not in keys.CONFIG_JSON_WITHOUT}]),
        others_digest=None if is_as_on_the_hub else _others_digest(folder),
        adapter_folder=str(adapter_folder) if adapter_folder else None,
        adapter_digest=adapter_digest,
        num_parameters=sum(_num_parameters(path) for path in weights),
        architecture=(config.get("architectures") or ["unknown"])[0],
        quantization=quantization_of(config),
    )


def policy_id(policy: PolicyConfig, files: ModelFiles, temperature: float = 1.0) -> str:
    """Names a policy's scores: the model's name for people, and 12 hex digits over what scores depend on.

    System prompt and template are not part: the rows that are scored hold them. keys.py has the rest.
    """
    base = files.name.rstrip("/").rsplit("/", 1)[-1]
    slug = re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-")[:40].strip("-") or "model"
    made_of = {
        "weights": files.weights_digest,
        "config": files.config_digest,
        "adapter": files.adapter_digest,
        "others": files.others_digest,
    }
    return f"{slug}-{keys.scores_key(policy, made_of, temperature)}"


# Places


def _local_folder(
    name: str, revision: str | None, what: str, patterns: list[str], options: StorageOptions
) -> tuple[Path, str | None]:
    """The local folder of a model or adapter, and its commit if it came from a hub."""
    if name.startswith("s3://"):
        return _from_s3(name, what, options), None
    path = Path(os.path.expanduser(name))
    if path.is_dir():
        return path.resolve(), None
    if path.is_file():
        raise UserError(f"{what} '{name}' is a file: give the folder that holds config.json, tokenizer and weights")
    if name.startswith((".", "/", "~")) or not HUB_ID.fullmatch(name):
        raise UserError(f"{what} '{name}' does not exist: give a hub id, a local folder or an s3:// folder")
    try:
        return _from_hub(name, revision, what, patterns)
    except (UserError, OSError):
        raise
    except Exception:  # of the client, for an invalid address; its words may quote that, with a password
        raise UserError(
            f"{what} '{name}' is not a local folder, and the model hub cannot be asked: correct HF_ENDPOINT or unset it"
        ) from None


def _from_hub(name: str, revision: str | None, what: str, patterns: list[str]) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = f" at revision '{revision}'" if revision else ""
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
        if not weight_files(folder):
            folder = Path(snapshot_download(name, revision=revision, allow_patterns=[*patterns, "*.bin"]))
    except GatedRepoError:
        raise UserError(
            f"{what} '{name}' is gated on the hub: ask for access there and set HF_TOKEN to a token that has it"
        ) from None
    except RepositoryNotFoundError:
        raise UserError(
            f"{what} '{name}' is neither a local folder nor on the model hub: correct its name (HF_TOKEN, if private)"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{what} '{name}' has no revision '{revision}': give a branch, tag or commit of it") from None
    except (LocalEntryNotFoundError, OSError) as error:
        if _is_disk_error(error):
            raise
        raise UserError(
            f"{what} '{name}'{at} is neither a local folder nor in the local hub cache, and the model hub "
            "cannot be reached: download it first or give a local folder or an s3:// folder"
        ) from None
    commit = folder.name
    assert COMMIT.fullmatch(commit), "huggingface_hub keeps a snapshot in a folder named by its commit"
    return folder, commit


def _is_disk_error(error: BaseException) -> bool:
    """Whether an OSError is this machine's (a full disk, no permission) and not the network's."""
    return isinstance(error, PermissionError) or getattr(error, "errno", None) in (28, 30, 122)


def _from_s3(url: str, what: str, options: StorageOptions) -> Path:
    """The s3:// folder's files on local disk, downloaded once for each state of the folder, and whole or not at all."""
    storage = Storage(url, options)
    listing = _listing(storage, what)
    state = _state(listing)
    folder = cache_folder() / "models" / digest_of([url, state], 32)
    if folder.is_dir():
        if _has_all(folder, listing):
            return folder
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda info: _download(storage, info.path, temporary / info.path), listing))
        if _state(_listing(storage, what)) != state or not _has_all(temporary, listing):
            raise UserError(f"{what} '{url}' changed while it was downloaded: run again once it is written")
        (temporary / LISTING_FILE).write_bytes(orjson.dumps({"url": url, "files": state}))
        with contextlib.suppress(OSError):  # another process was first
            temporary.rename(folder)
        assert folder.is_dir()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _listing(storage: Storage, what: str) -> list[FileInfo]:
    """The files of an s3:// folder that are downloaded. Raises UserError without one."""
    try:
        listing = [info for info in storage.list() if files_of_key([info.path], keys.NOT_DOWNLOADED)]
    except OSError as error:
        raise UserError(
            f"{what} '{storage.root}' cannot be read: {_first_line(error)}; check address and credentials"
        ) from None
    if not listing:
        raise UserError(f"{what} '{storage.root}' does not exist: there is no file in that folder")
    return listing


def _state(listing: list[FileInfo]) -> list[list[Any]]:
    return [[info.path, info.size, info.etag] for info in listing]


def _has_all(folder: Path, listing: list[FileInfo]) -> bool:
    """Whether every file is there with its size."""
    files = [(folder / info.path, info.size) for info in listing]
    return all(path.is_file() and path.stat().st_size == size for path, size in files)


def _download(storage: Storage, path: str, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with storage.open(path) as source, open(target, "wb") as file:
        shutil.copyfileobj(source, file, 16 * 2**20)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# What is in a folder


def weight_files(folder: Path) -> list[Path]:
    """The folder's weight files by name: its .safetensors, or if there are none, the PyTorch ones."""
    files = sorted(path for path in folder.iterdir() if path.suffix in WEIGHT_SUFFIXES and path.is_file())
    files = [path for path in files if path.name not in ("training_args.bin", "optimizer.bin", "optimizer.pt")]
    safetensors = [path for path in files if path.suffix == ".safetensors"]
    return safetensors or files


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        if any(folder.glob("*.gguf")):
            raise UserError(
                f"model '{name}' holds GGUF files, which are not scored: convert it to safetensors "
                "(examples/quickstart/prepare_model.py shows how)"
            )
        raise UserError(f"model '{name}' is not a model folder: it has no config.json")
    try:
        config = orjson.loads(path.read_bytes())
    except orjson.JSONDecodeError as error:
        raise UserError(f"model '{name}': its config.json is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"model '{name}': its config.json does not hold an object")
    return config


def _num_parameters(path: Path) -> int:
    """Parameters in a weight file: counted for safetensors, else one for each two bytes."""
    if path.suffix != ".safetensors":
        return path.stat().st_size // 2
    return sum(math.prod(tensor.shape) for tensor in file_headers(path).values())


def _refuse_pickle(names: list[str], what: str, name: str, allowed: bool) -> None:
    if is_pickle(names[0]) and not allowed:
        raise UserError(
            f"{what} '{name}' has its weights in {names[0]}, a pickle file, which can run code when it is read: "
            "convert it to safetensors, or set allow_pickle: true for it if you trust it"
        )


# Digests


def folder_here(policy: PolicyConfig, folder: str, storage_options: StorageOptions | None = None) -> str:
    """The folder of a policy's model on this machine: `folder`, which another machine has, where it is here too."""
    return folder if Path(folder).is_dir() else resolve_model(policy, storage_options).folder


@dataclass(frozen=True)
class PolicyFiles:
    """A policy and the files of its model, for tasks on any machine."""

    policy: PolicyConfig
    folder: str  # on the machine of the driver
    options: StorageOptions

    def here(self) -> str:
        """The model's folder on this machine."""
        return folder_here(self.policy, self.folder, self.options)


def adapter_here(policy: PolicyConfig, storage_options: StorageOptions | None = None) -> str | None:
    """The folder of a policy's adapter on this machine, downloaded where it is not there yet; None without one."""
    if policy.adapter is None:
        return None
    return str(_local_folder(policy.adapter, None, "adapter", HUB_PATTERNS, storage_options or {})[0])


def text_digests(folder: str) -> dict[str, str]:
    """sha256 of each file of a model folder, by its path in it, that may decide how text becomes tokens."""
    return content_digests(Path(folder), files_of_key(file_names(Path(folder)), keys.TEXTS_WITHOUT_FILES))


def texts_of(files: ModelFiles) -> list[dict[str, str]]:
    """`text_digests` of a policy's model and of its adapter, if it has one."""
    return [text_digests(folder) for folder in (files.folder, files.adapter_folder) if folder is not None]


def file_names(folder: Path) -> list[str]:
    """Every file of a folder at any depth, by its path in it, links followed; none of folders that no key holds."""
    found, seen = [], set()
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place)
        relative = here.relative_to(folder)
        seen.add(here.resolve())
        folders[:] = [name for name in folders if files_of_key([(relative / name / "x").as_posix()], keys.NOT_READ)]
        folders[:] = [name for name in folders if (here / name).resolve() not in seen]
        found += [(relative / name).as_posix() for name in names if (here / name).is_file()]
    return sorted(found)


def files_digest(files: list[Path]) -> str:
    """One digest over names, sizes and contents of files; where they lie does not matter."""
    with ThreadPoolExecutor(4) as threads:
        contents = list(threads.map(content_digest, files))
    return digest_of(
        [[[path.name, path.stat().st_size, content] for path, content in zip(files, contents, strict=True)]]
    )


def _others_digest(folder: Path) -> str | None:
    """A digest of what scores may depend on beside weights, config.json and adapter_config.json; None where there is
    nothing."""
    names = files_of_key(file_names(folder), keys.SCORES_WITHOUT_FILES)
    return digest_of(content_digests(folder, names)) if names else None
