"""Which proteins a probe learns from and which it is tested on, so that no test is answered from memory.

A split that the table brings is used as it is, after a search for leaks: a protein, a sequence or a cluster on both
sides is refused. Without one, folds are made of groups, which are clusters where those are known, by MMseqs2 where it
is installed, and shared 5-mers. These alone find proteins from about 80% identity on and no distant relatives: on
natural families, relatives at 30% stay on both sides, which makes numbers too good, and that is said.

Dimensions: P proteins, K keys (ids, sequences, clusters).
"""

import csv
import shutil
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hf_plm.config import UserError
from hf_plm.judging.probes.labels import is_missing
from hf_plm.judging.probes.task import Task, side

POOLED = "cross-validation"
"""The name of the test set that all folds make together."""
WHOLE_INNER_ROWS = 5000
"""Up to so many rows all inner folds take turns as the validation side; beyond, the first does."""
NUM_INNER = 4  # a quarter of what five folds leave: 60/20/20 (PhosBoost's README, 1.3)
KMER, KMER_SHARE, KMER_COMMON = 5, 0.3, 1000
"""Two proteins are relatives here if the one with fewer 5-mers shares 30% of them (0.8 ** 5); 5-mers of more proteins
than the last number tell nothing."""
BLOCK = 2000
"""Proteins whose 5-mers are compared with all others at once: of 100,000 the whole table would take 7 GB and more."""
MMSEQS = ("--min-seq-id", "0.3", "-c", "0.8", "--cov-mode", "0", "--cluster-mode", "1", "-v", "1")
"""30% identity over 80% of both, connected components (MMseqs2 user guide, "Clustering modes")."""


@dataclass(frozen=True)
class Round:
    """One fit and its tests; all are numbers of proteins."""

    train: np.ndarray
    inner: tuple[tuple[np.ndarray, np.ndarray], ...]  # pairs of parts of `train`, to choose settings by
    tests: dict[str, np.ndarray]


@dataclass(frozen=True)
class Plan:
    rounds: tuple[Round, ...]
    how: str
    groups_P: np.ndarray  # int64: what intervals resample
    notes: tuple[str, ...] = ()
    leaks: tuple[tuple[int, int, str, int], ...] = ()  # (train, test, what they share, round), dropped from train


def plan(
    task: Task,
    folds: int = 5,
    clusters: Path | None = None,
    leaks: str = "refuse",
    seed: int = 0,
) -> Plan:
    """Rounds of training and testing. `clusters`: a table of cluster and member; `leaks`: refuse, or drop from train.

    Raises `UserError` for a leak, naming two rows, and for a split or folds that cannot be.
    """
    if leaks not in ("refuse", "drop"):
        raise UserError(f"--leaks is refuse or drop, not {leaks!r}.")
    if folds < 2:
        raise UserError(f"--folds is a number from 2, not {folds}.")
    keys, notes = _keys(task, clusters)
    groups_P = joined(list(keys.values()))
    if task.splits is not None:
        return _given(task, task.splits, keys, groups_P, leaks, seed, notes)
    of = "given clusters"
    if "cluster" not in keys or keys["cluster"].min() < 0:
        found, found_P, more = _homology(task)
        of = f"{of} and {found}" if "cluster" in keys else found
        groups_P = joined([*keys.values(), found_P])
        notes += more
    parts = grouped(task, np.arange(len(task.ids)), groups_P, folds, seed)
    rounds = tuple(_round(task, groups_P, np.setdiff1d(np.arange(len(task.ids)), part), part, seed) for part in parts)
    return Plan(rounds, f"{folds} folds of {of}", groups_P, tuple(notes))


