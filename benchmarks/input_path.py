"""How fast sequences reach a run: from the prepared corpus to packed, corrupted micro-batches.

    python benchmarks/input_path.py --out input_path.json

The real proteins of HF_PLM_DATA (default ../shared/data) are prepared in a temporary folder (--folder keeps it, and is
to be on a disk, not in memory); without them nothing is measured. One core, to which the process is bound where the
system can: encoding against transformers' EsmTokenizer, and the loader in random order at crop 1,024, its files in
memory (warm) or dropped from it before each measurement (cold). A cold row holds the first tokens alone, because the
files are small and soon read; it is `not measured` where the disk delivered less than the tokens, as for a folder in
memory. Then what reaches a process that only receives, with four workers on all cores, and the share of the time of
real runs on the CPU that `next(steps)` takes, without workers. Medians; the last lines are rows of `name value unit`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from itertools import islice, pairwise
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from outcome import Row, finish, table

from hf_plm.config import Mask
from hf_plm.data import loader, pack
from hf_plm.data.corpus import Corpus, open_corpus
from hf_plm.data.order import Cursor
from hf_plm.data.pack import Packing
from hf_plm.data.prepare import ensure_prepared
from hf_plm.proteins.vocabulary import encode

PACKINGS = {
    "8192": Packing(crop=1024, tokens=8192, micro_batches=1, seed=0),
    "8x8192": Packing(crop=1024, tokens=8192, micro_batches=8, seed=0),
    "65536": Packing(crop=1024, tokens=65_536, micro_batches=1, seed=0),
}
WARM_TOKENS, COLD_TOKENS, WORKERS_TOKENS = 6_000_000, 2_000_000, 12_000_000
NUM_WORKERS = 4  # as many as a run on a GPU has
RUNS: dict[str, dict[str, str]] = {
    "demo": {"schedule.steps": "150"},
    "8m": {"model.preset": "8m", "data.crop": "1024", "schedule.steps": "12"},
}


@contextmanager
def one_core() -> Iterator[None]:
    """This process on one core, the last that it may use."""
    torch.set_num_threads(1)
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    yield
    os.sched_setaffinity(0, cores)


def rate(take: Callable[[], int]) -> float:
    """What `take` counts, per second."""
    began = time.perf_counter()
    count = take()
    return count / (time.perf_counter() - began)


def tokens_of(steps: Iterator[loader.Step], num_tokens: int) -> int:
    """Takes steps until they hold so many tokens."""
    taken = 0
    while taken < num_tokens:
        taken += next(steps).num_tokens
    return taken


def tokenising(corpus: Corpus, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Residues/s of both on the same sequences: as a micro-batch has them, and as texts."""
    from transformers import EsmTokenizer

    from hf_plm.proteins.tokenizer import ProteinTokenizer

    indices = next(pack.plan_steps(corpus.lengths, PACKINGS["8192"], 0, Cursor())).micro_batches[0].indices
    residues_R, offsets = corpus.read(indices)
    texts = [residues_R[begin:end].tobytes().decode() for begin, end in pairwise(offsets)]
    ProteinTokenizer().save_pretrained(folder / "tokenizer")
    esm_tokenizer = EsmTokenizer(str(folder / "tokenizer" / "vocab.txt"))
    assert [token for ids in esm_tokenizer(texts)["input_ids"] for token in ids[1:-1]] == encode(residues_R).tolist()

    def by_table() -> int:
        return sum(len(encode(residues_R)) for _ in range(2000))

    def by_tokenizer() -> int:
        return 10 * len(residues_R) if [esm_tokenizer(texts) for _ in range(10)] else 0

    found: dict[str, list[float]] = {"table": [], "esm_tokenizer": []}
    for _ in range(repeats):
        found["table"].append(rate(by_table))
        found["esm_tokenizer"].append(rate(by_tokenizer))
    return found


