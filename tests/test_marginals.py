"""Scores of variants against fair-esm's script (examples/variant-prediction/predict.py), window by window."""

import numpy as np
import pytest
import torch
from esm.pretrained import load_model_and_alphabet_local
from test_fair_esm import SAFE, new_model

from hf_plm.judging.scores.marginals import (
    DRAWS,
    METHODS,
    marginals,
    num_residues,
    num_split,
    score_variants,
    tile_begin,
    window_begin,
)
from hf_plm.judging.scores.scan import scan
from hf_plm.judging.scores.variants import check, parse
from hf_plm.models.fair_esm import write_fair_esm
from hf_plm.models.hub import save_hub_folder
from hf_plm.models.masked_lm import LETTERS, open_masked_lm

WILD_TYPE = "MKTAYIAKQRQISFVKSHFSRQLEERLG"
MUTANTS = ["K2A", "K2W", "T3L", "G28A", "M1C", "K2A:T3L", "Y5F:F19A:G28W", "WT", "A4A"]
TOLERANCE = 1e-4  # per position


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """One set of random weights, here and in fair-esm."""
    folder = tmp_path_factory.mktemp("marginals")
    model = new_model()
    save_hub_folder(model, folder / "hub", "# random weights")
    write_fair_esm(model, folder / "esm2_test.pt")
    with torch.serialization.safe_globals(SAFE):
        reference, alphabet = load_model_and_alphabet_local(folder / "esm2_test.pt")
    return open_masked_lm(folder / "hub"), reference.eval(), alphabet


@pytest.fixture
def model(both):
    """Ours alone, its settings as they were afterwards."""
    limit, tokens = both[0].limit, both[0].tokens_per_call
    yield both[0]
    both[0].limit, both[0].tokens_per_call = limit, tokens


def read(mutants, residues=WILD_TYPE):
    variants = [parse(mutant) for mutant in mutants]
    for variant in variants:
        check(variant, residues.encode())
    return variants


class Script:
    """What the script does with fair-esm's model, one forward pass after the other."""

    def __init__(self, reference, alphabet):
        self.reference, self.alphabet = reference, alphabet

    def tokens(self, sequence):
        return self.alphabet.get_batch_converter()([("protein1", sequence)])[2]

    @torch.no_grad()
    def log_probs(self, tokens):
        return torch.log_softmax(self.reference(tokens)["logits"], dim=-1)

    def token_probs(self, sequence, method):
        tokens = self.tokens(sequence)
        if method == "wild-type":
            return self.log_probs(tokens)
        rows = []
        for index in range(tokens.size(1)):
            masked = tokens.clone()
            masked[0, index] = self.alphabet.mask_idx
            rows.append(self.log_probs(masked)[:, index])
        return torch.cat(rows, dim=0)[None]

    def label(self, mutant, token_probs):
        score = 0.0
        for mutation in mutant.split(":") if mutant != "WT" else []:
            old, place, new = mutation[0], int(mutation[1:-1]) - 1, mutation[-1]
            column = token_probs[0, 1 + place]
            score += (column[self.alphabet.get_idx(new)] - column[self.alphabet.get_idx(old)]).item()
        return score

    def pseudo_log_likelihood(self, sequence, shift=0, last=0):
        """With shift=1 and last=2 as the script has it; residue i is token 1 + i, so the right shift is 0."""
        tokens = self.tokens(sequence)
        total = 0.0
        for index in range(len(sequence) - last):
            masked = tokens.clone()
            masked[0, 1 + index] = self.alphabet.mask_idx
            total += self.log_probs(masked)[0, 1 + index, self.alphabet.get_idx(sequence[index + shift])].item()
        return total


def mutated(mutant, sequence=WILD_TYPE):
    letters = list(sequence)
    for _, place, new in parse(mutant):
        letters[place] = new
    return "".join(letters)


@pytest.mark.parametrize("method", ["masked", "wild-type"])
def test_marginals_are_those_of_fair_esms_script(both, method):
    model, *theirs = both
    script = Script(*theirs)
    token_probs = script.token_probs(WILD_TYPE, method)
    expected = [script.label(mutant, token_probs) for mutant in MUTANTS]
    found = score_variants(model, WILD_TYPE.encode(), read(MUTANTS), method)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert np.std(expected) > 0.5
    other = script.token_probs(WILD_TYPE, "wild-type" if method == "masked" else "masked")
    assert np.abs(found - [script.label(mutant, other) for mutant in MUTANTS]).max() > 0.01


def test_random_masks_are_means_over_what_fair_esm_says_of_each(both):
    model, *theirs = both
    script = Script(*theirs)
    places = np.arange(len(WILD_TYPE))
    by_draw, random = np.zeros((DRAWS, len(WILD_TYPE), len(LETTERS))), np.random.default_rng(0)
    columns = [script.alphabet.get_idx(letter) for letter in LETTERS]
    for draw in range(DRAWS):
        seen = []
        for masked in np.array_split(random.permutation(places), 7):
            tokens = script.tokens(WILD_TYPE)
            tokens[0, 1 + masked] = script.alphabet.mask_idx
            by_draw[draw, masked] = script.log_probs(tokens)[0, 1 + masked][:, columns].numpy()
            seen += masked.tolist()
            assert 0.14 <= len(masked) / len(WILD_TYPE) <= 0.18
        assert sorted(seen) == places.tolist()
    found = marginals(model, WILD_TYPE.encode(), places, "random-masks")
    np.testing.assert_allclose(found, by_draw.mean(axis=0), atol=TOLERANCE)
    assert np.abs(found - by_draw[0]).max() > 0.01
    # A position's say does not depend on which others are asked about.
    few = marginals(model, WILD_TYPE.encode(), places[[3, 9]], "random-masks")
    np.testing.assert_allclose(few, found[[3, 9]], atol=TOLERANCE)


