"""What is held out from a stream, and what was seen before in it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plm.data import heldout
from hf_plm.data.heldout import HeldOut, Row, SeenHashes, hash_of, num_held_out


@pytest.mark.parametrize(
    ("num_sequences", "expected"), [(0, 0), (1, 0), (3, 1), (39, 19), (100, 20), (2500, 25), (10**6, 2000)]
)
def test_number_held_out(num_sequences: int, expected: int) -> None:
    assert num_held_out(num_sequences) == expected


def test_held_out_from_a_stream_longer_than_what_is_kept_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heldout, "MOST", 30)
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list("ACDEFGHIKL"), 20)) for _ in range(4000)]
    rows = [Row(str(number), sequence.encode(), None) for number, sequence in enumerate(sequences)]
    aside, train = HeldOut(), []
    for start in range(0, len(rows), 100):
        part = rows[start : start + 100]
        train += aside.offer([hash_of(row.residues) for row in part], part)
    held_out, rest = aside.finish(len(rows))
    assert held_out == sorted(rows, key=lambda row: hash_of(row.residues))[:30]
    assert sorted(train + rest + held_out) == sorted(rows)


def test_a_cluster_that_is_most_of_the_corpus_stays_in_train() -> None:
    aside = HeldOut()
    rows = [Row(str(number), b"M" * (number + 1), "big") for number in range(500)]
    assert len(aside.offer([5] * 500, rows)) == 500, "released when it grew past 200"
    assert aside.finish(500) == ([], [])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 40), max_size=20), max_size=12))
def test_seen_hashes_is_a_set(batches: list[list[int]]) -> None:
    seen, expected = SeenHashes(), set()
    for batch in batches:
        hashes_B = np.array(batch, dtype=np.uint64)
        assert seen.contains(hashes_B).tolist() == [value in expected for value in batch]
        is_new = seen.add(hashes_B).tolist()
        for value, new in zip(batch, is_new, strict=True):
            assert new == (value not in expected)
            expected.add(value)


def test_held_out_twin() -> None:
    rows = [Row(str(number), b"M" * (number + 1), None) for number in range(100)]
    aside = HeldOut()
    aside.offer([hash_of(row.residues) for row in rows], rows)
    held_out, _ = aside.finish(100)
    assert held_out != rows[:20], "the first ones would depend on the order of the file"
    assert hash_of(b"MKV") == 0x1F12E3BE1B9747A0, "a changed hash would move sequences between splits"
