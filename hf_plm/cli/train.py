"""`hf-plm pretrain`, `launch` and `inspect`."""

import argparse
import difflib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_plm.cli.knobs import knob_table, parse_knobs
from hf_plm.cli.process import quick_imports, tells
from hf_plm.config import KNOBS, UserError
from hf_plm.recipe import load_recipe, recipe_names

LAUNCH_FLAGS = (
    ("processes", int, "processes on all machines together (one per GPU; with --cpu 2)"),
    ("machines", int, "number of machines, where the file does not say it"),
    ("machine-rank", int, "which of them this one is, from 0"),
    ("main-ip", str, "address of machine 0"),
    ("port", int, "port where the processes meet (on one machine any free one, on several 29500)"),
)


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    pretrain = commands.add_parser(
        "pretrain",
        help="pretrain a model, or go on with a run",
        description="Run a recipe, or go on with the run in its folder. Any knob below overrides the recipe.",
        usage="hf-plm pretrain RECIPE --data.train FILE [FILE ...] --run.folder FOLDER [--section.knob VALUE ...]",
        epilog=knob_table(),
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

    inspect = commands.add_parser(
        "inspect",
        help="show a corpus, a run, or what a step of a run held",
        description="Show a prepared corpus, or a run and, with --step, the windows that a step of it held.",
    )
    inspect.add_argument("folder", type=Path, help="a prepared corpus or a run")
    inspect.add_argument("--step", type=int, help="0-based step of the run")
    inspect.set_defaults(run=_inspect)


def _pretrain(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    recipe = load_recipe(parsed.recipe, parse_knobs(rest))
    _ = recipe.run_folder  # refused before anything heavy is imported

    with quick_imports():
        from hf_plm.training.pretrain import pretrain
        from hf_plm.training.trainer import StoppedError

    try:
        pretrain(recipe)
    except StoppedError as stop:
        if tells():
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


def _inspect(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    with quick_imports():
        from hf_plm.training.inspection import inspect_folder

    print(inspect_folder(parsed.folder, parsed.step))
