"""Every knob of a run, once: its name, default, unit, meaning and source.

A recipe is a YAML file of sections; a flag `--section.knob value` overrides it. It is parsed once, frozen, and never
changed afterwards: what depends on the machine (knobs left at `auto`) is resolved into a new recipe by `replace`.
Numbers marked ESM-2 are from Lin et al. 2023 (Science 379:1123), supplementary A.2.
"""

import dataclasses
import keyword
import os
import re
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


class UserError(ValueError):
    """A mistake of the user's, told in one sentence: what was expected, what came, where, and what to do."""


class LostProcessError(UserError):
    """Another process of the run is gone. Each process that notices has said so at once: the launcher ends it soon."""


def knob(default: Any, meaning: str, may_change: bool = False) -> Any:
    """A field of a section. `may_change`: a run may be resumed with another value, since its numbers stay the same."""
    return field(default=default, metadata={"meaning": meaning, "may_change": may_change})


@dataclass(frozen=True)
class Model:
    preset: str = knob(
        "8m",
        "size of the network: demo, 8m, 35m, 150m, 650m, 3b, 15b (ESM-2), or LAYERSxWIDTHxHEADS; with init.from auto",
    )
    token_dropout: bool = knob(True, "zero the embedding of <mask> and rescale the rest, per sequence (ESM-2)")
    activation_checkpointing: bool = knob(
        False, "recompute activations in the backward pass: less memory, about a third slower", may_change=True
    )


@dataclass(frozen=True)
class Data:
    train: tuple[str, ...] = knob(
        (), "FASTA (.gz .zst .bz2 too), Parquet, a glob, a folder, a prepared corpus, or a dataset on the Hub"
    )
    validation: tuple[str, ...] = knob(
        (), "held-out sequences; left out, 1% of train (at least 20, at most 2,000 or half) is held out by a hash"
    )
    crop: int = knob(1024, "tokens of the longest window, <cls> and <eos> included (ESM-2)")
    sequence_column: str | None = knob(None, "column that holds the sequences, where its name cannot be guessed")
    illegal: str = knob("reject", "records with illegal letters: reject, or x to turn each such letter into X")
    gaps: str = knob("reject", "records with - or . in them: reject, or strip to unalign them")
    duplicates: str = knob("drop", "records with a sequence that came before: drop or keep")
    max_rejected: float = knob(0.1, "share of rejected records above which preparation stops")
    cache: str | None = knob(None, "where prepared corpora are kept (default: $HF_PLM_CACHE or ~/.cache/hf_plm)", True)
    workers: int | None = knob(None, "processes that read ahead; auto: 0 on a CPU, 4 per GPU", may_change=True)


@dataclass(frozen=True)
class Batch:
    tokens: int = knob(8192, "tokens of one micro-batch: what one forward pass of one process takes")
    micro_batches: int | None = knob(
        256, "micro-batches per step, over all processes (256 x 8,192 = ESM-2's 2 million); auto: fit to the budget"
    )
    strict: bool = knob(False, "refuse where the processes do not divide the micro-batches and some would idle", True)


@dataclass(frozen=True)
class Mask:
    rate: float = knob(0.15, "share of residues that become targets (BERT; ESM-2)")
    mask: float = knob(0.8, "share of targets shown as <mask> (BERT; ESM-2)")
    random: float = knob(0.1, "share of targets shown as a random standard residue (BERT; ESM-2); the rest is kept")


@dataclass(frozen=True)
class Optimizer:
    learning_rate: float = knob(4e-4, "peak learning rate of AdamW (ESM-2; 1.6e-4 for 15B)")
    beta1: float = knob(0.9, "decay of the first moment (ESM-2)")
    beta2: float = knob(0.98, "decay of the second moment (ESM-2)")
    epsilon: float = knob(1e-8, "AdamW's epsilon (ESM-2)")
    weight_decay: float = knob(0.01, "decoupled decay; never on biases and layer norms (ESM-2; 0.1 for 15B)")
    clip: float = knob(1.0, "largest norm of the gradient; 0 switches clipping off (ours; ESM-2 names none)")


