"""Names: what a dataset, a version and a tag may be called, and the one string that refers to a release."""

from __future__ import annotations

import re
from dataclasses import dataclass

from grape_service.config.schema import NAME_PATTERN
from grape_service.errors import UserError
from grape_service.storage.options import StorageOptions
from grape_service.storage.storage import Storage, normal_url

LATEST = "latest"
VERSION_PATTERN = re.compile(r"v(?!0000$)([0-9]{4}|[1-9][0-9]{4,8})")
_LIKE_A_VERSION = re.compile(r"v[0-9]+")
_INSIDE_A_VERSION = re.compile(rf"(?P<name>.+)/versions/(?P<version>{VERSION_PATTERN.pattern})(/|$)")
_TAG_PATTERN = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Reference:
    """`<path>/<name>@<version or tag>`."""

    path: str  # folder of datasets
    name: str
    version_or_tag: str

    def __str__(self) -> str:
        return f"{self.path}/{self.name}@{self.version_or_tag}"

    @property
    def is_version(self) -> bool:
        """Whether this names a version and not a tag."""
        return VERSION_PATTERN.fullmatch(self.version_or_tag) is not None

    def storage(self, options: StorageOptions | None = None) -> Storage:
        """The folder of datasets."""
        return Storage(self.path, options)


def parse_reference(text: str) -> Reference:
    """`s3://t/datasets/name@v0003`, `...@tag`, or without '@' for @latest; a slash behind it, as shells complete
    folders, says nothing. Raises UserError."""
    text = text.strip()
    if re.match(r"s3:/[^/]", text):
        raise UserError(f"{_shown(text)} has lost a slash, as in a pathlib.Path: give the address s3://... as text")
    if inside := _INSIDE_A_VERSION.match(text):
        raise UserError(f"{_shown(text)} is in the folder of a version: write {inside['name']}@{inside['version']}")
    if not text.endswith("//"):
        text = text.removesuffix("/")
    folder, _, last = text.rpartition("/")
    if not last or folder.endswith(":/"):
        raise UserError(f"{_shown(text)} is not a dataset reference: write <folder>/<name>@<version or tag>")
    name, at, version_or_tag = last.partition("@")
    if not at and re.search(r"\.(ya?ml|jsonl?|parquet|html|csv)$", last):
        raise UserError(f"{_shown(text)} is a file, not a dataset: write <folder>/<name>@<version or tag>")
    if at and not version_or_tag:
        raise UserError(f"{_shown(text)} names no version after '@': write @v0001, @{LATEST} or nothing")
    version_or_tag = version_or_tag or LATEST
    check_name(name)
    if not VERSION_PATTERN.fullmatch(version_or_tag):
        check_tag(version_or_tag)
    return Reference(normal_url(folder or "."), name, version_or_tag)


def check_name(name: str) -> str:
    """The name of a dataset, as it is. Raises UserError."""
    if not NAME_PATTERN.fullmatch(name):
        raise UserError(
            f"{_shown(name)} is not a dataset name: use a-z, 0-9 and '-', 63 characters at most, no '-' in front"
        )
    return name


def check_tag(tag: str) -> str:
    """The name of a tag, as it is. Raises UserError."""
    if _LIKE_A_VERSION.fullmatch(tag):
        raise UserError(f"{_shown(tag)} cannot be a tag: it reads like a version; versions are v0001, v0002, …")
    if not _TAG_PATTERN.fullmatch(tag):
        raise UserError(f"{_shown(tag)} is not a tag: use a-z, 0-9, '.', '_' and '-', 63 characters at most")
    return tag


def check_version(version: str) -> str:
    """A version, as it is. Raises UserError."""
    if not VERSION_PATTERN.fullmatch(version):
        raise UserError(f"{_shown(version)} is not a version: versions are v0001, v0002, …")
    return version


def version_number(version: str) -> int:
    """3 for 'v0003'."""
    assert VERSION_PATTERN.fullmatch(version), version
    return int(version[1:])


def version_name(number: int) -> str:
    """'v0003' for 3."""
    return f"v{number:04d}"


def version_folder(name: str, version: str) -> str:
    """Where a version lies, relative to the folder of datasets."""
    return f"{check_name(name)}/versions/{check_version(version)}"


def _shown(text: str) -> str:
    return ascii(text if len(text) <= 80 else text[:77] + "...")
