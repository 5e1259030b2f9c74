"""How each kind of published protein encoder wants its proteins written, and the look-up that writes them so.

The authors of one model give its tokenizer plain letters, those of another letters with spaces between, or a list of
them, or a word in front; some write rare residues as X. A `Family` is one such way, with the place where its authors
show it. What comes of it is always the same: a few fixed tokens, one per residue, a few fixed tokens. That is a
`Spelling`. It is found by trying the model's own tokenizer, and proven on every pair of letters, in ten milliseconds or
so. From then on a protein is encoded by one look-up: 50 million residues a second on one core for proteins of 300,
where transformers' tokenizers do 0.3 (EsmTokenizer) to 2.4 million (EsmcTokenizer).

Which family a model is of is told by its `model_type` and its vocabulary, never by the name of its repository.

Nothing here imports torch or transformers: an exported model keeps its spelling as JSON and is used without them.
Dimensions: N residues.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from hf_plm.config import UserError
from hf_plm.proteins.vocabulary import RARE_RESIDUES, RESIDUES, STANDARD_RESIDUES

LONGEST = 4096
"""Residues of the longest protein that any model is given. Ours: attention takes time and memory that grow with the
square of the length, and T5's relative positions set no bound of their own."""


@dataclass(frozen=True)
class Family:
    """One way of writing proteins, as the authors of the models show it."""

    name: str
    model_types: tuple[str, ...]
    is_in: Callable[[Mapping[str, int]], bool]
    """Whether a tokenizer with this vocabulary is of the family, for a model of one of its types."""
    spell: Callable[[str], str | list[str]]
    """What the tokenizer is given for residues (letters of `vocabulary.RESIDUES`, upper case)."""
    source: str
    has_cls: bool = False
    """Whether the first token is one that stands for the whole protein."""
    is_encoder_decoder: bool = False
    """Whether AutoModel opens a decoder too, which nothing here wants; T5EncoderModel opens the encoder alone."""
    has_bare_pieces: bool = False
    """Whether the pieces of its SentencePiece vocabulary are letters without U+2581, the mark that begins a word."""

    @property
    def is_split_into_words(self) -> bool:
        """The tokenizer's argument of that name: whether `spell` gives a list."""
        return isinstance(self.spell("A"), list)


def _has(token: str) -> Callable[[Mapping[str, int]], bool]:
    return lambda vocabulary: token in vocabulary


def _is_of_letters(vocabulary: Mapping[str, int]) -> bool:
    """Every token is a letter or a special token in brackets, as in no vocabulary of a natural language."""
    return "A" in vocabulary and all(len(token) == 1 or token.startswith("[") for token in vocabulary)


_RARE_TO_X = str.maketrans(RARE_RESIDUES, "X" * len(RARE_RESIDUES))
_WORD_MARK = "\u2581"
_T5 = ("t5", "mt5", "umt5")


def _plain(residues: str) -> str:
    return residues


def _spaced(residues: str) -> str:
    return " ".join(residues)


def _spaced_without_rare(residues: str) -> str:
    return " ".join(residues.translate(_RARE_TO_X))


FAMILIES = (
    # Our own models too. fair-esm keeps tokens 1 to N for the residues, and <cls> where it is asked for.
    Family(
        "ESM-2",
        ("esm",),
        _has("A"),
        _plain,
        source="facebookresearch/esm, scripts/extract.py and esm/data.py (BatchConverter)",
        has_cls=True,
    ),
    Family(
        "ESM C",
        ("esmc",),
        _has("A"),
        _plain,
        source="transformers, models/esmc/modeling_esmc.py (EsmcModel.forward) and tokenization_esmc.py",
        has_cls=True,
    ),
    # <AA2fold> says that amino acids come; the 3Di letters of structures, in the same vocabulary, are lower case.
    Family(
        "ProstT5",
        _T5,
        _has("<AA2fold>"),
        lambda residues: f"<AA2fold> {_spaced_without_rare(residues)}",
        source="mheinzinger/ProstT5, README.md (Quick Start): tokens 1 to N are the residues",
        is_encoder_decoder=True,
    ),
    # The model card says that [S2S] may be tried for embeddings too; the authors' own code takes [NLU].
    Family(
        "Ankh3",
        _T5,
        _has("[NLU]"),
        lambda residues: f"[NLU]{residues}",
        source="ElnaggarLab/ankh3-large, README.md; agemagician/Ankh, src/ankh/likelihood.py: one token comes before",
        is_encoder_decoder=True,
        has_bare_pieces=True,
    ),
    Family(
        "ProtT5",
        _T5,
        _has(f"{_WORD_MARK}A"),
        _spaced_without_rare,
        source="agemagician/ProtTrans, README.md (Quick Start): the last token is dropped",
        is_encoder_decoder=True,
    ),
    Family(
        "Ankh",
        _T5,
        _has("A"),
        list,
        source="agemagician/Ankh, README.md (Usage) and src/ankh/extract.py: the last token is dropped",
        is_encoder_decoder=True,
        has_bare_pieces=True,
    ),
    Family(
        "ProtBert",
        ("bert",),
        _is_of_letters,
        _spaced_without_rare,
        source="agemagician/ProtTrans, Embedding/PyTorch/Advanced/ProtBert.ipynb: [CLS] and [SEP] are dropped",
        has_cls=True,
    ),
)
"""The families by name, those that are told by a token of their own before those that are not."""

