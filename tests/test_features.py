"""What a probe sees: each row's own vector, and letters without a model."""

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from hf_plm.inference.embedder import Embedder
from hf_plm.judging.probes.features import WINDOW, embedded, letters
from hf_plm.judging.probes.task import read_task

PROTEINS = {"p1": "MKSTAYIAKQ", "p2": "GAVLIMCFYWSS", "p3": "MKSTAYIAKQ"}


@pytest.fixture
def tasks(tmp_path):
    per_protein = "id\tsequence\tlabel\n" + "".join(f"{i}\t{s}\t{n}\n" for n, (i, s) in enumerate(PROTEINS.items()))
    (tmp_path / "p.tsv").write_text(per_protein)
    rows = [("p1", 3, 1), ("p2", 12, 0), ("p3", 4, 0), ("p1", 10, 1), ("p2", 1, 1)]
    text = "protein\tposition\tsequence\tlabel\n" + "".join(f"{p}\t{i}\t{PROTEINS[p]}\t{y}\n" for p, i, y in rows)
    (tmp_path / "r.tsv").write_text(text)
    return read_task(tmp_path / "p.tsv", kind="regression"), read_task(tmp_path / "r.tsv")


def test_each_row_is_its_own_residue(tasks, tmp_path):
    from support.encoders import save_encoder

    folder = save_encoder("ESM-2", tmp_path / "model")
    encoder = Embedder(folder).encoder
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def vectors(sequence):
        with torch.no_grad():
            return model(**tokenizer(sequence, return_tensors="pt")).last_hidden_state[0, 1:-1].numpy()

    whole, sites = tasks
    means = [vectors(sequence).mean(0) for sequence in whole.sequences]
    assert embedded(encoder, whole) == pytest.approx(np.array(means), abs=1e-5)
    alone = embedded(encoder, sites)
    expected = [vectors(sites.sequences[p])[i] for p, i in zip(sites.proteins_R, sites.positions_R, strict=True)]
    assert alone == pytest.approx(np.array(expected), abs=1e-5)
    assert np.abs(alone[0] - alone[3]).max() > 0.01
    beside = embedded(encoder, sites, "site")
    assert beside[:, : encoder.width] == pytest.approx(alone)
    assert beside[:, encoder.width :] == pytest.approx(np.array(means)[sites.proteins_R], abs=1e-5)


def test_letters_of_sites_have_the_composition(tasks):
    """What a model's vector of a site is given of the whole protein, the baseline is given too."""
    whole, sites = tasks
    beside = letters(sites, "site")
    assert np.array_equal(beside[:, :-20], letters(sites))
    assert beside[:, -20:] == pytest.approx(letters(whole)[sites.proteins_R])


def test_letters(tasks):
    whole, sites = tasks
    shares = letters(whole)
    assert shares.shape == (3, 20)
    assert shares.sum(1) == pytest.approx(1)
    assert sorted(shares[0])[-2:] == pytest.approx([0.2, 0.2])  # A and K of ten
    windows = letters(sites).reshape(len(sites), 2 * WINDOW + 1, 21)
    assert (windows.sum(2) == 1).all()
    for row, (protein, position) in enumerate(zip(sites.proteins_R, sites.positions_R, strict=True)):
        padded = "-" * WINDOW + sites.sequences[protein] + "-" * WINDOW
        around = padded[position : position + 2 * WINDOW + 1]
        for other in range(row):
            q, i = sites.proteins_R[other], sites.positions_R[other]
            beside = ("-" * WINDOW + sites.sequences[q] + "-" * WINDOW)[i : i + 2 * WINDOW + 1]
            same = [one == two for one, two in zip(around, beside, strict=True)]
            assert ((windows[row] == windows[other]).all(1) == same).all()
        assert (windows[row, :, 20] == [letter == "-" for letter in around]).all()
