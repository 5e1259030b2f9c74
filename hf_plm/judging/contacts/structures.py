"""Which residues of a protein touch: read from lists of pairs, or from the coordinates of PDB and mmCIF files.

Two residues are in contact where their C-beta atoms (C-alpha of glycine) are less than 8 A apart, as CASP counts them
and Rao et al. 2021 train and test on (Transformer protein language models are unsupervised structure learners). What
the file lists but has no atom for keeps its place in the numbering and takes part in nothing else.

Dimensions: N residues, P pairs.
"""

import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.proteins.fasta import IllegalResidueError, clean

CUTOFF = 8.0
"""Angstrom, between two C-beta atoms."""
COORDINATES = (".pdb", ".ent", ".cif", ".mmcif")
LISTS = (".jsonl", ".ndjson")
UNKNOWN = "UNK"


@dataclass(frozen=True, eq=False)
class Structure:
    """One chain: its residues, which of them the structure shows, and which touch."""

    id: str
    set: str  # where it is from
    atom: str  # whose distances were measured: CB, CA
    cutoff: float  # angstrom
    residues: bytes  # as `fasta.clean` leaves them
    pairs_P2: np.ndarray  # int64, 0-based, i < j
    is_resolved_N: np.ndarray  # bool

    def contacts_NN(self) -> np.ndarray:
        """bool, symmetric."""
        contacts_NN = np.zeros((len(self.residues), len(self.residues)), dtype=bool)
        contacts_NN[self.pairs_P2[:, 0], self.pairs_P2[:, 1]] = True
        return contacts_NN | contacts_NN.T

    def truth(self) -> tuple[object, ...]:
        """What two structures of one sequence are compared by."""
        return self.atom, self.cutoff, set(map(tuple, self.pairs_P2.tolist())), self.is_resolved_N.tolist()

    @property
    def sha256(self) -> str:
        """Of the residues, the first 16 letters: what tells two proteins apart."""
        return hashlib.sha256(self.residues).hexdigest()[:16]


def holds_structures(path: Path) -> bool:
    """Whether a path is a folder, or a file whose name says that it holds structures."""
    return path.is_dir() or _suffix(path) in (*COORDINATES, *LISTS)


def read_structures(path: Path, sets: Iterable[str] = ()) -> list[Structure]:
    """The chains of a list, of a PDB or mmCIF file, or of all such files of a folder; of `sets` alone where given.

    A list is JSON lines, plain or gzip: id, seq, pairs ([i, j], 0-based) and, where known, set, atom, cutoff (angstrom)
    and unresolved (0-based). Raises `UserError` for what cannot be read, naming file and row.
    """
    if not path.exists():
        raise UserError(f"There are no structures {path}: neither a file nor a folder.")
    if path.is_dir():
        files = sorted(one for one in path.iterdir() if _suffix(one) in COORDINATES)
        if not files:
            raise UserError(f"{path} holds no structures: no file of it ends in {', '.join(COORDINATES)} (or .gz).")
        found = [structure for file in files for structure in _read_coordinates(file, path.name)]
    elif _suffix(path) in LISTS:
        found = _read_list(path)
    elif _suffix(path) in COORDINATES:
        found = _read_coordinates(path, path.name)
    else:
        raise UserError(
            f"{path} is no list of contacts ({', '.join(LISTS)}) and no structure ({', '.join(COORDINATES)})."
        )
    if not found:
        raise UserError(f"{path} has no chain of amino acids.")
    wanted = set(sets)
    if strange := wanted - {one.set for one in found}:
        known = ", ".join(sorted({one.set for one in found}))
        raise UserError(f"{path} has no set {min(strange)!r}; it has {known}.")
    return [one for one in found if not wanted or one.set in wanted]


def without_repeats(structures: Iterable[Structure]) -> tuple[list[Structure], list[Structure], int]:
    """Each sequence of a set once, the first; the repeats; and how many of these have other contacts than the first."""
    kept: dict[tuple[str, bytes], Structure] = {}
    repeats, num_different = [], 0
    for one in structures:
        first = kept.setdefault((one.set, one.residues), one)
        if first is not one:
            repeats.append(one)
            num_different += first.truth() != one.truth()
    return list(kept.values()), repeats, num_different


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return (gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content).decode("utf-8", "replace")
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None


def _read_list(path: Path) -> list[Structure]:
    found = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            found.append(_of_row(json.loads(line)))
        except IllegalResidueError as error:
            raise UserError(f"{path}, row {number}, seq: {error}") from None
        except KeyError as error:
            raise UserError(
                f"{path}, row {number}: the field {error} is missing; each row has id, seq and pairs."
            ) from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{path}, row {number}, is no structure: {error}.") from None
    return found


def _of_row(row: Any) -> Structure:
    if not isinstance(row, dict):
        raise TypeError("an object with id, seq and pairs was expected")
    residues = clean(str(row["seq"])).residues
    length = len(residues)
    pairs_P2 = np.array(row["pairs"]).reshape(-1, 2)
    if len(pairs_P2) and not np.issubdtype(pairs_P2.dtype, np.integer):
        raise ValueError("pairs holds something else than whole numbers")
    pairs_P2 = np.sort(pairs_P2.astype(np.int64), axis=1)
    unresolved = np.array(row.get("unresolved", []), dtype=np.int64)
    for name, places in (("pairs", pairs_P2), ("unresolved", unresolved)):
        if places.size and not 0 <= places.min() <= places.max() < length:
            wrong = int(places.max() if places.max() >= length else places.min())
            raise ValueError(f"{name} names residue {wrong} (0-based) of {length}")
    is_resolved_N = np.ones(length, dtype=bool)
    is_resolved_N[unresolved] = False
    return Structure(
        str(row["id"]),
        str(row.get("set", "")),
        str(row.get("atom", "CB")),
        float(row.get("cutoff", CUTOFF)),
        residues,
        pairs_P2,
        is_resolved_N,
    )


