"""Opening a release for reading."""

from __future__ import annotations

import importlib.util
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from grape_service.display import nearest, visible
from grape_service.errors import UserError
from grape_service.release.catalog import list_datasets
from grape_service.release.manifest import Column, FileEntry, Manifest, columns_of, read_manifest
from grape_service.release.reference import Reference, parse_reference, version_folder
from grape_service.release.tags import list_tag_names, read_tag, readable_tags
from grape_service.storage.options import StorageOptions
from grape_service.storage.parquet import open_checked, open_parquet
from grape_service.storage.storage import Storage

_READERS = 4

if TYPE_CHECKING:
    import datasets
    import pandas
    import polars


class Release:
    """One version, opened: everything about it is in `.manifest`, its rows are in `.dataset`."""

    def __init__(self, storage: Storage, manifest: Manifest):
        self.storage = storage  # the folder of datasets
        self.manifest = manifest
        self.name = manifest.name
        self.version = manifest.version
        self.folder = version_folder(manifest.name, manifest.version)

    def __repr__(self) -> str:
        manifest = self.manifest
        columns = ", ".join(f"{visible(column.name)} ({column.type})" for column in manifest.columns)
        shown = textwrap.fill(columns, 110, initial_indent="columns: ", subsequent_indent="  ", break_on_hyphens=False)
        return (
            f"Release {self.reference}\n"
            f"{manifest.content}; published {manifest.created}\n{shown}\n"
            "go on with .to_hf(), .to_pandas(), .to_polars(), .dataset (pyarrow, with columns and filters), .manifest"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return Release, (self.storage, self.manifest)

    @property
    def reference(self) -> str:
        """What refers to this version for ever."""
        return f"{self.storage.root}/{self.name}@{self.version}"

    @property
    def path(self) -> str:
        """Address of the version's folder."""
        return self.storage.url(self.folder)

    @property
    def row_count(self) -> int:
        return self.manifest.rows

    @property
    def files(self) -> list[str]:
        """Addresses of the data files, in order."""
        return [f"{self.path}/{entry.path}" for entry in self.manifest.files]

    @cached_property
    def schema(self) -> pa.Schema:
        """Columns of the data files. Raises UserError if they are not what the manifest says."""
        for entry in self.manifest.files[:1]:
            with self.open_file(entry.path) as file:
                schema = file.schema_arrow.remove_metadata()
            difference = schema_difference(self.manifest.columns, schema)
            if difference:
                raise UserError(f"{self.path}/{entry.path} is not what its manifest says: {difference}")
            return schema
        return pa.schema([])

    @property
    def dataset(self) -> pads.Dataset:
        """The rows; columns and filters that a scan is given are pushed down to the files.

        Made once in each process: a fork, such as a worker of a DataLoader, cannot use the connections of its parent.
        """
        cached = self.__dict__.get("_opened_dataset")
        if cached is None or cached[0] != os.getpid():
            cached = self.__dict__["_opened_dataset"] = os.getpid(), self._make_dataset()
        dataset: pads.Dataset = cached[1]
        return dataset

    def _make_dataset(self) -> pads.Dataset:
        self._refuse_other_sizes()
        paths = [self.storage.full(f"{self.folder}/{entry.path}") for entry in self.manifest.files]
        if not paths:
            return pads.dataset(self.schema.empty_table())
        scan = pads.ParquetFragmentScanOptions(page_checksum_verification=True)
        format = pads.ParquetFileFormat(default_fragment_scan_options=scan)
        return pads.dataset(paths, schema=self.schema, format=format, filesystem=self.storage.arrow)

    def _refuse_other_sizes(self) -> None:
        """Raises UserError for a data file that is missing or has another size than the manifest says: one listing
        finds a copy that was cut off and nearly every file of another version, `check_files` the others."""
        sizes = self._sizes()
        for entry in self.manifest.files:
            size = sizes.get(entry.path)
            if size is None:
                raise UserError(f"{self.path}/{entry.path} is missing: see `grape datasets verify {self.reference}`")
            if size != entry.size:
                raise UserError(
                    f"{self.path}/{entry.path} is not the file that its manifest names ({size:,} bytes, not "
                    f"{entry.size:,}): see `grape datasets verify {self.reference}`"
                )

    def _sizes(self) -> dict[str, int]:
        """Bytes of the data files that are there."""
        try:
            found = self.storage.list(self.folder)
        except UserError:  # whoever may read the files may not be allowed to list them
            with ThreadPoolExecutor(_READERS) as pool:
                asked = pool.map(self._size_of, self.manifest.files)
                return {entry.path: size for entry, size in zip(self.manifest.files, asked, strict=True) if size >= 0}
        return {info.path.removeprefix(f"{self.folder}/"): info.size for info in found}

    def _size_of(self, entry: FileEntry) -> int:
        try:
            return self.storage.info(f"{self.folder}/{entry.path}").size
        except FileNotFoundError:
            return -1

    def batches(
        self, columns: list[str] | None = None, filter: pads.Expression | None = None, batch_rows: int = 4096
    ) -> Iterator[pa.RecordBatch]:
        """The rows in order, a row group or two at a time, so that memory stays small however large the version is.
        Raises UserError where a column does not exist or a data file is missing or damaged."""
        self._check_columns(columns, filter)
        try:
            yield from self.dataset.to_batches(
                columns=columns, filter=filter, batch_size=batch_rows, batch_readahead=4, fragment_readahead=1
            )
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"the data of {self.reference} cannot be read ({_one_line(error)}): see `grape datasets verify`"
            ) from error

    def open_file(self, path: str) -> pq.ParquetFile:
        """One data file, by its path in the manifest. Raises UserError if it is missing or not Parquet."""
        try:
            return open_parquet(self.storage, f"{self.folder}/{path}")
        except FileNotFoundError as error:
            raise UserError(f"{self.path}/{path} is missing: see `grape datasets verify {self.reference}`") from error
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{self.path}/{path} is not readable Parquet ({_one_line(error)}): restore it") from error

    def open_checked(self, entry: FileEntry) -> pq.ParquetFile:
        """A data file whose bytes are those that the manifest names; held in memory while it is open. Raises
        UserError if they are not."""
        return open_checked(self.storage, f"{self.folder}/{entry.path}", entry.sha256)

    def check_files(self) -> None:
        """Compare the sha256 of every data file with the manifest's. Raises UserError naming the first that differs."""

        def check(entry: FileEntry) -> None:
            path = f"{self.folder}/{entry.path}"
            try:
                found = self.storage.sha256(path)
            except FileNotFoundError:
                raise UserError(f"{self.path}/{entry.path} is missing: restore it, or make another version") from None
            if found != entry.sha256:
                raise UserError(
                    f"{self.path}/{entry.path} is not the file that its manifest names (sha256 {found[:16]}…, "
                    f"not {entry.sha256[:16]}…): restore it, or make another version"
                )

        with ThreadPoolExecutor(_READERS) as pool:
            for _ in pool.map(check, self.manifest.files):
                pass

    def to_table(self, columns: list[str] | None = None, filter: pads.Expression | None = None) -> pa.Table:
        """The rows, in memory. Raises UserError where a column does not exist or a data file is missing or damaged."""
        batches = list(self.batches(columns, filter, batch_rows=65_536))
        if not batches:
            schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
            return schema.empty_table()
        return pa.Table.from_batches(batches)

    def _check_columns(self, columns: Sequence[str] | None, filter: pads.Expression | None) -> None:
        """Raises UserError, with the names that are near, for columns that do not exist."""
        names = self.schema.names
        for name in columns or ():
            if name not in names:
                raise UserError(f"{self.reference} has no column {name!a}; {nearest(name, names, most=3)}")
        if filter is not None:
            try:
                self.schema.empty_table().filter(filter)
            except pa.ArrowException as error:
                unknown = re.search(r"No match for FieldRef\.\w+\((.*?)\) in", str(error))
                if unknown is None:
                    raise UserError(f"the filter does not fit {self.reference}: {_one_line(error)}") from None
                name = unknown[1]
                raise UserError(
                    f"{self.reference} has no column {name!a} to filter by; {nearest(name, names, most=3)}"
                ) from None

    def to_pandas(self, columns: list[str] | None = None, filter: pads.Expression | None = None) -> pandas.DataFrame:
        """The rows as a pandas DataFrame, in memory; lists are numpy arrays. Raises UserError like `to_table`."""
        _require("pandas")
        return self.to_table(columns, filter).to_pandas()

    def to_polars(self, columns: list[str] | None = None, filter: pads.Expression | None = None) -> polars.DataFrame:
        """The rows as a polars DataFrame, in memory. Raises UserError like `to_table`."""
        _require("polars")
        import polars

        found = polars.from_arrow(self.to_table(columns, filter))
        assert isinstance(found, polars.DataFrame)
        return found

    def to_hf(self, streaming: bool = False, **options: Any) -> datasets.Dataset | datasets.IterableDataset:
        """The rows as a Hugging Face dataset; `streaming` reads them as they are used. `options` go to load_dataset.
        Raises UserError where one of their `columns` does not exist."""
        _require("datasets", "hf")
        self._check_columns(options.get("columns"), None)
        self._refuse_other_sizes()
        import datasets

        storage_options = {key: value for key, value in self.storage.options.items() if key != "retry_seconds"}
        return datasets.load_dataset(
            "parquet",
            data_files={"train": self.files},
            split="train",
            streaming=streaming,
            storage_options=storage_options or None,
            **options,
        )

    def tags(self) -> list[str]:
        """Tags that point to this version now."""
        return [tag.name for tag in readable_tags(self.storage, self.name)[0] if tag.version == self.version]


