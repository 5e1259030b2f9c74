"""The same steps from any number of workers and processes, and a validation set that never changes."""

import pickle
import signal
from dataclasses import fields
from itertools import islice
from multiprocessing.reduction import ForkingPickler
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
from hf_plm.data.pack import MicroBatch, Packing
from hf_plm.proteins.vocabulary import IGNORED_LABEL

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


def assert_equal_steps(one: Step, other: Step) -> None:
    """Every field of both, to the type and the last bit."""
    for field in fields(Step):
        if field.name != "micro_batches":
            assert getattr(one, field.name) == getattr(other, field.name)
    for ours, theirs in zip(one.micro_batches, other.micro_batches, strict=True):
        for field in fields(MicroBatch):
            a, b = getattr(ours, field.name), getattr(theirs, field.name)
            assert type(a) is type(b)
            assert (a.dtype == b.dtype and torch.equal(a, b)) if isinstance(a, torch.Tensor) else a == b


def test_a_step_comes_from_a_worker_as_it_was_made(family_corpus: Path) -> None:
    """With an empty micro-batch at the end, which process 1 of 2 has where there are 3."""
    here, there = (steps_of(family_corpus, num_workers, rank=1, world_size=2) for num_workers in (0, 2))
    assert any(batch.num_targets == 0 for batch in here[0].micro_batches)
    for one, other in zip(here, there, strict=True):
        assert_equal_steps(one, other)
    # The twin: one label of one micro-batch that got lost on the way.
    batch = there[0].micro_batches[0]
    batch.labels[batch.labels.argmax()] = IGNORED_LABEL
    with pytest.raises(AssertionError):
        assert_equal_steps(here[0], there[0])


def test_a_step_is_sent_as_one_tensor_of_two_bytes_a_token(family_corpus: Path) -> None:
    """Each tensor is a file of shared memory, and costs the process that trains a quarter of a millisecond."""
    step = steps_of(family_corpus)[0]
    _, sent = step.__reduce__()
    tensors = [part for part in sent if isinstance(part, torch.Tensor)]
    assert [tensor.nbytes for tensor in tensors] == [2 * step.num_tokens]
    assert len(ForkingPickler.dumps(step)) < 4096, "and the message beside it has the bounds alone"
    assert_equal_steps(pickle.loads(pickle.dumps(step)), step)


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