def _read_coordinates(path: Path, set_: str) -> list[Structure]:
    """A structure for each chain of the first model; chains without amino acids, such as DNA, are none."""
    from Bio.PDB.PDBExceptions import PDBConstructionException

    from hf_plm.judging.requirements import require_judge

    require_judge("scipy")
    name = path.name.removesuffix(".gz").rsplit(".", 1)[0]
    is_cif = _suffix(path) in (".cif", ".mmcif")
    try:
        chains, listed = (_parse_cif if is_cif else _parse_pdb)(_text(path), name)
    except (PDBConstructionException, ValueError, KeyError, IndexError, TypeError, StopIteration) as error:
        kind = "mmCIF" if is_cif else "PDB"
        raise UserError(f"{path} cannot be read as {kind}: {type(error).__name__} {error}.") from None
    found = []
    for chain in chains:
        residues = [one for one in chain if _letter(one.get_resname()) and "CA" in one]
        if residues:
            found.append(_of_chain(f"{name}:{chain.id}", set_, residues, listed.get(chain.id, ""), is_cif))
    return found


def _parse_pdb(text: str, name: str) -> tuple[list[Any], dict[str, str]]:
    """The chains, and the sequence of each from SEQRES, where the file has it."""
    from Bio.PDB.PDBParser import PDBParser

    model = next(iter(PDBParser(QUIET=True).get_structure(name, io.StringIO(text))))
    listed: dict[str, str] = {}
    for line in text.splitlines():
        if line.startswith("SEQRES"):
            listed[line[11]] = listed.get(line[11], "") + "".join(_letter(word) or "X" for word in line[19:70].split())
    return list(model), listed


def _parse_cif(text: str, name: str) -> tuple[list[Any], dict[str, str]]:
    """The same; residues are numbered by their place in the sequence, chains named as authors do."""
    from Bio.PDB.MMCIFParser import MMCIFParser

    parser = MMCIFParser(QUIET=True, auth_residues=False)
    model = next(iter(parser.get_structure(name, io.StringIO(text))))
    table = parser._mmcif_dict
    columns = (table.get(f"_pdbx_poly_seq_scheme.{one}", []) for one in ("pdb_strand_id", "seq_id", "mon_id"))
    by_place: dict[str, dict[int, str]] = {}
    for chain, place, residue in zip(*columns, strict=True):
        by_place.setdefault(chain, {}).setdefault(int(place), _letter(residue) or "X")  # the first of alternatives
    return list(model), {chain: "".join(letters.values()) for chain, letters in by_place.items()}


def _letter(residue: str) -> str:
    """Of an amino acid, also a modified one such as MSE; '' of anything else."""
    from Bio.Data.PDBData import protein_letters_3to1_extended

    return "X" if residue == UNKNOWN else protein_letters_3to1_extended.get(residue.strip(), "")


def _of_chain(id_: str, set_: str, residues: list[Any], listed: str, is_numbered: bool) -> Structure:
    from scipy.spatial import KDTree

    letters = "".join(_letter(one.get_resname()) for one in residues)
    numbers = [one.id[1] for one in residues]
    if is_numbered:
        places = [number - 1 for number in numbers]
    else:
        places = _places_in(listed, letters, numbers) or _places_by_number(numbers)
    whole = bytearray(listed.encode() if listed and max(places) < len(listed) else b"X" * (max(places) + 1))
    coordinates_N3 = np.full((len(whole), 3), np.nan)
    for place, letter, residue in zip(places, letters, residues, strict=True):
        whole[place] = ord(letter)
        atom = "CA" if residue.get_resname().strip() == "GLY" else "CB"
        if atom in residue:
            coordinates_N3[place] = residue[atom].coord
    is_resolved_N = np.isfinite(coordinates_N3[:, 0])
    known = np.flatnonzero(is_resolved_N)
    near_P2 = KDTree(coordinates_N3[known]).query_pairs(np.nextafter(CUTOFF, 0), output_type="ndarray")
    pairs_P2 = np.sort(known[near_P2].reshape(-1, 2), axis=1)
    return Structure(id_, set_, "CB", CUTOFF, clean(whole.decode()).residues, pairs_P2, is_resolved_N)


def _places_in(listed: str, letters: str, numbers: list[int]) -> list[int]:
    """The place of each residue in SEQRES, stretch by stretch of consecutive numbers; [] where they do not fit in."""
    breaks = [index for index in range(1, len(numbers)) if numbers[index] - numbers[index - 1] not in (0, 1)]
    places: list[int] = []
    for begin, end in zip([0, *breaks], [*breaks, len(numbers)], strict=True):
        least = places[-1] + 1 if places else 0
        # A short stretch may fit in several places: the one that the numbers tell, if it fits there.
        by_number = least + max(0, numbers[begin] - numbers[begin - 1] - 1) if begin else 0
        if listed.startswith(letters[begin:end], by_number):
            place = by_number
        else:
            place = listed.find(letters[begin:end], least)
        if place < 0:
            return []
        places += range(place, place + end - begin)
    return places


def _places_by_number(numbers: list[int]) -> list[int]:
    """Places by the differences of the residues' numbers, at least one each (insertions share a number)."""
    return np.cumsum([0, *(max(1, step) for step in np.diff(numbers))]).tolist()
