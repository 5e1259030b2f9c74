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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, AutoTokenizer, EsmForMaskedLM

from hf_plm.config import UserError
from hf_plm.judging.contacts.precision import RANGES, resolved_pairs, scored
from hf_plm.judging.contacts.predictor import LEAST_SEPARATION, ContactPredictor
from hf_plm.judging.contacts.structures import Structure
from hf_plm.models.card import CURVES
from hf_plm.models.families import Spelling
from hf_plm.models.hub import CARD, quiet_loading, save_hub_folder, without_checksums
from hf_plm.models.published import find_published
from hf_plm.progress import shown

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
    without a contact of resolved residues or seen before are not fitted on. Raises `UserError` where there are too few.
    """
    chosen: list[Structure] = []
    for one in _in_hash_order(structures, seed):
        is_far_P = one.pairs_P2[:, 1] - one.pairs_P2[:, 0] >= LEAST_SEPARATION
        is_useful = len(one.residues) <= limit and one.is_resolved_N[one.pairs_P2[is_far_P]].all(axis=1).any()
        if len(chosen) < num_fit and is_useful and not shared([one], chosen):
            chosen.append(one)
    if len(chosen) < num_fit:
        raise UserError(
            f"{num_fit} proteins to fit on were asked for, but there are {len(chosen)} different ones of at most "
            f"{limit:,} residues that have contacts of residues with coordinates; give more structures."
        )
    return chosen, [one for one in structures if not shared([one], chosen)]


def _in_hash_order(structures: Iterable[Structure], seed: int) -> list[Structure]:
    return sorted(structures, key=lambda one: hashlib.sha256(f"{seed} {one.sha256} {one.id}".encode()).digest())


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
    """The contact head for a model, from these structures; the model itself is left as it is.

    Raises `UserError` where all pairs are contacts, or none.
    """
    features, contacts = [], []
    for structure in shown("fitting contacts", structures, [len(one.residues) for one in structures]):
        pairs_P2 = resolved_pairs(structure)
        features.append(predictor.features(structure.residues, pairs_P2))
        contacts.append(structure.contacts_NN()[pairs_P2[:, 0], pairs_P2[:, 1]])
    is_contact_P = np.concatenate(contacts)
    if is_contact_P.all() or not is_contact_P.any():
        raise UserError(
            f"{'All' if len(is_contact_P) and is_contact_P.all() else 'None'} of the {len(is_contact_P):,} pairs of "
            f"residues with coordinates in {len(structures)} proteins touch, so there is nothing to fit; give others."
        )
    weights_C, bias = logistic_l1(np.concatenate(features), is_contact_P)
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


def read_quick(
    structures: Sequence[Structure], num_fit: int, num_test: int, seed: int, limit: int
) -> tuple[list[Structure], list[Structure]]:
    """For `quick_contacts`: short proteins to fit on, and at most `num_test` others, none of them on both sides.

    All can have a long-range contact. `limit`: residues that the model takes. Raises `UserError` where there are too
    few to fit on, or none is left.
    """
    short = [one for one in structures if len(one.residues) <= LONGEST_OF_QUICK and _is_long_enough(one)]
    fitted, others = split(short, num_fit, seed, limit)
    if not others:
        raise UserError(
            f"The {len(short)} structures of at most {LONGEST_OF_QUICK} residues are needed to fit contacts on, and "
            "none is left to judge them by; give more."
        )
    return fitted, _in_hash_order(others, seed)[:num_test]


def _is_long_enough(structure: Structure) -> bool:
    resolved = np.flatnonzero(structure.is_resolved_N)
    return len(resolved) > 0 and bool(resolved[-1] - resolved[0] >= RANGES["long"][0])


def quick_contacts(
    stock_model: EsmForMaskedLM, spelling: Spelling, fitted: list[Structure], tested: Sequence[Structure]
) -> dict[str, float]:
    """What a training may ask now and then: fit on a few short proteins, precision on others, long range.

    `contacts_long` is P@L, `contacts_long_chance` and `contacts_long_nearest` its baselines: means over proteins. The
    model stays as it is, its head too. `read_quick` makes the two sides.
    """
    predictor = ContactPredictor(stock_model, spelling, {"model": "the model"})
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
    stored.to(predictor.model.device).eval()  # another device rounds otherwise
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)(residues.decode(), return_tensors="pt")
    tokens = tokens.to(stored.device)
    found_NN = stored.predict_contacts(tokens["input_ids"], tokens["attention_mask"])[0].cpu().numpy()
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
