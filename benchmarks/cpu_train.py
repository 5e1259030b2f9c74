"""Training on a CPU, side by side: hf_plm against transformers' Trainer, with padding and with length grouping.

    python benchmarks/cpu_train.py --out cpu_train.json

The 8m preset on real proteins (HF_PLM_DATA, default `../shared/data`), crop 512. A micro-batch has 4,096 tokens here
and 8 rows of at most 512 there. Every contestant is a process with a whole run in it: the Trainer as it comes, with
`DataCollatorForLanguageModeling` and sequences that were tokenised beforehand; here `pretrain` itself. They take turns
of 3 steps (5 where batches are small), one at a time (A B A B ...), while the others wait. tokens/s count real tokens,
`<cls>` and `<eos>` included, and the ratios are medians of the rounds' ratios. The floor is what the machine's matrix
rate, measured in the same run, allows for the operations of `training_flops`.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from outcome import Row, finish, table

from hf_plm.config import Mask
from hf_plm.models.presets import build_model, esm_config, training_flops
from hf_plm.proteins.fasta import read_fasta

CROP, TOKENS, STEPS, WARM_UP = 512, 4096, 3, 3
PRESET = "8m"
SOURCE = Path(os.environ.get("HF_PLM_DATA", "../shared/data")) / "corpus" / "train.fasta.gz"
# The Trainer sorts 50 batches at a time by length: a turn of that contestant is every tenth of them.
GROUPED, STEPS_GROUPED = 50, 5
CONTESTANTS = {
    "padded.fp32": "Trainer, padded, fp32",
    "grouped.fp32": "Trainer, grouped by length, fp32",
    "ours.fp32": "hf_plm, fp32",
    "padded.bf16": "Trainer, padded, bf16",
    "grouped.bf16": "Trainer, grouped by length, bf16",
    "ours.bf16": "hf_plm, bf16",
}
# What must hold at least: ours over theirs.
RATIOS = (
    ("ours.fp32", "padded.fp32"),
    ("ours.fp32", "grouped.fp32"),
    ("ours.bf16", "padded.bf16"),
    ("ours.bf16", "grouped.bf16"),
    ("ours.bf16", "padded.fp32"),
    ("ours.bf16", "ours.fp32"),
)


class Turns:
    """A contestant's end of the line: waits for its turn, and tells what it did in it."""

    def __init__(self) -> None:
        self.steps, self.tokens, self.began = 0, 0, 0.0

    def before_step(self) -> None:
        if self.steps == 0:
            self._wait()
        elif self.steps == self.goal:
            seconds = time.perf_counter() - self.began
            print(json.dumps({"tokens": self.tokens, "seconds": seconds}), file=sys.__stdout__, flush=True)
            self._wait()
        self.steps += 1

    def _wait(self) -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        self.goal, self.steps, self.tokens = int(line), 0, 0
        self.began = time.perf_counter()