def load(
    reference: str | os.PathLike[str] | Reference,
    storage_options: StorageOptions | None = None,
    check_files: bool = False,
) -> Release:
    """Open a release: `load("s3://team/datasets/math-sft@v0003")`; without '@' it is @latest.

    `storage_options`: those of s3fs, without secrets, which come from the environment. `check_files` reads every data
    file once and compares its digest with the manifest's. Raises UserError.
    """
    if not isinstance(reference, Reference):
        reference = parse_reference(os.fspath(reference))
    storage = reference.storage(storage_options)
    version = resolve_version(storage, reference.name, reference.version_or_tag)
    release = Release(storage, read_manifest(storage, reference.name, version))
    if check_files:
        release.check_files()
    return release


def load_training_set(
    reference: str | os.PathLike[str] | Reference, storage_options: StorageOptions | None = None
) -> Release:
    """Open a release that is a training set. Raises UserError for candidates, and as `load` does."""
    release = load(reference, storage_options)
    refuse_candidates(release)
    return release


def refuse_candidates(release: Release) -> None:
    """Raises UserError for a version that holds candidates."""
    if release.manifest.kind == "candidates":
        raise UserError(
            f"{release.reference} holds candidates that gather sampled, and no training set: name it as pool.path of a "
            "config and run that, or look at them with grape_service.load"
        )


