"""Each sequence once an epoch, through crashes, resumes and changes of the number of processes.

Told from what the models got (`--run.record true`), not from the plan: hashes of the windows' true tokens and of their
targets, by process and step. What they must be is worked out here from the FASTA file.
"""

import itertools
import json
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from launches import Member, Run, start, train_here

from hf_plm import ProteinTokenizer
from hf_plm.config import Mask
from hf_plm.data.corpus import Corpus, open_corpus
from hf_plm.data.loader import Steps
from hf_plm.data.order import Cursor
from hf_plm.data.pack import Packing
from hf_plm.training.record import FOLDER, Record, go_back, window_hash

STEPS, CROP, TOKENS, MICRO_BATCHES = 38, 256, 512, 4
SMALL = {
    "data.crop": str(CROP),
    "batch.tokens": str(TOKENS),
    "batch.micro_batches": str(MICRO_BATCHES),
    "schedule.steps": str(STEPS),
    "validation.every": "100",
    "checkpoint.every": "4",
    "run.log_every": "1",
    "run.trackers": "none",
    "run.record": "true",
}
WORKERS = (("data.workers", "2"),)
CHAIN = [
    (Member("alone", "cpu"), 10),
    (Member("two", "ddp", 2, knobs=WORKERS), 26),
    (Member("three", "zero2", 3), None),
]
"""Who goes on with the run, and the step at which it is killed; about 16 steps are an epoch."""

Seen = dict[int, Counter[tuple[str, str]]]
"""By step: how often each (hash of a window, hash of its targets) was trained on, over all processes."""


@pytest.fixture(scope="module")
def sequences() -> dict[str, str]:
    """All shorter than the crop, so that a window is a sequence."""
    random = np.random.default_rng(0)
    lengths = random.integers(40, CROP - 2, 200)
    return {f"p{number}": "".join(random.choice(list("ACDEFGHIKLMNPQRSTVWY"), n)) for number, n in enumerate(lengths)}


@pytest.fixture(scope="module")
def fasta(sequences: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "random.fasta"
    path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in sequences.items()))
    return path


@pytest.fixture(scope="module")
def alone(fasta: Path) -> Run:
    """One process from beginning to end."""
    return train_here(fasta.parent / "alone", fasta, small=SMALL)


@pytest.fixture(scope="module")
def chain(fasta: Path) -> Run:
    """One process, killed; two with workers, killed after the end of an epoch; three to the end."""
    folder = fasta.parent / "chain"
    for member, last in CHAIN:
        launch = start(member, folder, fasta, SMALL)
        if last is None:
            return Run(folder, launch.finish())
        try:
            wait_for_step(folder, last)
        finally:
            launch.kill()
        assert not (folder / "summary.json").exists()
    raise AssertionError


def wait_for_step(folder: Path, step: int) -> None:
    metrics = folder / "metrics.jsonl"
    for _ in range(6000):
        if metrics.exists() and f'"step": {step},' in metrics.read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} never came: {folder.with_suffix('.log').read_text()}")


@pytest.fixture(scope="module")
def windows(sequences: dict[str, str], alone: Run) -> set[str]:
    """Hashes of what an epoch is made of: each sequence to train on, <cls> and <eos> around it."""
    corpus = train_corpus(alone)
    names = corpus.ids(np.arange(len(corpus)))
    tokenizer = ProteinTokenizer()
    return {window_hash(np.array(tokenizer(sequences[name])["input_ids"])) for name in names}


def train_corpus(run: Run) -> Corpus:
    return open_corpus(yaml.safe_load((run.folder / "config.yaml").read_text())["corpus"]["folder"], "train")


def read_seen(folder: Path) -> Seen:
    seen: Seen = defaultdict(Counter)
    for path in (folder / FOLDER).glob("rank-*.jsonl"):
        for line in path.read_text().splitlines():
            content = json.loads(line)
            seen[content["step"]].update((window, targets) for window, targets in content["sequences"])
    return seen


def faults(seen: Seen, windows: Iterable[str]) -> tuple[set[str], set[str]]:
    """The windows that were repeated, and those that were skipped.

    An epoch ends within a step, which holds the last sequences of one and the first of the next. So what must be true
    after each step is that every sequence was seen as often as there were whole epochs, or once more.
    """
    counts = dict.fromkeys(windows, 0)
    repeated: set[str] = set()
    skipped: set[str] = set()
    for step in range(STEPS):
        for (window, _), times in seen.get(step, Counter()).items():
            counts[window] += times
        epochs = sum(counts.values()) // len(counts)
        repeated |= {window for window, count in counts.items() if count > epochs + 1}
        skipped |= {window for window, count in counts.items() if count < epochs}
    return repeated, skipped


