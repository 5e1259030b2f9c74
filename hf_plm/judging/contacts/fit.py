"""The contact head fitted on a few structures, and stored where `predict_contacts` of plain transformers finds it.

An L1-penalised logistic regression over the attention maps, on 20 proteins, C = 0.15, as in Rao et al. 2021 (the solver
and its arguments are told by their first author: facebookresearch/esm, issue 249). Many weights become
zero: few heads carry contacts, and 20 proteins suffice to find them. What a head was fitted on is in the model's card,
by checksums, so that a later evaluation leaves those proteins out.

Dimensions: C attention maps of all layers, P pairs.
"""

import hashlib
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, EsmForMaskedLM

from hf_plm.config import UserError
from hf_plm.judging.contacts.precision import resolved_pairs, scored
from hf_plm.judging.contacts.predictor import LEAST_SEPARATION, ContactPredictor, counted
from hf_plm.judging.contacts.structures import Structure
from hf_plm.models.card import CURVES
from hf_plm.models.families import Spelling
from hf_plm.models.hub import CARD, quiet_loading, save_hub_folder, without_checksums
from hf_plm.models.published import find_published

INVERSE_PENALTY = 0.15
NUM_PROTEINS = 20
STORED_TOLERANCE = 1e-5
LONGEST_OF_QUICK = 200
"""Residues: what grows with their square should take seconds in the middle of a training."""


@dataclass(frozen=True)
class Regression:
    """A fitted contact head, and the proteins that it has seen."""

    weights_C: np.ndarray
    bias: float
    structures: list[Structure]
    num_pairs: int

    @property
    def num_used(self) -> int:
        """Attention maps with a weight."""
        return int(np.count_nonzero(self.weights_C))


def split(
    structures: Sequence[Structure], num_fit: int, seed: int, limit: int
) -> tuple[list[Structure], list[Structure]]:
    """`num_fit` structures to fit on, and the others, without those that share a sequence or an id with one of them.

    Which they are depends on the seed and the sequences alone, not on their order. Proteins above `limit` residues,
    without a contact or seen before are not fitted on. Raises `UserError` where there are too few.
    """
    order = sorted(structures, key=lambda one: hashlib.sha256(f"{seed} {one.sha256} {one.id}".encode()).digest())
    chosen: list[Structure] = []
    for one in order:
        separations_P = one.pairs_P2[:, 1] - one.pairs_P2[:, 0]
        is_useful = len(one.residues) <= limit and (separations_P >= LEAST_SEPARATION).any()
        if len(chosen) < num_fit and is_useful and not shared([one], chosen):
            chosen.append(one)
    if len(chosen) < num_fit:
        raise UserError(
            f"{num_fit} proteins to fit on were asked for, but there are {len(chosen)} different ones of at most "
            f"{limit:,} residues that have contacts; give more structures, or a smaller --proteins."
        )
    return chosen, [one for one in structures if not shared([one], chosen)]


def shared(some: Sequence[Structure], others: Sequence[Structure]) -> list[Structure]:
    """Those of `some` that `others` have too, by id or by sequence."""
    sequences, ids = {one.residues for one in others}, {one.id for one in others}
    return [one for one in some if one.residues in sequences or one.id in ids]


def check_apart(fitted: Sequence[Structure], tested: Sequence[Structure]) -> None:
    """Raises `UserError` where a protein is on both sides."""
    if both := shared(tested, fitted):
        raise UserError(
            f"{len(both)} of the proteins to evaluate on are among those to fit on, the first {both[0].id}; no protein "
            "may be on both sides."
        )


def fit_regression(predictor: ContactPredictor, structures: list[Structure]) -> Regression:
    """The contact head for a model, from these structures; the model itself is left as it is."""
    features, contacts = [], []
    for structure in counted(structures, len(structures), "fitting contacts"):
        pairs_P2 = resolved_pairs(structure)
        features.append(predictor.features(structure.residues, pairs_P2))
        contacts.append(structure.contacts_NN()[pairs_P2[:, 0], pairs_P2[:, 1]])
    weights_C, bias = logistic_l1(np.concatenate(features), np.concatenate(contacts))
    return Regression(weights_C, bias, structures, sum(map(len, contacts)))


def logistic_l1(features_PC: np.ndarray, is_contact_P: np.ndarray) -> tuple[np.ndarray, float]:
    """Weights (C,) and bias of the regression."""
    import sklearn
    from sklearn.linear_model import LogisticRegression

    # From 1.8 on the share of L1 says it, and `penalty` warns; before, that share meant something else.
    is_older = tuple(map(int, sklearn.__version__.split(".")[:2])) < (1, 8)
    lasso = {"penalty": "l1"} if is_older else {"l1_ratio": 1.0}
    regression = LogisticRegression(C=INVERSE_PENALTY, solver="liblinear", random_state=0, **lasso)
    regression.fit(features_PC, is_contact_P)
    return regression.coef_[0], float(regression.intercept_[0])


