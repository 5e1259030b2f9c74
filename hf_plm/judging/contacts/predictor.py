"""Which residues of a protein touch, read off the attention of a masked language model.

ESM's contact head: every attention map of every layer is made symmetric and corrected for what rows and columns explain
(average product correction), and a logistic regression adds them up (Rao et al. 2021; fair-esm 2.0.0, esm/modules.py,
`ContactPredictionHead`). `predict_contacts` of transformers keeps all maps at once and copies them: for 1,020 residues
and 8M parameters it takes 2.5 GB, and the more the more layers there are. Here each layer's are added up and dropped,
which takes 0.2 GB, and a quarter of the time. All is fp32: the correction takes nearly equal numbers from each other.

Dimensions: N residues, H heads of a layer, C attention maps of all layers, P pairs.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import EsmForMaskedLM

from hf_plm.config import UserError
from hf_plm.models.families import Spelling, longest
from hf_plm.models.locate import locate, revision
from hf_plm.models.stock import open_stock_masked_lm, pick_device

LEAST_SEPARATION = 6
"""Of two residues along the chain; nearer ones touch anyway. Source: Rao et al. 2021."""
LONGEST = 5000
"""Residues: what grows with their square takes some 1.5 GB then, where contacts are judged."""


class ContactPredictor:
    """A model with a contact head, ready. `facts` say which it is: model, family, revision, precision.

    The model's attention is computed as plain products for each protein, and is left as it was.
    """

    def __init__(
        self, model: EsmForMaskedLM, spelling: Spelling, facts: dict[str, str], device: torch.device | None = None
    ):
        self.model, self.spelling = model, spelling
        self.facts = {**facts, "precision": "fp32"}
        self.limit = longest(model.config, spelling)
        self.num_maps = model.config.num_hidden_layers * model.config.num_attention_heads
        if device is not None:
            model.to(device)

    @property
    def is_fitted(self) -> bool:
        """Whether the head was ever fitted: it begins with a bias of zero, and nothing else trains it."""
        return bool(self.model.esm.contact_head.regression.bias.detach().item() != 0)

    def require_fitted(self) -> None:
        """Raises `UserError` where the contact head is as it began."""
        if not self.is_fitted:
            name = self.facts["model"]
            raise UserError(
                f"The contact head of {name} was never fitted, so that its contacts mean nothing: "
                f"hf-plm contacts {name} --fit STRUCTURES --out FOLDER writes the model with one that is."
            )

    def set_head(self, weights_C: np.ndarray, bias: float) -> None:
        """Puts a regression into the model."""
        regression = self.model.esm.contact_head.regression
        with torch.no_grad():
            regression.weight.copy_(torch.as_tensor(weights_C, dtype=torch.float32)[None])
            regression.bias.fill_(bias)

    def probabilities(self, residues: bytes) -> np.ndarray:
        """fp32 (N, N), symmetric to rounding: of contact, as `predict_contacts` gives them.

        A protein above the model's limit is taken in windows of the limit that overlap by half or more. Pairs that
        several windows see get their mean; pairs that none sees are NaN. Raises `UserError` above `LONGEST`.
        """
        length = len(residues)
        check_lengths([(f"The protein that begins {residues[:20].decode()}", length)])
        if length <= self.limit:
            return self._window(residues)
        sums_NN = np.zeros((length, length), dtype=np.float32)
        counts_NN = np.zeros((length, length), dtype=np.uint8)
        for begin, end in windows(length, self.limit):
            sums_NN[begin:end, begin:end] += self._window(residues[begin:end])
            counts_NN[begin:end, begin:end] += 1
        with np.errstate(invalid="ignore"):
            return sums_NN / counts_NN

    def _window(self, residues: bytes) -> np.ndarray:
        regression = self.model.esm.contact_head.regression
        weights_LH = regression.weight.detach().float().view(self.model.config.num_hidden_layers, -1)
        halves_NN: Any = 0.0

        def add(layer: int, maps_HNN: torch.Tensor) -> None:
            nonlocal halves_NN
            # What APC takes off is a product for each head, so that it too is added up without a map of its own.
            sums_HN, totals_H = _marginals(maps_HNN)
            weights_H = weights_LH[layer]
            expected_NN = (sums_HN * (weights_H / totals_H)[:, None]).T @ sums_HN
            halves_NN = halves_NN + torch.tensordot(weights_H, maps_HNN, 1) - expected_NN / 2

        self._attend(residues, add)
        return self._checked(torch.sigmoid(halves_NN + halves_NN.T + regression.bias.detach()), residues)

    def features(self, residues: bytes, pairs_P2: np.ndarray) -> np.ndarray:
        """fp32 (P, C): what the regression adds up for each pair, of a protein within the limit."""
        first_P, second_P = torch.from_numpy(pairs_P2).to(self.model.device).T
        pieces: list[torch.Tensor] = []

        def add(layer: int, maps_HNN: torch.Tensor) -> None:
            sums_HN, totals_H = _marginals(maps_HNN)
            both_HP = maps_HNN[:, first_P, second_P] + maps_HNN[:, second_P, first_P]
            pieces.append((both_HP - sums_HN[:, first_P] * sums_HN[:, second_P] / totals_H[:, None]).T.cpu())

        self._attend(residues, add)
        return self._checked(torch.cat(pieces, 1), residues)

    @torch.no_grad()
    def _attend(self, residues: bytes, add: Callable[[int, torch.Tensor], None]) -> None:
        """Calls `add` with each layer's attention between residues, without that of special tokens."""
        assert len(residues) <= self.limit
        ids = torch.from_numpy(self.spelling.encode(residues))[None].to(self.model.device)
        kept = slice(len(self.spelling.prefix), len(self.spelling.prefix) + len(residues))
        try:
            with _listening(self.model, lambda layer, maps_HLL: add(layer, maps_HLL[:, kept, kept].float())):
                self.model.esm(input_ids=ids)
        except torch.OutOfMemoryError:
            raise UserError(
                f"The memory of {self.model.device} does not suffice for the attention of {len(residues):,} residues; "
                "--device cpu takes longer and has more."
            ) from None

    def _checked(self, numbers: torch.Tensor, residues: bytes) -> np.ndarray:
        if not numbers.isfinite().all():
            raise UserError(
                f"{self.facts['model']} gives contacts that are no numbers, for a protein that begins "
                f"{residues[:20].decode()}."
            )
        return numbers.cpu().numpy()


