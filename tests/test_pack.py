"""What a step holds: a contiguous run of the order, each sequence once, whole, and hardly a slot empty."""

from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_plm.config import Mask
from hf_plm.data.corpus import open_corpus
from hf_plm.data.order import Cursor, order
from hf_plm.data.pack import (
    LARGEST_BLOCK,
    Packing,
    best_fit,
    build_micro_batch,
    empty_micro_batch,
    plan_step,
    plan_steps,
    read_tokens,
    windows_from,
)
from hf_plm.data.prepare import prepare
from hf_plm.proteins.vocabulary import CLS_ID, EOS_ID, TOKENS


@given(st.lists(st.integers(1, 50), min_size=1, max_size=200), st.integers(1, 6))
def test_best_fit_takes_a_prefix_and_overfills_nothing(lengths: list[int], num_bins: int) -> None:
    bins = best_fit(iter(lengths), 100, num_bins)
    taken = sorted(position for bin_ in bins for position in bin_)
    assert taken == list(range(len(taken)))
    rooms = [100 - sum(lengths[position] for position in bin_) for bin_ in bins]
    assert min(rooms) >= 0
    if len(taken) < len(lengths):
        assert lengths[len(taken)] > max(rooms)


def test_best_fit_chooses_the_tightest_bin() -> None:
    """60 and 70 leave 40 and 30: 30 goes where it leaves nothing. The twin, first fit, would put it beside 60."""
    assert best_fit(iter([60, 70, 30, 40]), 100, 2) == [[0, 3], [1, 2]]


def lengths_of(num: int) -> np.ndarray:
    return np.random.default_rng(0).integers(30, 900, num).astype(np.int32)