def joined(keys: Sequence[np.ndarray]) -> np.ndarray:
    """int64 (P,): groups of what is connected by an equal value in any key; keys are int64 (P,) with -1 for none."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    num_proteins = len(keys[0])
    rows, columns, begin = [], [], num_proteins
    for key_P in keys:
        has = np.flatnonzero(key_P >= 0)
        rows.append(has)
        columns.append(begin + key_P[has])
        begin += int(key_P.max(initial=-1)) + 1
    row, column = np.concatenate(rows), np.concatenate(columns)
    graph = coo_matrix((np.ones(len(row), dtype=np.int8), (row, column)), shape=(begin, begin))
    return np.unique(connected_components(graph, directed=False)[1][:num_proteins], return_inverse=True)[1]


def grouped(task: Task, proteins: np.ndarray, groups_P: np.ndarray, folds: int, seed: int) -> list[np.ndarray]:
    """`proteins` in so many parts, no group in two; for classes, each part with about the share of each."""
    from sklearn.model_selection import GroupKFold, StratifiedGroupKFold

    num_groups = len(np.unique(groups_P[proteins]))
    if num_groups < folds:
        raise UserError(
            f"{task.path} has {num_groups:,} groups of unrelated proteins, too few for {folds} folds; give fewer with "
            "--folds."
        )
    rows = np.flatnonzero(np.isin(task.proteins_R, proteins))
    of_rows = task.proteins_R[rows]
    classes, counts = np.unique(task.labels_R[rows], return_counts=True)
    if task.kind == "regression" or counts.max() < folds:
        splitter, labels = GroupKFold(folds, shuffle=True, random_state=seed), None
    else:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        # Classes too small for all folds are one class here; scikit-learn would warn of each.
        small = classes[counts < folds]
        labels = np.where(np.isin(task.labels_R[rows], small), classes[counts.argmax()], task.labels_R[rows])
    return [np.unique(of_rows[test]) for _, test in splitter.split(rows, labels, groups_P[of_rows])]


def _round(task: Task, groups_P: np.ndarray, train: np.ndarray, test: np.ndarray, seed: int) -> Round:
    return Round(train, _inner(task, groups_P, train, seed), {POOLED: test})


def _inner(task: Task, groups_P: np.ndarray, train: np.ndarray, seed: int) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    num = min(NUM_INNER, len(np.unique(groups_P[train])))
    if num < 2:
        raise UserError(f"{task.path} has too few unrelated proteins to choose settings by, beside those of the test.")
    parts = grouped(task, train, groups_P, num, seed)
    if np.isin(task.proteins_R, train).sum() > WHOLE_INNER_ROWS:
        parts = parts[:1]
    return tuple((np.setdiff1d(train, part), part) for part in parts)


def _given(
    task: Task,
    splits: tuple[str, ...],
    keys: dict[str, np.ndarray],
    groups_P: np.ndarray,
    leaks: str,
    seed: int,
    notes: list[str],
) -> Plan:
    sides = [side(value) for value in splits]
    if "" in sides:
        row = sides.index("")
        raise UserError(
            f"{task.path}, line {task.lines[row]}: a split is train, valid, test or a fold's number, "
            f"not {splits[row]!r}."
        )
    names = np.array(sides)
    proteins = {name: np.flatnonzero(names == name) for name in sorted(set(sides))}
    parts = [proteins[name] for name in proteins if name.startswith("fold ")]
    tests = {name: proteins[name] for name in proteins if name not in ("train", "valid") and name[:5] != "fold "}
    if tests:
        train = np.setdiff1d(np.arange(len(sides)), np.concatenate(list(tests.values())))
        rounds = [Round(train, (), tests)]
    elif len(parts) > 1:
        rounds = [Round(np.setdiff1d(np.arange(len(sides)), part), (), {POOLED: part}) for part in parts]
    else:
        raise UserError(f"{task.path}: its split has no test side, only {', '.join(sorted(set(splits)))}.")
    dropped: list[tuple[int, int, str, int]] = []
    twice: set[int] = set()
    for index, one in enumerate(rounds):
        found = find_leaks(one.train, np.concatenate(list(one.tests.values())), keys)
        if found and leaks == "refuse":
            raise UserError(_told(task, found, splits))
        dropped += [(*leak, index + 1) for leak in found]
        train = np.setdiff1d(one.train, [row for row, _, _ in found])
        if not len(train):
            raise UserError(f"{task.path}: its split leaves nothing to train on.")
        valid = np.intersect1d(train, proteins.get("valid", np.empty(0, dtype=np.int64)))
        folds = [kept for part in parts if len(kept := np.intersect1d(train, part))]
        # Settings are chosen on proteins that the fit for it has not seen, either.
        inner = []
        for held in [valid] if len(valid) else folds:
            rest = np.setdiff1d(train, held)
            shared = [row for row, _, _ in find_leaks(rest, held, keys)]
            if len(kept := np.setdiff1d(rest, shared)):
                inner.append((kept, held))
                twice.update(shared)
        rounds[index] = replace(one, train=train, inner=tuple(inner))
    if not all(one.inner for one in rounds):
        near_P = joined([groups_P, by_kmers(task.sequences)])
        for index, one in enumerate(rounds):
            if not one.inner:  # of one family there are no groups of relatives
                is_one = len(np.unique(near_P[one.train])) < 2
                rounds[index] = replace(one, inner=_inner(task, groups_P if is_one else near_P, one.train, seed))
    if dropped:
        left_out = len({row for row, _, _, _ in dropped})
        notes = [*notes, f"{left_out:,} proteins of the train side are left out as leaks."]
    if twice:
        what = "valid" if len(proteins.get("valid", ())) else "another fold"
        notes = [
            *notes,
            f"{len(twice):,} proteins of the train side are in {what} too: no settings are chosen by them.",
        ]
    return Plan(tuple(rounds), "the given split", groups_P, tuple(notes), tuple(dropped))


def find_leaks(train: np.ndarray, test: np.ndarray, keys: dict[str, np.ndarray]) -> list[tuple[int, int, str]]:
    """Train proteins that share an id, a sequence or a cluster with the test: (train, one of the test, what)."""
    found: dict[int, tuple[int, int, str]] = {}
    for what, key_P in keys.items():
        tested = {int(key_P[row]): int(row) for row in test[::-1] if key_P[row] >= 0}
        for row in train.tolist():
            if (key := int(key_P[row])) in tested:
                found.setdefault(row, (row, tested[key], what))
    return [found[row] for row in sorted(found)]


def _told(task: Task, found: list[tuple[int, int, str]], splits: tuple[str, ...]) -> str:
    row, other, what = found[0]

    def named(index: int) -> str:
        return f"line {task.lines[index]} ({task.ids[index]}, {splits[index]})"

    return (
        f"{task.path}: {named(row)} and {named(other)} have the same {what}, so that the test would be answered from "
        f"memory; {len(found):,} rows of the train side are such, and --leaks drop leaves them out."
    )


def _keys(task: Task, clusters: Path | None) -> tuple[dict[str, np.ndarray], list[str]]:
    notes: list[str] = []
    keys = {"id": _numbered(task.ids), "sequence": _numbered(task.sequences)}
    named = task.clusters
    if clusters is not None:
        named = _cluster_table(clusters, task)
    if named is not None:
        if missing := sum(not name for name in named):
            notes.append(f"{missing:,} of {len(named):,} proteins have no cluster in {clusters or task.path}.")
        keys["cluster"] = _numbered(named)
    return keys, notes


def _numbered(names: Sequence[str]) -> np.ndarray:
    """int64: equal numbers for equal names, -1 for ''."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) if name else -1 for name in names], dtype=np.int64)


