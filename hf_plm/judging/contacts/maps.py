"""Predicted contacts as files: for each protein a table or a matrix, and a map to look at.

Dimensions: N residues, P pairs.
"""

import hashlib
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, MaxNLocator

from hf_plm.config import UserError
from hf_plm.files import write_whole
from hf_plm.judging.contacts.predictor import LEAST_SEPARATION, ContactPredictor, check_lengths, windows
from hf_plm.judging.contacts.structures import Structure, holds_structures, read_structures
from hf_plm.judging.plots import COLOURS, figure, save
from hf_plm.lock import locked
from hf_plm.progress import shown
from hf_plm.proteins.fasta import FastaReader, IllegalResidueError, clean

FORMATS = ("csv", "npz")
INDEX, REQUEST = "proteins.csv", "request.json"
BLUE, ORANGE = COLOURS[0], COLOURS[1]
NOT_PREDICTED = "#DDDDDD"
FAINTEST_TOP = 0.25
"""Of the colour scale, at least."""


@dataclass(frozen=True)
class Protein:
    id: str
    residues: bytes
    structure: Structure | None = None


def read_proteins(path: Path) -> list[Protein]:
    """Of a FASTA file, or of structures, with what they show. Raises `UserError` for bad records, naming them."""
    if holds_structures(path):
        structures = read_structures(path)
        check_lengths((f"{path}, {one.id},", len(one.residues)) for one in structures)
        return [Protein(one.id, one.residues, one) for one in structures]
    proteins = []
    reader = FastaReader(path)
    for number, record in enumerate(reader, start=1):
        try:
            residues = clean(record.sequence).residues
        except IllegalResidueError as error:
            raise UserError(f"{path}, record {number} ({record.id}): {error}") from None
        if not residues:
            raise UserError(f"{path}, record {number} ({record.id}), has no residues.")
        proteins.append(Protein(record.id, residues))
    check_lengths(
        (f"{path}, record {number} ({one.id}),", len(one.residues)) for number, one in enumerate(proteins, start=1)
    )
    for note in reader.notes:
        print(f"{path}: {note}")
    return proteins


def write_contacts(
    predictor: ContactPredictor, proteins: list[Protein], out: Path, kind: str = "csv", has_pictures: bool = True
) -> list[str]:
    """A table or matrix and a picture of each protein into the folder `out`; what is to be said of them.

    csv: i, j (1-based, j - i >= 6), probability; npz: probability (N, N), NaN where it was not predicted, and sequence.
    proteins.csv, written last, lists id, residues, files, windows, and pairs not predicted. Each file is written whole
    or not: the same call goes on after any stop. Raises `UserError` for a folder that is finished, that is of another
    model, other proteins or settings, or another's, and above `LONGEST` residues.
    """
    facts = {key: value for key, value in predictor.facts.items() if key != "model"}
    request = {**facts, "format": kind, "pictures": has_pictures, "proteins": _fingerprint(proteins)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        _check_free(out, request)
        lock = locked(out / ".lock", f"predicts contacts into {out}")
    except OSError as error:
        raise UserError(f"{out} cannot be made: {error.strerror}.") from None
    with lock:
        _check_free(out, request)  # again: it may have been another's until now
        for torn in out.glob(".*.tmp") if (out / REQUEST).is_file() else ():  # of a process that was killed
            torn.unlink()
        write_whole(out / REQUEST, json.dumps(request, indent=1).encode())
        named = list(zip(proteins, _file_names([one.id for one in proteins]), strict=True))
        todo = [
            (one, name)
            for one, name in named
            if not all(file.is_file() for file in _files(one, out / name, kind, has_pictures))
        ]
        if len(todo) < len(named):
            print(f"{len(named) - len(todo):,} of {len(named):,} proteins have their contacts in {out} already.")
        for protein, name in shown("predicting contacts", todo, [len(one.residues) for one, _ in todo]):
            map_NN = predictor.probabilities(protein.residues)
            table, *pictures = _files(protein, out / name, kind, has_pictures)
            write_whole(table, _csv(map_NN) if kind == "csv" else _npz(map_NN, protein.residues))
            for picture in pictures:
                drawn = contact_figure(protein.id, map_NN, protein.structure)
                save(drawn, picture, dots_per_inch(len(protein.residues)))
        return _write_index(named, out, kind, has_pictures, predictor.limit)


def _check_free(out: Path, request: dict[str, Any]) -> None:
    """Raises `UserError` for a folder that holds anything but the unfinished contacts of the same request."""
    if (out / INDEX).is_file():
        raise UserError(f"{out} is there already; name another folder with --out, or move it away.")
    path = out / REQUEST
    if not path.is_file():
        if strange := [one.name for one in out.iterdir() if not one.name.startswith(".")]:
            raise UserError(
                f"{out} is there already and holds files that are not of such a command ({min(strange)}); name another "
                "folder with --out."
            )
        return
    try:
        was = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in (*request, *was) if was.get(key) != request.get(key)]
    except (OSError, ValueError, AttributeError, TypeError):
        raise UserError(f"{path} is damaged or cannot be read; remove {out} or name another --out.") from None
    if different:
        key = different[0]
        what = f"with {key} {was.get(key)}, where {request.get(key)} was asked for"
        raise UserError(
            f"{out} holds unfinished contacts {'of other proteins' if key == 'proteins' else what}; name another "
            "folder with --out, or remove it."
        )