def open_contact_predictor(name: str, device: str = "auto") -> ContactPredictor:
    """The model of a folder, a finished run or a repository on the Hub, in fp32.

    Raises `UserError` for what cannot be opened, and for a model without a contact head: all but ESM-2 and ESM-1b.
    """
    folder = locate(name)
    model, spelling, facts, _ = open_stock_masked_lm(folder, name)
    if not isinstance(model, EsmForMaskedLM):
        raise UserError(
            f"{name} is a {type(model).__name__} ({facts['family']}), which has no contact head; ESM-2, ESM-1b "
            "and what hf-plm pretrains have one."
        )
    return ContactPredictor(model.eval(), spelling, {**facts, "revision": revision(folder)}, pick_device(device))


def check_lengths(lengths: Iterable[tuple[str, int]]) -> None:
    """Raises `UserError` where one of the named proteins is too long for a map of all its pairs."""
    long = [(name, length) for name, length in lengths if length > LONGEST]
    if long:
        others = f" (and {len(long) - 1:,} more are too long)" if len(long) > 1 else ""
        raise UserError(
            f"{long[0][0]} has {long[0][1]:,} residues{others}; contacts are predicted of at most {LONGEST:,}, since "
            "memory grows with their square: take such proteins out, or cut them into domains."
        )


def windows(length: int, limit: int) -> list[tuple[int, int]]:
    """Begins and ends of windows of `limit` residues that overlap by half, the last one by more."""
    step = max(1, limit // 2)
    begins = [*range(0, max(1, length - limit), step), max(0, length - limit)]
    return [(begin, min(begin + limit, length)) for begin in dict.fromkeys(begins)]


def far_pairs(length: int) -> np.ndarray:
    """int64 (P, 2): the pairs i < j of `LEAST_SEPARATION` and more, 0-based."""
    return np.stack(np.triu_indices(length, LEAST_SEPARATION), axis=1)


def _marginals(maps_HNN: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the rows of A + A^T (H, N), and of all of it (H,)."""
    sums_HN = maps_HNN.sum(1) + maps_HNN.sum(2)
    return sums_HN, sums_HN.sum(1)


@contextmanager
def _listening(model: EsmForMaskedLM, hear: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """While it lasts, each layer hands its attention maps (H, L, L) of a single row over, and keeps none."""

    def listener(layer: int) -> Callable[..., None]:
        return lambda module, inputs, outputs: hear(layer, outputs[1][0])

    before, was_training = model.config._attn_implementation, model.training
    model.eval()
    model.set_attn_implementation("eager")  # the others give no maps
    handles = [
        layer.attention.self.register_forward_hook(listener(index))
        for index, layer in enumerate(model.esm.encoder.layer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.set_attn_implementation(before)
        model.train(was_training)
