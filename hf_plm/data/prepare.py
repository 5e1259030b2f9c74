"""From records to a corpus: clean, drop and count, hold out, and write a dataset folder that the Hub takes as it is.

One pass over sources of any size; what stays in memory is 8 bytes for each sequence and each id, and one row group.
The folder appears under its name only when it is whole (temporary name, fsync, rename).
"""

import errno
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import TypeAlias

from tqdm import tqdm

from hf_plm.config import UserError
from hf_plm.data.intake import Intake, Options, TooManyRejectedError
from hf_plm.data.manifest import FORMAT_VERSION, MANIFEST_NAME, Manifest, dataset_card, is_corpus, read_manifest, report
from hf_plm.data.sources import Source, find_sources, is_hub_name
from hf_plm.files import sync_folder
from hf_plm.remote import download, has_file

__all__ = ["ensure_prepared", "prepare", "report"]

Sources: TypeAlias = str | Path | Iterable[str | Path]
STALE_SECONDS = 86_400
"""A half-made corpus that nothing was added to for a day is no other process's work in progress."""


def prepare(
    sources: Sources,
    out: str | Path,
    *,
    validation: Sources = (),
    test: Sources = (),
    illegal: str = "reject",
    gaps: str = "reject",
    duplicates: str = "drop",
    max_rejected: float = 0.10,
    sequence_column: str | None = None,
    show_progress: bool = True,
) -> Manifest:
    """Write the corpus of all sources to the folder `out`; if that exists, it must be a corpus, and is replaced.

    sources, validation, test: FASTA, Parquet, folders, globs, Hub names (`sources.find_sources`). Without validation,
    1% (20 to 2,000 sequences) are held out by a hash of the sequence, or of the cluster where there is such a column.
    illegal, gaps: see `fasta.clean`. duplicates: "drop" keeps the first of equal sequences, "keep" all. max_rejected:
    largest share of records that may be empty or have illegal characters. UserError says in one sentence what is wrong;
    then nothing is written but, where too many records are rejected, their list.
    """
    options = Options(illegal, gaps, duplicates, max_rejected, sequence_column)
    return _prepare(_gather(sources, validation, test), Path(out).expanduser(), options, show_progress, replaces=True)


def ensure_prepared(
    sources: Sources,
    cache: Path,
    *,
    validation: Sources = (),
    test: Sources = (),
    illegal: str = "reject",
    gaps: str = "reject",
    duplicates: str = "drop",
    max_rejected: float = 0.10,
    sequence_column: str | None = None,
    show_progress: bool = True,
) -> Path:
    """The folder of a prepared corpus of the sources: the source itself if it is one, else one made once under `cache`.

    What was prepared is found again by the sources' paths, sizes and times and the options. Processes that prepare the
    same at once do not disturb each other: the first to finish is used by all.
    """
    given = [sources] if isinstance(sources, str | Path) else list(sources)
    held_out_given = any(not isinstance(one, tuple | list) or one for one in (validation, test))
    if len(given) == 1 and is_corpus(Path(given[0]).expanduser()) and not held_out_given:
        folder = Path(given[0]).expanduser()
        read_manifest(folder)
        return folder
    if len(given) == 1 and not held_out_given and (published := _published_corpus(str(given[0]))):
        return published
    options = Options(illegal, gaps, duplicates, max_rejected, sequence_column)
    inputs = _gather(given, validation, test)
    folder = Path(cache) / f"{_corpus_name(inputs)}-{_cache_key(inputs, options)}"
    if is_corpus(folder):
        if show_progress:
            print(f"Data: {folder}, prepared before from the same files")
        return folder
    manifest = _prepare(inputs, folder, options, show_progress, replaces=False)
    if show_progress:
        print(f"{report(manifest)}\nData: {folder}")
    return folder


def _published_corpus(name: str) -> Path | None:
    """A copy on this disk of a prepared corpus on the Hub, the same to the last byte; None for anything else."""
    try:
        if not is_hub_name(name) or not has_file(name, "dataset", MANIFEST_NAME):
            return None
    except UserError as error:
        raise UserError(f"{name} is no file or folder here, and: {error}") from None
    folder = download(name, "dataset", ["*.json", "*.md", "*.tsv", "data/*"])
    manifest = read_manifest(folder)
    missing = [s.file for split in manifest.splits.values() for s in split.shards if not (folder / s.file).is_file()]
    if missing:
        raise UserError(f"The corpus {name} on the Hub lacks {missing[0]}, which its {MANIFEST_NAME} names.")
    return folder


