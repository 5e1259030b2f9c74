"""The file of vectors: made whole beforehand with ids and places, then filled portion by portion."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from hf_plm.inference.results import Tensor, WorkingFile
from hf_plm.inference.sites import Sites
from hf_plm.inference.unfinished import ROWS
from hf_plm.inference.vectors import windows as windows_of
from hf_plm.inference.worklist import Worklist

SITES = "sites.npz"


def create_rows(
    partial: Path,
    worklist: Worklist,
    width: int,
    wants: Sequence[str],
    dtype: str,
    kept: np.ndarray,
    windows: np.ndarray,
    sites: Sites | None,
    metadata: Mapping[str, str],
) -> None:
    """Makes the file with all that is known before the first vector of `width` numbers.

    `wants` are poolings, that of the rows first; `kept` and `windows` (P,) are the residues that get vectors and the
    windows of each protein. Raises `OSError` (ENOSPC) where the disk is too small.
    """
    rows = rows_of(wants, sites)
    num_records = len(sites) if sites else len(worklist)
    offsets = np.concatenate(([0], np.cumsum(kept))) if rows == "residues" else np.arange(num_records + 1)
    lengths = worklist.lengths
    if sites:
        lengths, windows, width = lengths[sites.proteins()], windows[sites.proteins()], 2 * width
    ids_bytes = sum(len(id_.encode()) for id_ in sites.ids(worklist)) if sites else int(worklist.id_bounds[-1])
    tensors = {
        "embeddings": Tensor(dtype, (int(offsets[-1]), width)),
        **{name: Tensor(dtype, (num_records, width)) for name in (() if sites else wants[1:])},
        "offsets": Tensor("int64", (num_records + 1,)),
        "id_offsets": Tensor("int64", (num_records + 1,)),
        "lengths": Tensor("int64", (num_records,)),
        "windows": Tensor("int32", (num_records,)),
        **({"site_position": Tensor("int64", (num_records,))} if sites else {}),
        "ids": Tensor("uint8", (ids_bytes,)),
        **({"site_residue": Tensor("uint8", (num_records,))} if sites else {}),
    }
    with WorkingFile.create(partial / ROWS, tensors, metadata) as file:
        file.write("offsets", 0, offsets.astype(np.int64))
        file.write("lengths", 0, lengths.astype(np.int64))
        file.write("windows", 0, windows.astype(np.int32))
        if sites:
            file.write("site_position", 0, sites.in_rows(sites.positions).astype(np.int64))
            file.write("site_residue", 0, sites.in_rows(sites.letters))
            np.savez(partial / SITES, **{name: value for name, value in asdict(sites).items() if value is not None})
        _write_ids(file, sites.ids(worklist) if sites else (id_ for id_, _ in worklist))
        file.sync()


def rows_of(wants: Sequence[str], sites: Sites | None) -> str:
    """What a row stands for: sites, residues or proteins."""
    return "sites" if sites else "residues" if wants[0] == "none" else "proteins"


def _write_ids(file: WorkingFile, ids: Iterator[str]) -> None:
    bounds, texts, first, done = [0], [], 0, 0
    for id_ in ids:
        raw = id_.encode()
        texts.append(raw)
        bounds.append(bounds[-1] + len(raw))
        if len(texts) == 100_000:
            file.write("ids", done, np.frombuffer(b"".join(texts), dtype=np.uint8))
            file.write("id_offsets", first, np.array(bounds[:-1], dtype=np.int64))
            first, done, texts, bounds = first + len(texts), bounds[-1], [], [bounds[-1]]
    file.write("ids", done, np.frombuffer(b"".join(texts), dtype=np.uint8))
    file.write("id_offsets", first, np.array(bounds, dtype=np.int64))


def window_counts(lengths: np.ndarray, limit: int) -> np.ndarray:
    """int32 (P,): the windows of each protein."""
    found = np.ones(len(lengths), dtype=np.int32)
    for index in np.flatnonzero(lengths > limit):
        found[index] = len(windows_of(int(lengths[index]), limit))
    return found


def write_portion(file: WorkingFile, begin: int, arrays: dict[str, list[np.ndarray]], sites: Sites | None) -> None:
    """The vectors of the proteins from `begin` on, by pooling, into their places."""
    if sites:
        for number, (residues_ND, mean_D) in enumerate(zip(arrays["none"], arrays["mean"], strict=True), start=begin):
            here = slice(int(sites.bounds[number]), int(sites.bounds[number + 1]))
            if here.start == here.stop:
                continue
            chosen_SD = residues_ND[sites.positions[here] - 1]
            rows_SD = np.concatenate((chosen_SD, np.broadcast_to(mean_D, chosen_SD.shape)), axis=1)
            places = np.arange(here.start, here.stop) if sites.rows is None else sites.rows[here]
            _write_rows(file, places, rows_SD)
        return
    first, *others = arrays
    if first == "none":
        offset = int(file.read("offsets", begin, begin + 1)[0])
        file.write("embeddings", offset, np.concatenate(arrays["none"]))
    else:
        file.write("embeddings", begin, np.stack(arrays[first]))
    for name in others:
        file.write(name, begin, np.stack(arrays[name]))


def _write_rows(file: WorkingFile, places: np.ndarray, rows_SD: np.ndarray) -> None:
    """Rows in their places, neighbours in one go."""
    if not len(places):
        return
    order = np.argsort(places)
    for run in np.split(order, np.flatnonzero(np.diff(places[order]) != 1) + 1):
        file.write("embeddings", int(places[run[0]]), rows_SD[run])


def read_sites(partial: Path) -> Sites:
    """The sites that `create_rows` was given."""
    with np.load(partial / SITES) as loaded:
        return Sites(**{name: loaded[name] for name in loaded.files})
