"""manifest.json: what a version holds and what it was made from. Never changed once written."""

from __future__ import annotations

import re
from typing import Any, Literal

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from grape_service.config.base import HIDDEN
from grape_service.errors import UserError, without_url_secrets
from grape_service.json_types import JsonObject
from grape_service.release.reference import version_folder
from grape_service.rows.columns import MARGIN_AT_LEAST, TARGET_FIELDS
from grape_service.storage.storage import Storage, json_bytes

MANIFEST = "manifest.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 64 * 2**20
DATA_FILE_PATTERN = re.compile(r"data/part-[0-9]{5,9}\.parquet")
CHANGES_FILE, CROISSANT_FILE = "changes.parquet", "croissant.json"
POOL_FILES = "pool-files.parquet"
DOCUMENTS = ("README.md", "report.html", CHANGES_FILE, CROISSANT_FILE, POOL_FILES)

_SECRET_KEY = re.compile(r".*(secret|token|password|passwd|credential|api_?key|customerkey).*|key|webhook", re.I)
_NOT_SECRET = re.compile(r".*(tokens|tokenizer|token_ids?|turn_end_token|num_.*)$|tokens.*|max_.*token.*", re.I)


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow", frozen=True)


class FileEntry(_Part):
    """One data file; `path` is relative to the version's folder."""

    path: str
    size: int = Field(ge=0)  # bytes
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    rows: int = Field(ge=0)
    tokens: int = Field(ge=0)  # of input_ids
    loss_tokens: int = Field(ge=0)
    partition: str = Field("b", pattern=r"^b[01]*$")  # whose prompts it holds; 'b': of any
    proven_rows: int = Field(0, ge=0)  # that were shown to come back from the release as they were; see proof.py

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, path: str) -> str:
        if not DATA_FILE_PATTERN.fullmatch(path):
            raise ValueError(f"{path[:80]!a} is not a data file of a version: those are data/part-00000.parquet, …")
        return path


class DocumentEntry(_Part):
    """A file beside the data: card, report, changes since the version before, metadata in Croissant's form, and the
    pool's files where they are many."""

    path: str
    size: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")

    @field_validator("path")
    @classmethod
    def _known(cls, path: str) -> str:
        if path not in DOCUMENTS:
            raise ValueError(f"{path[:80]!a} is not a document of a version: those are {', '.join(DOCUMENTS)}")
        return path


class Column(_Part):
    """One column of the data files."""

    name: str
    type: str
    nullable: bool
    policy: Literal["target", "behavior", "earlier target"] | None = None
    """Whose tokens or numbers it holds; earlier target: of the release that was weighed again at another target."""


class PoolFile(_Part):
    """One input file with what tells whether it changed."""

    path: str
    size: int
    etag: str | None = None
    digest: str | None = None


Role = Literal["pool", "prompts"]
"""Of files that a version was made from: its pool, and the prompts that gather sampled for."""


class FileList(_Part):
    """Files of which there are more than a manifest lists: all of them are in POOL_FILES."""

    files: int
    digest: str  # of all of them, in their order, with what tells whether they changed


class PolicyUse(_Part):
    """One policy that scored, in one role."""

    role: str  # target, behavior
    policy_id: str  # its folder below scores/ in the workspace
    model: str
    revision: str | None = None
    weights_digest: str | None = None
    adapter: str | None = None
    dtype: str | None = None
    quantization: str | None = None
    engine: str | None = None  # description: name, version, device
    tokenizer_digest: str | None = None
    template_digest: str | None = None


class Rendering(_Part):
    """Who made a row's tokens of its messages: under what else they are rendered, the tokens are others."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    system_prompt: str | None = None
    render: JsonObject = {}  # the config's section
    digest: str  # of the renderer: tokenizer, template, system prompt, limits
    tokenizer_digest: str
    template_digest: str
    stop_ids: list[int]  # tokens that end a turn


class CodeVersion(_Part):
    """What made the release."""

    package_version: str
    git_commit: str | None = None


class Parents(_Part):
    """Everything that a release was made from."""

    pool: list[PoolFile] = []
    prompts: list[PoolFile] = []  # that gather sampled for: what it made is in `pool`, or in `candidates`
    all_files: dict[Role, FileList] = {}  # where `pool` or `prompts` has only the first
    policies: list[PolicyUse] = []
    libraries: dict[str, str] = {}
    code: CodeVersion | None = None
    methods: list[JsonObject] = []  # functions of the user's that chose or weighed: name, package, source digest
    round: str | None = None  # of a job with several
    checkpoints: dict[str, str] = {}  # by an address that moves (folder/@latest), the folder that it stood for
    candidates: dict[str, str] = {}  # by what pool.path says, the version of candidates that was read
    release: str | None = None  # reference of the release that was weighed again
    rendering: Rendering | None = None
    at_another_target: bool = False  # than that of `release`, or of the one that it was weighed from
    workspace: str | None = None
    prepare_id: str | None = None
    run_id: str | None = None

    def num_files(self, role: Role) -> int:
        """How many files of the pool, or of prompts, there were."""
        found = self.all_files.get(role)
        return found.files if found is not None else len(self.pool if role == "pool" else self.prompts)

    @property
    def models(self) -> list[PolicyUse]:
        """`policies` without those that differ from one before in their system prompt alone."""
        found: dict[tuple[str, str], PolicyUse] = {}
        for policy in self.policies:
            found.setdefault((policy.role, policy.policy_id), policy)
        return list(found.values())


class ManifestFields(_Part):
    """What the one who publishes says; the rest of the manifest follows from the files."""

    kind: Literal["training", "candidates"] = "training"  # a training set, or what gather sampled
    content_digest: str  # of all that decides the data; equal content is published once
    counts: JsonObject = {}  # at each stage, with the reasons for what was left out
    config: JsonObject = {}  # resolved; secrets are hidden by `publish`
    parents: Parents = Parents()
    statistics: JsonObject = {}
    tags: list[str] = []  # moved to the version once it exists


class Manifest(ManifestFields):
    """A version's manifest.json."""

    format: int
    name: str
    version: str
    created: str  # ISO 8601, UTC
    writer: str  # id of the claim
    columns: list[Column]
    files: list[FileEntry]
    documents: list[DocumentEntry] = []

    @model_validator(mode="after")
    def _files_differ(self) -> Manifest:
        if len({entry.path for entry in self.files}) != len(self.files):
            raise ValueError("a data file is listed twice")
        return self

    @property
    def rows(self) -> int:
        return sum(entry.rows for entry in self.files)

    @property
    def tokens(self) -> int:
        return sum(entry.tokens for entry in self.files)

    @property
    def loss_tokens(self) -> int:
        return sum(entry.loss_tokens for entry in self.files)

    @property
    def content(self) -> str:
        """How much it holds, in words."""
        if self.kind == "candidates":
            return f"{self.rows:,} candidates, {self.tokens:,} sampled tokens"
        return f"{self.rows:,} rows, {self.tokens:,} tokens, {self.loss_tokens:,} with loss"

    @property
    def num_bytes(self) -> int:
        return sum(entry.size for entry in self.files)

    @property
    def rendered_with(self) -> tuple[str | None, JsonObject]:
        """(system prompt, render section of the config) with which the messages of the rows became their tokens.

        A release that was weighed again at another target has the tokens of the one that it came from.
        """
        rendering = self.parents.rendering
        if rendering is not None:
            return rendering.system_prompt, rendering.render
        return (self.config.get("target") or {}).get("system_prompt"), self.config.get("render") or {}

    @property
    def licenses(self) -> list[str]:
        """Those that the pool's rows name, sorted."""
        return sorted({str(name) for entry in self.files for name in (entry.model_extra or {}).get("licenses") or ()})

    def to_json(self) -> bytes:
        """The file's content."""
        return json_bytes(self.model_dump(mode="json"))


