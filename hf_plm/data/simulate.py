"""Simulated protein families, for the demo: no real data can be shipped with the package.

Each family is a random ancestor evolved along a random tree: substitutions under WAG with gamma-distributed rates
across sites, insertions and deletions with power-law lengths. What a masked model can learn from such data is which
residues a family has where, and which residues replace each other; there is no structure, no function and no coupling
between sites in it, so a model of it is worth nothing on real proteins. That is the trade: records are therefore called
simulated wherever they appear, in their ids and descriptions first of all.

Cost: about 1 second for 5,000 sequences on one core. Substitutions are drawn event by event (uniformisation),
which is exact for any rate and needs no matrix exponential, so that no linear-algebra library decides about a residue.
Random numbers are NumPy's `Generator(PCG64)`, one per family: the same seed gives the same bytes on one NumPy version,
while other versions may draw otherwise (NumPy promises only the stream of raw bits). Training batches do not depend on
this: they take the written file as it is.

Dimensions: N sites of one sequence, A the 20 amino acids in the order of `AMINO_ACIDS`.
"""

import gzip
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_plm.config import UserError
from hf_plm.data.corpus import Corpus

SIMULATED_PREFIX = "sim_"
"""Every simulated record's id begins so, and nothing that is made of them may hide it."""

AMINO_ACIDS = "ARNDCQEGHILKMFPSTWYV"

# WAG (Whelan & Goldman 2001, Mol. Biol. Evol. 18:691), the authors' values as distributed in PAML's wag.dat; three
# programs that carry them (PhyML, MrBayes, SubRecon) agree in all 210 numbers to 1e-6. Lower triangle, row by row.
_WAG_EXCHANGEABILITIES = """
0.551571 0.509848 0.635346 0.738998 0.147304 5.42942 1.02704 0.528191 0.265256 0.030295 0.908598 3.0355 1.54364
0.616783 0.098818 1.58285 0.439157 0.947198 6.17416 0.021352 5.46947 1.41672 0.584665 1.12556 0.865584 0.306674
0.330052 0.567717 0.316954 2.13715 3.95629 0.930676 0.248972 4.29411 0.570025 0.24941 0.193335 0.186979 0.554236
0.039437 0.170135 0.113917 0.127395 0.03045 0.13819 0.397915 0.497671 0.131528 0.084805 0.384287 0.869489 0.154263
0.061304 0.499462 3.17097 0.906265 5.35142 3.01201 0.479855 0.074034 3.8949 2.58443 0.373558 0.890432 0.323832
0.257555 0.893496 0.683162 0.198221 0.103754 0.390482 1.54526 0.315124 0.1741 0.404141 4.25746 4.85402 0.934276
0.210494 0.102711 0.096162 0.04673 0.39802 0.099921 0.081134 0.049931 0.679371 1.05947 2.11517 0.088836 1.19063
1.43855 0.679489 0.195081 0.423984 0.109404 0.933372 0.682355 0.24357 0.696198 0.099929 0.415844 0.556896 0.171329
0.161444 3.37079 1.22419 3.97423 1.07176 1.40766 1.02887 0.704939 1.34182 0.740169 0.31944 0.344739 0.96713 0.493905
0.545931 1.61328 2.12111 0.554413 2.03006 0.374866 0.512984 0.857928 0.822765 0.225833 0.473307 1.45816 0.326622
1.38698 1.51612 0.171903 0.795384 4.37802 0.113133 1.16392 0.071917 0.129767 0.71707 0.215737 0.156557 0.336983
0.262569 0.212483 0.665309 0.137505 0.515706 1.52964 0.139405 0.523742 0.110864 0.240735 0.381533 1.086 0.325711
0.543833 0.22771 0.196303 0.103604 3.87344 0.42017 0.398618 0.133264 0.428437 6.45428 0.216046 0.786993 0.291148
2.48539 2.00601 0.251849 0.196246 0.152335 1.00214 0.301281 0.588731 0.187247 0.118358 7.8213 1.80034 0.305434 2.05845
0.649892 0.314887 0.232739 1.38823 0.365369 0.31473
"""
_WAG_FREQUENCIES = """
0.0866279 0.043972 0.0390894 0.0570451 0.0193078 0.0367281 0.0580589 0.0832518 0.0244313 0.048466 0.086209 0.0620286
0.0195027 0.0384319 0.0457631 0.0695179 0.0610127 0.0143859 0.0352742 0.0708956
"""

