"""The same steps from any number of workers and processes, and a validation set that never changes."""

import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_plm.config import Mask
from hf_plm.data.corpus import open_corpus
from hf_plm.data.loader import (
    Step,
    Steps,
    count_tokens,
    load_steps,
    sequence_keys,
    stop_signals,
    validation_micro_batches,
    validation_windows,
)
from hf_plm.data.order import Cursor
from hf_plm.data.pack import Packing

PACKING = Packing(crop=128, tokens=512, micro_batches=3, seed=4)


def steps_of(
    corpus: Path, num_workers: int = 0, start: int = 0, cursor: Cursor | None = None, **ranks: int
) -> list[Step]:
    steps = Steps(open_corpus(corpus), PACKING, Mask(), start, cursor or Cursor(), **ranks)
    return list(islice(load_steps(steps, num_workers, pin_memory=False), 6))


def fingerprint(steps: list[Step]) -> list[tuple[int, list[list[int]]]]:
    return [(step.step, [batch.input_ids.tolist() for batch in step.micro_batches]) for step in steps]


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(family_corpus: Path, num_workers: int) -> None:
    assert fingerprint(steps_of(family_corpus, num_workers)) == fingerprint(steps_of(family_corpus))


def test_resuming_is_starting_at_a_cursor(family_corpus: Path) -> None:
    whole = steps_of(family_corpus)
    later = steps_of(family_corpus, num_workers=2, start=2, cursor=whole[1].next_cursor)
    assert fingerprint(later)[:4] == fingerprint(whole)[2:]
    # The twin: the same cursor under another step number draws another corruption.
    shifted = steps_of(family_corpus, start=3, cursor=whole[1].next_cursor)
    assert fingerprint(shifted)[0][1] != fingerprint(whole)[2][1]


def test_processes_split_the_micro_batches_of_a_step(family_corpus: Path) -> None:
    whole = steps_of(family_corpus)
    first, second = (steps_of(family_corpus, rank=rank, world_size=2) for rank in (0, 1))
    for step, a, b in zip(whole, first, second, strict=True):
        assert len(a.micro_batches) == len(b.micro_batches) == 2
        assert torch.equal(a.micro_batches[0].input_ids, step.micro_batches[0].input_ids)
        assert torch.equal(b.micro_batches[0].input_ids, step.micro_batches[1].input_ids)
        assert torch.equal(a.micro_batches[1].input_ids, step.micro_batches[2].input_ids)
        assert b.micro_batches[1].num_targets == 0
        assert a.num_tokens == b.num_tokens == step.num_tokens


def test_an_epoch_is_counted_in_cropped_tokens(family_corpus: Path) -> None:
    corpus = open_corpus(family_corpus)
    assert count_tokens(corpus, 10**6) == int(corpus.lengths.sum()) + 2 * len(corpus)
    assert count_tokens(corpus, 100) < count_tokens(corpus, 200)


def test_a_million_at_a_time_is_all_of_them(family_corpus: Path) -> None:
    corpus = open_corpus(family_corpus)
    corpus.lengths = np.random.default_rng(0).integers(1, 3000, 2_300_001).astype(np.int32)
    expected = int(np.minimum(corpus.lengths.astype(np.int64) + 2, 1024).sum())
    assert count_tokens(corpus, 1024) == expected
    assert Steps(corpus, PACKING, Mask(), 0, Cursor()).epoch_tokens != expected, "the twin: another crop"


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_the_warning_of_a_scheduler_asks_a_run_to_stop() -> None:
    assert {signal.SIGTERM, signal.SIGUSR1} <= set(stop_signals())
    assert signal.SIGUSR2 not in stop_signals()


def test_validation_does_not_depend_on_packing(family_corpus: Path) -> None:
    corpus = open_corpus(family_corpus, "validation")
    windows, keys = validation_windows(corpus, 128, 0, seed=0)
    assert len(set(keys.tolist())) == len(windows) == len(corpus)

    def targets(tokens: int) -> dict[int, list[int]]:
        found = {}
        for batch, places in validation_micro_batches(corpus, windows, keys, tokens, 0, Mask()):
            bounds = batch.cu_seqlens.tolist()
            for place, begin, end in zip(places.tolist(), bounds, bounds[1:], strict=False):
                found[place] = batch.input_ids[begin:end].tolist() + batch.labels[begin:end].tolist()
        return found

    assert targets(128) == targets(1024)
    assert len(targets(1024)) == len(corpus)


def test_a_sample_of_the_validation_set_is_the_same_in_any_order(family_corpus: Path) -> None:
    corpus = open_corpus(family_corpus, "validation")
    windows, keys = validation_windows(corpus, 128, 5, seed=0)
    everything = sequence_keys(corpus)
    assert keys.tolist() == sorted(everything.tolist())[:5]
    assert (everything[windows.indices] == keys).all()
    assert not np.isin(sequence_keys(open_corpus(family_corpus, "train")), everything).any()
