"""`hf-plm probe`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_plm.cli.process import quick_imports
from hf_plm.config import UserError
from hf_plm.files import check_writable


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    probe = commands.add_parser(
        "probe",
        help="what a small predictor reads off a model's embeddings; two models compared",
        description="Fits small predictors on frozen embeddings of labelled proteins or residues, and tests them on "
        "proteins that they have not seen, beside what the letters alone give.",
        epilog="A table has columns such as id, sequence, label and split; labels of residues are a string or a list "
        "as long as the sequence; sites are protein, position, residue, label. docs/probe.md has examples.",
    )
    probe.add_argument("model", nargs="?", metavar="MODEL", help="a folder, a finished run or a repository on the Hub")
    probe.add_argument(
        "--compare", nargs=2, metavar=("MODEL_A", "MODEL_B"), help="two models, on the same rows and folds"
    )
    probe.add_argument("--task", type=Path, metavar="TABLE", help="proteins and labels: CSV or TSV, .gz too")
    probe.add_argument("--label", metavar="COLUMN", help="column of the labels (the one named label, target, ...)")
    probe.add_argument("--kind", help="binary, multiclass or regression (told from the labels)")
    probe.add_argument(
        "--level", help="what a label is of: protein or residue (label or labels; told from the lengths)"
    )
    probe.add_argument("--proteins", type=Path, metavar="FASTA", help="the sequences of a table that lists sites")
    probe.add_argument(
        "--sites",
        metavar="LETTERS",
        help="only these residues, such as STY: S and T together, Y apart (all with labels)",
    )
    probe.add_argument(
        "--features", help="of a residue: residue (its vector) or site (and its protein's mean) (site with --sites)"
    )
    probe.add_argument(
        "--predictor",
        help="linear, knn, trees, phosboost (two stacked boosters) or all (all; with --compare linear, or phosboost "
        "where --sites is given)",
    )
    probe.add_argument("--split", metavar="COLUMN", help="column of the split; none: make folds (the one named split)")
    probe.add_argument("--cluster", metavar="COLUMN", help="column of clusters that must stay together (cluster)")
    probe.add_argument("--clusters", type=Path, metavar="TSV", help="cluster and member, as MMseqs2 writes them")
    probe.add_argument("--folds", type=int, default=5, help="folds, where the table has no split (5)")
    probe.add_argument(
        "--leaks", default="refuse", help="proteins on both sides of a split: refuse, or drop them from train (refuse)"
    )
    probe.add_argument("--max-rows", type=int, default=200_000, help="rows to learn from; tests are whole (200000)")
    probe.add_argument("--max-proteins", type=int, help="proteins to draw, for a quick look (all)")
    probe.add_argument("--predict", type=Path, metavar="FOLDER", help="apply the predictor of an earlier --out ...")
    probe.add_argument("--data", type=Path, metavar="FASTA", help="... to these proteins")
    probe.add_argument(
        "--out",
        type=Path,
        help="folder for findings, predictions and predictor; with --predict the CSV to write (predicted.csv)",
    )
    probe.add_argument(
        "--illegal", default="reject", help="letters that are no residues: reject, or x to write X (reject)"
    )
    probe.add_argument("--resamples", type=int, help="draws behind intervals and p-values (500; of many rows 200)")
    probe.add_argument("--seed", type=int, default=0, help="of folds and draws (0)")
    probe.add_argument("--precision", default="auto", help="of products: fp32, bf16, fp16 (fp32, on GPUs bf16)")
    probe.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (the GPU where there is one)")
    probe.add_argument("--threads", type=int, help="CPU cores to use (all)")
    probe.set_defaults(run=_run)


def _run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    if (parsed.model is None) == (parsed.compare is None):
        raise UserError("Give one MODEL, or two with --compare.")
    if parsed.threads is not None and parsed.threads < 1:
        raise UserError(f"--threads is a number from 1, not {parsed.threads}.")
    if parsed.illegal not in ("reject", "x"):
        raise UserError(f"--illegal is reject or x, not {parsed.illegal!r}.")
    if (parsed.predict is None) != (parsed.data is None):
        raise UserError("--predict FOLDER and --data FASTA go together.")
    if parsed.predict is not None:
        _predict(parsed)
        return
    if parsed.task is None:
        raise UserError("Give the labels with --task TABLE.")
    if parsed.out is not None and parsed.out.is_file():
        raise UserError(f"--out {parsed.out} is a file, where a folder was expected.")
    from hf_plm.inference.sites import site_letters
    from hf_plm.judging.requirements import require_judge

    require_judge()
    letters = None
    if parsed.sites is not None and not (letters := site_letters(parsed.sites)):
        raise UserError(f"--sites are letters of residues, such as STY, not {parsed.sites!r}.")
    with quick_imports():
        from hf_plm.judging.probes.comparison import compare
        from hf_plm.judging.probes.preparation import Options
        from hf_plm.judging.probes.probing import Model, check_out, letter_groups, run, site_groups
    from hf_plm.judging.probes.columns import Columns
    from hf_plm.judging.probes.task import read_task

    names = parsed.compare or [parsed.model]
    models = [Model(name, parsed.precision, parsed.device, parsed.threads) for name in names]
    columns = Columns(parsed.label, parsed.split, parsed.cluster)
    predictor = parsed.predictor or ("all" if not parsed.compare else "phosboost" if letters else "linear")
    options = Options(
        predictor,
        parsed.features or ("site" if letters else "residue"),
        parsed.folds,
        parsed.clusters,
        parsed.leaks,
        parsed.max_rows,
        parsed.max_proteins,
        parsed.threads or 0,
        parsed.resamples,
        parsed.seed,
    )
    task = read_task(parsed.task, columns, parsed.kind, parsed.proteins, letters, parsed.illegal, parsed.level)
    groups = site_groups(task, letters)
    is_apart = len(letter_groups(letters)) > 1  # even where one group is left
    outs = [parsed.out / group.name if parsed.out is not None and is_apart else parsed.out for group in groups]
    for out in outs if parsed.out is not None else ():
        check_out(out, [parsed.task, parsed.proteins, parsed.clusters])
    for group, out in zip(groups, outs, strict=True):
        if parsed.compare:
            compare(models[0], models[1], group, options, out)
        else:
            run(models[0], group, options, out)


def _predict(parsed: argparse.Namespace) -> None:
    if parsed.compare or parsed.task is not None:
        raise UserError("--predict applies a kept predictor of one MODEL; leave --compare and --task out.")
    out = parsed.out or Path("predicted.csv")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder; with --predict it is the CSV to write.")
    check_writable(out)
    with quick_imports():
        from hf_plm.judging.probes.prediction import apply
        from hf_plm.judging.probes.probing import Model, check_predicted
    from hf_plm.judging.probes.telling import counted, say

    check_predicted(out, parsed.data, parsed.predict)
    model = Model(parsed.model, parsed.precision, parsed.device, parsed.threads)
    count = apply(model, parsed.predict, parsed.data, out, parsed.illegal)
    say(f"{counted(count, 'prediction')} in {out}.")