def evict(folder: Path) -> int:
    """Drop the files under `folder` from memory; their bytes."""
    num_bytes = 0
    for path in folder.rglob("*.arrow"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is not written yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            num_bytes += path.stat().st_size
    return num_bytes


def bytes_from_disk() -> int | None:
    """What the disk has delivered to this process, as Linux counts it."""
    counts = Path("/proc/self/io")
    if not counts.exists():
        return None
    lines = dict(line.split(": ") for line in counts.read_text(encoding="ascii").splitlines())
    return int(lines["read_bytes"])


def loading(corpus: Corpus, cache: Path, repeats: int) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Tokens/s by case, and bytes dropped from memory and delivered by the disk."""
    found: dict[str, list[float]] = {}
    disk: dict[str, int] = {}
    for name, packing in PACKINGS.items():

        def steps(packing: Packing = packing) -> Iterator[loader.Step]:
            return iter(loader.Steps(corpus, packing, Mask(), 0, Cursor()))

        whole = steps()
        tokens_of(whole, int(corpus.lengths.sum()) // 4)  # into memory, if it was not
        found[f"warm.{name}"] = [
            rate(lambda whole=whole: tokens_of(whole, WARM_TOKENS))  # type: ignore[misc]
            for _ in range(repeats)
        ]
        if not hasattr(os, "posix_fadvise"):
            continue
        rates = []
        for _ in range(repeats):
            disk["evicted_bytes"] = evict(cache)
            before = bytes_from_disk()
            rates.append(rate(lambda steps=steps: tokens_of(steps(), COLD_TOKENS)))  # type: ignore[misc]
            after = bytes_from_disk()
            disk[f"delivered_bytes.{name}"] = -1 if before is None or after is None else after - before
        if disk[f"delivered_bytes.{name}"] >= COLD_TOKENS:
            found[f"cold.{name}"] = rates
    return found, disk


def stages(corpus: Corpus, packing: Packing) -> dict[str, float]:
    """Share of the time of each stage of a warm loader; the rest is not in any of them."""
    seconds: dict[str, float] = {}

    def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            began = time.perf_counter()
            result = function(*given)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - began
            return result

        return call

    def plans(*given: Any) -> Iterator[pack.StepPlan]:
        following = timed("plan", pack.plan_steps(*given).__next__)
        while True:
            yield following()

    with ExitStack() as patches:
        for name, owner, attribute in (
            ("read", corpus, "read"),
            ("encode", pack, "encode"),
            ("lay out", pack, "read_tokens"),
            ("draw bits", pack, "training_bits"),
            ("mask", pack, "mask_tokens"),
            ("make tensors", pack, "to_micro_batch"),
        ):
            patches.enter_context(patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        patches.enter_context(patch.object(loader, "plan_steps", plans))
        steps = iter(loader.Steps(corpus, packing, Mask(), 0, Cursor()))
        tokens_of(steps, WARM_TOKENS)
        seconds.clear()
        began = time.perf_counter()
        tokens_of(steps, WARM_TOKENS)
        whole = time.perf_counter() - began
    seconds["lay out"] -= seconds["read"] + seconds["encode"]
    seconds["rest"] = whole - sum(seconds.values())
    return {name: value / whole for name, value in seconds.items()}


def receiving(corpus: Corpus, packing: Packing, repeats: int) -> list[float]:
    """Tokens/s that reach a process which does nothing else, from workers on all cores."""
    warnings.filterwarnings("ignore", message="This DataLoader will create")
    steps = loader.Steps(corpus, packing, Mask(), 0, Cursor())
    with closing(loader.load_steps(steps, NUM_WORKERS, pin_memory=False)) as received:
        for _ in islice(received, 4 * NUM_WORKERS):  # what was read ahead while the workers started
            pass
        return [rate(lambda: tokens_of(received, WORKERS_TOKENS)) for _ in range(repeats)]


def waiting(corpus: str, run_folder: str, knobs: dict[str, str]) -> dict[str, float]:
    """A real run, and the share of the time from its second step to its last that it waited for data."""
    from hf_plm import load_recipe, pretrain
    from hf_plm.training import trainer

    marks: list[tuple[float, float]] = []

    def timed(*given: Any, **named: Any) -> Generator[loader.Step, None, None]:
        with closing(loader.load_steps(*given, **named)) as steps:
            while True:
                asked = time.perf_counter()
                step = next(steps)
                marks.append((asked, time.perf_counter()))
                yield step

    steps = knobs["schedule.steps"]
    fixed = {
        "data.train": corpus,
        "data.workers": "0",
        "validation.every": steps,
        "validation.final_sequences": "20",
        "checkpoint.every": steps,
        "run.trackers": "none",
        "run.folder": run_folder,
    }
    with patch.object(trainer, "load_steps", timed):
        pretrain(load_recipe("demo", {**fixed, **knobs}))
    # The last call is for the step after the last, and what is between is the end of the run.
    whole = marks[-2][0] - marks[0][1]
    waited = sum(got - asked for asked, got in marks[1:-2])
    num_steps = len(marks) - 2
    return {"share": waited / whole, "step": whole / num_steps, "wait": waited / max(num_steps - 1, 1)}


def runs(corpus: Path, repeats: int) -> dict[str, list[dict[str, float]]]:
    """`waiting` in a process of its own, on all cores."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
    for name, knobs in list(RUNS.items()) * repeats:
        with tempfile.TemporaryDirectory() as folder:
            call = json.dumps([str(corpus), f"{folder}/run", knobs])
            done = subprocess.run(
                [sys.executable, __file__, "--call", call], stdout=subprocess.PIPE, text=True, check=True
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def measure(fasta: Path, folder: Path, repeats: int, out: Path | None) -> None:
    import datasets

    cache = folder / "datasets"
    datasets.config.HF_DATASETS_CACHE = cache
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    prepared = ensure_prepared(fasta, folder / "corpora", show_progress=False)
    corpus = open_corpus(prepared)
    with one_core():
        tokenised = tokenising(corpus, folder, repeats)
        loaded, disk = loading(corpus, cache, repeats)
        shares = {name: stages(corpus, packing) for name, packing in PACKINGS.items()}
    received = {name: receiving(corpus, packing, repeats) for name, packing in PACKINGS.items()}
    ran = runs(prepared, max(1, repeats // 2))

    rows: list[Row] = [(f"input.tokenise.{name}", median(found), "residues/s") for name, found in tokenised.items()]
    ratio = median(tokenised["table"]) / median(tokenised["esm_tokenizer"])
    rows.append(("input.tokenise.ratio", ratio, "x"))
    for kind in ("warm", "cold"):
        for name in PACKINGS:
            found = loaded.get(f"{kind}.{name}")
            rows.append((f"input.loader.{kind}.{name}", median(found) if found else None, "tokens/s"))
    rows += [
        (f"input.loader.workers{NUM_WORKERS}.{name}", median(found), "tokens/s") for name, found in received.items()
    ]
    rows += [
        (f"input.stage.{name}.{stage.replace(' ', '_')}", 100 * share, "%")
        for name, found_shares in shares.items()
        for stage, share in found_shares.items()
    ]
    for name, found_runs in ran.items():
        for what, unit, scale in (("share", "%", 100.0), ("step", "s", 1.0), ("wait", "s", 1.0)):
            row = "input.waiting" if what == "share" else f"input.waiting.{what}"
            rows.append((f"{row}.{name}", scale * median(run[what] for run in found_runs), unit))

    def millions(found: list[float] | None) -> str:
        low_to_high = f"{min(found) / 1e6:.1f} to {max(found) / 1e6:.1f}" if found else ""
        return f"{median(found) / 1e6:.1f} ({low_to_high})" if found else "not measured"

    cases = {**tokenised, **loaded, **{f"workers{NUM_WORKERS}.{name}": found for name, found in received.items()}}
    text = table(("Case", "Millions per second"), [(name, millions(found)) for name, found in cases.items()])
    stage_names = next(iter(shares.values()))
    lines = [(stage, *(f"{shares[name][stage]:.0%}" for name in shares)) for stage in stage_names]
    text += "\n\n" + table(("Stage, share of one core", *shares), lines)
    facts = {
        "repeats": repeats,
        "workers_cores": os.cpu_count(),
        "omp_threads": os.environ.get("OMP_NUM_THREADS", "all"),
    }
    text += "\n\n" + ", ".join(f"{name} {value}" for name, value in {**facts, **disk}.items())
    finish(text, rows, out, **facts, disk=disk, tokenised=tokenised, loaded=loaded, received=received, runs=ran)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each case (5)")
    parser.add_argument("--folder", type=Path, help="where the corpus is prepared and kept (a temporary folder)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.call:
        print(json.dumps(waiting(*json.loads(arguments.call))))
        return
    fasta = Path(os.environ.get("HF_PLM_DATA", "../shared/data")) / "corpus" / "train.fasta.gz"
    if not fasta.exists():
        print(f"Nothing was measured: {fasta} is missing; set HF_PLM_DATA to the folder of the real proteins.")
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        measure(fasta.resolve(), folder, arguments.repeats, arguments.out)


if __name__ == "__main__":
    main()