def test_steps_follow_one_another_and_cross_the_end_of_an_epoch() -> None:
    lengths = lengths_of(100)
    packing = Packing(crop=512, tokens=2048, micro_batches=2, seed=0)
    cursor, seen = Cursor(), []
    for step in range(40):
        plan = plan_step(lengths, packing, step, cursor)
        seen += sorted(
            (window for windows in plan.micro_batches for window in windows.indices.tolist()), key=lambda index: index
        )
        assert plan.cursor == cursor
        cursor = plan.next_cursor
    assert cursor.epoch >= 3
    assert len(seen) == cursor.epoch * 100 + cursor.place
    counts = np.bincount(seen, minlength=100)
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("longest_first", [False, True])
def test_a_plan_is_the_best_fit_of_the_order(longest_first: bool) -> None:
    """However many windows are asked for at a time, and however the corpus is sorted; here over three epochs."""
    lengths, packing, cursor = lengths_of(90), Packing(512, 8192, 8, 1), Cursor(4, 80)
    lengths = np.sort(lengths)[::-1] if longest_first else lengths
    run = windows_from(lengths, packing, cursor, 400)
    bins = best_fit(iter(run.num_tokens.tolist()), packing.tokens, packing.micro_batches)
    plan = plan_step(lengths, packing, 0, cursor)
    assert [w.indices.tolist() for w in plan.micro_batches] == [run.indices[bin_].tolist() for bin_ in bins]
    assert [w.starts.tolist() for w in plan.micro_batches] == [run.starts[bin_].tolist() for bin_ in bins]
    assert plan.next_cursor == Cursor(4 + (80 + sum(map(len, bins))) // 90, (80 + sum(map(len, bins))) % 90)
    # The twin: another place in the order is another plan.
    other = plan_step(lengths, packing, 0, Cursor(4, 79))
    assert [w.indices.tolist() for w in other.micro_batches] != [w.indices.tolist() for w in plan.micro_batches]


def test_a_step_is_the_same_from_its_cursor_as_in_a_row() -> None:
    lengths, packing = lengths_of(500), Packing(512, 2048, 3, 1)
    first = plan_step(lengths, packing, 0, Cursor())
    again = plan_step(lengths, packing, 1, first.next_cursor)
    run = windows_from(lengths, packing, Cursor(), first.next_cursor.place + 50)
    held = np.concatenate([windows.indices for windows in again.micro_batches])
    assert set(held.tolist()) == set(run.indices[first.next_cursor.place :][: len(held)].tolist())
    # The twin: another seed holds other sequences.
    other = plan_step(lengths, Packing(512, 2048, 3, 2), 1, first.next_cursor)
    assert set(held.tolist()) != set(np.concatenate([w.indices for w in other.micro_batches]).tolist())


@pytest.mark.parametrize(
    ("num_sequences", "packing"), [(40, Packing(512, 8192, 2, 3)), (9000, Packing(512, 8192, 2, 3))]
)
def test_steps_in_a_row_are_those_planned_alone(num_sequences: int, packing: Packing) -> None:
    """Over the ends of epochs, and over blocks that end in the middle of a step."""
    lengths, start = lengths_of(num_sequences), Cursor(1, num_sequences - 3)
    in_a_row = list(islice(plan_steps(lengths, packing, 5, start), 300))
    cursor = start
    for step, plan in enumerate(in_a_row, start=5):
        alone = plan_step(lengths, packing, step, cursor)
        assert (plan.step, plan.cursor, plan.next_cursor) == (alone.step, alone.cursor, alone.next_cursor)
        for ours, theirs in zip(plan.micro_batches, alone.micro_batches, strict=True):
            assert vars(ours).keys() == {"indices", "starts", "num_tokens"}
            assert all(np.array_equal(array, getattr(theirs, name)) for name, array in vars(ours).items())
        cursor = plan.next_cursor
    num_taken = (cursor.epoch - 1) * num_sequences + cursor.place - start.place
    assert num_taken > 2 * LARGEST_BLOCK, "several blocks of the largest size"
    # The twin: a step planned from a cursor one further on.
    other = plan_step(lengths, packing, 5, Cursor(1, num_sequences - 2))
    assert other.micro_batches[0].indices.tolist() != in_a_row[0].micro_batches[0].indices.tolist()


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("five")
    letters = "ACDEFGHIKLMNPQRSTVWY"
    random = np.random.default_rng(0)
    with open(folder / "five.fasta", "w") as file:
        for number in range(45):
            file.write(f">p{number}\n{''.join(random.choice(list(letters), 10 + 7 * number))}\n")
    prepare([folder / "five.fasta"], folder / "corpus", show_progress=False)
    return folder / "corpus"


def test_tokens_are_the_window_of_the_sequence_with_its_specials(five: Path) -> None:
    corpus = open_corpus(five)
    windows = windows_from(corpus.lengths, Packing(40, 400, 1, 0), Cursor(), len(corpus) * 4)
    ids, cu_seqlens = read_tokens(corpus, windows)
    seen_starts = set()
    for place, index in enumerate(windows.indices):
        residues = bytes(corpus.read(np.array([index]))[0]).decode()
        whole = ["<cls>", *residues, "<eos>"]
        start, length = int(windows.starts[place]), int(windows.num_tokens[place])
        tokens = [TOKENS[token] for token in ids[cu_seqlens[place] : cu_seqlens[place + 1]]]
        assert tokens == whole[start : start + length]
        seen_starts.add(start)
    assert len(seen_starts) > 10


def test_a_micro_batch_carries_positions_that_restart(five: Path) -> None:
    corpus = open_corpus(five)
    plan = plan_step(corpus.lengths, Packing(64, 256, 2, 0), 0, Cursor())
    batch = build_micro_batch(corpus, plan, 1, 0, Mask())
    bounds = batch.cu_seqlens.tolist()
    assert batch.cu_seqlens.dtype == torch.int32
    assert bounds[0] == 0
    assert bounds[-1] == len(batch.input_ids) == len(batch.labels)
    expected = torch.cat([torch.arange(end - begin) for begin, end in pairwise(bounds)])
    assert torch.equal(batch.position_ids, expected)
    assert batch.max_seqlen == max(np.diff(bounds))
    assert batch.num_targets == len(batch.targets) > 0
    assert torch.equal(batch.targets, (batch.labels != -100).nonzero().squeeze(1))
    again = build_micro_batch(corpus, plan, 1, 0, Mask())
    assert torch.equal(batch.labels, again.labels)
    assert not torch.equal(batch.labels, build_micro_batch(corpus, plan, 1, 1, Mask()).labels)


def test_an_empty_micro_batch_has_no_target() -> None:
    batch = empty_micro_batch()
    assert batch.num_targets == 0
    assert batch.input_ids.tolist() == [CLS_ID, EOS_ID]


@pytest.mark.parametrize(("micro_batches", "steps", "floor"), [(8, 1000, 0.99), (1, 1000, 0.97)])
def test_real_proteins_fill_the_slots(real_data: Path, micro_batches: int, steps: int, floor: float) -> None:
    """Mean over 1,000 steps at crop 512 and micro-batches of 8,192 tokens."""
    import gzip

    from Bio.SeqIO.FastaIO import SimpleFastaParser

    with gzip.open(real_data / "corpus" / "train.fasta.gz", "rt") as file:
        lengths = np.array([len(sequence) for _, sequence in SimpleFastaParser(file)], dtype=np.int32)
    packing, cursor, filled = Packing(512, 8192, micro_batches, 0), Cursor(), 0
    for step in range(steps):
        plan = plan_step(lengths, packing, step, cursor)
        cursor, filled = plan.next_cursor, filled + plan.num_tokens
    share = filled / (steps * micro_batches * 8192)
    assert share >= floor
    # The twin: one sequence to a row, padded to the longest, fills half of them at best.
    windows = windows_from(lengths, packing, Cursor(), 1600)
    rows = windows.num_tokens.reshape(-1, 16)
    assert (rows / rows.max(axis=1, keepdims=True)).mean() < 0.75


def test_the_order_is_that_of_order(five: Path) -> None:
    corpus = open_corpus(five)
    windows = windows_from(corpus.lengths, Packing(512, 2048, 1, 9), Cursor(2, 5), 10)
    assert windows.indices.tolist() == order(np.arange(5, 15), len(corpus), 9, 2).tolist()