def test_pseudo_likelihood_is_that_of_the_script_with_residues_at_their_own_tokens(both):
    model, *theirs = both
    script = Script(*theirs)
    mutants = ["K2A", "K2A:T3L", "WT", "A4A"]
    base = script.pseudo_log_likelihood(WILD_TYPE)
    expected = [script.pseudo_log_likelihood(mutated(mutant)) - base for mutant in mutants]
    found = score_variants(model, WILD_TYPE.encode(), read(mutants), "pseudo-likelihood")
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * len(WILD_TYPE))
    assert found[2] == found[3] == 0
    published = [
        script.pseudo_log_likelihood(one, 1, 2) - script.pseudo_log_likelihood(WILD_TYPE, 1, 2)
        for one in map(mutated, mutants[:2])
    ]
    assert np.abs(found[:2] - published).max() > 0.1


def test_packed_calls_give_what_single_ones_give(model):
    variants = read([f"{old}{place}{'A' if old != 'A' else 'G'}" for place, old in enumerate(WILD_TYPE, start=1)])
    together = score_variants(model, WILD_TYPE.encode(), variants, "masked")
    model.tokens_per_call = 1
    alone = score_variants(model, WILD_TYPE.encode(), variants, "masked")
    np.testing.assert_allclose(together, alone, atol=TOLERANCE)
    assert np.std(alone) > 0.5


def test_windows_are_proteingyms():
    def get_optimal_window(place, length, window):  # proteingym/utils/scoring_utils.py, in other words
        half = window // 2
        if length <= window or place < half:
            return 0
        return length - window if place >= length - half else place - half

    for length in (5, 8, 9, 23):
        for limit in (4, 8):
            begins = [window_begin(place, length, limit) for place in range(length)]
            assert begins == [get_optimal_window(place, length, limit) for place in range(length)]
            assert all(begin <= place < begin + limit for place, begin in enumerate(begins))


def test_few_windows_have_their_places_in_the_middle():
    for length, limit in ((23, 8), (1_000, 64), (35_000, 1022)):
        begins = [tile_begin(place, length, limit) for place in range(length)]
        assert len(set(begins)) <= 2 * length // limit
        for place, begin in enumerate(begins):
            assert 0 <= begin <= length - limit
            assert begin == 0 or place >= begin + limit // 4
            assert begin == length - limit or place < begin + limit // 4 + limit // 2
    assert {tile_begin(place, 8, 8) for place in range(8)} == {tile_begin(place, 5, 8) for place in range(5)} == {0}


@pytest.mark.parametrize("method", METHODS)
def test_a_long_protein_is_seen_in_windows(model, method):
    long = WILD_TYPE * 3
    model.limit = 20
    variants = read(["K2A", "A32G", "S45C", "K30A:A32G", "G84A"], long)
    found = score_variants(model, long.encode(), variants, method)
    expected = []
    for variant in variants:
        pieces = [variant] if method == "pseudo-likelihood" else [(one,) for one in variant]
        window = tile_begin if method == "random-masks" else window_begin
        score = 0.0
        for piece in pieces:
            begin = window((piece[0].place + piece[-1].place) // 2, len(long), 20)
            moved = tuple(one._replace(place=one.place - begin) for one in piece)
            score += score_variants(model, long[begin : begin + 20].encode(), [moved], method)[0]
        expected.append(score)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE * 20)
    model.limit = 1022
    assert np.abs(found - score_variants(model, long.encode(), variants, method)).max() > 0.01


def test_mutations_further_apart_than_a_window_are_added_up(model):
    long = WILD_TYPE * 3
    model.limit = 20
    apart, first, last = (
        score_variants(model, long.encode(), read([mutant], long), "pseudo-likelihood")[0]
        for mutant in ("K2A:G84A", "K2A", "G84A")
    )
    assert apart == pytest.approx(first + last)
    variants = read(["K2A:G84A", "K2A", "K2A:T3L"], long)
    assert [num_split(long.encode(), [one], "pseudo-likelihood", 20) for one in variants] == [1, 0, 0]
    assert num_split(long.encode(), variants, "masked", 1022) == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("limit", [20, 1022])
def test_the_cost_is_what_is_counted(model, method, limit):
    long = WILD_TYPE * 3
    model.limit = limit
    variants = read(["K2A", "K2A", "K2C", "S45C:A32G", "K2A:G84A", "WT"], long)
    counted = []
    score_variants(model, long.encode(), variants, method, counted.append)
    assert sum(counted) == num_residues(long.encode(), variants, method, limit)


def test_a_residue_that_is_none_of_the_20_has_no_say(model):
    residues = b"MKXTAYIA"
    variants = read(["K2A"], residues.decode())
    for method in METHODS:
        assert np.isfinite(score_variants(model, residues, variants, method)).all()
    scores_NA = scan(model, residues)
    assert np.isnan(scores_NA[2]).all()
    assert scores_NA[1, LETTERS.index("A")] == pytest.approx(score_variants(model, residues, variants, "masked")[0])
    assert (scores_NA[[0, 1, 3], [LETTERS.index(letter) for letter in "MKT"]] == 0).all()


def test_nothing_but_the_wild_type(model):
    assert score_variants(model, WILD_TYPE.encode(), [(), ()], "masked").tolist() == [0, 0]
    assert score_variants(model, WILD_TYPE.encode(), [(), ()], "pseudo-likelihood").tolist() == [0, 0]