def run_trainer(fasta: Path, folder: Path, is_grouped: bool, is_bf16: bool) -> None:
    """transformers' Trainer, as run_mlm sets it up."""
    from datasets import Dataset
    from transformers import DataCollatorForLanguageModeling, EsmTokenizer, Trainer, TrainerCallback, TrainingArguments

    from hf_plm.proteins.vocabulary import TOKENS as VOCABULARY

    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    tokenizer = EsmTokenizer(str(folder / "vocab.txt"))
    sequences = [record.sequence for record in read_fasta(fasta)]
    encoded = tokenizer(sequences, truncation=True, max_length=CROP)
    dataset = Dataset.from_dict({"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"]})
    collate = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)
    turns, waiting = Turns(), deque[int]()

    def count(rows: list[Any]) -> Any:
        batch = collate(rows)
        waiting.append(int(batch["attention_mask"].sum()))
        return batch

    class Watch(TrainerCallback):
        def on_step_begin(self, *arguments: Any, **options: Any) -> None:
            turns.before_step()
            turns.tokens += waiting.popleft()

    grouping: dict[str, Any] = {}
    if is_grouped:  # named anew in transformers 5
        newer = "train_sampling_strategy" in TrainingArguments.__dataclass_fields__
        grouping = {"train_sampling_strategy": "group_by_length"} if newer else {"group_by_length": True}
    arguments = TrainingArguments(
        output_dir=str(folder / "trainer"),
        per_device_train_batch_size=TOKENS // CROP,
        max_steps=100_000,
        learning_rate=4e-4,
        bf16=is_bf16,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        **grouping,
    )

    class Interleaved(Trainer):
        def _get_train_sampler(self, *given: Any) -> Any:
            order = list(super()._get_train_sampler(*given))
            return interleaved(order, TOKENS // CROP) if is_grouped else order

    model = build_model(esm_config(PRESET), 0)
    Interleaved(model, arguments, data_collator=count, train_dataset=dataset, callbacks=[Watch()]).train()


def interleaved(order: list[int], num_rows: int) -> list[int]:
    """The first 50 batches of an order of sequences, spread so that every turn has long and short ones.

    Grouped by length they come longest first, and a few of them would be no sample: long sequences have more attention
    to compute, short ones make small batches.
    """
    batches = [order[begin : begin + num_rows] for begin in range(0, len(order), num_rows)]
    num_turns = GROUPED // STEPS_GROUPED
    spread = [batches[place] for turn in range(num_turns) for place in range(turn, GROUPED, num_turns)]
    warm_up = batches[GROUPED : GROUPED + WARM_UP]
    return [index for batch in (*warm_up, *spread, *batches[GROUPED + WARM_UP :]) for index in batch]


def run_ours(fasta: Path, folder: Path, precision: str, options: list[str]) -> None:
    """`pretrain`, as the command line calls it."""
    from hf_plm.data import loader
    from hf_plm.recipe import load_recipe
    from hf_plm.training import trainer
    from hf_plm.training.pretrain import pretrain

    turns, load = Turns(), loader.load_steps

    def load_in_turns(*arguments: Any, **named: Any) -> Iterator[Any]:
        steps = load(*arguments, **named)
        while True:
            turns.before_step()
            step = next(steps)
            turns.tokens += step.num_tokens
            yield step

    setattr(trainer, "load_steps", load_in_turns)  # noqa: B010 (a name that the module only imports)
    knobs = {
        "model.preset": PRESET,
        "data.train": str(fasta),
        "data.validation": str(fasta.with_name("held_out.fasta")),
        "data.crop": CROP,
        "data.cache": str(folder),
        "batch.tokens": TOKENS,
        "batch.micro_batches": 1,
        "schedule.steps": 100_000,
        "validation.every": 100_000,
        "validation.sequences": 20,
        "checkpoint.every": 100_000,
        "run.trackers": "none",
        "run.precision": precision,
        "run.folder": str(folder / "run"),
    }
    knobs.update(zip((name.removeprefix("--") for name in options[::2]), options[1::2], strict=True))
    pretrain(load_recipe("demo", {name: str(value) for name, value in knobs.items()}))


def contestant(name: str, fasta: Path, folder: Path, options: list[str]) -> None:
    kind, precision = name.split(".")
    sys.stdout = sys.stderr
    if kind == "ours":
        run_ours(fasta, folder, precision, options)
    else:
        run_trainer(fasta, folder, kind == "grouped", precision == "bf16")


def matrix_rate(dtype: torch.dtype, repeats: int = 20) -> float:
    """GFLOP/s of the widest product of the model, (4096, 320) x (320, 1280)."""
    left, right = torch.randn(TOKENS, 320, dtype=dtype), torch.randn(1280, 320, dtype=dtype)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        torch.nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - began)
    return 2 * TOKENS * 320 * 1280 / median(seconds) / 1e9


def flops_of_a_token(fasta: Path) -> float:
    """Of the sequences at hand, cropped."""
    lengths = [min(len(record.sequence) + 2, CROP) for record in read_fasta(fasta)]
    num_tokens, mask = sum(lengths), Mask()
    config = esm_config(PRESET)
    squares = sum(length * length for length in lengths)
    return training_flops(config, num_tokens, round(num_tokens * mask.rate), squares) / num_tokens