_OTHERS = (
    Family("letters", (), _has("A"), _plain, source="ours"),
    Family("spaced letters", (), _has("A"), _spaced, source="ours"),
)


@dataclass(frozen=True)
class Spelling:
    """The token ids of any protein: some before it, one for each residue, some after it."""

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    ids: tuple[int, ...]
    """Of the letters of `vocabulary.RESIDUES`, in their order."""
    pad_id: int

    @property
    def num_special(self) -> int:
        return len(self.prefix) + len(self.suffix)

    @cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        table = np.full(256, -1, dtype=np.int64)
        table[list(RESIDUES.encode())] = self.ids
        return np.array(self.prefix, dtype=np.int64), table, np.array(self.suffix, dtype=np.int64)

    def encode(self, residues: bytes) -> np.ndarray:
        """Token ids, int64 (len(prefix) + N + len(suffix),), of N residues as `fasta.clean` leaves them.

        The residues' own are those from len(prefix) on, N of them.
        """
        prefix, table, suffix = self._arrays
        ids_N = table[np.frombuffer(residues, dtype=np.uint8)]
        assert ids_N.min(initial=0) >= 0, "only letters of vocabulary.RESIDUES have ids"
        return np.concatenate((prefix, ids_N, suffix))

    def as_json(self) -> dict[str, Any]:
        residues = dict(zip(RESIDUES, self.ids, strict=True))
        return {"prefix": list(self.prefix), "residues": residues, "suffix": list(self.suffix), "pad": self.pad_id}

    @classmethod
    def from_json(cls, plain: Any) -> "Spelling":
        """Raises `UserError` for anything but what `as_json` gives."""
        try:
            ids = tuple(int(plain["residues"][letter]) for letter in RESIDUES)
            return cls(tuple(map(int, plain["prefix"])), tuple(map(int, plain["suffix"])), ids, int(plain["pad"]))
        except (KeyError, TypeError, ValueError):
            raise UserError(
                "A spelling was expected, with prefix, residues (an id for each letter), suffix and pad, "
                f"not {str(plain)[:80]}."
            ) from None


def family_of(config: Any, tokenizer: Any) -> Family:
    """The family of a model with this configuration and tokenizer.

    A model of none of them may be given plain letters, or else letters with spaces, whichever its tokenizer turns into
    one token per residue; raises `UserError` where neither does.
    """
    vocabulary = tokenizer.get_vocab()
    for family in FAMILIES:
        if config.model_type in family.model_types and family.is_in(vocabulary):
            return family
    for family in _OTHERS:
        try:
            spelling = spelling_of(family, tokenizer)
        except UserError:
            continue
        return replace(
            family,
            has_cls=bool(spelling.prefix) and spelling.prefix[0] == getattr(tokenizer, "cls_token_id", None),
            is_encoder_decoder=config.model_type in _T5 or bool(getattr(config, "is_encoder_decoder", False)),
        )
    raise UserError(
        f"A protein encoder was expected, with one token per residue, but the tokenizer of this {config.model_type} "
        f"model makes {_as_tokens(tokenizer, tokenizer(_EXAMPLE)['input_ids'])} of {_EXAMPLE!r}."
    )


