"""The 33 tokens of ESM-2, their ids, and the look-up table that encodes bytes.

One residue is one token, so encoding is one look-up in a table of 256 bytes. `bytes.translate` does that for over a
billion residues per second on one core, hundreds of times faster than a tokenizer that splits text. Ids: fair-esm,
`Alphabet.from_architecture("ESM-1b")`.
"""

import numpy as np

_LETTERS = "L A G V S E R T I D P K Q N F Y M H W C X B U Z O . -"
TOKENS = ("<cls>", "<pad>", "<eos>", "<unk>", *_LETTERS.split(), "<null_1>", "<mask>")
TOKEN_TO_ID = {token: index for index, token in enumerate(TOKENS)}
VOCABULARY_SIZE = len(TOKENS)

CLS_ID, PAD_ID, EOS_ID, UNK_ID = 0, 1, 2, 3
MASK_ID = TOKEN_TO_ID["<mask>"]
IGNORED_LABEL = -100  # torch.nn.functional.cross_entropy's ignore_index

STANDARD_RESIDUES = "LAGVSERTIDPKQNFYMHWC"
RARE_RESIDUES = "BUZO"
RESIDUES = STANDARD_RESIDUES + "X" + RARE_RESIDUES
"""Letters that a cleaned sequence is made of."""

STANDARD_IDS = np.array([TOKEN_TO_ID[letter] for letter in STANDARD_RESIDUES], dtype=np.uint8)


def _byte_table() -> bytes:
    table = bytearray([UNK_ID] * 256)
    for letter in RESIDUES + ".-":
        table[ord(letter)] = TOKEN_TO_ID[letter]
    return bytes(table)


BYTE_TO_ID = _byte_table()
"""256 bytes: token id of each byte, `<unk>` for every byte that is not an upper-case letter of the vocabulary."""

MAY_BE_TARGET = np.array([token in STANDARD_RESIDUES + RARE_RESIDUES for token in TOKENS])
"""bool (33,): tokens that may be a target: residues, but never `X`, gaps or special tokens."""


def encode(residues: bytes | np.ndarray) -> np.ndarray:
    """Token ids, uint8 (N,), of N residues given as ASCII: bytes or uint8 (N,). Read-only; no special tokens added."""
    if isinstance(residues, np.ndarray):
        assert residues.dtype == np.uint8
        residues = residues.tobytes()
    return np.frombuffer(residues.translate(BYTE_TO_ID), dtype=np.uint8)
