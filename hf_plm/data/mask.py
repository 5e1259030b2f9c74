"""Which residues become targets, and what the model sees in their place.

BERT's corruption: 15% of residues are targets; of these 80% show `<mask>`, 10% one of the 20 standard residues, 10%
stay. Whether a residue is a target is decided for each on its own. Only raw bits are taken from NumPy, whose
distributions may change between versions; what the bits mean is fixed here and held by golden values in the tests.
"""

import numpy as np

from hf_plm.config import Mask
from hf_plm.data.order import TRAINING_CORRUPTION, VALIDATION_CORRUPTION, mix, uniform_below
from hf_plm.proteins.vocabulary import IGNORED_LABEL, MASK_ID, MAY_BE_TARGET, STANDARD_IDS

# Dimensions: T tokens of a micro-batch, M places in it that are targets.


def training_bits(seed: int, step: int, micro_batch: int, num_tokens: int) -> np.ndarray:
    """Random bits, uint64 (2, T), of one micro-batch: one Philox stream per (seed, step, micro-batch)."""
    philox = np.random.Philox(key=[seed, TRAINING_CORRUPTION], counter=[0, 0, micro_batch, step])
    return philox.random_raw(2 * num_tokens).reshape(2, num_tokens)


def validation_bits(seed: int, sequence_key_T: np.ndarray, position_T: np.ndarray) -> np.ndarray:
    """Random bits, uint64 (2, T), that depend on the sequence and the position in it alone, and so not on packing."""
    return np.stack([mix(seed, VALIDATION_CORRUPTION, sequence_key_T, position_T, draw) for draw in (0, 1)])


def mask_tokens(token_ids_T: np.ndarray, bits_2T: np.ndarray, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """Corrupted input ids and labels, int64 (T,) each; labels are -100 where there is no target.

    Only the 20 standard residues and B, U, Z, O may be targets: never a special token, padding, a gap or `X`.
    """

    def threshold(share: float) -> np.uint64:
        return np.uint64(round(share * 2**32))

    # One place in seven is a target, so all that only targets need is computed for these alone.
    drawn_places = np.flatnonzero((bits_2T[0] >> np.uint64(32)) < threshold(mask.rate))
    places_M = drawn_places[MAY_BE_TARGET[token_ids_T[drawn_places]]]
    bits_M = bits_2T[1, places_M]
    action_M = bits_M & np.uint64(0xFFFFFFFF)  # the upper half draws the letter
    letters_M = STANDARD_IDS[uniform_below(bits_M, len(STANDARD_IDS))]

    input_ids_T = token_ids_T.astype(np.int64)
    labels_T = np.full(len(input_ids_T), IGNORED_LABEL, dtype=np.int64)
    true_M = input_ids_T[places_M]
    labels_T[places_M] = true_M
    shown_M = np.where(action_M < threshold(mask.mask + mask.random), letters_M, true_M)
    input_ids_T[places_M] = np.where(action_M < threshold(mask.mask), MASK_ID, shown_M)
    return input_ids_T, labels_T