MIN_LENGTH, MAX_LENGTH = 40, 1000
"""Shortest and longest ancestor, in residues. Deletions never shorten a sequence below half the minimum."""

MAX_INDEL_LENGTH = 50
"""Longest insertion or deletion, in residues, where the power law is cut off (our choice)."""


@dataclass(frozen=True)
class Evolution:
    """How families evolve; the defaults are the demo's.

    Attributes:
        depth: expected substitutions per site from the ancestor to every member. Ours: at 0.2 two members agree in 75%
            of their sites on average (56% at 0.5), which a demo-sized network picks up in minutes.
        rate_shape: alpha of the gamma distribution, mean 1, of rates across sites; below about 1 a few sites change
            often and most hardly ever (Yang 1993, Mol. Biol. Evol. 10:1396, introduces it; 1 is our round number).
        insertion_rate, deletion_rate: events per site and substitution per site. Gonnet's count for Benner, Cohen &
            Gonnet 1993 (J. Mol. Biol. 229:1065) is one gap in 170 aligned sites at 22 to 30 PAM, that is about 0.023
            indels per substitution; insertions and deletions share it.
        indel_exponent: P(length k) is proportional to k^-exponent; 1.7 is Benner et al. 1993 for proteins, and 1.6 to
            1.7 Cartwright 2009 (Mol. Biol. Evol. 26:473) for introns.
        median_length: of the log-normal lengths of ancestors, residues; `length_sigma` is its standard deviation in log
            units. Both as measured on 135,453 real proteins (292 and 0.76; median 301, 5% above 1,028).
    """

    depth: float = 0.2
    rate_shape: float = 1.0
    insertion_rate: float = 0.0115
    deletion_rate: float = 0.0115
    indel_exponent: float = 1.7
    median_length: float = 290.0
    length_sigma: float = 0.76

    def __post_init__(self) -> None:
        for name in ("rate_shape", "indel_exponent", "median_length"):
            if not getattr(self, name) > 0:
                raise UserError(f"simulated families need {name} above 0, and it is {getattr(self, name)}.")
        for name in ("depth", "insertion_rate", "deletion_rate", "length_sigma"):
            if not getattr(self, name) >= 0:
                raise UserError(f"simulated families need {name} of 0 or more, and it is {getattr(self, name)}.")


def rate_matrix(exchangeabilities: np.ndarray, frequencies_A: np.ndarray) -> np.ndarray:
    """Rate matrix Q, float64 (A, A), of a reversible model: from row to column, at a mean rate of 1.

    Takes the lower triangle of exchangeabilities, row by row, (A (A - 1) / 2,), and stationary frequencies f of sum 1.
    Rows sum to 0 and f_i Q_ij = f_j Q_ji; because of the mean rate, time is in expected substitutions per site.
    """
    num_residues = len(frequencies_A)
    lower_AA = np.zeros((num_residues, num_residues))
    lower_AA[np.tril_indices(num_residues, -1)] = exchangeabilities
    rates_AA: np.ndarray = (lower_AA + lower_AA.T) * frequencies_A
    leaving_A = rates_AA.sum(axis=1)
    rates_AA[np.diag_indices(num_residues)] = -leaving_A
    rates_AA /= float(frequencies_A @ leaving_A)
    return rates_AA


def _numbers(text: str) -> np.ndarray:
    return np.array(text.split(), dtype=np.float64)


WAG_FREQUENCIES_A = _numbers(_WAG_FREQUENCIES) / _numbers(_WAG_FREQUENCIES).sum()
"""float64 (A,): stationary frequencies of WAG."""

WAG_RATES_AA = rate_matrix(_numbers(_WAG_EXCHANGEABILITIES), WAG_FREQUENCIES_A)
"""float64 (A, A): WAG's rate matrix, in substitutions per site."""


