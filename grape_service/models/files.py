"""Model files: where a policy's weights are on this machine, and what names them.

`resolve_model` makes a local folder of a hub id or an s3:// folder; `policy_id` names what scores belong to.
Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import shutil
import struct
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from grape_service.config.policy import PolicyConfig
from grape_service.errors import UserError
from grape_service.models.headers import is_pickle, weight_file_names
from grape_service.models.weights import quantization_of, refuse_architecture
from grape_service.storage.storage import Storage
from grape_service.storage.temporary import temporary_folder

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
NOT_IN_CONFIG_DIGEST = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
COMMIT = re.compile(r"[0-9a-f]{40}")
LISTING_FILE = ".grape-listing.json"
TEXT_FILES = ("tokenizer*", "chat_template*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt")


@dataclass(frozen=True)
class ModelFiles:
    """A model on local disk."""

    folder: str  # local, with config.json and weights
    name: str  # as the config has it: hub id, folder or s3:// folder
    revision: str | None  # the hub commit, 40 hex digits; None for other places
    weights_digest: str  # of the weight files' contents; for hub models, of repository and commit
    config_digest: str  # of config.json without keys that change no score
    adapter_folder: str | None  # local
    adapter_digest: str | None
    num_parameters: int  # from the safetensors headers; of other formats a guess from their size
    architecture: str  # such as LlamaForCausalLM
    has_chat_template: bool
    quantization: str | None  # what its own config.json says of quantised weights, such as fp8


def resolve_model(policy: PolicyConfig, storage_options: dict[str, Any] | None = None) -> ModelFiles:
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
        adapter_digest = _digest(
            files_digest(weight_files(adapter_folder)),
            hashlib.sha256((adapter_folder / "adapter_config.json").read_bytes()).hexdigest(),
        )
    return ModelFiles(
        folder=str(folder),
        name=policy.model,
        revision=revision,
        weights_digest=_digest("hub", policy.model, revision) if revision else files_digest(weights),
        config_digest=_digest({key: config[key] for key in config if key not in NOT_IN_CONFIG_DIGEST}),
        adapter_folder=str(adapter_folder) if adapter_folder else None,
        adapter_digest=adapter_digest,
        num_parameters=sum(_num_parameters(path) for path in weights),
        architecture=(config.get("architectures") or ["unknown"])[0],
        has_chat_template=_has_chat_template(folder),
        quantization=quantization_of(config),
    )


def policy_id(policy: PolicyConfig, files: ModelFiles, temperature: float = 1.0) -> str:
    """Names a policy's scores: the model's name for people, and 12 hex digits over what scores depend on.

    That is weights, model config, adapter, dtype, quantization and a temperature other than 1. System prompt and
    template are not part: the rows that are scored hold them.
    """
    parts: dict[str, Any] = {
        "weights": files.weights_digest,
        "config": files.config_digest,
        "adapter": files.adapter_digest,
        "dtype": policy.dtype,
        "quantization": policy.quantization,
    }
    if temperature != 1.0:
        parts["temperature"] = float(temperature)
    base = files.name.rstrip("/").rsplit("/", 1)[-1]
    slug = re.sub(r"[^a-z0-9]+", "-", base.lower()).strip("-")[:40].strip("-") or "model"
    return f"{slug}-{_digest(parts)[:12]}"


def cache_folder() -> Path:
    """Where downloads and digests are kept on this machine: GRAPE_CACHE, or ~/.cache/grape.

    Without a home that can be written, a temporary folder of this user alone. Raises UserError where that is another's.
    """
    if given := os.environ.get("GRAPE_CACHE"):
        return Path(given)
    home = Path(os.path.expanduser("~"))
    place = home / ".cache" / "grape"
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if home.is_absolute() and nearest != Path("/") and os.access(nearest, os.W_OK):
        return place
    return temporary_folder("grape-cache", variable="GRAPE_CACHE")


# Places


def _local_folder(
    name: str, revision: str | None, what: str, patterns: list[str], options: dict[str, Any]
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
    except Exception:  # of the client, for an address that is none; its words may hold that, and it a password
        raise UserError(
            f"{what} '{name}' is no local folder, and the model hub cannot be asked: correct HF_ENDPOINT or unset it"
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


def _from_s3(url: str, what: str, options: dict[str, Any]) -> Path:
    """The s3:// folder's files on local disk, downloaded once for each state of the folder, and whole or not at all."""
    storage = Storage(url, options)
    try:
        listing = [info for info in storage.list() if "/" not in info.path]
    except OSError as error:
        raise UserError(f"{what} '{url}' cannot be read: {_first_line(error)}; check address and credentials") from None
    if not listing:
        raise UserError(f"{what} '{url}' does not exist: there is no file in that folder")
    state = [[info.path, info.size, info.etag] for info in listing]
    folder = cache_folder() / "models" / _digest(url, state)[:32]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=".tmp-", dir=folder.parent))
    try:
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda info: _download(storage, info.path, temporary / info.path), listing))
        (temporary / LISTING_FILE).write_bytes(orjson.dumps({"url": url, "files": state}))
        with contextlib.suppress(OSError):  # another process was first
            temporary.rename(folder)
        assert folder.is_dir()
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _download(storage: Storage, path: str, target: Path) -> None:
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