def _fingerprint(proteins: list[Protein]) -> str:
    """Of all that the files of a folder are made of, but for the model."""
    digest = hashlib.sha256()
    for one in proteins:
        digest.update(f"{one.id}\n{one.residues.decode()}\n".encode())
        if one.structure is not None:
            digest.update(f"{one.structure.atom} {one.structure.cutoff}\n".encode())
            digest.update(one.structure.pairs_P2.tobytes() + one.structure.is_resolved_N.tobytes())
    return digest.hexdigest()[:16]


def _files(protein: Protein, stem: Path, kind: str, has_pictures: bool) -> list[Path]:
    """Of one protein: the table or matrix and, of one that has a pair to predict, the picture."""
    is_drawn = has_pictures and len(protein.residues) > LEAST_SEPARATION
    return [Path(f"{stem}.{one}") for one in (kind, *(["png"] if is_drawn else []))]


def _write_index(named: list[tuple[Protein, str]], out: Path, kind: str, has_pictures: bool, limit: int) -> list[str]:
    lines = ["id,residues,file,picture,windows,pairs,pairs_not_predicted"]
    num_long = num_short = 0
    for protein, name in named:
        length = len(protein.residues)
        table, *pictures = (file.name for file in _files(protein, out / name, kind, has_pictures))
        num_pairs = max(0, length - LEAST_SEPARATION) * (length - LEAST_SEPARATION + 1) // 2
        num_windows, num_predicted = len(windows(length, limit)), _num_predicted(length, limit)
        num_long += num_windows > 1
        num_short += not num_pairs
        quoted = '"' + protein.id.replace('"', '""') + '"'
        counts = f"{num_windows},{num_predicted},{num_pairs - num_predicted}"
        lines.append(f"{quoted},{length},{table},{''.join(pictures)},{counts}")
    write_whole(out / INDEX, ("\n".join(lines) + "\n").encode())
    notes = [f"Contacts of {len(named):,} protein{'s' * (len(named) != 1)} are in {out}, listed in {INDEX}."]
    if num_long:
        notes.append(
            f"{num_long:,} longer than {limit:,} residues were taken in windows of that length that overlap by half; "
            "pairs that no window holds are not predicted."
        )
    if num_short:
        have = "has" if num_short == 1 else "have"
        notes.append(f"{num_short:,} {have} fewer than {LEAST_SEPARATION + 1} residues, and so no pair to predict.")
    return notes


def _num_predicted(length: int, limit: int) -> int:
    """Pairs of `LEAST_SEPARATION` and more that a window holds."""
    reach_N = np.zeros(length, dtype=np.int64)
    for begin, end in windows(length, limit):
        reach_N[begin:end] = end
    return int(np.maximum(0, reach_N - np.arange(length) - LEAST_SEPARATION).sum())