def compete(
    names: list[str], threads: int, rounds: int, fasta: Path, folder: Path, options: list[str]
) -> dict[str, list[float]]:
    """Tokens/s of each contestant in each round."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    lines = {}
    for name in names:
        home = folder / f"{name}-{threads}"
        home.mkdir()
        command = [sys.executable, __file__, "--contestant", name, "--fasta", str(fasta), "--folder", str(home)]
        log = open(home / "log", "w")  # noqa: SIM115 (held by the child)
        lines[name] = subprocess.Popen(
            [*command, *options], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
        )

    def turn(name: str, steps: int) -> float:
        process = lines[name]
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(f"{steps}\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{name} ended:\n{(folder / f'{name}-{threads}' / 'log').read_text()[-2000:]}")
        found = json.loads(answer)
        return found["tokens"] / found["seconds"]

    try:
        for name in names:
            turn(name, WARM_UP)
        speeds: dict[str, list[float]] = {name: [] for name in names}
        for count in range(rounds):
            for name in names:
                speeds[name].append(turn(name, STEPS_GROUPED if name.startswith("grouped") else STEPS))
            latest = ", ".join(f"{name} {speeds[name][-1]:,.0f}" for name in names)
            print(f"{threads} threads, round {count + 1} of {rounds}: {latest}", file=sys.stderr, flush=True)
        return speeds
    finally:
        for process in lines.values():
            process.kill()
            process.wait()


def sample(folder: Path, num_sequences: int) -> Path:
    """Real proteins, the same ones for every contestant, and a few to hold out."""
    records = list(read_fasta(SOURCE))
    chosen = random.Random(0).sample(records, num_sequences + 100)
    for name, part in (("train.fasta", chosen[100:]), ("held_out.fasta", chosen[:100])):
        text = "".join(f">{record.id}\n{record.sequence}\n" for record in part)
        (folder / name).write_text(text)
    return folder / "train.fasta"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contestant that count (5)")
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS, metavar="NAME")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--contestant", help=argparse.SUPPRESS)
    parser.add_argument("--fasta", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments, options = parser.parse_known_args()  # the rest are knobs of our runs
    if arguments.contestant:
        contestant(arguments.contestant, arguments.fasta, arguments.folder, options)
        return
    rows: list[Row] = []
    lines: list[list[str]] = []
    speeds: dict[int, dict[str, list[float]]] = {}
    if not SOURCE.exists():
        names = [f"cpu.ratio.{ours}.over.{theirs}.{n}_threads" for n in arguments.threads for ours, theirs in RATIOS]
        sentence = f"{SOURCE} is not there: say with HF_PLM_DATA where the real proteins are."
        finish(sentence, [(name, None, "x") for name in names], arguments.out)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fasta = sample(folder, 4000)
        flops = flops_of_a_token(fasta)
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            rates = {precision: matrix_rate(getattr(torch, dtype)) for precision, dtype in DTYPES.items()}
            found = speeds[threads] = compete(arguments.only, threads, arguments.rounds, fasta, folder, options)
            for contestant_name, values in found.items():
                rate = rates[contestant_name.split(".")[1]]
                floor = rate * 1e9 / flops
                speed = median(values)
                spread = f"{min(values):,.0f} to {max(values):,.0f}"
                title = CONTESTANTS[contestant_name]
                lines.append([title, str(threads), f"{speed:,.0f}", spread, f"{speed / floor:.0%}"])
                rows.append((f"cpu.{contestant_name}.{threads}_threads", speed, "tokens/s"))
            for precision, rate in rates.items():
                rows.append((f"cpu.matrix_rate.{precision}.{threads}_threads", rate, "GFLOP/s"))
                rows.append((f"cpu.floor.{precision}.{threads}_threads", rate * 1e9 / flops, "tokens/s"))
            for ours, theirs in RATIOS:
                if ours in found and theirs in found:
                    ratio = median(a / b for a, b in zip(found[ours], found[theirs], strict=True))
                    rows.append((f"cpu.ratio.{ours}.over.{theirs}.{threads}_threads", ratio, "x"))
    heading = ["contestant", "threads", "tokens/s", "slowest to fastest round", "of the matrix rate"]
    text = f"{PRESET}, crop {CROP}, {TOKENS} tokens, {flops / 1e6:.1f} MFLOP a token\n\n{table(heading, lines)}"
    finish(text, rows, arguments.out, speeds=speeds, flops_of_a_token=flops)


DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

if __name__ == "__main__":
    main()