@dataclass(frozen=True)
class Schedule:
    steps: int = knob(500_000, "optimizer steps (ESM-2); ignored where a budget is given")
    budget: str | None = knob(None, "wall-clock length of the run instead of a number of steps, such as 8h or 30m")
    warmup: int | None = knob(None, "steps of linear warm-up; auto: 5% of the steps, at most 2,000 (ESM-2)")
    decay_share: float = knob(0.9, "share of the run over which the rate falls linearly (ESM-2)")
    final_ratio: float = knob(0.1, "final learning rate over the peak (ESM-2)")


@dataclass(frozen=True)
class Validation:
    every: int | None = knob(None, "steps between validations; auto: about 20 of them in a run", may_change=True)
    sequences: int | None = knob(
        None, "held-out sequences used during the run; auto: 20 to 1,000, at most 5% of the work", may_change=True
    )
    final_sequences: int = knob(2000, "held-out sequences used at the end, a fixed choice by hash", may_change=True)


@dataclass(frozen=True)
class Evaluate:
    every: int | None = knob(None, "steps between evaluations on the tasks named below; auto: never", may_change=True)
    data: tuple[str, ...] = knob((), "held-out sequences for the protocol of hf-plm evaluate", may_change=True)
    dms: str | None = knob(None, "folder of deep mutational scans, as of hf-plm score --dms", may_change=True)
    contacts: str | None = knob(None, "structures, as of hf-plm contacts --fit", may_change=True)
    probe: tuple[str, ...] = knob((), "tasks, as of hf-plm probe --task", may_change=True)
    sample: int = knob(
        200, "proteins of the protocol and of a probe, and variants of a scan, that are taken", may_change=True
    )


@dataclass(frozen=True)
class Checkpoint:
    every: int | None = knob(
        None, "steps between checkpoints; auto: about 20 of them, at most 1,000 apart", may_change=True
    )
    keep: int = knob(2, "newest checkpoints kept", may_change=True)
    background: bool = knob(True, "write checkpoints while training goes on, not while it waits", may_change=True)


@dataclass(frozen=True)
class Spike:
    action: str = knob(
        "none",
        "at a loss spike: none; skip (drop the update and count it; waits for each step's loss; not under DeepSpeed); "
        "rollback (to the last checkpoint, passing over the sequences since; PaLM)",
        may_change=True,
    )
    deviations: float = knob(
        6.0, "running standard deviations above the running mean loss that make a spike (ours)", may_change=True
    )


@dataclass(frozen=True)
class Init:
    from_: str | None = knob(
        None,
        "published weights to start from instead of random ones: a repository on the Hub (user/model or "
        "user/model@revision), a Hub folder, or a fair-esm .pt of ESM-2",
    )


@dataclass(frozen=True)
class Hub:
    push: str | None = knob(None, "repository on the Hub to push the finished model to, such as user/my-plm", True)
    every: int | None = knob(
        None, "steps between pushes of a checkpoint, each to its branch step-N; auto: only the finished model", True
    )
    public: bool = knob(False, "whether a new repository is public; one that is there stays as it is", True)
    license: str | None = knob(None, "licence in the model card, by the Hub's name for it, such as apache-2.0", True)
    dataset: str | None = knob(None, "dataset on the Hub that holds the training data, named in the model card", True)


@dataclass(frozen=True)
class Run:
    folder: str | None = knob(None, "where the run writes everything", may_change=True)
    seed: int = knob(0, "seed of weights, order, crops and corruption")
    precision: str = knob("auto", "fp32, bf16, or auto: what the launcher says, else bf16 on GPUs that have it")
    compile: bool | None = knob(None, "compile the layers by torch.compile; auto: on GPUs", may_change=True)
    log_every: int = knob(10, "steps between lines of metrics", may_change=True)
    trackers: tuple[str, ...] = knob(("tensorboard",), "tensorboard, wandb, trackio; none to switch off", True)
    record: bool = knob(
        False, "write hashes of what each process saw at each step to samples/rank-N.jsonl of the run", True
    )