def dots_per_inch(length: int) -> int:
    """For a map of so many residues: a dot or more for each, up to 2,500 residues."""
    return min(600, max(200, length // 4))


def contact_figure(title: str, map_NN: np.ndarray, structure: Structure | None = None) -> Figure:
    """Probability above the diagonal and, below it, the contacts of the structure where one is known."""
    length = len(map_NN)
    made, (axes,) = figure(5.6, 5.2 if structure else 4.9)
    is_below_NN = np.tri(length, k=-LEAST_SEPARATION, dtype=bool)
    is_shown_NN = is_below_NN.T if structure is not None else is_below_NN | is_below_NN.T
    shown_NN = np.where(is_shown_NN, map_NN, np.nan)
    # A weak model gives 0.05 at most: the scale follows it down, but not so far that noise looks like contacts.
    top = max(FAINTEST_TOP, float(np.nanmax(shown_NN, initial=0.0)))
    colours = LinearSegmentedColormap.from_list("white to blue", ["#FFFFFF", "#9CCBE8", BLUE, "#00243B"])
    # By `data` a pixel is chosen before it is coloured, so that colours of 32 bytes are not made for every pair.
    place: dict[str, Any] = {
        "extent": (0.5, length + 0.5, length + 0.5, 0.5),
        "interpolation": "nearest",
        "interpolation_stage": "data",
    }
    image = axes.imshow(shown_NN, cmap=colours.with_extremes(bad=NOT_PREDICTED), vmin=0, vmax=top, **place)
    handles = [Patch(color=NOT_PREDICTED, label="not predicted")]
    if structure is not None:
        below_NN = is_below_NN & np.logical_and.outer(*[structure.is_resolved_N] * 2)
        truth_NN = np.where(below_NN, structure.contacts_NN().astype(np.float32), np.nan)
        orange = LinearSegmentedColormap.from_list("contacts", ["#FFFFFF", ORANGE])
        axes.imshow(truth_NN, cmap=orange.with_extremes(bad=(0, 0, 0, 0)), vmin=0, vmax=1, **place)
        label = f"structure ({structure.atom.removesuffix('(virtual)')} < {structure.cutoff:g} \u00c5)"
        unknown = [] if structure.is_resolved_N.all() else [Patch(color=NOT_PREDICTED, label="not known")]
        handles = [Patch(color=BLUE, label="model"), Patch(color=ORANGE, label=label), *unknown]
    if structure is not None or np.isnan(map_NN).any():
        made.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    axes.set(xlabel="residue", ylabel="residue", title=title)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(7, integer=True, min_n_ticks=3))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}" if 1 <= value <= length else ""))
    for side in ("top", "right"):
        axes.spines[side].set_visible(True)
    bar = made.colorbar(image, cax=axes.inset_axes((1.03, 0, 0.04, 1)))
    bar.set_label("predicted probability of contact")
    bar.outline.set_linewidth(0.5)
    return made


def _file_names(ids: list[str]) -> Iterator[str]:
    """Names of files for ids: of harmless letters, no two alike, even where case makes no difference."""
    seen: set[str] = set()
    for id_ in ids:
        name = base = re.sub(r"[^\w.-]+", "_", id_)[:100].lstrip(".") or "protein"
        number = 1
        while name.lower() in seen or name.lower() == INDEX.removesuffix(".csv"):
            number += 1
            name = f"{base}_{number}"
        seen.add(name.lower())
        yield name


def _csv(map_NN: np.ndarray) -> bytes:
    with io.BytesIO() as text:
        text.write(b"i,j,probability\n")
        for i, row_N in enumerate(map_NN):  # row by row: of all pairs at once Python's numbers take gigabytes
            near = i + LEAST_SEPARATION
            known = near + np.flatnonzero(np.isfinite(row_N[near:]))
            rows = zip((known + 1).tolist(), row_N[known].tolist(), strict=True)
            text.write("".join(f"{i + 1},{j},{value:.6g}\n" for j, value in rows).encode())
        return text.getvalue()


def _npz(map_NN: np.ndarray, residues: bytes) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, probability=map_NN, sequence=np.array(residues.decode()))
    return buffer.getvalue()
