"""Deep mutational scans: a whole benchmark of measured variants, scored assay by assay, resumable.

Two layouts are read. ProteinGym's: `DMS_substitutions.csv` and a CSV per assay. And one of two tables: `dms_assays`
(assay, uniprot, selection, binarization_cutoff, wt_sequence) and `dms_single` (assay, mutant, score).

The scores of each assay are a CSV in the output folder, whole or not there. The same command goes on after any stop;
metrics are always computed from these files, so that a stopped run gives what an unstopped one gives.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from hf_plm.config import UserError
from hf_plm.files import write_whole
from hf_plm.judging.findings import home, write_findings
from hf_plm.judging.requirements import require_judge
from hf_plm.judging.scores.agreement import METRICS, averages, blosum62, metrics
from hf_plm.judging.scores.marginals import num_residues, num_split, score_variants
from hf_plm.judging.scores.variants import Table, Variant, find_variants, read_table, write_table
from hf_plm.lock import locked
from hf_plm.models.masked_lm import MaskedLM
from hf_plm.progress import Progress
from hf_plm.proteins.fasta import IllegalResidueError, clean

REFERENCE = "DMS_substitutions.csv"
TABLES = ("dms_assays", "dms_single")
SCORE = "hf_plm_score"
SCORE_COLUMNS = ["mutant", "DMS_score", "DMS_score_bin", SCORE]
REQUEST = "request.json"

# The commonest `coarse_selection_type` of each `selection_type` in ProteinGym's reference_files/DMS_substitutions.csv,
# names in lower case; an empty name is most often OrganismalFitness there. What is not here keeps its name.
COARSE = {
    "growth": "OrganismalFitness",
    "growth (antitoxin neutralization of pare3)": "OrganismalFitness",
    "amp resistance": "OrganismalFitness",
    "amoxicillin resistance": "OrganismalFitness",
    "antibiotics resistance": "OrganismalFitness",
    "inhibitor resistance": "OrganismalFitness",
    "complementation": "OrganismalFitness",
    "": "OrganismalFitness",
    "activity": "Activity",
    "auto-ubiquitination": "Activity",
    "facs": "Activity",
    "flow cytometry": "Activity",
    "fluorescence": "Activity",
    "lipid phosphatase activity": "Activity",
    "receptor activity": "Activity",
    "toxin activity": "Activity",
    "voltage": "Activity",
    "binding": "Binding",
    "protein stability": "Expression",
    "protein abundance": "Expression",
    "aggregation": "Stability",
    "cdna display proteolysis": "Stability",
    "thermostability": "Stability",
}


@dataclass(frozen=True)
class Assay:
    """One deep mutational scan: of which protein, and the table of its variants, read when it is asked for."""

    name: str
    uniprot: str
    selection: str  # by which ProteinGym averages: its coarse type
    residues: bytes
    cutoff: float | None  # variants above it are fit; none: above the median, or as the table says
    table: Callable[[], Table]

    def read(self) -> "Measured":
        """Raises `UserError` where the table does not fit the protein."""
        table = self.table()
        mutants, variants = find_variants(table, self.residues)
        return Measured(mutants, variants, *measurements(table, self.cutoff))


class Measured(NamedTuple):
    mutants: list[str]
    variants: list[Variant]
    scores_V: np.ndarray
    is_fit_V: np.ndarray


def measurements(table: Table, cutoff: float | None = None) -> tuple[np.ndarray, np.ndarray]:
    """fp64 and bool (V,): what was measured of each variant, and whether it is fit. Raises `UserError`."""
    column = table.find("DMS_score", "score")
    if column is None:
        raise UserError(f"{table.path} has no column DMS_score, nor score; its columns are {', '.join(table.header)}.")
    scores_V = table.numbers(column)
    column = table.find("DMS_score_bin")
    if column is not None:
        return scores_V, table.numbers(column) > 0
    return scores_V, scores_V > (np.median(scores_V) if cutoff is None else cutoff)


def find_assays(folder: Path, reference: Path | None = None) -> tuple[list[Assay], list[str]]:
    """The assays of a folder in either layout, and the names of those in ProteinGym's reference that have no file.

    `reference` names the reference where the folder does not hold it; beside two tables it gives their assays
    ProteinGym's types of selection. Raises `UserError` where nothing of the kind is there.
    """
    if not folder.is_dir():
        what = f"{folder} is a file" if folder.exists() else f"There is no folder {folder}"
        raise UserError(f"{what}; --dms takes a folder with {REFERENCE} and a CSV of each assay.")
    rows = _reference(reference or folder / REFERENCE) if reference or (folder / REFERENCE).is_file() else []
    tables = [next((path for path in sorted(folder.glob(f"{name}.*")) if path.is_file()), None) for name in TABLES]
    if tables[0] and tables[1]:
        return _of_tables(tables[0], tables[1], {row["DMS_id"]: row["coarse_selection_type"] for row in rows}), []
    if not rows:
        raise UserError(
            f"{folder} has no {REFERENCE} (ProteinGym's reference_files; --reference names one elsewhere), nor "
            f"{TABLES[0]}.tsv.gz and {TABLES[1]}.tsv.gz."
        )
    found, missing = [], []
    for row in rows:
        path = folder / row["DMS_filename"]
        if not path.is_file():
            missing.append(row["DMS_id"])
            continue
        where = f"target_seq of {row['DMS_id']}"
        found.append(
            Assay(
                row["DMS_id"],
                row["UniProt_ID"],
                row["coarse_selection_type"],
                _residues(row["target_seq"], where),
                _cutoff(row, "DMS_id", "DMS_binarization_cutoff"),
                lambda path=path: read_table(path),  # type: ignore[misc]
            )
        )
    if not found:
        raise UserError(f"{folder} holds none of the {len(rows):,} files that the reference names ({missing[0]} ...).")
    return found, missing


def _reference(path: Path) -> list[dict[str, str]]:
    rows = _as_dicts(read_table(path))
    needed = {"DMS_id", "DMS_filename", "UniProt_ID", "target_seq", "coarse_selection_type"}
    if missing := sorted(needed - rows[0].keys()):
        raise UserError(f"{path} should be ProteinGym's {REFERENCE}, but lacks {', '.join(missing)}.")
    _check_names(path, [row["DMS_id"] for row in rows])
    return rows


def _check_names(path: Path, names: Sequence[str]) -> None:
    """Raises `UserError` for names of assays that are no names of files, or of one file."""
    seen = {"summary"}  # the result's own
    for name in names:
        if not name.strip() or name.startswith(".") or len(name) > 200 or {"/", "\\", "\0"} & set(name):
            raise UserError(f"{path}: {name[:60]!r} cannot be the name of an assay, since its scores are a file of it.")
        if name.lower() in seen:
            raise UserError(f"{path}: the assay {name} is there twice, or has the name of another file (summary).")
        seen.add(name.lower())


def _as_dicts(table: Table) -> list[dict[str, str]]:
    return [dict(zip(table.header, row, strict=True)) for row in table.rows]


def _of_tables(assays_path: Path, variants_path: Path, coarse: dict[str, str]) -> list[Assay]:
    rows = _as_dicts(read_table(assays_path))
    if missing := sorted({"assay", "uniprot", "selection", "wt_sequence"} - rows[0].keys()):
        raise UserError(f"{assays_path} lacks {', '.join(missing)}.")
    _check_names(assays_path, [row["assay"] for row in rows])
    table = read_table(variants_path)
    column = table.find("assay")
    if column is None:
        raise UserError(f"{variants_path} lacks a column assay.")
    places: dict[str, list[int]] = {row["assay"]: [] for row in rows}
    for index, row in enumerate(table.rows):
        if row[column] not in places:
            raise UserError(
                f"{variants_path}, line {table.lines[index]}: {row[column]} is no assay of {assays_path.name}."
            )
        places[row[column]].append(index)

    def part(name: str) -> Table:
        chosen = places[name]
        return Table(
            table.path, table.delimiter, table.header, [table.rows[i] for i in chosen], [table.lines[i] for i in chosen]
        )

    found = []
    for assay in rows:
        name = assay["assay"]
        if not places[name]:
            raise UserError(f"{variants_path} has no variant of {name}.")
        selection = coarse.get(name) or COARSE.get(assay["selection"].lower(), assay["selection"])
        residues = _residues(assay["wt_sequence"], f"wt_sequence of {name}")
        found.append(
            Assay(
                name,
                assay["uniprot"],
                selection,
                residues,
                _cutoff(assay, "assay", "binarization_cutoff"),
                lambda name=name: part(name),  # type: ignore[misc]
            )
        )
    return found


def _cutoff(row: dict[str, str], name: str, column: str) -> float | None:
    text = row.get(column, "").strip()
    try:
        cutoff = float(text) if text else None
    except ValueError:
        cutoff = math.nan
    if cutoff is not None and not math.isfinite(cutoff):
        raise UserError(f"{column} of {row[name]} should be a number, not {text!r}.")
    return cutoff


def _residues(sequence: str, where: str) -> bytes:
    try:
        return clean(sequence).residues
    except IllegalResidueError as error:
        raise UserError(f"{where}: {error}") from None


def run_dms(
    model: MaskedLM, where: str, name: str, assays: Sequence[Assay], missing: list[str], method: str, out: Path
) -> dict[str, Any]:
    """Score every assay that has no scores in `out` yet, then judge all of them; returns what the findings hold.

    `where` is the model's folder or name, `name` the benchmark's; `missing` is what `find_assays` found no file for.
    Raises `UserError` before anything is computed where a table does not fit, or `out` holds scores of another model
    or method.
    """
    require_judge("scipy", "sklearn")
    if missing:
        print(f"Left out, since the folder has no file of them: {len(missing):,} of the reference ({missing[0]} ...)")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = locked(out / ".lock", f"scores into {out}")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}.") from None
    with lock:
        _claim(out, {"method": method, **{key: value for key, value in model.facts.items() if key != "model"}})
        todo = [assay for assay in assays if not _scores_path(out, assay).is_file()]
        if len(todo) < len(assays):
            print(f"{len(assays) - len(todo):,} of {len(assays):,} assays have their scores already.")
        total = num_forwards = 0
        for assay in todo:  # what is wrong with any of them is told now
            num = num_residues(assay.residues, assay.read().variants, method, model.limit)
            total, num_forwards = total + num, num_forwards + num // min(len(assay.residues), model.limit)
        if todo:
            print(f"{len(todo):,} assays, {method}: {num_forwards:,} forward passes", flush=True)
        with Progress(f"{len(todo):,} assays", total) as progress:
            for assay in todo:
                _score(model, assay, method, _scores_path(out, assay), progress)
        rows = [_judge(assay, _scores_path(out, assay), method, model.limit) for assay in assays]
        plain = {"dms": name, "method": method, "missing": missing, **summarize(rows), "assays": rows}
        write_table(out / "summary.csv", list(rows[0]), [list(row.values()) for row in rows])
    paths = [path for path in (out / "findings.json", home(where, "dms", f"{name}-{method}")) if path is not None]
    for path in paths:
        write_findings(path, "dms", [model.facts], plain)
    print("\n".join(f"Kept in {path}" for path in paths))
    return plain


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The averages of every metric, of the model and of BLOSUM62."""
    names = [*METRICS, *(f"blosum62_{metric}" for metric in METRICS)]
    return {"averages": {metric: averages(rows, metric) for metric in names}}


