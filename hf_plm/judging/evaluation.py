"""Models on one protocol: losses, perplexity and recovery with intervals, beside what needs no context, and in pairs.

Every number is a mean over targets with a 95% bootstrap interval over proteins, since the residues of a protein rise
and fall together. Two models are compared target by target: what makes a protein hard is hard for both, so the interval
of a difference is several times narrower than the two intervals beside each other suggest.

Dimensions: K targets, S proteins, R resamples, P residues asked about, A letters (20).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from hf_plm.config import Mask, UserError
from hf_plm.inference.evaluate import Evaluation, resampled_interval, resamples
from hf_plm.judging.protocol import Protein, Protocol, Sample
from hf_plm.models.masked_lm import LETTER_INDEX, LETTERS, MaskedLM, Query, limit_of
from hf_plm.progress import Progress
from hf_plm.proteins.vocabulary import TOKEN_TO_ID, TOKENS

LENGTHS = (1, 100, 200, 300, 400, 600, 1000)
"""Begins of the groups of lengths, in residues; the last is open."""
DEPTHS = (1, 2, 5, 20, 100)
"""Begins of the groups of cluster depths, in members."""
_COLUMN_OF_ID = np.array([LETTER_INDEX[ord(token)] if len(token) == 1 else -1 for token in TOKENS])


def evaluate_models(
    names: Sequence[str],
    sample: Sample,
    protocol: Protocol,
    open_model: Callable[[str], MaskedLM],
    num_pseudo: int = 0,
) -> tuple[list[dict[str, str]], dict[str, Any]]:
    """The facts of the models, and findings of kind "evaluation"; the models are in memory one after the other.

    With `num_pseudo` pseudo-perplexities too, of the first so many proteins, a forward for each of their residues.
    Raises `UserError` for a model that takes shorter proteins than the protocol has.
    """
    facts, results, evaluations = [], [], []
    for name in names:  # before the first has taken its hour
        limit = limit_of(name)
        if limit < protocol.crop:
            raise UserError(
                f"{name} takes {limit:,} residues at once, fewer than the {protocol.crop:,} of the protocol; "
                f"--crop {limit} evaluates all models on windows of that length."
            )
    for name in names:
        model = open_model(name)
        with Progress(name, sum(len(one.residues) for one in sample.proteins if len(one.targets))) as progress:
            evaluations.append(evaluate_sample(model, sample, progress.count))
        result = {"model": name, **summarise(evaluations[-1], sample)}
        if num_pseudo:
            some = sample.proteins[:num_pseudo]
            with Progress(f"{name}, pseudo-perplexity", sum(len(one.residues) ** 2 for one in some)) as progress:
                result["pseudo"] = pseudo_perplexity(model, some, progress.count)
        facts.append(model.facts)
        results.append(result)
    differences = [
        {"a": names[index], "b": names[0], **paired_difference(evaluations[index], evaluations[0])}
        for index in range(1, len(names))
    ]
    plain = {"protocol": protocol.as_json(), "data": sample.facts, "results": results, "differences": differences}
    return facts, plain


def evaluate_sample(model: MaskedLM, sample: Sample, count: Callable[[int], object] = id) -> Evaluation:
    """Every target of the sample; `count` is told how many residues are done."""
    losses, is_correct = [], []
    proteins = [protein for protein in sample.proteins if len(protein.targets)]
    for protein, log_probs_PA in zip(proteins, model.log_probs(one.query for one in proteins), strict=True):
        columns_P = _COLUMN_OF_ID[protein.labels]
        losses.append(-log_probs_PA[np.arange(len(columns_P)), columns_P].astype(np.float64))
        is_correct.append(log_probs_PA.argmax(1) == columns_P)
        count(len(protein.residues))
    number = {id(protein): index for index, protein in enumerate(sample.proteins)}
    return Evaluation(
        np.concatenate(losses),
        np.concatenate(is_correct),
        np.concatenate([protein.labels for protein in proteins]),
        np.concatenate([protein.inputs for protein in proteins]),
        np.concatenate([np.full(len(one.targets), number[id(one)]) for one in proteins]),
        len(sample.proteins),
        Mask(),
    )


def pseudo_perplexity(
    model: MaskedLM, proteins: Sequence[Protein], count: Callable[[int], object] = id
) -> dict[str, Any]:
    """Each standard residue of each window masked alone (Salazar et al. 2020, ACL).

    `pseudo_perplexity` is exp of the mean over residues, with its interval over proteins; `mean_of_proteins` is the
    mean of each protein's own, which weighs short proteins as much as long ones.
    """
    sums, counts = np.zeros(len(proteins)), np.zeros(len(proteins))
    answers = model.log_probs(query for protein in proteins for query in one_by_one(protein))
    for index, protein in enumerate(proteins):
        letters_N = LETTER_INDEX[np.frombuffer(_window(protein), dtype=np.uint8)]
        for place in np.flatnonzero(letters_N >= 0):
            sums[index] -= next(answers)[0, letters_N[place]]
            counts[index] += 1
        count(len(protein.residues) ** 2)
    answers.close()
    few = np.count_nonzero(counts) < 2
    low, high = [np.nan] * 2 if few else np.exp(resampled_interval(sums, counts, resamples(len(proteins))))
    own = np.exp(sums[counts > 0] / counts[counts > 0])
    return {
        "pseudo_perplexity": [float(np.exp(sums.sum() / counts.sum())), float(low), float(high)],
        "mean_of_proteins": float(own.mean()),
        "proteins": len(proteins),
        "residues": int(counts.sum()),
    }


def one_by_one(protein: Protein) -> Iterator[Query]:
    """A query for each standard residue of the window, masked alone."""
    residues = _window(protein)
    for place in np.flatnonzero(LETTER_INDEX[np.frombuffer(residues, dtype=np.uint8)] >= 0):
        yield Query(residues, np.array([place]), np.array([place]))


def _window(protein: Protein) -> bytes:
    return protein.residues[slice(*protein.window)]


def summarise(found: Evaluation, sample: Sample) -> dict[str, Any]:
    """Overall, by residue, by length and by depth of cluster; intervals are [value, low, high]."""
    weights_RS = resamples(found.num_sequences)
    lengths_K = np.array([len(protein.residues) for protein in sample.proteins])[found.sequences_K]
    depths_K = np.array([protein.depth or 0 for protein in sample.proteins])[found.sequences_K]
    masked = found.is_masked_K
    everything = np.ones_like(masked)
    context_free_K, unigram_K = found.context_free_losses_K(), np.where(masked, found.unigram_losses_K(), 0.0)

    def interval(values_K: np.ndarray, chosen_K: np.ndarray) -> list[float]:
        return found.interval(values_K, chosen_K, weights_RS)

    loss = interval(found.losses_K, everything)
    margins = found.margins(weights_RS)
    overall = {
        "loss": loss,
        "perplexity": [float(value) for value in np.exp(loss)],
        "recovery": interval(found.is_correct_K, everything),
        "context_free_loss": float(context_free_K.mean()),
        "margin_context_free": margins["margin_context_free"],
        "loss_masked": interval(found.losses_K, masked),
        "recovery_masked": interval(found.is_correct_K, masked),
        "unigram_entropy": float(unigram_K[masked].mean()) if masked.any() else float("nan"),
        "margin_unigram_masked": margins["margin_unigram_masked"],
    }
    by_residue = []
    for letter in LETTERS:
        chosen = found.labels_K == TOKEN_TO_ID[letter]
        by_residue.append(
            {
                "residue": letter,
                "num_targets": int(chosen.sum()),
                "loss": interval(found.losses_K, chosen),
                "recovery": interval(found.is_correct_K, chosen),
                "context_free_loss": float(context_free_K[chosen].mean()) if chosen.any() else float("nan"),
            }
        )

    def groups(values_K: np.ndarray, begins: Sequence[int]) -> list[dict[str, Any]]:
        rows = []
        for begin, end in zip(begins, [*begins[1:], None], strict=True):
            chosen = (values_K >= begin) & (values_K < (end or np.inf))
            if chosen.any():
                rows.append(
                    {
                        "from": begin,
                        "to": end - 1 if end else None,
                        "num_sequences": len(np.unique(found.sequences_K[chosen])),
                        "num_targets": int(chosen.sum()),
                        "loss": interval(found.losses_K, chosen),
                        "recovery": interval(found.is_correct_K, chosen),
                        "context_free_loss": float(context_free_K[chosen].mean()),
                        "margin_context_free": interval(context_free_K - found.losses_K, chosen),
                    }
                )
        return rows

    return {
        "overall": overall,
        "by_residue": by_residue,
        "by_length": groups(lengths_K, LENGTHS),
        "by_cluster_size": groups(depths_K, DEPTHS),
    }


def paired_difference(first: Evaluation, second: Evaluation) -> dict[str, Any]:
    """Loss and recovery of the first less those of the second, on the same targets, with their intervals."""
    assert np.array_equal(first.labels_K, second.labels_K)
    assert np.array_equal(first.inputs_K, second.inputs_K)
    weights_RS = resamples(first.num_sequences)
    everything = np.ones(len(first.labels_K), dtype=bool)
    loss_K = first.losses_K - second.losses_K
    sums_S = np.bincount(first.sequences_K, loss_K, minlength=first.num_sequences)
    return {
        "loss": first.interval(loss_K, everything, weights_RS),
        "loss_masked": first.interval(loss_K, first.is_masked_K, weights_RS),
        "recovery": first.interval(first.is_correct_K.astype(float) - second.is_correct_K, everything, weights_RS),
        "share_of_proteins_better": float((sums_S < 0).mean()),
    }