@pytest.mark.slow
def test_each_sequence_is_seen_once_an_epoch_through_crashes_and_changes(
    chain: Run, alone: Run, windows: set[str]
) -> None:
    for run in (chain, alone):
        seen = read_seen(run.folder)
        assert sorted(seen) == list(range(STEPS))
        assert faults(seen, windows) == (set(), set())
        assert sum(sum(step.values()) for step in seen.values()) > 2 * len(windows)
    assert read_seen(chain.folder) == read_seen(alone.folder)


@pytest.mark.slow
def test_the_chain_was_what_it_says(chain: Run, alone: Run) -> None:
    """All three ran, in turn, and each step is recorded once: what was lost in a crash was made again."""
    steps = {
        rank: {json.loads(line)["step"] for line in (chain.folder / FOLDER / f"rank-{rank}.jsonl").open()}
        for rank in range(3)
    }
    first_of_two, first_of_three = min(steps[1]), min(steps[2])
    assert 4 <= first_of_two < first_of_three < STEPS
    assert first_of_two % 4 == first_of_three % 4 == 0
    assert steps[0] == set(range(STEPS))
    assert steps[1] == set(range(first_of_two, STEPS))
    assert steps[2] == set(range(first_of_three, STEPS))
    assert [chain.summary[name] for name in ("engine", "processes")] == ["ZeRO-2", 3]
    epochs = {line["step"] - 1: line["epoch"] for line in chain.lines if "epoch" in line}
    assert epochs[first_of_two] == 0
    assert epochs[first_of_three] == 1
    assert epochs[STEPS - 1] == 2
    assert epochs == {line["step"] - 1: line["epoch"] for line in alone.lines if "epoch" in line}


# What must not pass.


def test_twin_a_step_that_is_made_twice_repeats_sequences(alone: Run, windows: set[str], tmp_path: Path) -> None:
    shutil.copytree(alone.folder / FOLDER, tmp_path / FOLDER)
    path = tmp_path / FOLDER / "rank-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines, *(line for line in lines if '"step": 7,' in line)]))
    assert faults(read_seen(tmp_path), windows)[0]


@pytest.mark.parametrize("broken", ["", "left out", "rank", "seed", "rate", "resume"])
def test_twin_records_of_steps_that_are_built_wrongly(
    broken: str, alone: Run, windows: set[str], tmp_path: Path
) -> None:
    """Two processes played here: as they should be; the second one's left out; both of rank 0; of another seed, or
    rate; resumed a step late."""
    packing = Packing(CROP, TOKENS, MICRO_BATCHES, 1 if broken == "seed" else 0)
    mask = replace(Mask(), rate=0.16) if broken == "rate" else Mask()
    for rank in range(1 if broken == "left out" else 2):
        record = Record(tmp_path, rank)
        steps = Steps(train_corpus(alone), packing, mask, 0, Cursor(), 0 if broken == "rank" else rank, 2)
        for step in itertools.islice(steps, STEPS):
            if not (broken == "resume" and step.step == 9):
                record.write(step)
    seen = read_seen(tmp_path)
    assert (seen == read_seen(alone.folder)) == (broken == "")
    assert (faults(seen, windows) == (set(), set())) == (broken in ("", "seed", "rate"))


def test_twin_lines_of_lost_steps_that_are_kept_repeat_sequences(alone: Run, windows: set[str], tmp_path: Path) -> None:
    """A crash after step 13 and a checkpoint before step 12: what was recorded between must be forgotten."""
    path = tmp_path / FOLDER / "rank-0.jsonl"
    shutil.copytree(alone.folder / FOLDER, path.parent)
    lines = {line: json.loads(line)["step"] for line in path.read_text().splitlines(keepends=True)}
    before = "".join(line for line, step in lines.items() if step < 14)
    after = "".join(line for line, step in lines.items() if step >= 12)
    path.write_text(before + after)
    assert faults(read_seen(tmp_path), windows)[0]
    path.write_text(before)
    go_back(tmp_path, 12)
    path.write_text(path.read_text() + after)
    assert read_seen(tmp_path) == read_seen(alone.folder)