def _claim(out: Path, request: dict[str, str]) -> None:
    """Take a folder for one model and method, or find that it is theirs."""
    path = out / REQUEST
    if not path.is_file():
        if strange := [one.name for one in out.iterdir() if not one.name.startswith(".")]:
            raise UserError(f"{out} holds files that are no scores of --dms ({min(strange)}); name another --out.")
        write_whole(path, json.dumps(request, indent=1).encode())
        return
    try:
        was = json.loads(path.read_text(encoding="utf-8"))
        different = [key for key in sorted(was.keys() | request.keys()) if was.get(key) != request.get(key)]
    except (OSError, ValueError, AttributeError):
        raise UserError(f"{path} is damaged or cannot be read; remove {out} or name another --out.") from None
    if different:
        key = different[0]
        raise UserError(
            f"{out} holds scores of another {key} ({was.get(key)}, now {request.get(key)}); name another --out, or "
            "remove the folder."
        )


def _scores_path(out: Path, assay: Assay) -> Path:
    return out / f"{assay.name}.csv"


def _score(model: MaskedLM, assay: Assay, method: str, path: Path, progress: Progress) -> None:
    measured = assay.read()
    scores_V = score_variants(model, assay.residues, measured.variants, method, progress.count)
    columns = (
        measured.mutants,
        measured.scores_V.tolist(),
        measured.is_fit_V.astype(int).tolist(),
        scores_V.round(6).tolist(),
    )
    write_table(path, SCORE_COLUMNS, zip(*columns, strict=True))


