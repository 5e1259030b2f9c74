"""`hf-plm report`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_plm.cli.process import quick_imports
from hf_plm.config import UserError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    report = commands.add_parser(
        "report",
        help="everything known of a model on one page",
        description="One HTML file that opens without a network: curves, evaluation, variants, contacts, probes, "
        "families, recipe, data and hardware. What hf-plm evaluate, score, contacts and probe found is shown; the "
        "evaluation on held-out proteins and their map are computed where they are missing.",
    )
    report.add_argument("model", metavar="MODEL", help="a run, finished or not, a folder, or a name on the Hub")
    report.add_argument("--against", metavar="MODEL", help="another model, put beside it")
    report.add_argument(
        "--findings", nargs="+", type=Path, default=[], metavar="PATH", help="more findings: JSON files, or folders"
    )
    report.add_argument("--data", nargs="+", default=[], help="held-out proteins to evaluate on (those of the run)")
    report.add_argument(
        "--families", type=Path, metavar="TABLE", help="CSV or TSV with the columns sequence and family, for the map"
    )
    report.add_argument(
        "--sequences", type=int, default=500, help="held-out proteins used here; 0: nothing is computed (500)"
    )
    report.add_argument("--out", type=Path, help="HTML file to write (report.html in the folder of the model)")
    report.add_argument("--precision", default="auto", help="of products: fp32, bf16, fp16 (fp32, on GPUs bf16)")
    report.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (the GPU where there is one)")
    report.add_argument("--threads", type=int, help="CPU cores to use (all)")
    report.set_defaults(run=_run)


def _run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    if parsed.sequences < 0:
        raise UserError(f"--sequences is a number from 0, not {parsed.sequences}.")
    with quick_imports():
        from hf_plm.report.report import Asked, write_report

    asked = Asked(
        parsed.model,
        parsed.against,
        tuple(parsed.findings),
        tuple(parsed.data),
        parsed.families,
        parsed.sequences,
        parsed.out,
        parsed.precision,
        parsed.device,
        parsed.threads,
    )
    print(write_report(asked))
