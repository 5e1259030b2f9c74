"""The stream of vectors: order, windows, blending, and what a portion depends on."""

import itertools
import threading
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_plm.config import UserError
from hf_plm.inference.vectors import POOLINGS, Blend, embed_stream, windows
from hf_plm.models.families import Spelling

SPELLING = Spelling((0,), (2,), tuple(range(4, 29)), 1)


class Letters:
    """An encoder whose vector of a residue is its letter and, after that, the length of what it was seen in."""

    spelling, width, limit, has_cls, num_calls, tokens_per_call = SPELLING, 2, 10, True, 3, 20
    facts = {"model": "letters", "family": "test"}  # noqa: RUF012

    def __init__(self):
        self.calls, self.lock, self.threads = [], threading.Lock(), set()

    def prepare_thread(self):
        self.threads.add(threading.get_ident())

    def leave_threads(self):
        self.has_left = True

    def encode(self, proteins, wants):
        with self.lock:
            self.calls.append(tuple(proteins))
            assert threading.get_ident() in self.threads
        rows = [np.array([[letter, len(one)] for letter in one], dtype=np.float32) for one in proteins]
        found = {
            "none": np.concatenate(rows),
            "mean": np.stack([one.mean(0) for one in rows]),
            "max": np.stack([one.max(0) for one in rows]),
            "cls": np.array([[one[0], len(one)] for one in proteins], dtype=np.float32),
        }
        return {name: found[name] for name in wants}


def run(portions, wants=("none",), long="window", limit=10):
    encoder = Letters()
    return list(embed_stream(encoder, portions, wants, long, limit)), encoder


@given(length=st.integers(1, 5000), limit=st.integers(1, 300))
def test_windows_cover_and_overlap(length, limit):
    cuts = windows(length, limit)
    assert cuts[0][0] == 0
    assert cuts[-1][1] == length
    assert all(end - begin == min(limit, length) for begin, end in cuts)
    for (begin, end), (later, _) in itertools.pairwise(cuts):
        assert begin < later <= end - int(limit * 0.25)
    fewest = 1 if length <= limit else 1 + -(-(length - limit) // max(1, limit - int(limit * 0.25)))
    assert len(cuts) == fewest


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 35), max_size=40), st.integers(1, 5))
def test_every_protein_comes_out_in_its_place(lengths, num_portions):
    proteins = [bytes([65 + number % 20]) * length for number, length in enumerate(lengths)]
    portions = [proteins[index::num_portions] for index in range(num_portions)]
    found, encoder = run(portions, POOLINGS)
    flat = [one for portion in portions for one in portion]
    assert len(found) == len(flat)
    for vectors, residues in zip(found, flat, strict=True):
        assert vectors["none"].shape == (len(residues), 2)
        np.testing.assert_allclose(vectors["none"][:, 0], list(residues), rtol=1e-6)
        np.testing.assert_allclose(vectors["none"][:, 1], min(len(residues), 10), rtol=1e-6)
        for name in ("mean", "max", "cls"):
            np.testing.assert_allclose(vectors[name], [residues[0], min(len(residues), 10)], rtol=1e-6)
    for call in encoder.calls:
        assert sum(len(one) + 2 for one in call) <= 20 or len(call) == 1


def test_a_call_has_proteins_of_one_portion():
    one, other = [b"AAA", b"CC"], [b"G"]
    _, encoder = run([one, other])
    assert sorted(encoder.calls) == [(b"AAA", b"CC"), (b"G",)]
    _, encoder = run([one + other])
    assert encoder.calls == [(b"AAA", b"CC", b"G")]


def test_blending_goes_from_one_window_to_the_next():
    blend = Blend(14, 8, 1)
    blend.add(0, np.zeros((8, 1), dtype=np.float32))
    blend.add(6, np.ones((8, 1), dtype=np.float32))
    blended = blend.result()[:, 0]
    assert (blended[:6] == 0).all()
    assert (blended[8:] == 1).all()
    np.testing.assert_allclose(blended[6:8], [1 / 3, 2 / 3], rtol=1e-6)


def test_long_proteins_are_cut_or_refused_as_asked():
    protein = b"ACDEFGHIKLMNPQ"
    (cropped,), _ = run([[protein]], long="crop")
    assert cropped["none"][:, 0].tolist() == list(protein[:10])
    with pytest.raises(UserError, match=r"Protein 2 has 14 residues, where at most 10.*--long window"):
        run([[b"A", protein]], long="refuse")


def test_poolings_are_checked_before_any_work():
    with pytest.raises(UserError, match="one of none, mean, max, cls"):
        run([[b"A"]], ("average",))
    encoder = SimpleNamespace(has_cls=False, facts=Letters.facts)
    with pytest.raises(UserError, match="no <cls> token"):
        next(embed_stream(encoder, [[b"A"]], ("cls",), "window", 10))


def test_what_fails_in_a_call_is_raised_and_no_more_is_read():
    class Failing(Letters):
        def encode(self, proteins, wants):
            raise RuntimeError("no")

    read = []

    def proteins():
        for number in range(1000):
            read.append(number)
            yield b"A" * 9

    with pytest.raises(RuntimeError, match="no"):
        list(embed_stream(Failing(), [proteins()], ("mean",), "window", 10))
    assert len(read) < 40
