"""What `hf-plm contacts` does: predict for a file of proteins, fit the contact head, say how good it is."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.files import check_writable, keep_inputs
from hf_plm.judging.contacts.fit import (
    INVERSE_PENALTY,
    NUM_PROTEINS,
    card_of,
    check_apart,
    fit_regression,
    fitted_on,
    split,
    store,
)
from hf_plm.judging.contacts.maps import FORMATS, contact_figure, dots_per_inch, read_proteins, write_contacts
from hf_plm.judging.contacts.precision import as_table, evaluate_contacts, means, verdict, with_interval
from hf_plm.judging.contacts.predictor import ContactPredictor, check_lengths, open_contact_predictor
from hf_plm.judging.contacts.structures import Structure, read_structures, without_repeats
from hf_plm.judging.findings import home, write_findings
from hf_plm.judging.plots import save
from hf_plm.judging.requirements import require_judge
from hf_plm.models.locate import locate

EXPORT = Path("exports") / "contacts"
"""In a run's folder: its model with a fitted contact head."""


@dataclass(frozen=True)
class Judged:
    """Structures to fit on, to judge by, or both."""

    model: str
    fit: Path | None = None
    evaluate: Path | None = None
    sets: tuple[str, ...] = ()
    num_proteins: int = NUM_PROTEINS
    seed: int = 0
    out: Path | None = None  # the new model's folder; without `fit` the file of the findings
    device: str = "auto"


def predict_contacts(
    model: str, proteins: Path, out: Path, kind: str = "csv", has_pictures: bool = True, device: str = "auto"
) -> None:
    """Contacts of each protein of a FASTA file, or of structures, into the folder `out`; see `write_contacts`."""
    if kind not in FORMATS:
        raise UserError(f"--format is one of {', '.join(FORMATS)}, not {kind!r}.")
    found = read_proteins(proteins)
    predictor = open_contact_predictor(model, device)
    predictor.require_fitted()
    for note in write_contacts(predictor, found, out, kind, has_pictures):
        print(note)


def fit_contacts(job: Judged) -> Path:
    """Fits the head on some of `job.fit`, stores it in a new folder, judges it on the others or on `job.evaluate`."""
    require_judge("scipy", "sklearn")
    assert job.fit is not None
    out = _place(job)
    if job.num_proteins < 1:
        raise UserError(f"--proteins is a number from 1, not {job.num_proteins}.")
    structures = _read(job.fit, job.sets)
    given = _read(job.evaluate, job.sets) if job.evaluate else None
    predictor = open_contact_predictor(job.model, job.device)
    fitted, others = split(structures, job.num_proteins, job.seed, predictor.limit)
    kept = {id(one) for one in fitted + others}
    alike = [one.id for one in structures if id(one) not in kept] if given is None else []
    tested = others if given is None else given
    check_apart(fitted, tested)
    regression = fit_regression(predictor, fitted)
    store(predictor, regression, job.model, out)
    print(
        f"Fitted on {len(fitted)} proteins of {job.fit} (seed {job.seed}; {describe(fitted)}): "
        f"{regression.num_used} of {predictor.num_maps} attention maps used. The model is in {out}."
    )
    if not regression.num_used:
        print(
            "None of the maps tells contacts from other pairs, on these proteins: the head says the same of all pairs."
        )
    if alike:
        print(f"{len(alike)} that share a sequence or an id with one of them are left out of the evaluation.")
    how = {
        "structures": job.fit.name,
        "seed": job.seed,
        "penalty": "l1",
        "C": INVERSE_PENALTY,
        "proteins": [one.id for one in fitted],
        "num_pairs": regression.num_pairs,
        "maps": predictor.num_maps,
        "maps_used": regression.num_used,
    }
    if tested:
        name = (job.evaluate or job.fit).name
        path = home(job.model, "contacts", _stem(name, job.sets)) or out.with_name(f"{out.name}-contacts.json")
        _judge(predictor, tested, name, path, {"fit": how, "left_out": alike})
    else:
        print("No protein is left to judge it by: give more structures, or --evaluate OTHERS.")
    return out


def judge_contacts(job: Judged) -> Path | None:
    """Judges a model's contact head by `job.evaluate`, without the proteins that its card says it was fitted on."""
    require_judge("scipy", "sklearn")
    assert job.evaluate is not None
    if job.out and job.out.suffix != ".json":
        raise UserError(f"--out names a file that ends in .json for what --evaluate finds, not {job.out}.")
    if job.out:
        keep_inputs([job.evaluate], job.out, job.out.with_suffix(".png"))
        check_writable(job.out)
    structures = _read(job.evaluate, job.sets)
    predictor = open_contact_predictor(job.model, job.device)
    predictor.require_fitted()
    seen = fitted_on(card_of(job.model))
    tested = [one for one in structures if one.sha256 not in seen]
    if len(tested) < len(structures):
        print(
            f"{len(structures) - len(tested)} of {len(structures)} proteins are left out: the model's card names them "
            "among those that its contact head was fitted on."
        )
    if not tested:
        raise UserError(f"The contact head of {job.model} was fitted on all proteins of {job.evaluate}; give others.")
    path = job.out or home(job.model, "contacts", _stem(job.evaluate.name, job.sets))
    left_out = [one.id for one in structures if one.sha256 in seen]
    _judge(predictor, tested, job.evaluate.name, path, {"fit": None, "left_out": left_out})
    return path


