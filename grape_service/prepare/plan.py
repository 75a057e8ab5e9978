"""What prepare will do: the pool's files, cut into pieces, and the number of buckets and partitions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from grape_service.config.schema import Config
from grape_service.errors import UserError
from grape_service.keys import digest_of, prepared_key
from grape_service.models.digests import is_young, stamp_of
from grape_service.models.files import ModelFiles, texts_of
from grape_service.pool.contract import GroupContract, group_contracts
from grape_service.pool.files import PoolFile, open_pool_file, with_digests
from grape_service.pool.listing import Listing, list_pool
from grape_service.pool.reader import Segment, holds_document
from grape_service.render.renderer import Renderer
from grape_service.rows.keys import partition_bits, partition_names
from grape_service.storage.storage import Storage

FOLDER = "prepared"
COMPRESSION_RATIO = 6
"""Bytes of rows in a byte of a compressed file, about."""
MAX_BUCKETS = 2**16
FAN_OUT = 64
"""Buckets, at most, that a task deals rows to, and files that it reads to do so: a power of two."""
PIECE_BYTES = 2 * 2**20
"""A piece is not smaller, nor a partition where there are more than PIECES: each is a task with files of its own."""
PIECES = 32
"""So many pieces, about, of a pool that is not large: of a few, the last would leave CPUs idle."""
FOLDER_OF_MAP = "dealt"
"""Below the plan's folder: what lies between map and reduce."""
PREPARED = "prepared.json"
SMALL_PARQUET_BYTES = 4 * 2**20
"""A smaller file's row groups are not looked at: it is one segment."""


@dataclass(frozen=True)
class Piece:
    """What one map task reads: segments of about `piece_bytes` together."""

    index: int
    segments: tuple[Segment, ...]

    @property
    def name(self) -> str:
        return f"piece-{self.index:05d}"