def resolve_version(storage: Storage, name: str, version_or_tag: str) -> str:
    """The version that a tag points to; a version is itself. Raises UserError if there is no such tag."""
    if Reference(storage.root, name, version_or_tag).is_version:
        return version_or_tag
    tag = read_tag(storage, name, version_or_tag)
    if tag is not None:
        return tag.version
    known = list_tag_names(storage, name)
    if not known and not storage.folders(f"{name}/versions"):
        inside = list_datasets(storage.sub(name))
        if inside:
            there = f"{storage.root}/{name}"
            raise UserError(f"{there} is a folder of datasets: name one of them, such as {there}/{inside[0]}@latest")
        raise UserError(f"there is no dataset '{name}' in {storage.root}: see `grape datasets list {storage.root}`")
    hint = f"its tags are {', '.join(known)}" if known else "it has no tags; name a version, such as v0001"
    raise UserError(f"{storage.root}/{name} has no tag '{version_or_tag}': {hint}")


def schema_difference(columns: list[Column], schema: pa.Schema) -> str | None:
    """How a file's columns differ from a manifest's, in words; None if they do not."""
    expected = {column.name: column for column in columns}
    found = {column.name: column for column in columns_of(schema)}
    for name in [*expected, *found]:
        if name not in found:
            return f"column {name!a} is missing"
        if name not in expected:
            return f"column {name!a} is not in the manifest"
        if found[name].type != expected[name].type:
            return f"column {name!a} is {found[name].type}, not {expected[name].type}"
    return None


def _require(package: str, name: str = "") -> None:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:  # a folder of that name is no package
        raise UserError(f"to_{name or package} needs the package {package}: pip install {package}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
