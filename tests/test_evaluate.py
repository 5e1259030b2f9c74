"""Losses against baselines that know no context."""

from pathlib import Path

import numpy as np
import pytest
import torch

from hf_plm.config import Mask
from hf_plm.data.corpus import open_corpus
from hf_plm.data.loader import share_of, validation_micro_batches, validation_windows
from hf_plm.data.mask import mask_tokens, training_bits
from hf_plm.inference.evaluate import Evaluation
from hf_plm.proteins.vocabulary import IGNORED_LABEL, MASK_ID, STANDARD_IDS

FREQUENCIES = np.arange(1, 21) / 210
NUM = 600_000


def evaluation(losses_of: object = None, mask: Mask | None = None) -> Evaluation:
    """Targets drawn from known frequencies and corrupted for real, in 500 sequences."""
    mask = mask or Mask()
    ids = np.random.default_rng(0).choice(STANDARD_IDS, NUM, p=FREQUENCIES)
    inputs, labels = mask_tokens(ids, training_bits(0, 0, 0, NUM), mask)
    chosen = labels != IGNORED_LABEL
    labels, inputs = labels[chosen], inputs[chosen]
    sequences = np.arange(len(labels)) % 500
    return Evaluation(np.zeros(len(labels)), np.ones(len(labels), bool), labels, inputs, sequences, 500, mask)


def test_unigram_entropy_is_that_of_the_frequencies() -> None:
    expected = -(FREQUENCIES * np.log(FREQUENCIES)).sum()
    assert evaluation().summary()["unigram_entropy"] == pytest.approx(expected, abs=0.01)


def test_no_predictor_without_context_beats_the_context_free_loss() -> None:
    """The best table of P(true | visible), fitted by gradient descent to the very targets, comes no lower."""
    found = evaluation()
    baseline = found.summary()["context_free_loss"]
    logits = torch.zeros(33, 33, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.3)
    for _ in range(150):
        loss = torch.nn.functional.cross_entropy(logits[found.inputs_K], torch.from_numpy(found.labels_K))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    # The table has 21 x 20 free numbers, worth 420 / (2 K) nats on the K targets that it is fitted to.
    assert loss.item() == pytest.approx(baseline, abs=0.004)
    assert loss.item() > baseline - 420 / len(found.labels_K)


def test_the_usual_rates_give_the_known_gap() -> None:
    """DESIGN: about 2.72 where the unigram entropy of real proteins is 2.90, because a tenth of targets is visible."""
    numbers = evaluation().summary()
    assert 0.12 < numbers["unigram_entropy"] - numbers["context_free_loss"] < 0.25
    # The twin: with every target masked, the two baselines are one.
    all_masked = evaluation(mask=Mask(mask=1.0, random=0.0)).summary()
    assert all_masked["context_free_loss"] == pytest.approx(all_masked["unigram_entropy"])


def test_margins_have_an_interval_over_sequences() -> None:
    found = evaluation()
    losses = found.context_free_losses_K() - 0.05
    better = Evaluation(losses, found.is_correct_K, found.labels_K, found.inputs_K, found.sequences_K, 500, Mask())
    mean, low, high = better.margins()["margin_context_free"]
    assert mean == pytest.approx(0.05)
    assert low == pytest.approx(0.05)
    assert high == pytest.approx(0.05)
    # The twin: a model that is no better has an interval that holds zero.
    noisy = found.context_free_losses_K() + np.random.default_rng(1).normal(0, 1, len(losses))
    worse = Evaluation(noisy, found.is_correct_K, found.labels_K, found.inputs_K, found.sequences_K, 500, Mask())
    _, low, high = worse.margins()["margin_context_free"]
    assert low < 0 < high


def test_masked_means_shown_as_mask() -> None:
    found = evaluation()
    assert np.array_equal(found.is_masked_K, found.inputs_K == MASK_ID)
    assert 0.79 < found.is_masked_K.mean() < 0.81


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_validation_is_shared_out_once_and_evenly(family_corpus: Path, world_size: int) -> None:
    """Each window on one process, and as many forward passes on each: sharded engines gather weights in all of them."""
    corpus = open_corpus(family_corpus, "validation")
    windows, keys = validation_windows(corpus, 128, 20, seed=0)
    shares = [
        list(share_of(validation_micro_batches(corpus, windows, keys, 256, 0, Mask()), rank, world_size))
        for rank in range(world_size)
    ]
    assert len({len(share) for share in shares}) == 1
    seen = [window for share in shares for batch, chosen in share if batch.num_targets for window in chosen]
    assert sorted(seen) == list(range(20))
    empty = [batch for share in shares for batch, _ in share if not batch.num_targets]
    assert len(empty) < world_size
