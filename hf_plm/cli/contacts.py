"""`hf-plm contacts`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_plm.cli.process import quick_imports
from hf_plm.config import UserError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    contacts = commands.add_parser(
        "contacts",
        help="predict which residues touch; fit the contact head, judge it",
        description="Contacts of each protein from the attention of an ESM-2 or ESM-1b (Rao et al. 2021). A model from "
        "random weights needs its contact head fitted first, on a few structures, with --fit.",
        epilog="STRUCTURES are JSON lines (id, seq, pairs), a PDB or mmCIF file, or a folder of such files.",
    )
    contacts.add_argument("model", help="a folder, a finished run or a repository on the Hub")
    proteins = contacts.add_argument(
        "proteins",
        type=Path,
        metavar="[proteins]",
        help="a FASTA file, or structures, which are drawn beside what is predicted",
    )
    proteins.required = False  # nargs="?" would take it to be absent where a flag stands between the model and it
    contacts.add_argument(
        "--out", type=Path, help="folder to write; with --evaluate alone a .json file (default: in RUN/findings)"
    )
    contacts.add_argument("--format", help="csv: i, j, probability; npz: the matrix (csv)")
    contacts.add_argument("--no-pictures", action="store_true", help="no map of each protein")
    contacts.add_argument(
        "--fit", type=Path, metavar="STRUCTURES", help="fit the contact head; write the model, judge it on the others"
    )
    contacts.add_argument("--proteins", dest="num_proteins", type=int, help="to fit on (20)")
    contacts.add_argument("--seed", type=int, help="another seed, other proteins to fit on (0)")
    contacts.add_argument(
        "--evaluate", type=Path, metavar="STRUCTURES", help="P@L, P@L/2 and P@L/5 by range, with two baselines"
    )
    contacts.add_argument("--sets", nargs="+", help="of the structures of --fit and --evaluate these sets alone (all)")
    contacts.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (the GPU where there is one)")
    contacts.add_argument("--threads", type=int, help="CPU cores to use (all)")
    contacts.set_defaults(run=_contacts)


def _contacts(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    if parsed.threads is not None and parsed.threads < 1:
        raise UserError(f"--threads is a number from 1, not {parsed.threads}.")
    if parsed.proteins and (parsed.fit or parsed.evaluate):
        raise UserError(f"Predict for {parsed.proteins} in a command of its own; leave --fit and --evaluate out.")
    if not (parsed.proteins or parsed.fit or parsed.evaluate):
        raise UserError("Give proteins to predict contacts of (a FASTA file), or --fit or --evaluate with structures.")
    for name, is_given, goes, where in (
        ("format", parsed.format, parsed.proteins, "proteins to predict for"),
        ("no-pictures", parsed.no_pictures, parsed.proteins, "proteins to predict for"),
        ("proteins", parsed.num_proteins is not None, parsed.fit, "--fit"),
        ("seed", parsed.seed is not None, parsed.fit, "--fit"),
        ("sets", parsed.sets, parsed.fit or parsed.evaluate, "--fit and --evaluate"),
    ):
        if is_given and not goes:
            raise UserError(f"--{name} goes with {where}.")
    if parsed.proteins and parsed.out is None:
        raise UserError("Say where to write: --out FOLDER.")
    with quick_imports():
        import torch

        from hf_plm.judging.contacts.fit import NUM_PROTEINS
        from hf_plm.judging.contacts.job import Judged, fit_contacts, judge_contacts, predict_contacts

    if parsed.threads:
        torch.set_num_threads(parsed.threads)
    if parsed.proteins:
        predict_contacts(
            parsed.model, parsed.proteins, parsed.out, parsed.format or "csv", not parsed.no_pictures, parsed.device
        )
        return
    job = Judged(
        parsed.model,
        parsed.fit,
        parsed.evaluate,
        tuple(parsed.sets or ()),
        NUM_PROTEINS if parsed.num_proteins is None else parsed.num_proteins,
        parsed.seed or 0,
        parsed.out,
        parsed.device,
    )
    if parsed.fit:
        fit_contacts(job)
    else:
        judge_contacts(job)
