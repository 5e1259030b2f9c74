"""`hf-plm score`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_plm.cli.process import quick_imports
from hf_plm.config import UserError
from hf_plm.files import check_writable, keep_inputs

if TYPE_CHECKING:
    from hf_plm.models.masked_lm import MaskedLM

METHODS = ("masked", "random-masks", "wild-type", "pseudo-likelihood")
"""As in hf_plm.judging.scores.marginals, which imports torch."""
SPREADSHEETS = (".xlsx", ".xls", ".ods", ".parquet")


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    score = commands.add_parser(
        "score",
        help="score variants of proteins without any training",
        description="How fit a masked language model thinks variants are: log-ratios to the wild type, in nats, higher "
        "is fitter. Of a table, of a benchmark of measured variants, or of every substitution of a protein.",
    )
    score.add_argument("model", metavar="MODEL", help="a folder, a finished run, or a name on the Hub")
    what = score.add_mutually_exclusive_group(required=True)
    what.add_argument("--variants", type=Path, help="CSV or TSV with a column of mutants, such as A42G or A42G:L50P")
    what.add_argument("--dms", type=Path, metavar="FOLDER", help="ProteinGym's assays: every one; the same goes on")
    what.add_argument("--scan", type=Path, metavar="FASTA", help="every substitution: a table and a heat map")
    score.add_argument("--wild-type", type=Path, metavar="FASTA", help="the protein that --variants are of")
    score.add_argument("--method", choices=METHODS, default="masked", help="where probabilities come from (masked)")
    score.add_argument("--offset", type=int, help="how far positions of --variants are ahead of the wild type's (0)")
    score.add_argument("--mutant-column", metavar="NAME", help="column of mutants (mutant, variant, hgvs or the like)")
    score.add_argument("--reference", type=Path, metavar="CSV", help="of --dms: DMS_substitutions.csv (in its folder)")
    score.add_argument(
        "--out",
        type=Path,
        help="file to write, of --dms and several proteins a folder (variant_scores.csv, dms_scores, scan.csv, scan)",
    )
    score.add_argument("--precision", default="auto", help="of products: fp32, bf16, fp16 (fp32, on GPUs bf16)")
    score.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (the GPU where there is one)")
    score.add_argument("--threads", type=int, help="CPU cores to use (all)")
    score.set_defaults(run=_run)


def _run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    _check(parsed)
    with quick_imports():
        from hf_plm.models.masked_lm import open_masked_lm

    def open_model() -> "MaskedLM":
        return open_masked_lm(parsed.model, precision=parsed.precision, device=parsed.device, threads=parsed.threads)

    if parsed.variants:
        _score_table(parsed, open_model)
    elif parsed.dms:
        _score_benchmark(parsed, open_model)
    else:
        _scan(parsed, open_model)


def _check(parsed: argparse.Namespace) -> None:
    """What can be said of the flags before anything is opened."""
    if parsed.variants and not parsed.wild_type:
        raise UserError("--variants needs --wild-type, a FASTA file with the protein that they are variants of.")
    for name in ("wild_type", "offset", "mutant_column"):
        if getattr(parsed, name) is not None and not parsed.variants:
            raise UserError(f"--{name.replace('_', '-')} goes with --variants.")
    if parsed.reference and not parsed.dms:
        raise UserError("--reference goes with --dms.")
    if parsed.scan and parsed.method == "pseudo-likelihood":
        raise UserError(
            "--scan takes --method masked, random-masks or wild-type: by pseudo-likelihood each of 19 substitutions of "
            "each residue would take as many forward passes as the protein has residues."
        )


def _check_outputs(parsed: argparse.Namespace, *written: Path) -> None:
    """Raises `UserError` where one of the paths to write is one of those to read, or cannot be written."""
    keep_inputs([parsed.variants, parsed.wild_type, parsed.scan, parsed.dms, parsed.reference], *written)
    for path in written:
        check_writable(path)
        if path.suffix.lower() in SPREADSHEETS:
            raise UserError(
                f"Tables are written as CSV or TSV, which {path.suffix} files are not; name {path.stem}.csv."
            )


def _score_table(parsed: argparse.Namespace, open_model: Any) -> None:
    from hf_plm.judging.findings import home, write_findings
    from hf_plm.judging.requirements import require_judge
    from hf_plm.judging.scores.dms import SCORE
    from hf_plm.judging.scores.marginals import num_residues, num_split, score_variants
    from hf_plm.judging.scores.variants import find_variants, read_table, read_wild_type, write_table
    from hf_plm.progress import Progress

    out = parsed.out or Path("variant_scores.csv")
    _check_outputs(parsed, out)
    protein, residues = read_wild_type(parsed.wild_type)
    table = read_table(parsed.variants)
    if table.find(SCORE) is not None:
        raise UserError(f"{table.path} has a column {SCORE} already; rename it or take it out.")
    _, variants = find_variants(table, residues, offset=parsed.offset or 0, mutant_column=parsed.mutant_column)
    column, is_fit = table.find("DMS_score"), table.find("DMS_score_bin")
    if column is not None:
        require_judge("scipy", "sklearn")
        measured_V = table.numbers(column, may_lack=True)
        fit_V = None if is_fit is None else table.numbers(is_fit, may_lack=True)
    model = open_model()
    total = num_residues(residues, variants, parsed.method, model.limit)
    num_forwards = total // min(len(residues), model.limit)
    print(
        f"{len(variants):,} variants of {protein} ({len(residues):,} residues), {parsed.method}: {num_forwards:,} "
        f"forward pass{'' if num_forwards == 1 else 'es'}",
        flush=True,
    )
    with Progress(f"{num_forwards:,} forward passes", total) as progress:
        scores_V = score_variants(model, residues, variants, parsed.method, progress.count)
    split = num_split(residues, variants, parsed.method, model.limit)
    if split:
        print(f"Seen in more than one window of {model.limit:,} residues: {split:,} variants")
    plain: dict[str, Any] = {
        "protein": protein,
        "residues": len(residues),
        "method": parsed.method,
        "variants": len(variants),
        "table": parsed.variants.name,
        "split": split,
    }
    rows = [[*row, score] for row, score in zip(table.rows, scores_V.round(6).tolist(), strict=True)]
    write_table(out, [*table.header, SCORE], rows, table.delimiter)
    print(f"Written to {out}")
    if column is not None:
        plain |= _agreement(parsed.model, scores_V, variants, measured_V, fit_V)
    name = f"{parsed.variants.name.split('.')[0]}-{protein}-{parsed.method}"
    if path := home(parsed.model, "score", name):
        write_findings(path, "score", [model.facts], plain)
        print(f"Kept in {path}")


def _agreement(name: str, scores_V: Any, variants: Any, measured_V: Any, fit_V: Any) -> dict[str, Any]:
    """Print how scores and BLOSUM62 agree with what was measured, where it was; for the findings."""
    import numpy as np

    from hf_plm.judging.scores.agreement import METRICS, agreement_intervals, blosum62, metrics

    has_V = np.isfinite(measured_V) if fit_V is None else np.isfinite(measured_V) & np.isfinite(fit_V)
    if not has_V.all():
        print(f"Left out of what follows, without a measurement: {(~has_V).sum():,} of {len(has_V):,} rows")
    fit_V = None if fit_V is None else fit_V[has_V] > 0
    substitutions_V = blosum62(variants)
    model, baseline = (metrics(one[has_V], measured_V[has_V], fit_V) for one in (scores_V, substitutions_V))
    lines = [
        [title, *(found[metric] for metric in METRICS)] for title, found in ((name, model), ("BLOSUM62", baseline))
    ]
    print("\n" + _table("", lines, METRICS))
    places_V = np.array(["+".join(str(one.place) for one in variant) for variant in variants])
    own, above = agreement_intervals(scores_V[has_V], substitutions_V[has_V], measured_V[has_V], places_V[has_V])
    verdict = "above" if above.low > 0 else "below" if above.high < 0 else "not shown to be above or below"
    print(f"\nSpearman {own}, less BLOSUM62's {above:+}: {verdict} it (95%, bootstrap over positions)\n")
    found = {"metrics": model, "blosum62": baseline, "spearman": own.plain(), "above_blosum62": above.plain()}
    return {"measured": int(has_V.sum()), **found}


def _score_benchmark(parsed: argparse.Namespace, open_model: Any) -> None:
    from hf_plm.judging.scores.agreement import METRICS
    from hf_plm.judging.scores.dms import find_assays, run_dms

    out = parsed.out or Path("dms_scores")
    keep_inputs([parsed.dms, parsed.reference], out)
    assays, missing = find_assays(parsed.dms, parsed.reference)
    found = run_dms(open_model(), parsed.model, parsed.dms.resolve().name, assays, missing, parsed.method, out)
    rows = [
        [row["assay"], row["variants"], *(row[metric] for metric in METRICS), row["blosum62_spearman"]]
        for row in found["assays"]
    ]
    print("\n" + _table("assay", rows, ("variants", *METRICS, "BLOSUM62")) + "\n")
    averages = found["averages"]
    names = list(averages["spearman"]["by_selection"])
    pick = [*METRICS, "blosum62_spearman"]
    rows = [[name, *(averages[metric]["by_selection"].get(name, float("nan")) for metric in pick)] for name in names]
    rows.append(["average", *(averages[metric]["mean"] for metric in pick)])
    rows.append(["standard error", *(averages[metric]["standard_error"] for metric in pick)])
    print(_table("average by selection", rows, (*METRICS, "BLOSUM62")))
    print("\nBLOSUM62 is the Spearman of that matrix. Means over assays of a protein, over proteins, over selections.")
    print(f"Written to {out}: summary.csv and the scores of each assay")


def _scan(parsed: argparse.Namespace, open_model: Any) -> None:
    import numpy as np

    from hf_plm.judging import plots
    from hf_plm.judging.findings import home, write_findings
    from hf_plm.judging.scores.scan import cost, heat_map, read_scannable, scan, write_scan
    from hf_plm.models.masked_lm import LETTERS
    from hf_plm.progress import Progress

    proteins = read_scannable(parsed.scan)
    taken: set[str] = set()
    names = [_file_name(name, taken) for name, _ in proteins]
    out = parsed.out or Path("scan.csv" if len(proteins) == 1 else "scan")
    paths = [out] if len(proteins) == 1 else [out / f"{name}.csv" for name in names]
    _check_outputs(parsed, *paths, *(path.with_suffix(".png") for path in paths))
    if len(proteins) == 1 and out.suffix != ".csv":
        raise UserError(f"--out of a scan is a .csv file, beside which the .png is put, not {out}.")
    model = open_model()
    total = sum(cost(residues, parsed.method, model.limit) for _, residues in proteins)
    with Progress(f"{len(proteins):,} protein{'s' * (len(proteins) > 1)}", total) as progress:
        for (name, residues), file_name, path in zip(proteins, names, paths, strict=True):
            scores_NA = scan(model, residues, parsed.method, progress.count)
            write_scan(path, residues, scores_NA)
            title = f"{name}, {parsed.method} marginals of {Path(parsed.model).name}"
            plots.save(heat_map(title, residues, scores_NA), path.with_suffix(".png"))
            is_scanned_N = ~np.isnan(scores_NA).any(axis=1)
            progress.say(f"{path}: {19 * is_scanned_N.sum():,} substitutions of {name}, and {path.with_suffix('.png')}")
            if not is_scanned_N.all():
                progress.say(f"Not scanned, since it is none of the 20: {(~is_scanned_N).sum():,} of {len(residues):,}")
            if kept := home(parsed.model, "scan", f"{file_name}-{parsed.method}"):
                plain = {"protein": name, "residues": residues.decode(), "letters": LETTERS, "method": parsed.method}
                write_findings(kept, "scan", [model.facts], {**plain, "scores_NA": scores_NA.round(4)})
                progress.say(f"Kept in {kept}")


def _file_name(name: str, taken: set[str]) -> str:
    """A record's id as a file's name, another one for each record."""
    safe = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name).lstrip(".")[:100]
    candidates = (safe, *(f"{safe}_{number}" for number in range(2, len(taken) + 3)))
    chosen = next(one for one in candidates if one and one.lower() not in taken)
    taken.add(chosen.lower())
    return chosen


def _table(title: str, rows: Sequence[Sequence[Any]], columns: Sequence[str]) -> str:
    width = max(len(title), *(len(row[0]) for row in rows))
    lines = [f"{title:<{width}}" + "".join(f"{name:>10}" for name in columns)]
    for name, *cells in rows:
        shown = [f"{cell:>10,}" if isinstance(cell, int) else f"{cell:>10.3f}" for cell in cells]
        lines.append(f"{name:<{width}}" + "".join(shown).replace("nan", "  -"))
    return "\n".join(lines)
