"""How fast a run goes on: a corpus of 65 million sequences, its cursor, and the first batch of step 1,000,000.

    python benchmarks/resume.py /scratch/resume --out resume.json

The corpus has no sequences, only what surrounds them. The folder is a prepared corpus (`corpus.json`, Parquet with ids
and real lengths) that `open_corpus` opens as any other; in the Arrow files that `datasets` makes of it, the letters are
then replaced by holes of the true size (sparse files: 27 GB by name, 2 GB on disk). So chunks, offsets and places are
those of a real corpus, and `Corpus.read` returns as many bytes as it would, but zeros, which become `<unk>`. What that
leaves out: no letter is read from the disk, and no residue is a target.

Lengths are drawn from the real proteins of HF_PLM_DATA (default `../shared/data`), or from a log-normal fit to them
where that is absent. Every measurement is a process of its own, and its clock starts before the interpreter does. A
cold one finds the corpus out of memory, but not the libraries. The last lines are rows of `name value unit`.
"""

import argparse
import gzip
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from importlib.metadata import version
from io import FileIO
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from hf_plm.config import Mask
from hf_plm.data.corpus import open_corpus
from hf_plm.data.loader import Steps, load_steps
from hf_plm.data.manifest import FORMAT_VERSION, MANIFEST_NAME, Counts, Manifest, Shard, Split
from hf_plm.data.order import Cursor
from hf_plm.data.pack import Packing, plan_step
from hf_plm.data.shards import ROW_GROUP_RESIDUES

STEP = 1_000_000
PACKING = Packing(crop=1024, tokens=8192, micro_batches=256, seed=0)  # launch/recipes/esm2_650m.yaml
NUM_FILES = 32  # 26 billion residues in files of 500 MB, at 0.6 bytes a residue
LOG_NORMAL = (5.678, 0.762, 30, 16_223)  # mean and deviation of ln, shortest, longest of 135,453 natural proteins
CASES: dict[str, dict[str, Any]] = {
    "rank0of1": {},
    "rank3of8": {"rank": 3, "world_size": 8},
    "rank0of1.worker": {"num_workers": 1},
    "rank3of8.worker": {"rank": 3, "world_size": 8, "num_workers": 1},
    "rank3of8.spawned_worker": {"rank": 3, "world_size": 8, "num_workers": 1, "start_method": "spawn"},
}


def known_lengths() -> np.ndarray:
    """Lengths, int32, to draw from."""
    fasta = Path(os.environ.get("HF_PLM_DATA", "../shared/data")) / "corpus" / "train.fasta.gz"
    if not fasta.exists():
        mean, deviation, shortest, longest = LOG_NORMAL
        drawn = np.random.default_rng(1).lognormal(mean, deviation, 200_000)
        return drawn.clip(shortest, longest).astype(np.int32)
    lengths: list[int] = []
    with gzip.open(fasta, "rt") as file:
        for line in file:
            if line.startswith(">"):
                lengths.append(0)
            else:
                lengths[-1] += len(line.strip())
    return np.array(lengths, dtype=np.int32)


def make(folder: Path, num_sequences: int) -> None:
    """The corpus without its sequences, and the cache of `datasets` with the holes in it."""
    import datasets

    lengths = known_lengths()
    random = np.random.default_rng(0)
    rows = ROW_GROUP_RESIDUES // int(lengths.mean())
    (folder / "data").mkdir(parents=True)
    shards, num_residues, begin = [], 0, 0
    for number in range(NUM_FILES):
        end = num_sequences * (number + 1) // NUM_FILES
        ids = pyarrow.compute.utf8_lpad(pyarrow.array(np.arange(begin, end)).cast(pyarrow.string()), 10, "0")
        drawn = random.choice(lengths, end - begin)
        num_residues += int(drawn.sum(dtype=np.int64))
        columns = {
            "id": pyarrow.compute.binary_join_element_wise("UniRef50", ids, "_"),
            "sequence": pyarrow.repeat("", end - begin),
            "length": drawn,
        }
        path = folder / "data" / f"train-{number:05d}-of-{NUM_FILES:05d}.parquet"
        pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd", row_group_size=rows)
        checksum = hashlib.sha256(path.name.encode()).hexdigest()  # opening a corpus compares sizes, not sums
        shards.append(Shard(f"data/{path.name}", end - begin, path.stat().st_size, checksum))
        begin = end
    split = Split(num_sequences, num_residues, {}, {}, tuple(shards))
    counts = Counts(read=num_sequences, kept=num_sequences)
    manifest = Manifest("resume", FORMAT_VERSION, version("hf_plm"), "given", {}, counts, {"train": split}, (), ())
    # As many Arrow files as with the letters, of which a row has 30 bytes without them.
    datasets.config.MAX_SHARD_SIZE = int(500e6 * 30 / (30 + lengths.mean()))
    (folder / MANIFEST_NAME).write_text(manifest.to_json(), encoding="utf-8")
    open_corpus(folder)
    for path in sorted((folder / "cache").rglob("*.arrow")):
        _put_holes(path)


