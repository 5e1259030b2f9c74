"""Which window of a sequence a model sees.

The window is drawn over `<cls>` + residues + `<eos>`, every start equally likely, so that both ends are reachable and a
crop that does not begin at the N-terminus has no `<cls>`: the absence tells the model that it sees a fragment.
"""

import numpy as np

from hf_plm.data.order import mix, uniform_below

NUM_SPECIALS = 2  # <cls> and <eos>


def crop_windows(num_residues_B: np.ndarray, crop: int, *keys: int | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First token and number of tokens, int64 (B,) each, of one window per sequence.

    Token 0 is `<cls>`, tokens 1 to N the residues, token N + 1 `<eos>`. A sequence that fits is whole. `keys` are
    what the draw depends on: (seed, purpose, epoch, index_B).
    """
    num_tokens_B = num_residues_B.astype(np.int64) + NUM_SPECIALS
    num_windows_B = np.maximum(num_tokens_B - crop, 0) + 1
    starts_B = uniform_below(mix(*keys), num_windows_B)
    return np.broadcast_to(starts_B, num_tokens_B.shape), np.minimum(num_tokens_B, crop)