def _cluster_table(path: Path, task: Task) -> tuple[str, ...]:
    import gzip

    opener: Callable = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8", newline="") as file:
            pairs = [(row[1], row[0]) for row in csv.reader(file, delimiter="\t") if len(row) > 1]
    except (OSError, EOFError, zlib.error, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a table of cluster and member: {error}.") from None
    of: dict[str, str] = {}
    for member, cluster in pairs:
        if of.setdefault(member, cluster) != cluster:
            raise UserError(f"{path} has {member!r} in two clusters, {of[member]!r} and {cluster!r}.")
    if not any(id_ in of for id_ in task.ids):
        raise UserError(f"{path} has none of the proteins of {task.path}; its lines are a cluster, a tab and a member.")
    return tuple("" if is_missing(name := of.get(id_, "")) else name for id_ in task.ids)


def _homology(task: Task) -> tuple[str, np.ndarray, list[str]]:
    if (program := shutil.which("mmseqs")) is not None:
        # Its clusters are of like length; a fragment shares 5-mers with what it is of.
        found_P = joined([_mmseqs(program, task.sequences), by_kmers(task.sequences)])
        return "clusters by MMseqs2 (30% identity over 80%) and shared 5-mers", found_P, []
    warning = (
        "No clusters are given and MMseqs2 is not installed: proteins are kept together by shared 5-mers, which finds "
        "relatives from about 80% identity on and no distant ones, so that numbers may be too good."
    )
    return "groups by shared 5-mers", by_kmers(task.sequences), [warning]


def _mmseqs(program: str, sequences: Sequence[str]) -> np.ndarray:
    with tempfile.TemporaryDirectory() as folder:
        fasta = Path(folder) / "in.fasta"
        fasta.write_text("".join(f">{number}\n{sequence}\n" for number, sequence in enumerate(sequences)))
        done = subprocess.run(
            [program, "easy-cluster", "in.fasta", "out", "tmp", *MMSEQS], cwd=folder, capture_output=True, text=True
        )
        table = Path(folder) / "out_cluster.tsv"
        if done.returncode or not table.exists():
            said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["it said nothing"]
            raise UserError(f"{program} failed with {done.returncode} ({said[0]}); give --clusters, or a split.")
        pairs = [line.split("\t") for line in table.read_text().splitlines()]
    clusters_P = np.full(len(sequences), -1, dtype=np.int64)
    for cluster, member in pairs:
        clusters_P[int(member)] = int(cluster)
    return clusters_P


def by_kmers(sequences: Sequence[str]) -> np.ndarray:
    """int64 (P,): groups of proteins that share many 5-mers, by single linkage."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    everyone = np.arange(len(sequences))
    row, column = near_pairs(sequences, everyone, everyone)
    graph = coo_matrix((np.ones(len(row), dtype=np.int8), (row, column)), shape=(len(everyone), len(everyone)))
    return connected_components(graph, directed=False)[1].astype(np.int64)


def near_pairs(sequences: Sequence[str], some: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of one of `some` and one of `others` that share `KMER_SHARE` of the 5-mers of the one with fewer."""
    from scipy.sparse import csr_matrix

    kmers = []
    for sequence in sequences:
        letters = np.frombuffer(sequence.encode(), dtype=np.uint8).astype(np.int64) - 65
        kmers.append(np.unique(np.convolve(letters, 26 ** np.arange(min(KMER, len(letters))), "valid")))
    counts_P = np.array([len(one) for one in kmers])
    columns = np.unique(np.concatenate(kmers), return_inverse=True)[1]
    rows = np.repeat(np.arange(len(sequences)), counts_P)
    shape = (len(sequences), int(columns.max()) + 1)
    table = csr_matrix((np.ones(len(rows), dtype=np.int32), (rows, columns)), shape=shape)
    table = table[:, np.asarray(table.sum(axis=0)).ravel() <= KMER_COMMON]
    turned, found = table[others].T.tocsr(), []
    for begin in range(0, len(some), BLOCK):
        block = some[begin : begin + BLOCK]
        shared = (table[block] @ turned).tocoo()
        row, column = block[shared.row], others[shared.col]
        near = shared.data >= KMER_SHARE * np.minimum(counts_P[row], counts_P[column])
        found.append(np.stack([row[near], column[near]]))
    row, column = np.concatenate(found, axis=1)
    return row, column