class Substitution:
    """Substitutions under one rate matrix, by uniformisation (Jensen 1953).

    Events fall on every site at the rate of the fastest residue; an event draws the next residue from I + Q / that
    rate, which may be the same residue. The outcome has exactly the distribution exp(Q t), for any t and any site.
    """

    def __init__(self, rates_AA: np.ndarray) -> None:
        self.event_rate = float(-np.diag(rates_AA).min())
        jumps_AA = np.eye(len(rates_AA)) + rates_AA / self.event_rate
        # The last column is left out: a number above all the others means the last residue, whatever rounding did.
        self.cumulative_AA = np.cumsum(jumps_AA, axis=1)[:, :-1]

    def evolve(self, states_N: np.ndarray, expected_N: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Residues, uint8 (N,), after `expected_N` expected substitutions per site, float (N,)."""
        states_N = states_N.copy()
        num_events_N = random.poisson(self.event_rate * expected_N)
        sites = np.flatnonzero(num_events_N)
        while sites.size:
            uniform = random.random(sites.size)
            states_N[sites] = (uniform[:, None] >= self.cumulative_AA[states_N[sites]]).sum(axis=1)
            num_events_N[sites] -= 1
            sites = sites[num_events_N[sites] > 0]
        return states_N


@dataclass(frozen=True)
class _Sequence:
    states_N: np.ndarray  # uint8, index into AMINO_ACIDS
    rates_N: np.ndarray  # float64, relative rate of each site, mean 1; inherited with the site


def _draw_sequence(length: int, evolution: Evolution, random: np.random.Generator) -> _Sequence:
    uniform_N = random.random(length)
    states_N = np.searchsorted(np.cumsum(WAG_FREQUENCIES_A)[:-1], uniform_N, side="right").astype(np.uint8)
    return _Sequence(states_N, random.gamma(evolution.rate_shape, 1 / evolution.rate_shape, length))


def _draw_indel_length(evolution: Evolution, random: np.random.Generator) -> int:
    weights = np.arange(1, MAX_INDEL_LENGTH + 1) ** -evolution.indel_exponent
    cumulative = np.cumsum(weights)
    return 1 + int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))


def _insert_and_delete(
    sequence: _Sequence, branch_length: float, evolution: Evolution, random: np.random.Generator
) -> _Sequence:
    """The sequence after the insertions and deletions of one branch, in random order.

    Their number is drawn for the length at the branch's beginning: branches are short against the change of length.
    """
    length = len(sequence.states_N)
    num_insertions = int(random.poisson(evolution.insertion_rate * branch_length * (length + 1)))
    num_deletions = int(random.poisson(evolution.deletion_rate * branch_length * length))
    for is_insertion in random.permutation(np.arange(num_insertions + num_deletions) < num_insertions):
        length, span = len(sequence.states_N), _draw_indel_length(evolution, random)
        if is_insertion:
            new = _draw_sequence(span, evolution, random)
            place = int(random.integers(length + 1))
            sequence = _Sequence(
                np.insert(sequence.states_N, place, new.states_N), np.insert(sequence.rates_N, place, new.rates_N)
            )
        else:
            start = int(random.integers(length))
            cut = slice(start, min(start + span, length))
            if length - (cut.stop - cut.start) >= MIN_LENGTH // 2:
                sequence = _Sequence(np.delete(sequence.states_N, cut), np.delete(sequence.rates_N, cut))
    return sequence


def draw_tree(num_tips: int, depth: float, random: np.random.Generator) -> list[tuple[int, float]]:
    """A pure-birth (Yule 1925) tree: (parent, branch length) of every node, parents first, the root's parent -1.

    The last `num_tips` nodes are the tips, all at `depth` from the root, which splits at once: the tree is that of
    lineages that split equally often, stopped just before it would have one tip more, and scaled.
    """
    if num_tips == 1:
        return [(-1, 0.0), (0, depth)]
    nodes: list[tuple[int, float]] = [(-1, 0.0)]
    active = [(0, 0.0), (0, 0.0)]  # (parent node, time of its split) of each lineage now alive
    time = 0.0
    while True:
        time += random.exponential(1 / len(active))
        if len(active) == num_tips:
            break
        parent, since = active.pop(int(random.integers(len(active))))
        nodes.append((parent, time - since))
        active += [(len(nodes) - 1, time)] * 2
    nodes += [(parent, time - since) for parent, since in active]
    return [(parent, branch_length * depth / time) for parent, branch_length in nodes]


def simulate_family(num_members: int, evolution: Evolution, random: np.random.Generator) -> list[str]:
    """The sequences of one family, in random order and, where evolution made enough of them, all different.

    The tree has twice as many tips as members are kept: a database holds a part of what lives, and each sequence once.
    """
    substitution = Substitution(WAG_RATES_AA)
    length = round(evolution.median_length * float(np.exp(evolution.length_sigma * random.standard_normal())))
    nodes = [_draw_sequence(min(max(length, MIN_LENGTH), MAX_LENGTH), evolution, random)]
    num_tips = 2 * num_members
    for parent, branch_length in draw_tree(num_tips, evolution.depth, random)[1:]:
        before = nodes[parent]
        states_N = substitution.evolve(before.states_N, before.rates_N * branch_length, random)
        nodes.append(_insert_and_delete(_Sequence(states_N, before.rates_N), branch_length, evolution, random))
    letters = np.frombuffer(AMINO_ACIDS.encode(), dtype=np.uint8)
    # Tips come out in the order of their births; shuffled, a member's number says nothing about its relatives.
    tips = [nodes[len(nodes) - num_tips + int(tip)] for tip in random.permutation(num_tips)]
    texts = [letters[tip.states_N].tobytes().decode() for tip in tips]
    distinct = list(dict.fromkeys(texts))
    return (distinct + texts)[:num_members]


def simulate_families(
    num_families: int, members_per_family: int, seed: int, evolution: Evolution | None = None
) -> Iterator[tuple[str, str, str]]:
    """(id, description, sequence) of every member of simulated families, family by family.

    A family depends on the seed, its number and its size only, not on how many other families there are.

    Raises:
        UserError: a count below 1 or a negative seed.
    """
    for name, count in (("num_families", num_families), ("members_per_family", members_per_family)):
        if count < 1:
            raise UserError(f"simulated families need {name} of 1 or more, and it is {count}.")
    if seed < 0:
        raise UserError(f"simulated families need a seed of 0 or more, and it is {seed}.")
    evolution = evolution or Evolution()
    family_digits = max(3, len(str(num_families - 1)))
    member_digits = max(4, len(str(members_per_family - 1)))
    for family in range(num_families):
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(family,))))
        for member, sequence in enumerate(simulate_family(members_per_family, evolution, random)):
            record_id = f"{SIMULATED_PREFIX}F{family:0{family_digits}d}_M{member:0{member_digits}d}"
            yield record_id, f"simulated family {family}", sequence


def write_simulated_fasta(
    path: str | Path,
    num_families: int = 6,
    members_per_family: int = 1000,
    seed: int = 29,
    evolution: Evolution | None = None,
) -> int:
    """Write simulated families as FASTA, gzip-compressed where the name ends in .gz; returns the number of records.

    The defaults are the demo corpus: 6,000 sequences, 1.5 million residues. They are few families because what a small
    network must see through in few tokens is the number of different sites, here 1,485. After 1.9 to 2.3 million tokens
    the demo network was 0.24 nats under the unigram entropy at masked positions with 2,207 sites (six families of seed
    2), 0.05 with 5,075 (ten, depth 0.3) and 0 with 13,802 (forty, depth 0.3). The seed is one whose ancestors are of
    ordinary lengths (110 to 395 residues, median 250). A member that is held out at random has close relatives among
    the others, so a loss on it says that training works and nothing about new families.

    The file appears whole or not at all, and the same arguments give the same bytes (gzip's header holds neither a time
    nor a name). Sequences are on lines of 60 residues, in the order of `simulate_families`.

    Raises:
        UserError: an argument that `simulate_families` refuses.
        OSError: the folder is missing or not writable.
    """
    path = Path(path)
    lines: list[str] = []
    num_records = 0
    for record_id, description, sequence in simulate_families(num_families, members_per_family, seed, evolution):
        lines.append(f">{record_id} {description}")
        lines += [sequence[start : start + 60] for start in range(0, len(sequence), 60)]
        num_records += 1
    text = ("\n".join(lines) + "\n").encode()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(gzip.compress(text, compresslevel=6, mtime=0) if path.name.endswith(".gz") else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with suppress(OSError):  # of a read-only folder; what went wrong before is what is said
            temporary.unlink(missing_ok=True)
    return num_records


def is_simulated(corpus: Corpus) -> bool:
    """Whether the sequences of a corpus came from here, as their ids say."""
    return all(name.startswith(SIMULATED_PREFIX) for name in corpus.ids(np.arange(min(20, len(corpus)))))
