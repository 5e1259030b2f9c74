"""Where sequences come from: FASTA, Parquet, folders written by `datasets`, data sets on the Hub; all as one stream.

Nothing is held: a file is read record by record, a table batch by batch, so a source may be larger than memory.
"""

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from glob import glob, has_magic
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow
import pyarrow.parquet

from hf_plm.config import UserError
from hf_plm.proteins.fasta import FastaReader
from hf_plm.remote import is_repository, split_revision

Format = Literal["fasta", "parquet", "datasets", "hub"]
FASTA_SUFFIXES = (".fasta", ".fa", ".faa", ".fas", ".fsa", ".pep", ".mpfa", ".pir", ".a2m", ".a3m")
COMPRESSED_SUFFIXES = (".gz", ".zst", ".bz2")
SEQUENCE_COLUMNS = ("sequence", "seq", "protein_sequence", "aa_sequence", "primary", "sequences", "protein", "aa_seq")
ID_COLUMNS = ("id", "accession", "entry", "protein_id", "seq_id", "sequence_id", "uniprot_id", "name", "header")
CLUSTER_COLUMN = "cluster"
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("validation", "valid", "val", "dev"), "validation")
BATCH_ROWS = 1000


class RawRecord(NamedTuple):
    """A record of any source, as it stands there."""

    id: str
    sequence: str
    cluster: str | None


@dataclass(frozen=True)
class Source:
    """One file, or one split of a data set, and the split of the corpus that it is meant for."""

    name: str
    split: str
    format: Format
    location: str
    own_split: str = ""  # the data set's name of the split, for the formats that have splits
    note: str = ""  # what of the place it was found in is not read

    @property
    def files(self) -> list[Path]:
        """The files on disk that make it up, for sizes and checksums; none for the Hub."""
        if self.format == "hub":
            return []
        path = Path(self.location)
        return sorted(part for part in path.rglob("*") if part.is_file()) if path.is_dir() else [path]


def find_sources(given: str | Path | Iterable[str | Path], split: str) -> list[Source]:
    """All sources that the given files, globs, folders and Hub names stand for, in the order of their names.

    A data set with splits of its own gives train, validation and test when it is asked for train, and otherwise the
    split asked for. UserError where nothing is found.
    """
    if isinstance(given, str | Path):
        given = [given]
    found = [source for one in given for source in _find(str(one), split)]
    seen: dict[tuple[str, str], Source] = {}
    for source in found:
        location = source.location if source.format == "hub" else str(Path(source.location).resolve())
        seen.setdefault((location, source.own_split), source)
    sources = list(seen.values())
    names = [source.name for source in sources]
    return [
        replace(source, name=f"{Path(source.location).resolve().parent.name}/{source.name}")
        if names.count(source.name) > 1 and source.format in ("fasta", "parquet")
        else source
        for source in sources
    ]


def _find(given: str, split: str) -> list[Source]:
    path = Path(given).expanduser()
    if path.is_dir():
        return _find_in_folder(path, split)
    if path.exists():
        return [_file_source(path, split)]
    if has_magic(given):
        matches = sorted(glob(str(path), recursive=True))
        if not matches:
            raise UserError(f"No file matches {given}.")
        return [source for match in matches for source in _find(match, split)]
    if is_hub_name(given):
        return _pick_splits(given, given, "hub", _hub_splits(given), split)
    raise UserError(f"There is no file or folder {given}.")


def is_hub_name(given: str) -> bool:
    """Whether it can only be meant as the name of a data set on the Hub: nothing on this disk is called so."""
    path = Path(given).expanduser()
    is_file_name = _is_fasta_name(path) or path.suffix == ".parquet" or has_magic(given)
    return is_repository(given) and not is_file_name and not path.exists()


def _file_source(path: Path, split: str) -> Source:
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} may not be read; its permissions forbid it.")
    with open(path, "rb") as file:
        is_parquet = file.read(4) == b"PAR1"
    return Source(path.name, split, "parquet" if is_parquet or path.suffix == ".parquet" else "fasta", str(path))


