"""`hf-plm push` and `export`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from hf_plm.cli.process import quick_imports
from hf_plm.config import UserError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    push = commands.add_parser(
        "push",
        help="push a run, a Hub folder or a corpus to the Hub",
        description="Verify what is to be sent, send it in one commit, and compare what the Hub has then. The token is "
        "that of `hf auth login`, or HF_TOKEN.",
    )
    push.add_argument("folder", type=Path, help="a run, a Hub folder or a prepared corpus")
    push.add_argument("repository", help="user/name; made if it is not there")
    push.add_argument("--public", action="store_true", help="make a new repository public (it is private otherwise)")
    push.add_argument(
        "--revision", help="branch to push to, made if need be; of a run, step-N is the checkpoint of step N"
    )
    push.add_argument("--dry-run", action="store_true", help="verify, list every file that would be sent, send nothing")
    push.set_defaults(run=_push)

    export = commands.add_parser(
        "export",
        help="write a run or published weights as a Hub folder, a fair-esm file or ONNX",
        description="The model of a run, or of a checkpoint of it, or published weights, in another form.",
    )
    export.add_argument("source", help="a run, a Hub folder, a repository on the Hub, or a fair-esm .pt of ESM-2")
    export.add_argument("--format", choices=("hub", "fair-esm", "onnx"), default="hub", help="form to write (hub)")
    export.add_argument(
        "--step", type=int, help="of a run: the checkpoint of this step (default: the finished model, or the newest)"
    )
    export.add_argument("--out", type=Path, help="folder to write, or esm2_NAME.pt file (default: in RUN/exports)")
    export.set_defaults(run=_export)


def _push(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    from hf_plm.remote import is_repository

    with quick_imports():
        from hf_plm.training.push import listing, push
        from hf_plm.training.shipment import Request

    if not is_repository(parsed.repository) or "@" in parsed.repository:
        raise UserError(f"A repository is user/name, such as user/my-plm, not {parsed.repository!r}.")
    request = Request(parsed.folder, parsed.repository, parsed.revision, parsed.public)
    if parsed.dry_run:
        print(listing(request))
    else:
        try:
            print(f"Pushed: {push(request)}")
        except KeyboardInterrupt:
            print("Interrupted: the commit is on the Hub whole, or not at all; the same command finishes it.")
            raise


def _export(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    with quick_imports():
        from hf_plm.training.export import export

    for path in export(parsed.source, parsed.format, parsed.out, parsed.step):
        print(path)
