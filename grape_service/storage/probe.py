"""Whether a place can hold releases: tried out before any work is done, with what publishing will need."""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Iterator

from grape_service.errors import StageError, UserError
from grape_service.storage.storage import Storage


def check_writable(storage: Storage) -> None:
    """Write, replace, read and delete small probes; none is left. Nine requests on S3.

    Raises UserError where that is not allowed, where the bucket does not exist or the disk is full, and where the
    server ignores the condition of a conditional write: tags, claims and leases rest on it.
    """
    folder = f".grape-probe-{uuid.uuid4().hex}"
    small, in_parts, data = f"{folder}/a", f"{folder}/b", uuid.uuid4().bytes
    with _of_the_place(folder):
        _check_deletes(storage, [small, in_parts])
        try:
            _check_conditions(storage, small, data)
            storage.write_in_parts(in_parts, data)
            if storage.read(in_parts) != data:
                raise UserError(f"the server of {storage.root} gives back other bytes than were written")
        except BaseException:
            with contextlib.suppress(UserError, StageError, OSError):  # the first error says what is wrong
                storage.delete_files([small, in_parts])
            raise
        storage.delete_files([small, in_parts])
        if not storage.is_s3:
            storage.delete_folder(folder)


def _check_deletes(storage: Storage, paths: list[str]) -> None:
    """Delete files that do not exist, one and several: what may not be deleted is not written either."""
    try:
        storage.delete(paths[0])
        storage.delete_files(paths)
    except UserError:
        storage.compare_and_swap(paths[0], b"", "0" * 32)  # never done, and refused where writing is
        raise


def _check_conditions(storage: Storage, path: str, data: bytes) -> None:
    if not storage.create_if_absent(path, data):
        raise UserError(f"the server of {storage.root} is not an S3 server: it says that a new file exists already")
    if storage.create_if_absent(path, data + b"again"):
        raise UserError(
            f"the server of {storage.root} ignores conditional writes (If-None-Match): use one that honours them"
        )
    etag = storage.read_with_etag(path)[1]
    if not storage.compare_and_swap(path, data + b"new", etag):
        raise UserError(f"the server of {storage.root} refuses to replace a file by its etag (If-Match): use another")
    if storage.compare_and_swap(path, data + b"late", etag):
        raise UserError(
            f"the server of {storage.root} ignores conditional writes (If-Match): two writers of a tag would lose one "
            "another's; use one that honours them"
        )


@contextlib.contextmanager
def _of_the_place(folder: str) -> Iterator[None]:
    """Sentences name the place that was asked for, and not a probe in it."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(rf"/{folder}(/\w*)?", "", str(error))) from error