def _is_fasta_name(path: Path) -> bool:
    name = path.name.lower()
    for suffix in COMPRESSED_SUFFIXES:
        name = name.removesuffix(suffix)
    return name.endswith(FASTA_SUFFIXES)


def _find_in_folder(folder: Path, split: str) -> list[Source]:
    if (folder / "dataset_dict.json").is_file():
        from datasets import load_from_disk

        return _pick_splits(folder.name, str(folder), "datasets", list(load_from_disk(str(folder))), split)
    if (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        return [Source(folder.name, split, "datasets", str(folder))]
    fasta = sorted(path for path in folder.iterdir() if path.is_file() and _is_fasta_name(path))
    parquet = sorted(path for path in folder.rglob("*.parquet") if path.is_file())
    if fasta and parquet:
        raise UserError(f"{folder} holds FASTA ({fasta[0].name}) and Parquet ({parquet[0].name}); give one of the two.")
    if fasta:
        others = [path.name for path in sorted(folder.iterdir()) if path not in fasta and path.name[0] != "."]
        note = f"{len(others)} other entries of the folder left out, the first: {others[0]!r}" if others else ""
        return [Source(path.name, split, "fasta", str(path), note=note if path == fasta[0] else "") for path in fasta]
    if not parquet:
        raise UserError(
            f"The folder {folder} holds no FASTA file ({' '.join(FASTA_SUFFIXES[:4])}, also with .gz .zst .bz2), no "
            "Parquet file and no data set written by `datasets`."
        )
    by_split: dict[str, list[Path]] = {}
    for path in parquet:
        match = re.match(r"(train|validation|valid|val|dev|test)(?=[-_.])", path.name)
        by_split.setdefault(match[1] if match else "train", []).append(path)
    picked = _pick_splits(folder.name, str(folder), "parquet", list(by_split), split)
    return [
        Source(path.name, source.split, "parquet", str(path), source.own_split, source.note)
        for source in picked
        for path in by_split[source.own_split]
    ]


def _pick_splits(name: str, location: str, format: Format, own_splits: list[str], split: str) -> list[Source]:
    known = {own: SPLIT_NAMES[own] for own in own_splits if own in SPLIT_NAMES}
    if len(own_splits) == 1:
        known = {own_splits[0]: split}
    wanted = known if split == "train" else {own: kind for own, kind in known.items() if kind == split}
    if split not in wanted.values():
        raise UserError(f"{name} has no split for {split}: it has {', '.join(own_splits) or 'none'}.")
    left_out = [own for own in own_splits if own not in known]
    note = f"splits of other names left out: {', '.join(left_out)}" if left_out else ""
    return [
        Source(f"{name}:{own}" if len(own_splits) > 1 else name, kind, format, location, own, note)
        for own, kind in wanted.items()
    ]


def _hub_splits(name: str) -> list[str]:
    from datasets import get_dataset_split_names

    try:
        repository, revision = split_revision(name)
        return list(get_dataset_split_names(repository, revision=revision))
    except Exception as error:  # the client raises a dozen kinds; to the user they are one
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name} is no file or folder here, and as a data set on the Hub it could not be opened ({reason})."
        ) from error


def read_records(
    source: Source, sequence_column: str | None, notes: list[str], on_bytes: Callable[[int], object]
) -> Iterator[RawRecord]:
    """The records of a source, in its order. `notes` gets a sentence for each kind of thing left out; `on_bytes` gets
    the bytes of the file read since the last call."""
    if source.format == "fasta":
        yield from _read_fasta_records(source, notes, on_bytes)
    else:
        yield from _read_table_records(source, sequence_column, on_bytes)


def has_cluster(source: Source, sequence_column: str | None) -> bool:
    """Whether the source says which cluster each record is in."""
    if source.format == "fasta":
        return False
    _, columns, _ = _open_tables(source)
    return _name_columns(source, columns, sequence_column)[2] is not None