def _has_chat_template(folder: Path) -> bool:
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    tokenizer_config = folder / "tokenizer_config.json"
    return tokenizer_config.is_file() and bool(orjson.loads(tokenizer_config.read_bytes()).get("chat_template"))


def _num_parameters(path: Path) -> int:
    """Parameters in a weight file: counted for safetensors, else one for each two bytes."""
    if path.suffix != ".safetensors":
        return path.stat().st_size // 2
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = orjson.loads(file.read(length))
    return sum(math.prod(tensor["shape"]) for name, tensor in header.items() if name != "__metadata__")


def _refuse_pickle(names: list[str], what: str, name: str, allowed: bool) -> None:
    if is_pickle(names[0]) and not allowed:
        raise UserError(
            f"{what} '{name}' has its weights in {names[0]}, a pickle file, which can run code when it is read: "
            "convert it to safetensors, or set allow_pickle: true for it if you trust it"
        )


# Digests


def folder_here(policy: PolicyConfig, folder: str, storage_options: dict[str, Any] | None = None) -> str:
    """The folder of a policy's model on this machine: `folder`, which another machine has, where it is here too."""
    return folder if Path(folder).is_dir() else resolve_model(policy, storage_options).folder


def text_digests(folder: str) -> dict[str, str]:
    """sha256 of each file of a model folder that decides how text becomes tokens, the chat template included."""
    files = {path for pattern in TEXT_FILES for path in Path(folder).glob(pattern) if path.is_file()}
    return {path.name: _content_digest(path) for path in sorted(files)}


def _digest(*parts: Any) -> str:
    return hashlib.sha256(orjson.dumps(parts, option=orjson.OPT_SORT_KEYS)).hexdigest()


def files_digest(files: list[Path]) -> str:
    """One digest over names, sizes and contents of files; where they lie does not matter."""
    with ThreadPoolExecutor(4) as threads:
        contents = list(threads.map(_content_digest, files))
    return _digest([[path.name, path.stat().st_size, content] for path, content in zip(files, contents, strict=True)])


def _content_digest(path: Path) -> str:
    """sha256 of a file's content, remembered by path, size and modification time."""
    path = path.resolve()
    stat = path.stat()
    remembered = cache_folder() / "digests" / _digest(str(path), stat.st_size, stat.st_mtime_ns)[:32]
    with contextlib.suppress(OSError):
        known = remembered.read_text()
        if len(known) == 64:
            return known
    with open(path, "rb") as file:
        content = hashlib.file_digest(file, "sha256")
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
        remembered.parent.mkdir(parents=True, exist_ok=True)
        temporary = remembered.with_name(f".{remembered.name}.{os.getpid()}")
        temporary.write_text(content.hexdigest())
        temporary.replace(remembered)
    return content.hexdigest()