def spelling_of(family: Family, tokenizer: Any) -> Spelling:
    """What the family's way of writing and the tokenizer make of proteins, proven on every pair of letters and more.

    A rare residue that the tokenizer lacks is its `<unk>`, one for each: some tokenizers make one of a whole run, after
    which no token would be at its residue's place. Raises `UserError` where it is not one token per residue.
    """
    tokens_of = _reader(family, tokenizer)
    first, second = tokens_of("A"), tokens_of("L")
    different = [place for place, pair in enumerate(zip(first, second, strict=False)) if pair[0] != pair[1]]
    if len(first) != len(second) or len(different) != 1:
        raise _not_one_each(family, tokenizer, _EXAMPLE, tokens_of(_EXAMPLE))
    place = different[0]
    prefix, suffix = first[:place], first[place + 1 :]
    ids = []
    for letter in RESIDUES:
        tokens = tokens_of(letter)
        if len(tokens) != len(first) or [*prefix, tokens[place], *suffix] != tokens:
            raise _not_one_each(family, tokenizer, letter, tokens)
        if letter in STANDARD_RESIDUES and tokens[place] == tokenizer.unk_token_id:
            raise UserError(
                f"A token for every residue was expected, but the tokenizer ({family.name}) has no {letter}."
            )
        ids.append(tokens[place])
    # Padding is masked, so where the tokenizer names none any id will do.
    pad_id = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    spelling = Spelling(tuple(prefix), tuple(suffix), tuple(ids), pad_id)

    lacking = {letter for letter, index in zip(RESIDUES, ids, strict=True) if index == tokenizer.unk_token_id}
    for trial in _trials(tokenizer.get_vocab()):
        residues = _without_runs(trial, lacking)
        tokens = tokens_of(residues)
        if tokens != spelling.encode(residues.encode()).tolist():
            raise _not_one_each(family, tokenizer, residues, tokens)
    return spelling


def longest(config: Any, spelling: Spelling) -> int:
    """Residues of the longest protein for a model: its positions less the special tokens, and at most `LONGEST`.

    That is 1,022 for ESM-2, whose 1,026 positions begin after the padding index (fair-esm, scripts/extract.py, cuts at
    1,022 too), 2,046 for ESM C, and `LONGEST` for T5 and for ProtBert, whose configuration has 40,000.
    """
    positions = getattr(config, "max_position_embeddings", None)
    if not positions:
        return LONGEST
    if config.model_type in ("esm", "roberta", "xlm-roberta", "camembert"):
        positions -= config.pad_token_id + 1
    return min(LONGEST, positions - spelling.num_special)


_EXAMPLE = "MKTAYIAKQRQISFVK"


def _reader(family: Family, tokenizer: Any) -> Callable[[str], list[int]]:
    """The authors' steps: from residues to token ids.

    Since transformers 5, T5Tokenizer begins each word with the word mark, whatever its tokenizer.json says. In a
    vocabulary of bare letters that mark is a token too many, an `<unk>`: one before a protein, or one before each
    residue of a list. The authors' examples gave none (transformers 4), so it is switched off, in a copy.
    """
    if not (family.has_bare_pieces and hasattr(tokenizer, "backend_tokenizer")):
        return lambda residues: tokenizer(
            family.spell(residues), is_split_into_words=family.is_split_into_words, add_special_tokens=True
        )["input_ids"]
    from tokenizers import Tokenizer
    from tokenizers.pre_tokenizers import Metaspace

    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.pre_tokenizer = Metaspace(replacement=_WORD_MARK, prepend_scheme="never")
    backend.no_truncation()
    backend.no_padding()
    return lambda residues: backend.encode(family.spell(residues), is_pretokenized=family.is_split_into_words).ids


def _trials(vocabulary: Mapping[str, int]) -> Iterator[str]:
    """Sequences that show a tokenizer that joins letters: each pair of them, runs, chance, and its longer tokens."""
    for first in RESIDUES:
        yield "".join(first + second for second in RESIDUES)
    yield "".join(letter * 3 for letter in RESIDUES)
    draw = random.Random(0)
    for length in (1, 2, 37, 120, 250):
        yield "".join(draw.choices(RESIDUES, k=length))
    for token in vocabulary:
        letters = token.strip(f"{_WORD_MARK}\u0120#")
        if len(letters) > 1 and set(letters) <= set(RESIDUES):
            yield letters


def _without_runs(residues: str, lacking: set[str]) -> str:
    """The residues, but of neighbours that the tokenizer lacks only the first."""
    before = " " + residues
    return "".join(letter for letter, last in zip(residues, before, strict=False) if not {letter, last} <= lacking)


def _not_one_each(family: Family, tokenizer: Any, residues: str, tokens: list[int]) -> UserError:
    return UserError(
        f"One token per residue was expected of the tokenizer ({family.name}), which makes "
        f"{_as_tokens(tokenizer, tokens)} of {residues[:20]!r}{'...' if len(residues) > 20 else ''}."
    )


def _as_tokens(tokenizer: Any, tokens: list[int]) -> str:
    names = " ".join(map(str, tokenizer.convert_ids_to_tokens(tokens[:8])))
    return f"{len(tokens)} tokens ({names}{' ...' if len(tokens) > 8 else ''})"