def _read_fasta_records(source: Source, notes: list[str], on_bytes: Callable[[int], object]) -> Iterator[RawRecord]:
    reader = FastaReader(source.location)
    told_bytes = 0
    for record in reader:
        if reader.position_bytes != told_bytes:
            on_bytes(reader.position_bytes - told_bytes)
            told_bytes = reader.position_bytes
        yield RawRecord(record.id, record.sequence, None)
    on_bytes(reader.position_bytes - told_bytes)
    notes.extend(reader.notes)


def _read_table_records(
    source: Source, sequence_column: str | None, on_bytes: Callable[[int], object]
) -> Iterator[RawRecord]:
    tables, columns, num_rows = _open_tables(source)
    sequence_name, id_name, cluster_name = _name_columns(source, columns, sequence_column)
    wanted = [name for name in (sequence_name, id_name, cluster_name) if name]
    size_bytes = sum(path.stat().st_size for path in source.files)
    stem, number = Path(source.name).stem, 0
    for table in tables(wanted):
        sequences = table[sequence_name]
        ids = table[id_name] if id_name else [None] * len(sequences)
        clusters = table[cluster_name] if cluster_name else [None] * len(sequences)
        for id_, sequence, cluster in zip(ids, sequences, clusters, strict=True):
            number += 1
            if sequence is not None and not isinstance(sequence, str):
                raise UserError(
                    f"{source.name}, row {number}: column {sequence_name!r} should hold text, not "
                    f"{type(sequence).__name__}; name another by --data.sequence_column."
                )
            name = f"{stem}_{number}" if id_ is None or str(id_).strip() == "" else " ".join(str(id_).split())
            yield RawRecord(name, sequence or "", None if cluster is None else str(cluster))
        if num_rows:
            on_bytes(size_bytes * len(sequences) // num_rows)


def _open_tables(source: Source) -> tuple[Callable[[list[str]], Iterator[dict[str, list[Any]]]], list[str], int]:
    """A function from column names to batches of columns, the columns there are, the number of rows (0: unknown)."""
    if source.format == "parquet":
        try:
            file = pyarrow.parquet.ParquetFile(source.location)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise UserError(f"{source.location} is not a whole Parquet file ({error}).") from error

        def read_parquet(columns: list[str]) -> Iterator[dict[str, list[Any]]]:
            try:
                for batch in file.iter_batches(BATCH_ROWS, columns=columns):
                    yield batch.to_pydict()
            except (pyarrow.ArrowInvalid, OSError) as error:
                raise UserError(f"{source.location} is damaged ({error}); copy or download it again.") from error

        return read_parquet, file.schema_arrow.names, file.metadata.num_rows

    import datasets

    if source.format == "datasets":
        on_disk = datasets.load_from_disk(source.location)
        stored = on_disk[source.own_split] if isinstance(on_disk, datasets.DatasetDict) else on_disk

        def read_datasets(columns: list[str]) -> Iterator[dict[str, list[Any]]]:
            for table in stored.select_columns(columns).with_format("arrow").iter(BATCH_ROWS):
                yield table.to_pydict()

        return read_datasets, stored.column_names, len(stored)

    name, revision = split_revision(source.location)
    streamed = datasets.load_dataset(name, split=source.own_split, streaming=True, revision=revision)
    names = streamed.column_names or list(next(iter(streamed)))

    def read_hub(columns: list[str]) -> Iterator[dict[str, list[Any]]]:
        yield from streamed.select_columns(columns).iter(BATCH_ROWS)

    return read_hub, names, 0


def _name_columns(source: Source, columns: list[str], given: str | None) -> tuple[str, str | None, str | None]:
    by_lower = {column.lower(): column for column in columns}
    if given is not None and given not in columns:
        raise UserError(f"{source.name} has no column {given!r}: its columns are {', '.join(columns)}.")
    sequence = given or next((by_lower[name] for name in SEQUENCE_COLUMNS if name in by_lower), None)
    if sequence is None:
        raise UserError(
            f"{source.name} has no column whose name says that it holds sequences; give one of {', '.join(columns)} by "
            "--data.sequence_column."
        )
    identifier = next((by_lower[name] for name in ID_COLUMNS if name in by_lower and by_lower[name] != sequence), None)
    return sequence, identifier, by_lower.get(CLUSTER_COLUMN)
