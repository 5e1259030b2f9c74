"""`hf-plm prepare` and `simulate`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_plm.cli.knobs import meaning
from hf_plm.config import KNOBS, UserError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepare = commands.add_parser(
        "prepare",
        help="make a corpus of FASTA files, Parquet or a dataset",
        description="Clean sequences, say what was dropped and why, hold some out; write a Hub-ready dataset.",
    )
    prepare.add_argument("sources", nargs="+", help=meaning("data.train"))
    prepare.add_argument("--out", required=True, type=Path, help="folder to write")
    prepare.add_argument("--validation", nargs="+", default=[], help=meaning("data.validation"))
    prepare.add_argument("--test", nargs="+", default=[], help="sequences of the test split")
    for name, choices in (
        ("illegal", ("reject", "x")),
        ("gaps", ("reject", "strip")),
        ("duplicates", ("drop", "keep")),
    ):
        item = KNOBS[f"data.{name}"]
        prepare.add_argument(
            f"--{name}", f"--data.{name}", choices=choices, default=item.default, help=meaning(item.name)
        )
    item = KNOBS["data.max_rejected"]
    prepare.add_argument("--max-rejected", f"--{item.name}", type=float, default=item.default, help=meaning(item.name))
    item = KNOBS["data.sequence_column"]
    prepare.add_argument("--sequence-column", f"--{item.name}", help=meaning(item.name))
    prepare.set_defaults(run=_prepare)

    simulate = commands.add_parser(
        "simulate",
        help="write a FASTA of simulated protein families to try with",
        description="Evolve random ancestors along random trees; nothing in the file is a real protein.",
    )
    simulate.add_argument("out", type=Path, help="FASTA file to write, .gz if its name ends so")
    simulate.add_argument("--families", type=int, default=6, help="number of families (6)")
    simulate.add_argument("--members", type=int, default=1000, help="members of each family (1000)")
    simulate.add_argument("--seed", type=int, default=29, help="another seed, other families (29)")
    simulate.set_defaults(run=_simulate)


def _prepare(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    from hf_plm.data.prepare import prepare, report

    manifest = prepare(
        parsed.sources,
        parsed.out,
        validation=parsed.validation,
        test=parsed.test,
        illegal=parsed.illegal,
        gaps=parsed.gaps,
        duplicates=parsed.duplicates,
        max_rejected=parsed.max_rejected,
        sequence_column=parsed.sequence_column,
    )
    print(report(manifest))
    print(f"\nThe corpus is in {parsed.out}; train on it with --data.train {parsed.out}")


def _simulate(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    from hf_plm.data.simulate import write_simulated_fasta

    if parsed.out.exists():
        raise UserError(f"{parsed.out} is there already; give another name, or remove it.")
    try:
        count = write_simulated_fasta(parsed.out, parsed.families, parsed.members, parsed.seed)
    except OSError as error:
        raise UserError(f"{parsed.out} cannot be written: {error.strerror}.") from None
    print(f"{parsed.out}: {count:,} simulated proteins in {parsed.families:,} families (seed {parsed.seed})")