def _judge(assay: Assay, path: Path, method: str, limit: int) -> dict[str, Any]:
    """An assay's row of the result, from its scores as they were written."""
    measured = assay.read()
    table = read_table(path)
    mutants = [row[0] for row in table.rows]
    if table.header != SCORE_COLUMNS or mutants != measured.mutants or (table.numbers(1) != measured.scores_V).any():
        raise UserError(f"{path} is of other variants than {assay.name} has now; remove it to have it scored again.")
    baseline = metrics(blosum62(measured.variants), measured.scores_V, measured.is_fit_V)
    return {
        "assay": assay.name,
        "uniprot": assay.uniprot,
        "selection": assay.selection,
        "residues": len(assay.residues),
        "variants": len(mutants),
        "split": num_split(assay.residues, measured.variants, method, limit),
        **metrics(table.numbers(3), measured.scores_V, measured.is_fit_V),
        **{f"blosum62_{metric}": value for metric, value in baseline.items()},
    }


class Drawn(NamedTuple):
    """Some variants of an assay, and what was measured of them."""

    assay: Assay
    variants: list[Variant]
    scores_V: np.ndarray


def read_quick(assays: Sequence[Assay], per_assay: int, seed: int = 0) -> list[Drawn]:
    """`per_assay` variants of each, read at once, for `quick_dms`; always the same ones for a seed.

    Raises `UserError` where a table does not fit its protein, or the extra `judge` is missing.
    """
    require_judge("scipy", "sklearn")
    drawn = []
    for assay in assays:
        measured = assay.read()
        size = min(per_assay, len(measured.variants))
        chosen_V = np.sort(np.random.default_rng(seed).choice(len(measured.variants), size, replace=False))
        drawn.append(Drawn(assay, [measured.variants[index] for index in chosen_V], measured.scores_V[chosen_V]))
    return drawn


def quick_dms(model: MaskedLM, drawn: Sequence[Drawn], method: str = "wild-type") -> dict[str, float]:
    """Averages on what `read_quick` has drawn: for a look during training.

    `dms_spearman`, its `dms_blosum62_spearman`, and `dms_spearman/ASSAY`. By `wild-type` an assay costs one forward
    pass, or one for each mutated position where the protein is longer than the model takes.
    """
    rows, found = [], {}
    for assay, variants, measured_V in drawn:
        row: dict[str, Any] = {"uniprot": assay.uniprot, "selection": assay.selection}
        for prefix, scores_V in (
            ("", score_variants(model, assay.residues, variants, method)),
            ("blosum62_", blosum62(variants)),
        ):
            row[f"{prefix}spearman"] = metrics(scores_V, measured_V)["spearman"]
        rows.append(row)
        found[f"dms_spearman/{assay.name}"] = row["spearman"]
    return {f"dms_{name}": averages(rows, name)["mean"] for name in ("spearman", "blosum62_spearman")} | found
