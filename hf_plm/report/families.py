"""Held-out proteins as a model's vectors place them: a map in two dimensions, and a number that needs no map.

The map (t-SNE; of few proteins the first two principal components) is to be looked at. What is measured is in the whole
space: how often a protein's nearest neighbour is of its own family, beside what amino-acid composition alone reaches.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.data.heldout import hash_of
from hf_plm.inference.embedder import Embedder
from hf_plm.judging.intervals import bootstrap_interval
from hf_plm.judging.scores.variants import read_table
from hf_plm.models.masked_lm import LETTERS
from hf_plm.progress import shown
from hf_plm.proteins.fasta import IllegalResidueError, clean
from hf_plm.report.charts import QUIET, Series, scatter
from hf_plm.report.findings import short
from hf_plm.report.page import (
    Html,
    counted,
    element,
    estimate,
    figure,
    grid,
    join,
    missing,
    notice,
    number,
    paragraph,
    table,
)

NUM_FAMILIES, NUM_MEMBERS = 12, 40
"""Shown at most: as many as marks and colours tell apart, and a minute's work on a laptop."""
FEWEST_MEMBERS = 3
FEW = 12
"""Below so many proteins t-SNE has nothing to arrange."""


@dataclass(frozen=True)
class Labelled:
    """Proteins, each with the name of its family; none where families are not known. `source` says whence."""

    residues: list[bytes]
    families: list[str] | None
    source: str


@dataclass(frozen=True)
class Map:
    """Where a model's vectors place P proteins. `same` and the rest are None where no families are known."""

    model: str
    places_P2: np.ndarray
    method: str
    is_same_P: np.ndarray | None = None  # whether the nearest neighbour is of the same family
    same: list[float] | None = None  # their share, with its 95% interval
    silhouette: float | None = None


def read_families(path: Path) -> Labelled:
    """A table with the columns `sequence` and `family` (or `cluster`): the largest families, some members of each.

    Raises `UserError` for what is no such table, an illegal letter, and fewer than two families of three members.
    """
    table = read_table(path)
    sequence, family = table.find("sequence", "seq"), table.find("family", "cluster", "label")
    if sequence is None or family is None:
        raise UserError(f"{path} should have the columns sequence and family; it has {', '.join(table.header)}.")
    found = []
    for row, line in zip(table.rows, table.lines, strict=True):
        try:
            found.append((clean(row[sequence]).residues, row[family]))
        except IllegalResidueError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
    chosen = of_families(found, str(path.name))
    if chosen is None:
        raise UserError(f"{path} has fewer than two families with {FEWEST_MEMBERS} different members.")
    return chosen


def of_families(proteins: Iterable[tuple[bytes, str | None]], source: str) -> Labelled | None:
    """The largest families, some members of each, by hash; None where fewer than two have three members."""
    unique = {residues: family for residues, family in proteins if residues and family}
    sizes = Counter(unique.values())
    largest = [name for name, size in sizes.most_common(NUM_FAMILIES) if size >= FEWEST_MEMBERS]
    if len(largest) < 2:
        return None
    members: dict[str, list[bytes]] = {name: [] for name in largest}
    for residues in sorted(unique, key=hash_of):
        kept = members.get(unique[residues] or "")
        if kept is not None and len(kept) < NUM_MEMBERS:
            kept.append(residues)
    return Labelled(
        [one for name in largest for one in members[name]], [name for name in largest for _ in members[name]], source
    )


def embed_map(model: str, proteins: Labelled, **options: Any) -> Map:
    """A model's map of the proteins, from the mean of each one's residue vectors; `options` are the `Embedder`'s."""
    embedder = Embedder(model, **options)
    sequences = [residues.decode() for residues in proteins.residues]
    vectors = shown(f"embedding held-out proteins by {model}", embedder.stream(sequences), map(len, sequences))
    return map_of(model, np.stack(list(vectors)), proteins.families)


def composition_map(proteins: Labelled) -> Map:
    """What the shares of the 20 standard residues place near each other: the baseline."""
    shares_PA = np.array([[one.count(ord(letter)) / len(one) for letter in LETTERS] for one in proteins.residues])
    return map_of("amino-acid composition", shares_PA, proteins.families)