OF_TOKENS = ("input_ids", "loss_mask", "labels", "turn_ends")
OF_CHOICE = (
    *("grape_score", "grape_rank", "grape_margin", "select_score", "select_rank", "select_margin"),
    MARGIN_AT_LEAST.name,
)
OF_TARGET = ("target_logprobs", *(item.name for item in TARGET_FIELDS.values()), "loss_weights")
OF_BEHAVIOR = ("behavior_logprobs", "behavior_known")


def columns_of(schema: pa.Schema, at_another_target: bool = False) -> list[Column]:
    """A schema as a manifest lists it; `at_another_target`: of a release that was weighed again at one."""
    earlier: Literal["target", "earlier target"] = "earlier target" if at_another_target else "target"
    owners: dict[str, Literal["target", "behavior", "earlier target"]] = {
        **dict.fromkeys((*OF_TOKENS, *OF_CHOICE), earlier),
        **dict.fromkeys(OF_TARGET, "target"),
        **dict.fromkeys(OF_BEHAVIOR, "behavior"),
    }
    return [Column(name=f.name, type=type_text(f.type), nullable=f.nullable, policy=owners.get(f.name)) for f in schema]


def type_text(kind: pa.DataType) -> str:
    """A type in words; what a list's items are called, which Parquet writers choose, is left out."""
    return re.sub(r"\blist<(item|element): ", "list<", str(kind))


def read_manifest(storage: Storage, name: str, version: str) -> Manifest:
    """A version's manifest, checked. Raises UserError where there is none or it is not to be trusted."""
    path = f"{version_folder(name, version)}/{MANIFEST}"
    address = storage.url(path)
    try:
        value = storage.read_json_value(path, MAX_MANIFEST_BYTES)
    except FileNotFoundError as error:
        raise UserError(f"{storage.root}/{name} has no version {version}: see `grape datasets list`") from error
    if isinstance(value, dict) and isinstance(value.get("format"), int) and value["format"] > FORMAT:
        raise UserError(
            f"{address} was written by a newer grape-service (its format is {value['format']}, this one reads "
            f"{FORMAT}): use that version"
        )
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        found = ascii(value.get("format") if isinstance(value, dict) else type(value).__name__)[:40]
        raise UserError(f"{address} is no manifest of format {FORMAT} (found {found}): use a matching grape-service")
    try:
        manifest = Manifest.model_validate(value)
    except (ValidationError, RecursionError) as error:
        raise UserError(f"{address} is not a manifest: {_first_problem(error)}") from error
    if (manifest.name, manifest.version) != (name, version):
        raise UserError(f"{address} says it is {ascii(manifest.name)[:80]} {ascii(manifest.version)[:80]}: restore it")
    return manifest


def _first_problem(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return "it is nested too deeply"
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])[:120]
    return f"{ascii(place)[1:-1]}: {first['msg']}"[:300]


def without_secrets(value: Any) -> Any:
    """A config's value with secrets, webhook addresses and passwords in URLs hidden, at any depth."""
    if isinstance(value, dict):
        return {key: HIDDEN if _is_secret(key, item) else without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    if isinstance(value, str):
        return without_url_secrets(value)
    return value


def secret_places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where `without_secrets` hides something: the keys, and places in lists, that lead there."""
    if not isinstance(value, dict | list):
        return [above]
    hidden = without_secrets(value)
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return [place for key, item in items if item != hidden[key] for place in secret_places(item, (*above, key))]


def _is_secret(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or not isinstance(value, str) or _NOT_SECRET.fullmatch(key):
        return False
    return _SECRET_KEY.fullmatch(key) is not None