@dataclass(frozen=True)
class PreparePlan:
    """Everything that map and reduce tasks agree on. The number of workers has no part in it."""

    prepare_id: str
    pool: str
    files: tuple[PoolFile, ...]
    pieces: tuple[Piece, ...]
    num_buckets: int
    """What rows are dealt to, by the leading bits of their prompt's order; none, about, above partition_bytes."""
    num_partitions: int
    """What the stages work on and store: a bucket, or neighbours that are small by themselves."""
    passed_over: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Entries below the pool's path that are not read: by reason their count and some of them."""
    fan_out: int = FAN_OUT
    contracts: tuple[GroupContract, ...] = ()
    """How the files of each group are read."""

    @property
    def level_bits(self) -> list[int]:
        """By how many bits of a prompt's order each level deals rows, down to the buckets; see deal.py."""
        bits, most = partition_bits(self.num_buckets), partition_bits(self.fan_out)
        num_levels = max(1, -(-bits // most))
        return [(bits + level) // num_levels for level in range(num_levels)]

    @property
    def folder(self) -> str:
        """Where everything about this plan is, in the workspace."""
        return f"{FOLDER}/{self.prepare_id}"

    @property
    def partitions(self) -> list[str]:
        """Names of the partitions, in order."""
        return partition_names(self.num_partitions)

    def buckets_of(self, partition: int) -> range:
        """The buckets that a partition holds."""
        each = self.num_buckets // self.num_partitions
        return range(partition * each, (partition + 1) * each)

    @property
    def pool_bytes(self) -> int:
        """Size of the pool's files."""
        return sum(file.size for file in self.files)


def row_path(plan: PreparePlan, piece: Piece, number: int) -> str:
    """An Arrow file of a piece's rows, MAPPED."""
    return f"{plan.folder}/{FOLDER_OF_MAP}/{piece.name}-{number:03d}.arrow"


def reject_path(plan: PreparePlan, piece: Piece, number: int) -> str:
    """An Arrow file of a piece's rejects, MAP_REJECT."""
    return f"{plan.folder}/{FOLDER_OF_MAP}/{piece.name}-rejects-{number:03d}.arrow"


def rendering_of(renderer: Renderer, files: ModelFiles) -> str:
    """Names how a policy's text becomes tokens, by its renderer and by the files that this was made from."""
    return digest_of([renderer.digest(), texts_of(files)])


def plan_prepare(config: Config, rendering: str, storage: Storage) -> PreparePlan:
    """Look at the pool's files and write `plan.json`. `rendering` names what makes tokens of text: see `rendering_of`.

    Raises UserError for a pool that does not exist, is empty, or has files of an unknown format.
    """
    listing = pool_listing(config, storage)
    files = tuple(listing.files)
    sized = list(sized_segments(files, config))
    pieces = tuple(_packed(sized, piece_bytes(files, config)))
    total_bytes = sum(size for _, size in sized)
    num_buckets = _num_buckets(total_bytes, config.workers.partition_bytes)
    num_partitions = _num_partitions(total_bytes, num_buckets)
    cut = [num_buckets, num_partitions, piece_bytes(files, config)]
    prepare_id = prepared_key(config, [_as_listed(file) for file in files], config.pool.groups, rendering, cut)
    passed_over = {reason: asdict(passed) for reason, passed in sorted(listing.passed_over.items())}
    plan = PreparePlan(
        prepare_id,
        config.pool.address,
        files,
        pieces,
        num_buckets,
        num_partitions,
        passed_over,
        contracts=group_contracts(files, config),
    )
    storage.write_json(f"{plan.folder}/plan.json", asdict(plan))
    return plan


def piece_bytes(files: tuple[PoolFile, ...], config: Config) -> int:
    """Bytes of pool in a piece, about: those of a partition, less in a pool of few partitions."""
    pool_bytes = sum(file.size * _expansion(file) for file in files)
    return max(PIECE_BYTES, min(pool_bytes // PIECES, config.workers.partition_bytes))


def _expansion(file: PoolFile) -> int:
    """Bytes of rows in a byte of a file, about."""
    return 1 if file.format in (".json", ".jsonl", ".csv", ".arrow") else COMPRESSION_RATIO


def pool_listing(config: Config, storage: Storage) -> Listing:
    """The pool's files; digests of local ones are remembered in the workspace while size and times stay."""
    remembered = f"{FOLDER}/digests-{digest_of(config.pool.address, 16)}.json"
    known: dict[str, list[Any]] = storage.read_note(remembered) or {}
    listing = list_pool(config)
    stamps = {file.url: list(stamp_of(Path(file.url))) for file in listing.files if "://" not in file.url}
    young = {url for url, stamp in stamps.items() if is_young((stamp[0], stamp[1], stamp[2]))}
    same = [
        replace(file, digest=known[file.url][-1])
        for file in listing.files
        if file.url in stamps and known.get(file.url, [])[:-1] == stamps[file.url]
    ]
    listing.files = with_digests(listing.files, same, config.storage)
    old = {file.url: [*stamps[file.url], file.digest] for file in listing.files if file.url in stamps.keys() - young}
    if old != known:
        storage.write_json(remembered, old)
    return listing


def _as_listed(file: PoolFile) -> dict[str, Any]:
    """A pool file for a key: all that is known of it; a local one's content says more than when it was written."""
    listed = asdict(file)
    return {**listed, "version": None} if file.digest is not None else listed


def files_key(files: Iterable[PoolFile]) -> str:
    """Names a pool's files as they are listed."""
    return digest_of([_as_listed(file) for file in files])


def _num_buckets(total_bytes: int, partition_bytes: int) -> int:
    """The smallest power of two of buckets that are not larger than partition_bytes."""
    wanted = -(-total_bytes // partition_bytes)
    return min(MAX_BUCKETS, 1 << max(0, wanted - 1).bit_length())


def _num_partitions(total_bytes: int, num_buckets: int) -> int:
    """One for each bucket; above PIECES of them, neighbours are joined until they hold PIECE_BYTES. A partition is a
    task of every stage, with files of its own, which cost milliseconds whatever is in them."""
    not_small = max(1, total_bytes // PIECE_BYTES)
    return min(num_buckets, max(PIECES, 1 << (not_small.bit_length() - 1)))


def _packed(sized: Iterable[tuple[Segment, int]], piece_bytes: int) -> Iterator[Piece]:
    """Segments in order, small ones together."""
    waiting: list[Segment] = []
    index, waiting_bytes = 0, 0
    for segment, size in sized:
        if waiting and waiting_bytes + size > piece_bytes:
            yield Piece(index, tuple(waiting))
            index, waiting, waiting_bytes = index + 1, [], 0
        waiting.append(segment)
        waiting_bytes += size
    if waiting:
        yield Piece(index, tuple(waiting))


def sized_segments(files: tuple[PoolFile, ...], config: Config) -> Iterator[tuple[Segment, int]]:
    """Segments of all files, and about how many bytes of rows each holds."""
    most = piece_bytes(files, config)
    with ThreadPoolExecutor(16, thread_name_prefix="footers") as pool:
        footers = pool.map(lambda file: _row_group_bytes(file, most, config), files)
        in_lines = pool.map(lambda file: _is_cut_at_lines(file, most, config), files)
        for index, (file, row_groups, lines) in enumerate(zip(files, footers, in_lines, strict=True)):
            if lines:
                for start in range(0, file.size, most):
                    end = min(start + most, file.size)
                    yield Segment(index, start, end), end - start
            elif row_groups is not None:
                yield from _row_group_segments(index, row_groups, most)
            else:
                yield Segment(index), file.size * _expansion(file)


def _is_cut_at_lines(file: PoolFile, most: int, config: Config) -> bool:
    """Whether a file has a row a line and can be read in parts."""
    if file.format not in (".json", ".jsonl") or file.size == 0:
        return False
    if file.size <= most:
        return file.format == ".jsonl"  # one part all the same
    return not holds_document(file, config.storage)


def _row_group_segments(index: int, row_groups: list[int], most: int) -> Iterator[tuple[Segment, int]]:
    start, size = 0, 0
    for group, group_bytes in enumerate(row_groups):
        if group > start and size + group_bytes > most:
            yield Segment(index, start, group), size
            start, size = group, 0
        size += group_bytes
    yield Segment(index, start, len(row_groups)), size


def _row_group_bytes(file: PoolFile, most: int, config: Config) -> list[int] | None:
    """Uncompressed bytes of each row group of a larger Parquet file; None for other files."""
    if file.format != ".parquet" or file.size < min(SMALL_PARQUET_BYTES, most):
        return None
    try:
        with open_pool_file(file, config.storage) as stream:
            metadata = pq.ParquetFile(stream).metadata
            return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"the pool file '{file.url}' is not a Parquet file: {str(error)[:200]}") from error
