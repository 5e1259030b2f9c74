"""Simulated families: the model's own mathematics, what a family looks like, and the bytes on disk."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from hf_plm.config import UserError
from hf_plm.data import simulate
from hf_plm.data.simulate import (
    AMINO_ACIDS,
    WAG_FREQUENCIES_A,
    WAG_RATES_AA,
    Evolution,
    Substitution,
    draw_tree,
    rate_matrix,
    simulate_families,
    simulate_family,
    write_simulated_fasta,
)
from hf_plm.proteins.vocabulary import STANDARD_RESIDUES

NO_INDELS = {"insertion_rate": 0.0, "deletion_rate": 0.0}


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(seed))


def sequences(num_families: int, members: int, seed: int = 0, evolution: Evolution | None = None) -> list[list[str]]:
    records = [sequence for _, _, sequence in simulate_families(num_families, members, seed, evolution)]
    return [records[first : first + members] for first in range(0, len(records), members)]


def identity(first: str, second: str) -> float:
    """Share of equal residues, site by site, over the shorter of the two."""
    return float(np.mean([a == b for a, b in zip(first, second, strict=False)]))


def shared_words(first: str, second: str, k: int = 4) -> float:
    """Share of the first sequence's words of k residues that the second has too, wherever they are."""
    words = [{text[start : start + k] for start in range(len(text) - k + 1)} for text in (first, second)]
    return len(words[0] & words[1]) / len(words[0])


def transition_probabilities(rates_AA: np.ndarray, time: float) -> np.ndarray:
    """exp(Q t) by its power series on t / 2^10, squared ten times: a way that the module does not go."""
    step_AA = np.eye(len(rates_AA))
    term_AA = np.eye(len(rates_AA))
    for order in range(1, 12):
        term_AA = term_AA @ rates_AA * (time / 1024) / order
        step_AA = step_AA + term_AA
    return np.linalg.matrix_power(step_AA, 1024)


# The substitution model.


def is_normalised_and_reversible(rates_AA: np.ndarray) -> bool:
    flow_AA = WAG_FREQUENCIES_A[:, None] * rates_AA
    return bool(
        np.allclose(rates_AA.sum(axis=1), 0, atol=1e-12)
        and np.allclose(flow_AA, flow_AA.T, atol=1e-15)
        and np.isclose(-np.trace(flow_AA), 1, atol=1e-12)
        and (rates_AA[~np.eye(20, dtype=bool)] > 0).all()
    )


def test_rate_matrix_has_zero_rows_detailed_balance_and_mean_rate_1() -> None:
    assert sorted(AMINO_ACIDS) == sorted(STANDARD_RESIDUES)
    assert WAG_FREQUENCIES_A.sum() == pytest.approx(1, abs=1e-12)
    assert is_normalised_and_reversible(WAG_RATES_AA)


def test_rate_matrix_twin_swapped_frequencies_or_another_scale_fail() -> None:
    exchangeabilities = simulate._numbers(simulate._WAG_EXCHANGEABILITIES)
    assert not is_normalised_and_reversible(rate_matrix(exchangeabilities, WAG_FREQUENCIES_A[::-1]))
    assert not is_normalised_and_reversible(1.05 * WAG_RATES_AA)


def test_known_values_of_wag() -> None:
    """Known properties: leucine the most and tryptophan the least frequent; I-V, D-E, F-Y and K-R exchange readily."""
    index = {letter: place for place, letter in enumerate(AMINO_ACIDS)}
    assert len(simulate._numbers(simulate._WAG_EXCHANGEABILITIES)) == 190
    assert AMINO_ACIDS[int(WAG_FREQUENCIES_A.argmin())] == "W"
    assert AMINO_ACIDS[int(np.argsort(WAG_FREQUENCIES_A)[-2])] == "L"
    assert WAG_FREQUENCIES_A.max() < 0.087
    exchangeabilities_AA = WAG_RATES_AA / WAG_FREQUENCIES_A
    ratio = exchangeabilities_AA / exchangeabilities_AA[index["A"], index["R"]] * 0.551571
    for pair, published in {"IV": 7.8213, "DE": 6.17416, "FY": 6.45428, "RK": 5.35142, "CE": 0.021352}.items():
        assert ratio[index[pair[0]], index[pair[1]]] == pytest.approx(published, rel=1e-6), pair
        assert ratio[index[pair[1]], index[pair[0]]] == pytest.approx(published, rel=1e-6), pair


def distance_from_theory(rates_AA: np.ndarray, time: float) -> float:
    """Largest difference between the drawn and the theoretical joint share of (before, after) at WAG's true scale."""
    random = generator(3)
    num_sites = 400_000
    before_N = random.choice(20, size=num_sites, p=WAG_FREQUENCIES_A).astype(np.uint8)
    after_N = Substitution(rates_AA).evolve(before_N, np.full(num_sites, time), random)
    drawn_AA = np.bincount(before_N.astype(np.int64) * 20 + after_N, minlength=400).reshape(20, 20) / num_sites
    expected_AA = WAG_FREQUENCIES_A[:, None] * transition_probabilities(WAG_RATES_AA, time)
    return float(abs(drawn_AA - expected_AA).max())


