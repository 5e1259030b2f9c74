"""How well a model predicts held-out residues, beside what it would score without looking at any context.

A fifth of BERT's targets show a letter and half of those the true one, so a model that knows nothing but letter
frequencies already scores about 2.72 nats where their entropy is 2.90. Two baselines say what that amounts to on the
very targets at hand, each the best of its kind in hindsight: learning means being under both.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from hf_plm.config import Mask, UserError
from hf_plm.data.pack import MicroBatch
from hf_plm.proteins.vocabulary import MASK_ID, STANDARD_IDS, VOCABULARY_SIZE

# Dimensions: K targets, S sequences, V vocabulary.


@dataclass(frozen=True)
class Evaluation:
    """Every target of a held-out set: its loss in nats, true and visible token, and the sequence that it is in."""

    losses_K: np.ndarray
    is_correct_K: np.ndarray
    labels_K: np.ndarray
    inputs_K: np.ndarray
    sequences_K: np.ndarray
    num_sequences: int
    mask: Mask

    @property
    def is_masked_K(self) -> np.ndarray:
        return self.inputs_K == MASK_ID

    def context_free_losses_K(self) -> np.ndarray:
        """Loss of the best predictor that knows the visible token and the frequencies of these targets."""
        frequencies_V = np.bincount(self.labels_K, minlength=VOCABULARY_SIZE) / len(self.labels_K)
        kept = 1 - self.mask.mask - self.mask.random
        shown_VV = np.zeros((VOCABULARY_SIZE, VOCABULARY_SIZE))  # probability that true token v is shown as u
        shown_VV[:, STANDARD_IDS] = self.mask.random / len(STANDARD_IDS)
        shown_VV += kept * np.eye(VOCABULARY_SIZE)
        shown_VV[:, MASK_ID] = self.mask.mask
        joint_VV = frequencies_V[:, None] * shown_VV
        joint_K = joint_VV[self.labels_K, self.inputs_K]
        return -np.log(joint_K / joint_VV.sum(axis=0)[self.inputs_K])

    def unigram_losses_K(self) -> np.ndarray:
        """Loss of the letter frequencies of the masked targets; over masked targets its mean is their entropy."""
        frequencies_V = np.bincount(self.labels_K[self.is_masked_K], minlength=VOCABULARY_SIZE)
        with np.errstate(divide="ignore", invalid="ignore"):
            return -np.log(frequencies_V / frequencies_V.sum())[self.labels_K]

    def summary(self) -> dict[str, float]:
        """Means over all targets, or over the masked ones where the name says so; nats, or shares."""
        masked = self.is_masked_K
        loss = float(self.losses_K.mean())
        return {
            "validation_loss": loss,
            "context_free_loss": float(self.context_free_losses_K().mean()),
            "validation_loss_masked": float(self.losses_K[masked].mean()) if masked.any() else float("nan"),
            "unigram_entropy": float(self.unigram_losses_K()[masked].mean()) if masked.any() else float("nan"),
            "validation_perplexity": float(np.exp(loss)),
            "validation_recovery": float(self.is_correct_K.mean()),
        }

    def margins(self, weights_RS: np.ndarray | None = None) -> dict[str, list[float]]:
        """How far the losses lie under their baselines: mean and 95% bootstrap interval over sequences, in nats.

        `weights_RS` are those of `resamples`, where they are at hand.
        """
        weights_RS = resamples(self.num_sequences) if weights_RS is None else weights_RS
        masked = self.is_masked_K
        everything = np.ones_like(masked)
        return {
            "margin_context_free": self.interval(self.context_free_losses_K() - self.losses_K, everything, weights_RS),
            "margin_unigram_masked": self.interval(
                np.where(masked, self.unigram_losses_K(), 0) - self.losses_K, masked, weights_RS
            ),
        }

    def interval(self, values_K: np.ndarray, chosen_K: np.ndarray, weights_RS: np.ndarray) -> list[float]:
        """The mean of the chosen values and its 95% bootstrap interval over sequences.

        NaN where none is chosen; the interval is NaN where all are of one sequence, which says nothing of others.
        """
        if not chosen_K.any():
            return [float("nan")] * 3
        sequences_K = self.sequences_K[chosen_K]
        sums_S = np.bincount(sequences_K, values_K[chosen_K], minlength=self.num_sequences)
        counts_S = np.bincount(sequences_K, minlength=self.num_sequences)
        mean = float(sums_S.sum() / counts_S.sum())
        if np.count_nonzero(counts_S) < 2:
            return [mean, float("nan"), float("nan")]
        return [mean, *resampled_interval(sums_S, counts_S, weights_RS)]


def resamples(num_sequences: int, num_resamples: int = 1000, seed: int = 0) -> np.ndarray:
    """uint8 (R, S): how often each sequence is drawn in each of the resamples of a bootstrap."""
    draw = np.random.default_rng(seed)
    weights_RS = np.empty((num_resamples, num_sequences), dtype=np.uint8)
    for row_S in weights_RS:
        row_S[:] = np.bincount(draw.integers(num_sequences, size=num_sequences), minlength=num_sequences)
    return weights_RS


def resampled_interval(sums_S: np.ndarray, counts_S: np.ndarray, weights_RS: np.ndarray) -> list[float]:
    """The 95% interval of sum over count: both summed over the sequences of each resample."""
    both_S2 = np.stack([sums_S, counts_S], axis=1).astype(np.float64)
    # A few rows at a time as floats: all of them, for a million sequences, would be 8 GB.
    totals_R2 = np.concatenate([rows @ both_S2 for rows in np.array_split(weights_RS, max(1, len(weights_RS) // 50))])
    sums_R, counts_R = totals_R2[totals_R2[:, 1] > 0].T
    return [float(bound) for bound in np.quantile(sums_R / counts_R, [0.025, 0.975])]


# What a micro-batch contributes: losses_K, is_correct_K, labels_K, inputs_K, sequences_K.
Part = tuple[np.ndarray, ...]


@torch.no_grad()
def predict(
    module: torch.nn.Module, micro_batches: Iterable[tuple[MicroBatch, np.ndarray]], device: torch.device
) -> list[Part]:
    """Run `module`, a `PackedMaskedLM` as it is or as an engine wrapped it, over held-out micro-batches.

    `micro_batches` come from `hf_plm.data.loader.validation_micro_batches`: each with the window of each sequence.
    """
    was_training = module.training
    module.eval()
    parts: list[Part] = []
    for micro_batch, windows in micro_batches:
        losses, is_correct, sequences, input_ids, labels = (
            tensor.cpu().numpy() for tensor in module(*micro_batch.to(device).inputs(), per_target=True)
        )
        parts.append((losses.astype(np.float64), is_correct, labels, input_ids, windows[sequences]))
    module.train(was_training)
    return parts


def evaluation(parts: list[Part], num_sequences: int, mask: Mask) -> Evaluation:
    """What the parts say together; raises `UserError` where they hold no target."""
    if not any(len(part[0]) for part in parts):
        raise UserError("The held-out sequences have not one target; give more of them with --data.validation.")
    losses, is_correct, labels, inputs, sequences = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    return Evaluation(losses, is_correct, labels, inputs, sequences, num_sequences, mask)


def evaluate(
    module: torch.nn.Module,
    micro_batches: Iterable[tuple[MicroBatch, np.ndarray]],
    num_sequences: int,
    mask: Mask,
    device: torch.device,
) -> Evaluation:
    """`predict` and `evaluation`, on one process."""
    return evaluation(predict(module, micro_batches, device), num_sequences, mask)