class _SparseFile(FileIO):
    """A file in which a long run of zeros is a hole."""

    def write(self, data: Any) -> int:
        if len(data) > 100_000 and not np.frombuffer(data, dtype=np.uint8).any():
            self.seek(len(data), os.SEEK_CUR)
            return len(data)
        return super().write(data)


def _put_holes(path: Path) -> None:
    """The same record batches, with sequences of the lengths that they name."""
    sparse = path.with_suffix(".sparse")
    with pyarrow.memory_map(str(path)) as whole, _SparseFile(str(sparse), "w") as file:
        stream = pyarrow.ipc.open_stream(whole)
        with pyarrow.ipc.new_stream(pyarrow.PythonFile(file), stream.schema) as writer:
            for batch in stream:
                ends = np.cumsum(batch.column("length").to_numpy(), dtype=np.int32)
                offsets, letters = np.append(np.int32(0), ends), np.zeros(ends[-1], dtype=np.uint8)
                buffers = pyarrow.py_buffer(offsets), pyarrow.py_buffer(letters)
                text = pyarrow.StringArray.from_buffers(len(ends), *buffers)
                place = batch.schema.get_field_index("sequence")
                writer.write_batch(batch.set_column(place, batch.schema.field(place), text))
    os.replace(sparse, path)


def plan_speed(folder: Path, num_steps: int) -> dict[str, float]:
    """Planning without a cursor, which is what a run that had lost it would do a million times."""
    lengths, cursor = open_corpus(folder).lengths, Cursor()
    began = time.perf_counter()
    for step in range(num_steps):
        cursor = plan_step(lengths, PACKING, step, cursor).next_cursor
    seconds = time.perf_counter() - began
    num_taken = cursor.epoch * len(lengths) + cursor.place
    return {"steps_per_second": num_steps / seconds, "sequences_per_step": num_taken / num_steps}


def permutation(num_sequences: int) -> dict[str, float]:
    """What an order with a table would cost in every process and epoch, before anything is read."""
    before, began = _peak_bytes(resource.RUSAGE_SELF), time.perf_counter()
    table = np.random.default_rng(0).permutation(num_sequences)
    seconds = time.perf_counter() - began
    assert len(table) == num_sequences
    return {"seconds": seconds, "bytes": _peak_bytes(resource.RUSAGE_SELF) - before}


def first_step(
    folder: Path,
    cursor: Cursor,
    started: float,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    start_method: str | None = None,
) -> dict[str, float]:
    """Seconds from the start of the process, and memory after the third step."""
    if start_method:
        multiprocessing.set_start_method(start_method)
    marks = {"imported": time.time()}
    corpus = open_corpus(folder)
    marks["opened"] = time.time()
    steps = Steps(corpus, PACKING, Mask(), STEP, cursor, rank, world_size)
    assert steps.epoch_tokens > 0  # which a run says when it starts
    marks["counted"] = time.time()
    taken = load_steps(steps, num_workers, pin_memory=False)
    first = next(taken)
    marks["first_step"] = time.time()
    assert first.step == STEP
    assert len(first.micro_batches) == -(-PACKING.micro_batches // world_size)
    for _ in islice(taken, 2):
        pass
    found = {f"{name}_seconds": mark - started for name, mark in marks.items()}
    found["private_bytes"] = _private_bytes(os.getpid())
    workers = multiprocessing.active_children()
    if workers:
        found["worker_private_bytes"] = _private_bytes(workers[0].pid)
    del taken
    found["peak_bytes"] = _peak_bytes(resource.RUSAGE_SELF)
    if workers:
        found["worker_peak_bytes"] = _peak_bytes(resource.RUSAGE_CHILDREN)
    return found


def _peak_bytes(who: int) -> float:
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(who).ru_maxrss * unit)