@pytest.mark.parametrize("time", [0.05, 0.5, 3.0])
def test_substitutions_follow_exp_Qt(time: float) -> None:
    # The standard error of the largest cell is 4e-4.
    assert distance_from_theory(WAG_RATES_AA, time) < 2e-3


def test_substitutions_follow_exp_Qt_twin() -> None:
    assert distance_from_theory(1.2 * WAG_RATES_AA, 0.5) > 2e-3


def substitutions_per_site(rates_AA: np.ndarray, branch_length: float) -> float:
    """Changes per site along a branch walked in steps so short that a site hardly ever changes twice in one."""
    random = generator(4)
    num_sites, num_steps = 20_000, 200
    states_N = random.choice(20, size=num_sites, p=WAG_FREQUENCIES_A).astype(np.uint8)
    site_rates_N = random.gamma(1.0, 1.0, num_sites)
    substitution, num_changes = Substitution(rates_AA), 0
    for _ in range(num_steps):
        after_N = substitution.evolve(states_N, site_rates_N * branch_length / num_steps, random)
        num_changes += int((after_N != states_N).sum())
        states_N = after_N
    return num_changes / num_sites


def test_branch_length_is_expected_substitutions_per_site() -> None:
    assert substitutions_per_site(WAG_RATES_AA, 2.0) == pytest.approx(2.0, rel=0.04)


def test_branch_length_twin_exchangeabilities_without_normalisation() -> None:
    """PAML's exchangeabilities times frequencies have a mean rate of 0.953: forgetting to normalise is caught."""
    assert substitutions_per_site(0.9528 * WAG_RATES_AA, 2.0) != pytest.approx(2.0, rel=0.04)


# The tree.


@pytest.mark.parametrize("num_tips", [1, 2, 3, 50])
def test_tree_is_binary_and_every_tip_is_at_the_depth(num_tips: int) -> None:
    nodes = draw_tree(num_tips, 0.3, generator(num_tips))
    distances = [0.0]
    num_children = [0] * len(nodes)
    for node, (parent, branch_length) in enumerate(nodes[1:], start=1):
        assert parent < node
        assert branch_length >= 0
        num_children[parent] += 1
        distances.append(distances[parent] + branch_length)
    assert np.allclose(distances[-num_tips:], 0.3)
    assert num_children[-num_tips:] == [0] * num_tips
    assert set(num_children[:-num_tips]) == ({2} if num_tips > 1 else {1})


# Families.


def test_members_of_a_family_are_related_and_families_are_not() -> None:
    families = sequences(6, 20)
    within = [shared_words(family[0], member) for family in families for member in family[1:]]
    between = [shared_words(first[0], second[0]) for first in families for second in families if first is not second]
    assert np.mean(within) > 0.25
    assert min(within) > 0.08
    assert max(between) < 0.04  # by chance about 1 word in 400 at this length


def test_identity_within_a_family_follows_the_depth() -> None:
    """Two members are at most twice the depth apart, so their identity is at least what exp(Q t) gives there."""
    identities = {}
    for depth in (0.05, 0.3, 30.0):
        evolution = Evolution(depth=depth, median_length=800.0, length_sigma=0.0, **NO_INDELS)
        families = sequences(4, 20, evolution=evolution)
        identities[depth] = np.mean([identity(family[0], member) for family in families for member in family[1:]])
    same = {
        depth: float(WAG_FREQUENCIES_A @ np.diag(transition_probabilities(WAG_RATES_AA, 2 * depth)))
        for depth in identities
    }
    assert same[0.05] - 0.01 < identities[0.05]
    assert 0.9 < identities[0.05] < 0.97
    assert same[0.3] - 0.01 < identities[0.3]
    assert 0.55 < identities[0.3] < 0.75
    assert identities[30.0] < 0.35


def test_residue_frequencies_stay_at_the_models() -> None:
    """The ancestor's and, after much evolution, the members' frequencies are those of the model."""
    evolution = Evolution(depth=1.0)
    text = "".join(family[0] for family in sequences(150, 2, evolution=evolution))
    counts_A = np.array([text.count(letter) for letter in AMINO_ACIDS])
    assert counts_A.sum() == len(text) > 30_000
    # Standard error at most 0.0015.
    assert abs(counts_A / len(text) - WAG_FREQUENCIES_A).max() < 0.006
    assert abs(counts_A / len(text) - np.roll(WAG_FREQUENCIES_A, 1)).max() > 0.006


def test_lengths_are_log_normal_within_bounds() -> None:
    lengths = np.array([len(family[0]) for family in sequences(1500, 1, evolution=Evolution(**NO_INDELS))])
    assert lengths.min() >= simulate.MIN_LENGTH
    assert lengths.max() == simulate.MAX_LENGTH
    # Standard error of the median 2.5%; of the quartiles alike. 290 exp(-+0.674 * 0.76) are 174 and 484.
    assert np.quantile(lengths, [0.25, 0.5, 0.75]) == pytest.approx([174, 290, 484], rel=0.1)
    wider = np.array(
        [len(family[0]) for family in sequences(300, 1, evolution=Evolution(length_sigma=2.0, **NO_INDELS))]
    )
    assert np.quantile(wider, [0.25, 0.75]) != pytest.approx([174, 484], rel=0.1)


