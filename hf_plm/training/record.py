"""For looking into a run: what each process saw at each step, as hashes, in `samples/rank-N.jsonl` of the run's folder.

A line is a micro-batch: its step, and for each sequence in it a hash of the true tokens of its window and a hash of
what is to be predicted where. They are taken from the tensors that the model gets, not from the plan that made them, so
that two runs, or one run before and after a crash, can be compared by what happened.
"""

import hashlib
import itertools
import json
from pathlib import Path

import numpy as np

from hf_plm.data.loader import Step
from hf_plm.data.pack import MicroBatch
from hf_plm.proteins.vocabulary import IGNORED_LABEL

FOLDER = "samples"


class Record:
    """Appends to the file of one process. `go_back` forgets, in all files of the folder, what will be seen again."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder = folder / FOLDER
        self._folder.mkdir(exist_ok=True)
        self._path = self._folder / f"rank-{rank}.jsonl"

    def write(self, step: Step) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            for batch in step.micro_batches:
                if batch.num_targets:
                    file.write(json.dumps({"step": step.step, "sequences": _hashes(batch)}) + "\n")


def go_back(folder: Path, step: int) -> None:
    """Forget the steps from `step` on, in the files of every process there ever was."""
    for path in (folder / FOLDER).glob("rank-*.jsonl"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step))


def _hashes(batch: MicroBatch) -> list[tuple[str, str]]:
    inputs_T, labels_T = batch.input_ids.numpy(), batch.labels.numpy()
    true_T = np.where(labels_T == IGNORED_LABEL, inputs_T, labels_T)
    bounds = batch.cu_seqlens.tolist()
    return [
        (window_hash(true_T[begin:end]), _hash(labels_T[begin:end], inputs_T[begin:end]))
        for begin, end in itertools.pairwise(bounds)
    ]


def window_hash(tokens: np.ndarray) -> str:
    """Of the true token ids of a window, specials included."""
    return _hash(tokens)


def _hash(*arrays: np.ndarray) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(array.astype(np.int64).tobytes())
    return digest.hexdigest()