def _gather(sources: Sources, validation: Sources, test: Sources) -> list[Source]:
    """All sources in the order in which they are read: held-out ones first, so that their duplicates leave train."""
    held_out = find_sources(test, "test") + find_sources(validation, "validation")
    given_splits = {source.split for source in held_out}
    found = find_sources(sources, "train")
    train = [
        replace(source, note=source.note or f"its own {', '.join(unused)} not read, since others are given")
        if (unused := sorted({other.split for other in found} & given_splits))
        else source
        for source in found
        if source.split not in given_splits
    ]
    if not train:
        raise UserError(
            "There is no training data; give FASTA, Parquet, a folder or the name of a data set on the Hub."
        )
    order = {"test": 0, "validation": 1, "train": 2}
    return sorted(held_out + train, key=lambda source: order[source.split])


def _corpus_name(inputs: list[Source]) -> str:
    name = next(source for source in inputs if source.split == "train").name.split(":")[0].split("/")[-1]
    stem = name.split(".")[0] or "corpus"
    return "".join(letter if letter.isalnum() or letter in "-_" else "_" for letter in stem)


def _cache_key(inputs: list[Source], options: Options) -> str:
    known: list[object] = [FORMAT_VERSION, asdict(options)]
    for source in inputs:
        files = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in source.files]
        known.append([source.split, source.format, source.own_split, files or source.location])
    return sha256(json.dumps(known).encode()).hexdigest()[:12]


def _prepare(inputs: list[Source], out: Path, options: Options, show_progress: bool, replaces: bool) -> Manifest:
    if out.exists() and not is_corpus(out) and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not a prepared corpus; give another folder, or remove it.")
    total_bytes = sum(path.stat().st_size for source in inputs for path in source.files)
    is_quiet = not (show_progress and sys.stderr.isatty())
    with (
        _temporary_sibling(out) as folder,
        tqdm(total=total_bytes, unit="B", unit_scale=True, desc="preparing", leave=False, disable=is_quiet) as bar,
        Intake(folder, options, inputs, bar.update) as intake,
    ):
        for source in inputs:
            intake.add(source)
        try:
            manifest = intake.finish(out.name)
        except TooManyRejectedError as error:
            listed = out.parent / f"{out.name}.rejected.tsv"
            os.replace(folder / "rejected.tsv", listed)
            raise UserError(f"{error} All are listed in {listed}.") from None
        (folder / "README.md").write_text(dataset_card(manifest), encoding="utf-8")
        (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
        is_ours = _publish(folder, out, replaces)
    if not is_ours:
        return read_manifest(out)
    for warning in manifest.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    return manifest


@contextmanager
def _temporary_sibling(out: Path) -> Iterator[Path]:
    """A folder beside `out` that is gone afterwards, whatever happens, unless it was renamed."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = out.parent / f".{out.name}.preparing-{os.getpid()}-{secrets.token_hex(4)}"
        for stale in out.parent.glob(f".{out.name}.preparing-*"):  # of a run that was killed
            if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(stale, ignore_errors=True)
        (folder / "data").mkdir(parents=True)
    except OSError as error:
        raise UserError(f"The corpus {out} cannot be written: {error.strerror} ({out.parent}).") from error
    try:
        yield folder
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise UserError(f"The disk is full: the corpus {out} was not written; free space, run it again.") from None
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, out: Path, replaces: bool) -> bool:
    """Rename the whole folder to `out`; False if another process was first with the same corpus, which then stays."""
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb+") as file:
                os.fsync(file.fileno())
    old = out.parent / f"{folder.name}.old"
    if replaces and is_corpus(out):
        # The same files, changed or read with other options, make a new version; other files another corpus.
        there, new = ({source.name for source in read_manifest(path).sources} for path in (out, folder))
        if there != new:
            raise UserError(
                f"{out} is a corpus of other sources ({', '.join(sorted(there))}); give another folder, or remove it."
            )
        os.rename(out, old)
    elif out.is_dir() and not is_corpus(out):
        out.rmdir()  # it was empty when we began; if it no longer is, this fails as it should
    try:
        os.rename(folder, out)
    except OSError:
        if old.exists():
            os.rename(old, out)
        if replaces or not is_corpus(out):
            raise
        return False
    shutil.rmtree(old, ignore_errors=True)
    sync_folder(out.parent)
    return True