def test_insertions_and_deletions_occur_at_their_rates() -> None:
    def length_changes(insertion_rate: float, deletion_rate: float) -> tuple[float, float]:
        evolution = Evolution(
            depth=0.5, insertion_rate=insertion_rate, deletion_rate=deletion_rate, median_length=500.0, length_sigma=0.0
        )
        lengths = np.array([len(s) for s in simulate_family(400, evolution, generator(5))])
        return float((lengths != 500).mean()), float(lengths.mean() - 500)

    assert length_changes(0, 0) == (0.0, 0.0)
    changed, _ = length_changes(0.0115, 0.0115)
    assert changed > 0.8
    # 0.02 x 0.5 x 500 = 5 events of mean length 4.1 residues; a deletion may be cut short by the end.
    mean_length = (np.arange(1, 51) ** -0.7).sum() / (np.arange(1, 51) ** -1.7).sum()
    _, inserted = length_changes(0.02, 0)
    _, deleted = length_changes(0, 0.02)
    assert 0.5 * 5 * mean_length < inserted < 1.6 * 5 * mean_length
    assert 0.5 * 5 * mean_length < -deleted < 1.6 * 5 * mean_length


def test_members_are_all_different() -> None:
    evolution = Evolution(depth=0.1, median_length=120.0, length_sigma=0.0)
    assert len(set(simulate_family(200, evolution, generator()))) == 200
    # The twin: where hardly anything evolves, repeats fill up what is missing, so the number of members is kept.
    still = simulate_family(200, Evolution(depth=1e-4, median_length=120.0), generator())
    assert len(set(still)) < len(still) == 200


def test_deletions_leave_something() -> None:
    evolution = Evolution(depth=5.0, insertion_rate=0.0, deletion_rate=1.0, median_length=40.0)
    assert min(len(member) for member in simulate_family(10, evolution, generator())) >= simulate.MIN_LENGTH // 2


# Records and files.


def test_records_are_called_simulated() -> None:
    records = list(simulate_families(13, 35, 0))
    assert len(records) == 13 * 35
    assert records[-1][:2] == ("sim_F012_M0034", "simulated family 12")
    assert len({record_id for record_id, _, _ in records}) == len(records)
    assert set("".join(sequence for _, _, sequence in records)) <= set(STANDARD_RESIDUES)


def test_a_family_does_not_depend_on_the_number_of_families() -> None:
    few, many = sequences(2, 5), sequences(4, 5)
    assert few == many[:2]
    assert few != sequences(2, 5, seed=1)
    assert many[2] != many[3]


@pytest.mark.parametrize("name", ["demo.fasta", "demo.fasta.gz"])
def test_file_has_the_same_bytes_each_time(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, other = (tmp_path / folder / name for folder in ("a", "b", "c"))
    for path in (first, second, other):
        path.parent.mkdir()
    assert write_simulated_fasta(first, 3, 4, seed=7) == 12
    # gzip would otherwise take the time from this clock.
    monkeypatch.setattr("time.time", lambda: 1_000_000_000.0)
    write_simulated_fasta(second, 3, 4, seed=7)
    write_simulated_fasta(other, 3, 4, seed=8)
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes() != other.read_bytes()
    assert [path.name for path in first.parent.iterdir()] == [name]


def test_file_holds_the_records(tmp_path: Path) -> None:
    write_simulated_fasta(tmp_path / "demo.fasta.gz", 2, 3, seed=1)
    text = gzip.decompress((tmp_path / "demo.fasta.gz").read_bytes()).decode()
    expected = list(simulate_families(2, 3, 1))
    read = []
    for block in text.removeprefix(">").split("\n>"):
        header, *lines = block.split("\n")
        assert max(map(len, lines)) <= 60
        read.append((*header.split(" ", 1), "".join(lines)))
    assert read == expected
    assert read != list(simulate_families(2, 3, 2))


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "demo.fasta"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("hf_plm.data.simulate.os.fsync", fail)
    with pytest.raises(OSError, match="no space"):
        write_simulated_fasta(path, 1, 1)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((0, 5, 0), "num_families of 1 or more, and it is 0"),
        ((5, 0, 0), "members_per_family of 1 or more, and it is 0"),
        ((5, 5, -1), "seed of 0 or more, and it is -1"),
    ],
)
def test_counts_out_of_range_are_refused(arguments: tuple[int, int, int], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        next(simulate_families(*arguments))


def test_impossible_evolution_is_refused() -> None:
    with pytest.raises(UserError, match="rate_shape above 0"):
        Evolution(rate_shape=0.0)
    with pytest.raises(UserError, match="depth of 0 or more, and it is nan"):
        Evolution(depth=float("nan"))
