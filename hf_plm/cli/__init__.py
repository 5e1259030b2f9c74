"""The program `hf-plm`: one subcommand for each thing a person does, a module for each few of them.

Everything heavy is imported inside the subcommand that needs it, so that help and mistakes in flags answer at once.
"""

import argparse
import errno
import os
import signal
import sys
from collections.abc import Sequence

from hf_plm.cli import contacts, corpora, embed, evaluate, probe, report, score, ship, train
from hf_plm.cli.knobs import parse_knobs
from hf_plm.cli.process import leave, quick_imports, tells
from hf_plm.config import LostProcessError, UserError
from hf_plm.version import __version__

__all__ = ["main", "parse_knobs", "quick_imports", "run_command"]

EPILOG = "Documentation: README.md and docs/. Mistakes are told in one sentence; --help works after each subcommand."


def main(arguments: Sequence[str] | None = None) -> None:
    """The program: `run_command`, and the end of a process that is one of several."""
    is_one_of_many = int(os.environ.get("WORLD_SIZE", "1")) > 1
    try:
        run_command(arguments)
    except SystemExit as end:
        if is_one_of_many:
            leave(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    if is_one_of_many:
        leave(0)


def run_command(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; exits 1 after the user's mistake, or 128 + signal when stopped by one."""
    parser = _parser()
    given = list(sys.argv[1:] if arguments is None else arguments)
    parsed, rest = parser.parse_known_args(given)
    if rest and parsed.command not in ("pretrain", "launch"):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if parsed.command is None:
        parser.print_help()
        return
    try:
        parsed.run(parsed, rest)
    except LostProcessError:
        sys.exit(1)
    except UserError as error:
        if tells():
            print(f"hf-plm: {error}", file=sys.stderr, flush=True)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" ({error.filename})" if error.filename else ""
        what = "disk is full" if error.errno == errno.ENOSPC else "disk quota is used up"
        print(f"hf-plm: The {what}{where}; free space and run the same command again.", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        if tells():
            print("hf-plm: Stopped.", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-plm",
        description="From a FASTA file to a protein language model on the Hugging Face Hub.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"hf-plm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")
    for module in (train, corpora, ship, embed, evaluate, score, contacts, probe, report):
        module.add(commands)
    return parser