def _read(path: Path, sets: tuple[str, ...]) -> list[Structure]:
    structures = read_structures(path, sets)
    check_lengths((f"{path}, {one.id},", len(one.residues)) for one in structures)
    return structures


def _judge(
    predictor: ContactPredictor, structures: list[Structure], name: str, path: Path | None, more: dict[str, Any]
) -> None:
    """Prints the table and keeps the findings, with the map of the protein that stands in the middle by its P@L."""
    structures, repeats, num_different = without_repeats(structures)
    if repeats:
        others = f", {num_different:,} with other contacts than the first, which counts" if num_different else ""
        what = "repeat of a sequence of its set is" if len(repeats) == 1 else "repeats of a sequence of their set are"
        print(f"{len(repeats):,} {what} left out{others}.")
    rows = evaluate_contacts(predictor, structures)
    found = {"all": means(rows)}
    kinds = sorted({one.set for one in structures})
    if len(kinds) > 1:
        found |= {kind: means([row for row in rows if row["set"] == kind]) for kind in kinds}
    print(
        f"\n{predictor.facts['model']} on {len(rows)} protein{'s' * (len(rows) != 1)} of {name}: {describe(structures)}"
    )
    print("Precision, mean over proteins (95% interval).\n")
    print(as_table(found["all"]))
    for kind in kinds if len(kinds) > 1 else ():
        chance = found[kind]["long chance"]["mean"]
        print(f"  {kind or 'no set'}, long range: P@L {with_interval(found[kind]['long P@L'])}, chance {chance:.3f}")
    print(f"\n{verdict(found['all'])}")
    if missing := sum(row["not_predicted"] for row in rows):
        print(f"{missing:,} pairs farther apart than a window of {predictor.limit:,} residues were not predicted.")
    if path is None:
        print("--out FILE.json keeps these numbers, protein by protein.")
        return
    middle = sorted(range(len(rows)), key=lambda index: np.nan_to_num(rows[index]["long P@L"], nan=-1.0))[
        len(rows) // 2
    ]
    example = structures[middle]
    precision = rows[middle]["long P@L"]
    title = f"{example.id}: long-range P@L {precision:.2f}" if np.isfinite(precision) else example.id
    picture, dots = path.with_suffix(".png"), dots_per_inch(len(example.residues))
    save(contact_figure(title, predictor.probabilities(example.residues), example), picture, dots)
    plain = {
        "structures": name,
        "sets": _kinds(structures),
        "means": found,
        "verdict": verdict(found["all"]),
        "example": {"id": example.id, "picture": picture.name},
        **more,
        "repeats": [one.id for one in repeats],
        "rows": rows,
    }
    write_findings(path, "contacts", [predictor.facts], plain)
    print(f"Protein by protein: {path}; the map of {example.id}, in the middle by its P@L: {picture}")


def describe(structures: list[Structure]) -> str:
    """Sets, atoms and cutoffs, such as `40 of ts50 (CB < 8 A)`."""
    return "; ".join(
        f"{one['num_proteins']} of {one['set'] or 'no set'} ({one['atom']} < {one['cutoff']:g} A)"
        for one in _kinds(structures)
    )


def _kinds(structures: list[Structure]) -> list[dict[str, Any]]:
    keys = [(one.set, one.atom, one.cutoff) for one in structures]
    return [
        {"set": key[0], "atom": key[1], "cutoff": key[2], "num_proteins": keys.count(key)} for key in sorted(set(keys))
    ]


def _place(job: Judged) -> Path:
    """The new model's folder, which is not there yet."""
    folder = locate(job.model)
    is_run = (Path(job.model).expanduser() / "hub" / "config.json").is_file()
    if job.out is None and not is_run:
        raise UserError(f"Say where to write: hf-plm contacts {job.model} --fit {job.fit} --out FOLDER.")
    out = job.out or Path(job.model).expanduser() / EXPORT
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} is the model itself, which stays as it is; name another folder with --out.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already; name another folder with --out, or move it away.")
    return out


def _stem(name: str, sets: tuple[str, ...]) -> str:
    """What findings are called: the file's name without its ending, and the sets of it."""
    return "-".join([name.removesuffix(".gz").rsplit(".", 1)[0], *sorted(sets)])