@dataclass(frozen=True)
class Recipe:
    """All knobs of one run. Build one with `hf_plm.recipe.load_recipe`."""

    model: Model = Model()
    data: Data = Data()
    batch: Batch = Batch()
    mask: Mask = Mask()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    validation: Validation = Validation()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    spike: Spike = Spike()
    init: Init = Init()
    hub: Hub = Hub()
    run: Run = Run()

    def __getitem__(self, name: str) -> Any:
        """The value of a knob by its full name, `section.knob`."""
        section, knob_name = name.split(".")
        return getattr(getattr(self, section), _attribute(knob_name))

    @property
    def run_folder(self) -> Path:
        if self.run.folder is None:
            raise UserError("The run has no folder; say where it should write with --run.folder runs/NAME.")
        return Path(self.run.folder)

    @property
    def cache_folder(self) -> Path:
        return Path(self.data.cache or os.environ.get("HF_PLM_CACHE") or Path.home() / ".cache" / "hf_plm").expanduser()

    @property
    def budget_seconds(self) -> float | None:
        return None if self.schedule.budget is None else parse_duration(self.schedule.budget)

    def replace(self, **values: Any) -> "Recipe":
        """A copy with knobs set, `section__knob=value`; values must already have their types."""
        recipe = self
        for name, value in values.items():
            section, knob_name = name.split("__")
            changed = dataclasses.replace(getattr(recipe, section), **{_attribute(knob_name): value})
            recipe = dataclasses.replace(recipe, **{section: changed})
        return recipe

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section and knob; `auto` where a knob is not resolved."""
        plain = dataclasses.asdict(self)
        return {
            section: {name.rstrip("_"): _plain(section, name.rstrip("_"), value) for name, value in knobs.items()}
            for section, knobs in plain.items()
        }

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)


def _attribute(knob_name: str) -> str:
    """The name of a knob in Python, where `from` is taken."""
    return f"{knob_name}_" if keyword.iskeyword(knob_name) else knob_name


def _plain(section: str, name: str, value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return "auto" if value is None and KNOBS[f"{section}.{name}"].may_be_auto else value


@dataclass(frozen=True)
class Knob:
    name: str
    type: Any
    default: Any
    meaning: str
    may_change: bool

    @property
    def may_be_auto(self) -> bool:
        """Whether `auto` leaves the choice to the machine."""
        return self.default == "auto" or (
            isinstance(self.type, types.UnionType) and not {int, bool}.isdisjoint(typing.get_args(self.type))
        )


def _all_knobs() -> dict[str, Knob]:
    knobs = {}
    for section in fields(Recipe):
        hints = typing.get_type_hints(section.type)
        for item in fields(section.type):  # type: ignore[arg-type]
            name = f"{section.name}.{item.name.rstrip('_')}"
            knobs[name] = Knob(
                name, hints[item.name], item.default, item.metadata["meaning"], item.metadata["may_change"]
            )
    return knobs


KNOBS = _all_knobs()
"""Every knob by its full name, `section.knob`."""


def parse_duration(text: str) -> float:
    """Seconds of `90s`, `30m`, `8h`, `2d` or a sum such as `1h30m`."""
    if not re.fullmatch(r"(\d+(\.\d+)?[dhms])+", text):
        raise UserError(f"A duration such as 30m, 8h or 1h30m was expected for schedule.budget, not {text!r}.")
    seconds = {"d": 86400, "h": 3600, "m": 60, "s": 1}
    total = sum(float(amount) * seconds[unit] for amount, _, unit in re.findall(r"(\d+(\.\d+)?)([dhms])", text))
    if total <= 0:
        raise UserError(f"schedule.budget must be longer than nothing, not {text!r}.")
    return total