def _private_bytes(pid: int | None) -> float:
    """Memory that no other process shares and no file backs, as Linux counts it; nan elsewhere."""
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    if not rollup.exists():
        return float("nan")
    fields = dict(line.split(":", 1) for line in rollup.read_text().splitlines()[1:])
    return 1024.0 * int(fields["Private_Dirty"].split()[0])


def _evict(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _in_its_own_process(folder: Path, name: str, **given: Any) -> dict[str, float]:
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    call = json.dumps([name, {**given, "started": time.time()}])
    command = [sys.executable, __file__, str(folder), "--call", call]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1]) if done.stdout.strip() else {}


def _call(folder: Path, name: str, given: dict[str, Any]) -> dict[str, float]:
    """The other side of it."""
    if name == "make":
        make(folder, given["num_sequences"])
        return {}
    if name == "plan":
        return plan_speed(folder, given["num_steps"])
    if name == "permutation":
        return permutation(given["num_sequences"])
    return first_step(folder, Cursor(*given.pop("cursor")), **given)


def _machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = (line.partition(":") for line in cpuinfo.read_text().splitlines())
        processor = next((value.strip() for name, _, value in lines if name.startswith("model name")), processor)
    names = ["hf_plm", "torch", "datasets", "pyarrow", "numpy"]
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
    }


def _rows(name: str, found: list[dict[str, float]]) -> list[tuple[str, str, str]]:
    """Median and range of times, the largest of each memory."""
    rows = []
    for key in found[0]:
        what, unit = key.rsplit("_", 1)
        values = sorted(one[key] for one in found)
        if unit == "seconds":
            rows.append((f"{name}.{what}", f"{median(values):.2f} ({values[0]:.2f} to {values[-1]:.2f})", "s"))
        else:
            rows.append((f"{name}.{what}", f"{values[-1] / 1e6:.0f}", "MB"))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made where it is missing: 2 GB, a few minutes")
    parser.add_argument("--sequences", type=int, default=65_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="a JSON file with every measurement")
    parser.add_argument("--call", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    if arguments.call:
        name, given = json.loads(arguments.call)
        print(json.dumps(_call(folder, name, given)))
        return
    if not (folder / "made").exists():
        shutil.rmtree(folder, ignore_errors=True)
        _in_its_own_process(folder, "make", num_sequences=arguments.sequences)
        (folder / "made").touch()
    plan = _in_its_own_process(folder, "plan", num_steps=200)
    # Planning a million steps takes hours; every step takes about as many sequences, so the place is known well enough.
    cursor = divmod(round(STEP * plan["sequences_per_step"]), arguments.sequences)
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(arguments.repeats):  # in turns, so that other work on the machine falls on all cases
        for name, case in CASES.items():
            measured[name].append(_in_its_own_process(folder, "first_step", cursor=cursor, **case))
    if hasattr(os, "posix_fadvise"):
        for name in ("rank0of1", "rank3of8"):
            _evict(folder)
            measured[f"{name}.cold"] = [_in_its_own_process(folder, "first_step", cursor=cursor, **CASES[name])]
    table = _in_its_own_process(folder, "permutation", num_sequences=arguments.sequences)

    rows = [("sequences", f"{arguments.sequences}", ""), ("cursor", f"{cursor[0]}:{cursor[1]}", "epoch:place")]
    rows += [row for name, found in measured.items() for row in _rows(name, found)]
    rows.append(("planning", f"{plan['steps_per_second']:.0f}", "steps/s"))
    rows.append(("sequences_per_step", f"{plan['sequences_per_step']:.1f}", ""))
    rows.append(("permutation.time", f"{table['seconds']:.2f}", "s"))
    rows.append(("permutation.memory", f"{table['bytes'] / 1e6:.0f}", "MB"))
    machine = _machine()
    print(json.dumps(machine))
    for row in rows:
        print(*row)
    if arguments.out:
        everything = {"machine": machine, "cursor": cursor, "measured": measured, "plan": plan, "permutation": table}
        arguments.out.write_text(json.dumps(everything, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