def quick_contacts(
    stock_model: EsmForMaskedLM,
    spelling: Spelling,
    structures: Sequence[Structure],
    num_fit: int = 8,
    num_test: int = 16,
    seed: int = 0,
) -> dict[str, float]:
    """What a training may ask now and then: fit on a few short proteins, precision on others, long range.

    `contacts_long` is P@L, `contacts_long_chance` and `contacts_long_nearest` its baselines: means over proteins. The
    model stays as it is, its head too. Raises `UserError` where there are too few proteins.
    """
    predictor = ContactPredictor(stock_model, spelling, {"model": "the model"})
    short = [one for one in structures if 24 < len(one.residues) <= LONGEST_OF_QUICK]
    fitted, others = split(short, num_fit, seed, predictor.limit)
    tested, _ = split(others, num_test, seed, predictor.limit)
    regression = fit_regression(predictor, fitted)
    rows = []
    for structure in tested:
        pairs_P2 = resolved_pairs(structure)
        rows.append(
            scored(structure, pairs_P2, predictor.features(structure.residues, pairs_P2) @ regression.weights_C)
        )
    names = {"": "long P@L", "_chance": "long chance", "_nearest": "long nearest P@L"}
    return {f"contacts_long{end}": float(np.nanmean([row[name] for row in rows])) for end, name in names.items()}


def store(predictor: ContactPredictor, regression: Regression, name: str, out: Path) -> Path:
    """Writes `predictor`'s model, its head fitted, as a Hub folder, with the card of the model `name`.

    What was written is opened in plain transformers; raises `RuntimeError` where its contacts differ by over 1e-5.
    """
    predictor.set_head(regression.weights_C, regression.bias)
    card, extras = _card(name, regression)
    save_hub_folder(predictor.model, out, card, extras)
    try:
        _verify(predictor, regression.structures[0].residues[:300], out)
    except RuntimeError:
        shutil.rmtree(out)
        raise
    return out


@torch.no_grad()
def _verify(predictor: ContactPredictor, residues: bytes, folder: Path) -> None:
    with quiet_loading():
        stored = AutoModelForMaskedLM.from_pretrained(folder, attn_implementation="eager", local_files_only=True)
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(residues.decode(), return_tensors="pt")
    found_NN = stored.eval().predict_contacts(tokens["input_ids"], tokens["attention_mask"])[0].numpy()
    difference = float(np.abs(found_NN - predictor.probabilities(residues)).max())
    if not difference <= STORED_TOLERANCE:
        raise RuntimeError(f"{folder} was not written: its contacts in plain transformers are off by {difference:.1e}.")


_SECTION = re.compile(r"\n## Contacts\n(?:(?!\n## ).)*", re.DOTALL)
_UNFITTED = re.compile(r"^- The contact head is .*\n", re.MULTILINE)
_ROW = re.compile(r"^\| [^|\n]* \| `([0-9a-f]{16})` \|$", re.MULTILINE)


def card_of(name: str) -> str:
    """The text of a model's card, without its checksums, or ''."""
    card = find_published(name) / CARD
    return without_checksums(card.read_text(encoding="utf-8")) if card.is_file() else ""


def fitted_on(card: str) -> set[str]:
    """Which proteins (`Structure.sha256`) the contact head was fitted on, as far as a card says so."""
    section = _SECTION.search(card)
    return set(_ROW.findall(section[0])) if section else set()


def _card(name: str, regression: Regression) -> tuple[str, dict[str, Path]]:
    """The card of a model with what is new, and the picture that it shows."""
    text = card_of(name) or f"---\nlibrary_name: transformers\npipeline_tag: fill-mask\n---\n\n# {Path(name).name}\n"
    text = _UNFITTED.sub("", _SECTION.sub("", text)).rstrip("\n")
    kinds = sorted(
        {f"{one.atom} < {one.cutoff:g} A" + (f" ({one.set})" if one.set else "") for one in regression.structures}
    )
    rows = "".join(f"| {one.id.replace('|', '/')} | `{one.sha256}` |\n" for one in regression.structures)
    section = f"""

## Contacts

The contact head is a logistic regression over the attention maps, fitted on {len(regression.structures)} structures
({regression.num_pairs:,} pairs of residues at least {LEAST_SEPARATION} apart; {"; ".join(kinds)}); L1 penalty,
C = {INVERSE_PENALTY}, {regression.num_used} of {len(regression.weights_C)} maps used. Source: Rao et al. 2021,
*Transformer protein language models are unsupervised structure learners*. `predict_contacts` needs
`attn_implementation="eager"`. It was fitted on these and is not to be judged by them:

| protein | sha256 of its residues, first 16 |
|---|---|
{rows}"""
    curves = find_published(name) / CURVES
    return text + section, {CURVES: curves} if curves.is_file() else {}
