"""The program `hf-plm`: one subcommand for each thing a person does.

Everything heavy is imported inside the subcommand that needs it, so that help and mistakes in flags answer at once.
"""

import argparse
import difflib
import errno
import gc
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hf_plm.config import KNOBS, LostProcessError, UserError
from hf_plm.recipe import load_recipe, recipe_names
from hf_plm.version import __version__

EPILOG = "Documentation: README.md and docs/. Mistakes are told in one sentence; --help works after each subcommand."

LAUNCH_FLAGS = (
    ("processes", int, "processes on all machines together (one per GPU; with --cpu 2)"),
    ("machines", int, "number of machines, where the file does not say it"),
    ("machine-rank", int, "which of them this one is, from 0"),
    ("main-ip", str, "address of machine 0"),
    ("port", int, "port where the processes meet (on one machine any free one, on several 29500)"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a subcommand; exits 0, 1 after the user's mistake, or 128 + signal when stopped by one."""
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
        if _tells():
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
        sys.exit(128 + signal.SIGINT)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave()


def _leave() -> None:
    """End a finished process of several at once, without Python taking itself apart.

    A thread of gloo may still hold a tensor then: it wants Python back to let go of it, and the process aborts (once in
    some hundred runs under ZeRO-3, all files written: "terminate called without an active exception").
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _tells() -> bool:
    """Whether this process tells what all processes of a machine have met alike: the first of them does.

    The others leave a moment later: the launcher stops all when one has left, and the first must have spoken by then.
    """
    if os.environ.get("LOCAL_RANK", "0") == "0":
        return True
    time.sleep(3)
    return False


@contextmanager
def quick_imports() -> Iterator[None]:
    """The first imports of torch and what stands on it: without garbage collection, since nearly all of it stays.

    That takes 0.5 s of 3 off them. What they made is kept out of later collections too: one of everything, while data
    are opened or in the middle of training, takes 0.02 s instead of 0.2 s.
    """
    if "torch" in sys.modules:  # by the program that calls this one: then its garbage is not ours to keep
        yield
        return
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-plm",
        description="From a FASTA file to a protein language model on the Hugging Face Hub.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"hf-plm {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command")

    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain a model, or go on with a run",
        description="Run a recipe, or go on with the run in its folder. Any knob below overrides the recipe.",
        usage="hf-plm pretrain RECIPE --data.train FILE [FILE ...] --run.folder FOLDER [--section.knob VALUE ...]",
        epilog=_knob_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    pretrain.add_argument("recipe", help=f"a YAML file, or one of {', '.join(recipe_names())}")
    pretrain.set_defaults(run=_pretrain)

    launch = commands.add_parser(
        "launch",
        help="pretrain on several GPUs or machines: a front to accelerate launch",
        description="Start a recipe through accelerate launch; knobs of the recipe follow as in hf-plm pretrain.",
        usage="hf-plm launch CONFIG RECIPE [--processes N] [...] [--section.knob VALUE ...]",
        allow_abbrev=False,
    )
    launch.add_argument(
        "config", help="a YAML file for Accelerate, or the name of one of accelerate_configs, such as ddp"
    )
    launch.add_argument("recipe", help="as in hf-plm pretrain")
    for name, kind, meaning in LAUNCH_FLAGS:
        launch.add_argument(f"--{name}", type=kind, help=meaning)
    launch.add_argument("--cpu", action="store_true", help="try it on CPUs, in fp32: DDP and DeepSpeed")
    launch.add_argument("--dry-run", action="store_true", help="check, print the accelerate launch line, start nothing")
    launch.set_defaults(run=_launch)

    prepare = commands.add_parser(
        "prepare",
        help="make a corpus of FASTA files, Parquet or a dataset",
        description="Clean sequences, say what was dropped and why, hold some out; write a Hub-ready dataset.",
    )
    prepare.add_argument("sources", nargs="+", help=_meaning("data.train"))
    prepare.add_argument("--out", required=True, type=Path, help="folder to write")
    prepare.add_argument("--validation", nargs="+", default=[], help=_meaning("data.validation"))
    prepare.add_argument("--test", nargs="+", default=[], help="sequences of the test split")
    for name, choices in (
        ("illegal", ("reject", "x")),
        ("gaps", ("reject", "strip")),
        ("duplicates", ("drop", "keep")),
    ):
        item = KNOBS[f"data.{name}"]
        prepare.add_argument(
            f"--{name}", f"--data.{name}", choices=choices, default=item.default, help=_meaning(item.name)
        )
    item = KNOBS["data.max_rejected"]
    prepare.add_argument("--max-rejected", f"--{item.name}", type=float, default=item.default, help=_meaning(item.name))
    item = KNOBS["data.sequence_column"]
    prepare.add_argument("--sequence-column", f"--{item.name}", help=_meaning(item.name))
    prepare.set_defaults(run=_prepare)

    inspect = commands.add_parser(
        "inspect",
        help="show a corpus, a run, or what a step of a run held",
        description="Show a prepared corpus, or a run and, with --step, the windows that a step of it held.",
    )
    inspect.add_argument("folder", type=Path, help="a prepared corpus or a run")
    inspect.add_argument("--step", type=int, help="0-based step of the run")
    inspect.set_defaults(run=_inspect)

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

    embed = commands.add_parser(
        "embed",
        help="embed proteins with any published encoder",
        description="The vectors of proteins, from any model that AutoModel opens with one token per residue. Stopped "
        "in any way, the same command goes on.",
        epilog="Under accelerate launch (launch/embed.py) several processes share the proteins.",
    )
    embed.add_argument("sources", nargs="+", help=_meaning("data.train"))
    embed.add_argument("--model", required=True, help="a folder, a finished run or a repository on the Hub")
    embed.add_argument(
        "--out", required=True, type=Path, help="file to write: .safetensors, .h5, .parquet or .npz, by its name"
    )
    embed.add_argument(
        "--pool",
        metavar="POOLING",
        help="mean, cls or max over a protein, none: a row per residue; several side by side: none,mean (mean)",
    )
    embed.add_argument("--layer", type=int, default=-1, help="0 the embeddings, -1 what the last layer gives (-1)")
    embed.add_argument("--precision", default="auto", help="of products: fp32, bf16, fp16 (fp32, on GPUs bf16)")
    embed.add_argument("--dtype", default="float32", help="of what is written: float32 or float16 (float32)")
    embed.add_argument(
        "--sites", help="a row for each residue of these letters (STY) or of this table: its vector, the protein's mean"
    )
    embed.add_argument(
        "--long", default="window", help="longer proteins than --max-length: window, crop or refuse (window)"
    )
    embed.add_argument("--max-length", type=int, help="residues taken at once (what the model takes)")
    embed.add_argument("--backend", default="torch", help="torch, or onnx: ONNX Runtime on CPUs (torch)")
    embed.add_argument("--int8", action="store_true", help="with --backend onnx: 8-bit products; says what that costs")
    embed.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (the GPU where there is one)")
    embed.add_argument("--threads", type=int, help="CPU cores to use (all)")
    for name in ("illegal", "gaps"):
        item = KNOBS[f"data.{name}"]
        embed.add_argument(f"--{name}", f"--{item.name}", default=item.default, help=_meaning(item.name))
    item = KNOBS["data.max_rejected"]
    embed.add_argument("--max-rejected", f"--{item.name}", type=float, default=item.default, help=_meaning(item.name))
    item = KNOBS["data.sequence_column"]
    embed.add_argument("--sequence-column", f"--{item.name}", help=_meaning(item.name))
    embed.set_defaults(run=_embed)

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
    return parser


def _meaning(name: str) -> str:
    return KNOBS[name].meaning.replace("%", "%%")  # argparse formats help texts


def _knob_table() -> str:
    lines = ["knobs (default):"]
    section = ""
    for item in KNOBS.values():
        if item.name.split(".")[0] != section:
            section = item.name.split(".")[0]
            lines.append("")
        default = " ".join(item.default) if isinstance(item.default, tuple) else item.default
        if default in (None, ""):
            default = "auto" if item.may_be_auto else "none"
        lines.append(f"  --{item.name} ({default})\n        {item.meaning}")
    return "\n".join(lines)


def parse_knobs(words: Sequence[str]) -> dict[str, str | list[str]]:
    """`--section.knob value`, `--section.knob=value`, several values for a list, or none for a switch."""
    knobs: dict[str, str | list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, _, value = word[2:].partition("=")
            if name in knobs:
                raise UserError(f"--{name} is given twice; give it once.")
            knobs[name] = [value] if "=" in word else []
        elif not name:
            raise UserError(f"{word!r} is not a flag; knobs are given as --section.knob value.")
        else:
            values = knobs[name]
            assert isinstance(values, list)
            values.append(word)
    return {name: _one_or_many(name, values) for name, values in knobs.items() if isinstance(values, list)}


def _one_or_many(name: str, values: list[str]) -> str | list[str]:
    if name in KNOBS and KNOBS[name].type is bool and not values:
        return "true"
    if name in KNOBS and KNOBS[name].type == tuple[str, ...]:
        if not values:
            raise UserError(f"--{name} needs a value.")
        return values[0] if values == ["none"] else values
    if name in KNOBS and len(values) != 1:
        raise UserError(f"--{name} takes one value, not {len(values)}.")
    return values[0] if values else ""


def _pretrain(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    recipe = load_recipe(parsed.recipe, parse_knobs(rest))
    _ = recipe.run_folder  # refused before anything heavy is imported

    with quick_imports():
        from hf_plm.training.pretrain import pretrain
        from hf_plm.training.trainer import StoppedError

    try:
        pretrain(recipe)
    except StoppedError as stop:
        if _tells():
            print(stop, flush=True)
        sys.exit(128 + getattr(signal.Signals, stop.signal_name, signal.SIGTERM))


def _launch(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    knobs = parse_knobs(rest)
    for name in knobs.keys() - KNOBS.keys():
        close = difflib.get_close_matches(name, [*(flag for flag, *_ in LAUNCH_FLAGS), "cpu", "dry-run"], n=1)
        if close:
            raise UserError(f"Unknown flag --{name}; did you mean --{close[0]}?")
    from hf_plm.training.launch import Request, find_config, plan, run

    find_config(parsed.config)
    _ = load_recipe(parsed.recipe, knobs).run_folder  # its mistakes are told before anything heavy is imported
    given = (parsed.processes, parsed.machines, parsed.machine_rank, parsed.main_ip, parsed.port, parsed.cpu)
    planned = plan(Request(parsed.config, *given), [parsed.recipe, *rest])
    print(planned.line(), flush=True)
    if not parsed.dry_run:
        sys.exit(run(planned))


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


def _inspect(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    with quick_imports():
        from hf_plm.training.inspection import inspect_folder

    print(inspect_folder(parsed.folder, parsed.step))


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


def _embed(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    from hf_plm.inference.embed import embed_file
    from hf_plm.inference.embedder import Options, require_torch
    from hf_plm.inference.job import Job
    from hf_plm.inference.worklist import Cleaning

    options = Options(
        parsed.layer,
        parsed.precision,
        parsed.backend,
        parsed.int8,
        parsed.long,
        parsed.max_length,
        parsed.device,
        parsed.threads,
    )
    cleaning = Cleaning(parsed.illegal, parsed.gaps, parsed.max_rejected, parsed.sequence_column)
    if parsed.sites is not None and parsed.pool:
        raise UserError("--sites gives a residue's vector and its protein's mean; leave --pool out.")
    pool = tuple(name.strip() for name in (parsed.pool or "mean").split(","))
    job = Job(parsed.sources, parsed.model, parsed.out, pool, parsed.dtype, parsed.sites, options, cleaning)
    if parsed.backend == "torch":
        with quick_imports():
            require_torch()
    try:
        embed_file(job)
    except KeyboardInterrupt:
        print(f"\nInterrupted; the same command goes on with {parsed.out}.", file=sys.stderr)
        raise


def _simulate(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    from hf_plm.data.simulate import write_simulated_fasta

    if parsed.out.exists():
        raise UserError(f"{parsed.out} is there already; give another name, or remove it.")
    try:
        count = write_simulated_fasta(parsed.out, parsed.families, parsed.members, parsed.seed)
    except OSError as error:
        raise UserError(f"{parsed.out} cannot be written: {error.strerror}.") from None
    print(f"{parsed.out}: {count:,} simulated proteins in {parsed.families:,} families (seed {parsed.seed})")


if __name__ == "__main__":
    main()