def map_of(model: str, vectors_PD: np.ndarray, families: Sequence[str] | None) -> Map:
    """The map of vectors. Neighbours are by cosine after the mean of all is taken off."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from sklearn.metrics import silhouette_score
    from sklearn.neighbors import NearestNeighbors

    vectors_PD = (vectors_PD - vectors_PD.mean(axis=0)).astype(np.float64)
    if len(vectors_PD) < FEW:
        places_P2, method = PCA(2, random_state=0).fit_transform(vectors_PD), "the first two principal components"
    else:
        perplexity = min(30.0, (len(vectors_PD) - 1) / 3)
        arranged = TSNE(2, perplexity=perplexity, init="pca", metric="cosine", random_state=0)
        places_P2, method = arranged.fit_transform(vectors_PD), "t-SNE"
    if families is None:
        return Map(model, places_P2, method)
    nearest_P = NearestNeighbors(n_neighbors=1, metric="cosine").fit(vectors_PD).kneighbors(return_distance=False)[:, 0]
    names_P = np.asarray(families)
    is_same_P = names_P[nearest_P] == names_P
    return Map(
        model,
        places_P2,
        method,
        is_same_P,
        mean_with_interval(is_same_P.astype(float), families),
        float(silhouette_score(vectors_PD, names_P, metric="cosine")),
    )


def mean_with_interval(values_P: np.ndarray, families: Sequence[str]) -> list[float]:
    """Mean and 95% interval over families, whose members are not independent: 1,000 resamples."""
    found = bootstrap_interval(np.asarray(families), lambda rows: float(values_P[rows].mean()), 1000)
    return [found.value, found.low, found.high]


def by_chance(families: Sequence[str]) -> float:
    """The share of neighbours of the same family, were they drawn at random."""
    sizes = Counter(families)
    return sum(size * (size - 1) for size in sizes.values()) / (len(families) * (len(families) - 1))


def section(proteins: Labelled | None, maps: Sequence[Map], baseline: Map | None, why_not: str = "") -> Html:
    """Where models place held-out proteins, and how often the nearest neighbour is of the same family."""
    if proteins is None or not maps:
        return missing(f"There is no map of held-out proteins. {why_not}".strip())
    parts = []
    if proteins.families is None:
        parts.append(
            paragraph(
                f"{counted(len(proteins.residues), 'held-out protein')} of {proteins.source}, each as the mean of its "
                "residues' vectors. Which families they are of is not known, so no number says how good the map is; ",
                element("code", "--families TABLE"),
                " with the columns sequence and family gives one.",
            )
        )
    else:
        names = list(dict.fromkeys(proteins.families))
        parts.append(
            paragraph(
                f"{len(proteins.residues):,} proteins of the {len(names)} largest families in {proteins.source}, each "
                "as the mean of its residues' vectors. How often is a protein's nearest neighbour of its own family?",
            )
        )
        parts.append(_neighbours(proteins.families, maps, baseline))
    alt = "A map of held-out proteins by {}: each point a protein, families by colour and mark."
    drawn = [
        figure(
            join([element("b", short(one.model)), f", {one.method}. Directions and distances on it have no unit."]),
            scatter(_groups(one, proteins.families), alt.format(short(one.model))),
        )
        for one in [*maps, *([baseline] if baseline is not None and len(maps) == 1 else [])]
    ]
    return join([*parts, grid(*drawn)])


def _groups(one: Map, names: Sequence[str] | None) -> list[Series]:
    if names is None:
        across, up = one.places_P2.T.tolist()
        return [Series("", across, up, kind="points")]
    groups = []
    for style, name in enumerate(dict.fromkeys(names)):
        across, up = one.places_P2[np.asarray(names) == name].T.tolist()
        groups.append(Series(name, across, up, style=style + (style >= QUIET), kind="points"))
    return groups


def _neighbours(names: Sequence[str], maps: Sequence[Map], baseline: Map | None) -> Html:
    rows = [(short(one.model), estimate(one.same, ".1%"), number(one.silhouette, ".3f")) for one in maps]
    if baseline is not None:
        rows.append((baseline.model, estimate(baseline.same, ".1%"), number(baseline.silhouette, ".3f")))
    rows.append(("by chance", number(by_chance(names), ".1%"), ""))
    parts = [table("Nearest neighbour of the same family", ["Vectors", "Share of proteins", "Silhouette"], rows)]
    compared = [(maps[0], one, short(one.model)) for one in maps[1:]]
    compared += [(maps[0], baseline, "composition")] if baseline is not None else []
    for one, other, called in compared:
        if one.is_same_P is None or other.is_same_P is None:
            continue
        difference = mean_with_interval(100 * (one.is_same_P.astype(float) - other.is_same_P), names)
        amount = f"{estimate(difference, '+.1f')} points"
        parts.append(paragraph(f"{short(one.model)} less {called}, on the same proteins: {amount}."))
        if not difference[1] > 0 and called == "composition":
            parts.append(notice(f"{short(one.model)} is not shown to know families better than composition does."))
    return join(parts)
