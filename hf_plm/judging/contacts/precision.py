"""How good predicted contacts are: the share of true ones among the L, L/2 and L/5 that are predicted first.

L is the number of residues that the structure shows; where a range has fewer pairs than L/k, all of them are taken.
Ranges and cuts as in Rao et al. 2021. Beside each stand two predictors that know no protein:
`chance`, the share of contacts among all pairs of the range, and `nearest`, which takes the pairs that are nearest
along the chain first. Ties are broken at random: a predictor that says the same of all pairs is at chance.

Dimensions: P pairs.
"""

import warnings
from collections.abc import Iterable
from typing import Any

import numpy as np

from hf_plm.judging.contacts.predictor import ContactPredictor, far_pairs
from hf_plm.judging.contacts.structures import Structure
from hf_plm.progress import shown

RANGES = {"short": (6, 11), "medium": (12, 23), "long": (24, 10**9)}
"""Separations along the chain, both ends included."""
CUTS = {"P@L": 1, "P@L/2": 2, "P@L/5": 5}
PREDICTORS = ("model", "nearest")
RESAMPLES = 2000
"""Of proteins, for a 95% interval."""


def precisions(
    scores_P: np.ndarray, is_contact_P: np.ndarray, separations_P: np.ndarray, length: int
) -> dict[str, float]:
    """Of one protein: RANGE CUT for each range and cut, RANGE nearest CUT, RANGE chance. NaN where a range has no pair.

    Pairs without a score (NaN) are taken last. `length` is L.
    """
    from sklearn.metrics import precision_score

    found: dict[str, float] = {}
    ties_P = np.random.default_rng(0).permutation(len(scores_P))
    for name, (least, most) in RANGES.items():
        chosen = np.flatnonzero((separations_P >= least) & (separations_P <= most))
        true = is_contact_P[chosen]
        found[f"{name} chance"] = float(true.mean()) if len(chosen) else float("nan")
        for label, keys_P in (("", -np.nan_to_num(scores_P, nan=-np.inf)), ("nearest ", separations_P)):
            order = np.lexsort((ties_P[chosen], keys_P[chosen]))
            for cut, part in CUTS.items():
                is_predicted = np.zeros(len(chosen), dtype=bool)
                is_predicted[order[: max(1, length // part)]] = True
                value = precision_score(true, is_predicted) if len(chosen) else float("nan")
                found[f"{name} {label}{cut}"] = float(value)
    return found


def evaluate_contacts(predictor: ContactPredictor, structures: Iterable[Structure]) -> list[dict[str, Any]]:
    """A row for each protein: id, set, atom, residues, resolved, not_predicted, and what `precisions` gives."""
    rows = []
    structures = list(structures)
    for structure in shown("predicting contacts", structures, [len(one.residues) for one in structures]):
        pairs_P2 = resolved_pairs(structure)
        scores_P = predictor.probabilities(structure.residues)[pairs_P2[:, 0], pairs_P2[:, 1]]
        rows.append(
            {
                "id": structure.id,
                "set": structure.set,
                "atom": structure.atom,
                "residues": len(structure.residues),
                "resolved": int(structure.is_resolved_N.sum()),
                "not_predicted": int(np.isnan(scores_P).sum()),
                **scored(structure, pairs_P2, scores_P),
            }
        )
    return rows


def scored(structure: Structure, pairs_P2: np.ndarray, scores_P: np.ndarray) -> dict[str, float]:
    """`precisions` of a structure's pairs."""
    is_contact_P = structure.contacts_NN()[pairs_P2[:, 0], pairs_P2[:, 1]]
    return precisions(scores_P, is_contact_P, pairs_P2[:, 1] - pairs_P2[:, 0], int(structure.is_resolved_N.sum()))


def resolved_pairs(structure: Structure) -> np.ndarray:
    """int64 (P, 2): the pairs of `LEAST_SEPARATION` and more of which the structure shows both residues."""
    pairs_P2 = far_pairs(len(structure.residues))
    return pairs_P2[structure.is_resolved_N[pairs_P2].all(axis=1)]


def means(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """For each number of the rows: mean over proteins, 95% interval (low, high), num_proteins.

    Proteins too short for a range are left out of its means. RANGE margin: P@L less the better baseline's, by protein.
    """
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0] if name.split()[0] in RANGES}
    for name in RANGES:
        baselines = [columns[f"{name} {one}"] for one in ("chance", "nearest P@L")]
        best = max(baselines, key=lambda values: np.nanmean(values) if np.isfinite(values).any() else -1.0)
        columns[f"{name} margin"] = columns[f"{name} P@L"] - best
    return {name: _mean(values) for name, values in columns.items()}


def _mean(values: np.ndarray) -> dict[str, float]:
    from scipy.stats import bootstrap

    values = values[np.isfinite(values)]
    low = high = float("nan")
    if len(values) > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a degenerate sample would be told by one
            interval = bootstrap(
                (values,), np.mean, n_resamples=RESAMPLES, method="percentile", rng=np.random.default_rng(0)
            ).confidence_interval
        low, high = float(interval.low), float(interval.high)
    return {
        "mean": float(values.mean()) if len(values) else float("nan"),
        "low": low,
        "high": high,
        "num_proteins": len(values),
    }


def as_table(found: dict[str, dict[str, float]]) -> str:
    """The means as lines of text: a row for each range, precision with its interval and the two baselines of P@L."""
    lines = [f"{'range':18}" + "".join(f"{cut:22}" for cut in CUTS) + f"{'chance':9}nearest first (P@L)"]
    for name, (least, most) in RANGES.items():
        span = f"{least}-{most}" if most < 10**9 else f"{least} and more"
        cells = []
        for cut in CUTS:
            cells.append(with_interval(found[f"{name} {cut}"]).ljust(22))
        chance, nearest = (found[f"{name} {one}"]["mean"] for one in ("chance", "nearest P@L"))
        lines.append(f"{name + ' ' + span:18}" + "".join(cells) + f"{chance:<9.3f}{nearest:.3f}")
    return "\n".join(lines)


def with_interval(found: dict[str, float], form: str = ".3f", to: str = "-") -> str:
    """Such as `0.047 (0.040-0.053)`; of one protein there is no interval."""
    if found["num_proteins"] < 2:
        return f"{found['mean']:{form}}"
    return f"{found['mean']:{form}} ({found['low']:{form}}{to}{found['high']:{form}})"


def verdict(found: dict[str, dict[str, float]]) -> str:
    """One sentence: whether long-range contacts are predicted better than without looking at the protein."""
    margin = found["long margin"]
    text = with_interval(margin, "+.3f", " to ")
    if not margin["num_proteins"]:
        return "No protein is long enough for a long-range contact."
    if margin["low"] > 0:
        return f"Long-range P@L is {text} above the better baseline: the model has learnt contacts."
    return f"Long-range P@L is {text} against the better baseline: the model has not been shown to know contacts."
