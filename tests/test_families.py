"""Each family against its authors' steps, written out here as they show them, on tokenizers made on the spot.

The vocabularies have the published ids. Of Ankh and Ankh3 that is known of the standard residues only.
"""

import json
import subprocess
import sys
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from support.encoders import (
    KINDS,
    PROTBERT_TOKENS,
    PROTT5_LETTERS,
    RARE,
    SELENOPROTEIN,
    UBIQUITIN,
    ankh3_pieces,
    ankh_pieces,
    as_ankh3_does,
    as_ankh_does,
    as_prostt5_does,
    as_prott5_does,
    esm2,
    prostt5,
    protbert,
    scored,
    unigram,
)
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Split, WhitespaceSplit
from transformers import EsmTokenizer, PreTrainedTokenizerFast, T5Tokenizer

from hf_plm.config import UserError
from hf_plm.models.families import FAMILIES, LONGEST, Spelling, family_of, longest, spelling_of
from hf_plm.proteins.vocabulary import RESIDUES, STANDARD_RESIDUES, TOKENS, encode


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("esm2") / "vocab.txt"
    path.write_text("\n".join(TOKENS))
    return path


each_kind = pytest.mark.parametrize("kind", KINDS)
sequences = st.text(alphabet=RESIDUES, min_size=1, max_size=80)


def config(model_type, **values):
    return SimpleNamespace(model_type=model_type, **{"is_encoder_decoder": model_type == "t5", **values})


@cache
def opened(kind):
    model_type, make, authors_steps = KINDS[kind]
    tokenizer = make()
    family = family_of(config(model_type), tokenizer)
    return tokenizer, family, spelling_of(family, tokenizer), authors_steps


@each_kind
@given(sequence=sequences)
@example(sequence=UBIQUITIN)
@example(sequence=SELENOPROTEIN)
@example(sequence=RARE)
def test_a_protein_is_written_as_its_authors_write_it(kind, sequence):
    tokenizer, _, spelling, authors_steps = opened(kind)
    expected, kept = authors_steps(tokenizer, sequence)
    ids = spelling.encode(sequence.encode())
    assert ids.dtype == np.int64
    assert ids.tolist() == expected
    first = len(spelling.prefix)
    assert ids[first : first + len(sequence)].tolist() == expected[kept]


@each_kind
@pytest.mark.parametrize("sequence", [UBIQUITIN, SELENOPROTEIN, RARE])
def test_a_protein_is_written_twin(kind, sequence):
    """Another protein, or the steps of another family, give other tokens."""
    tokenizer, _, spelling, authors_steps = opened(kind)
    ids = spelling.encode(sequence.encode()).tolist()
    assert authors_steps(tokenizer, sequence[1:] + sequence[0])[0] != ids
    other_steps = as_prott5_does if kind == "ProstT5" else as_prostt5_does
    assert other_steps(tokenizer, sequence)[0] != ids


@each_kind
def test_each_family_is_recognised_and_says_what_it_is(kind):
    tokenizer, family, spelling, _ = opened(kind)
    assert family.name == kind
    assert family.source
    assert family.is_encoder_decoder == (KINDS[kind][0] == "t5")
    assert family.is_split_into_words == (kind == "Ankh")
    assert family.has_cls == (kind in ("ESM-2", "ESM C", "ProtBert"))
    assert not family.has_cls or spelling.prefix == (tokenizer.cls_token_id,)
    assert spelling.pad_id == tokenizer.pad_token_id
    assert (
        tokenizer.convert_ids_to_tokens(spelling.prefix)
        == {
            "ESM-2": ["<cls>"],
            "ESM C": ["<cls>"],
            "ProtT5": [],
            "ProstT5": ["<AA2fold>"],
            "Ankh": [],
            "Ankh3": ["[NLU]"],
            "ProtBert": ["[CLS]"],
        }[kind]
    )
    assert {family.name for family in FAMILIES} == set(KINDS)


PUBLISHED = {
    # Rostlab/prot_bert, vocab.txt; transformers 5.23, models/esmc/tokenization_esmc.py; ProstT5's are ProtT5's.
    "ProtBert": [21, 16, 6, 7, 19, 13, 18, 8, 23, 12, 6, 19],
    "ESM C": [20, 14, 5, 6, 18, 10, 16, 7, 23, 15, 5, 18],
    "ProtT5": [19, 13, 3, 5, 15, 8, 16, 6, 22, 14, 3, 15],
    # What transformers 4.25 made of it with the files of ankh-base and ankh3-large: Synthyra/FastPLMs, tests/goldens.
    "Ankh": [19, 13, 3, 5, 15, 8, 16, 6, 22, 14, 3, 15],
    "Ankh3": [24, 17, 8, 9, 20, 13, 21, 11, 25, 18, 8, 20],
}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_the_ids_are_the_published_ones(kind):
    spelling = opened(kind)[2]
    assert spelling.encode(b"MPAGFRQVCKAF")[len(spelling.prefix) : -1].tolist() == PUBLISHED[kind]


def test_recognition_is_by_type_and_vocabulary():
    """The twin: what tells one family from another is taken away, and it is the other."""
    without_prompt = [piece for piece in ankh3_pieces() if piece != "[NLU]"]
    assert family_of(config("t5"), unigram(without_prompt)).name == "Ankh"
    assert family_of(config("mt5"), prostt5()).name == "ProstT5"
    assert family_of(config("esmc"), esm2()).name == "ESM C"
    other_bert = family_of(config("bert"), protbert([*PROTBERT_TOKENS, "the"]))
    assert (other_bert.name, other_bert.has_cls) == ("spaced letters", True)
    assert spelling_of(other_bert, protbert()).ids[RESIDUES.index("U")] == PROTBERT_TOKENS.index("U")
    assert opened("ProtBert")[2].ids[RESIDUES.index("U")] == PROTBERT_TOKENS.index("X")


def test_our_own_models_are_esm2(vocab_file):
    transformers_own = EsmTokenizer(str(vocab_file))
    family = family_of(config("esm"), transformers_own)
    spelling = spelling_of(family, transformers_own)
    assert spelling == opened("ESM-2")[2]
    assert spelling.encode(RARE.encode())[1:-1].tolist() == encode(RARE.encode()).tolist()


@pytest.mark.parametrize(("kind", "pieces"), [("Ankh", ankh_pieces()), ("Ankh3", ankh3_pieces())])
def test_the_word_mark_is_no_token(kind, pieces):
    """T5Tokenizer of transformers 5 begins words with a mark that these vocabularies lack."""
    _, _, expected, authors_steps = opened(kind)
    marked = unigram(pieces, Metaspace(prepend_scheme="always"))
    for tokenizer in (T5Tokenizer(scored(pieces)), marked):
        family = family_of(config("t5"), tokenizer)
        assert family.name == kind
        assert spelling_of(family, tokenizer) == expected
    # The twin: asked as it is, it puts tokens between or before the residues; and it stays as it was.
    found, _ = authors_steps(marked, UBIQUITIN)
    assert found != expected.encode(UBIQUITIN.encode()).tolist()
    assert marked.unk_token_id in found


def test_a_rare_residue_that_the_tokenizer_lacks_keeps_its_place():
    without = PROTT5_LETTERS.translate(str.maketrans("", "", "UO"))
    tokenizer = unigram(ankh_pieces(without))
    spelling = spelling_of(family_of(config("t5"), tokenizer), tokenizer)
    assert spelling.encode(RARE.encode()).tolist() == as_ankh_does(tokenizer, RARE)[0]
    assert spelling.encode(b"UUOO").tolist() == [2, 2, 2, 2, 1]

    tokenizer = unigram(ankh3_pieces(without))
    spelling = spelling_of(family_of(config("t5"), tokenizer), tokenizer)
    assert spelling.encode(b"MUK").tolist() == as_ankh3_does(tokenizer, "MUK")[0]
    # A run is one token in this tokenizer's hands, and one for each residue in ours.
    assert as_ankh3_does(tokenizer, "MUUOOK")[0].count(2) == 1
    assert spelling.encode(b"MUUOOK").tolist().count(2) == 4


def fast(model, pre_tokenizer, **names):
    backend = Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", pad_token="<pad>", **names)


def bpe(pre_tokenizer, *merges):
    """Single letters, those that ByteLevel marks as after a space, and what the merges join."""
    joined = ["".join(merge) for merge in merges]
    tokens = ["<unk>", "<pad>", *RESIDUES, *("\u0120" + letter for letter in RESIDUES), "\u0120", *joined]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return fast(BPE(vocabulary, list(merges), unk_token="<unk>"), pre_tokenizer)


def test_other_encoders_are_given_letters_or_spaced_letters():
    plain = family_of(config("roformer"), bpe(WhitespaceSplit()))
    assert (plain.name, plain.is_encoder_decoder, plain.has_cls) == ("letters", False, False)
    joining = bpe(WhitespaceSplit(), ("L", "L"))
    spaced = family_of(config("bart", is_encoder_decoder=True), joining)
    assert (spaced.name, spaced.is_encoder_decoder) == ("spaced letters", True)
    ids = spelling_of(spaced, joining).encode(UBIQUITIN.encode()).tolist()
    assert ids == joining(" ".join(UBIQUITIN))["input_ids"]
    # The twin: plain, it joins.
    assert len(joining("MLLK")["input_ids"]) == 3


@pytest.mark.parametrize("merge", [("W", "C"), ("L", "L"), ("M", "K")])
def test_a_tokenizer_that_joins_residues_is_refused(merge):
    tokenizer = bpe(ByteLevel(add_prefix_space=False), merge)
    with pytest.raises(UserError, match=r"^A protein encoder was expected, with one token per residue, but .+\.$"):
        family_of(config("gpt2"), tokenizer)
    with pytest.raises(UserError, match=r"^One token per residue was expected of the tokenizer \(ESM-2\), which .+\.$"):
        spelling_of(FAMILIES[0], tokenizer)
    # The twin: the same without the merge is taken.
    assert family_of(config("gpt2"), bpe(ByteLevel(add_prefix_space=False))).name == "letters"


def test_a_piece_of_several_letters_is_found_wherever_it_stands():
    pieces = [*ankh3_pieces(), "WWWHC"]
    assert len(as_ankh3_does(unigram(pieces), "WWWHC")[0]) == 3
    with pytest.raises(UserError, match=r"One token per residue was expected .+ makes 3 tokens .+ of 'WWWHC'\.$"):
        spelling_of(opened("Ankh3")[1], unigram(pieces))


def test_a_vocabulary_without_a_residue_is_refused():
    with pytest.raises(UserError, match=r"A token for every residue was expected, .+\(Ankh\) has no W\.$"):
        spelling_of(opened("Ankh")[1], unigram(ankh_pieces(PROTT5_LETTERS.replace("W", ""))))
    # SaProt: two letters each, a residue and its 3Di state, under ESM's model_type.
    pairs = [first + second for first in STANDARD_RESIDUES for second in "pynwrqhgdlvtmfsaeikc#"]
    vocabulary = {token: index for index, token in enumerate(["<cls>", "<pad>", "<eos>", "<unk>", *pairs])}
    saprot = fast(WordLevel(vocabulary, unk_token="<unk>"), Split("", "isolated"), cls_token="<cls>")
    with pytest.raises(UserError, match="A protein encoder was expected"):
        family_of(config("esm"), saprot)


def test_the_longest_protein():
    def of(kind, **values):
        return longest(config(KINDS[kind][0], **values), opened(kind)[2])

    assert of("ESM-2", max_position_embeddings=1026, pad_token_id=1) == 1022
    assert of("ESM C", max_position_embeddings=2048, pad_token_id=1) == 2046
    assert of("ProtT5", n_positions=512) == LONGEST
    assert of("ProtBert", max_position_embeddings=40_000, pad_token_id=0) == LONGEST
    assert of("ProtBert", max_position_embeddings=512, pad_token_id=0) == 510


def test_json_there_and_back(tmp_path):
    for kind in KINDS:
        spelling = opened(kind)[2]
        path = tmp_path / "spelling.json"
        path.write_text(json.dumps(spelling.as_json()))
        read = Spelling.from_json(json.loads(path.read_text()))
        assert read == spelling
        assert read.encode(RARE.encode()).tolist() == spelling.encode(RARE.encode()).tolist()
        # The twin: one id more or less is another spelling.
        plain = spelling.as_json()
        plain["residues"]["W"] += 1
        assert Spelling.from_json(plain) != spelling
    for damaged in ({}, [], {**plain, "residues": {"A": 3}}, {**plain, "pad": None}, {**plain, "prefix": "no"}):
        with pytest.raises(UserError, match=r"^A spelling was expected, .+\.$"):
            Spelling.from_json(damaged)


def test_only_residues_are_encoded():
    spelling = opened("ProstT5")[2]
    assert spelling.encode(b"").tolist() == [*spelling.prefix, *spelling.suffix]
    for stranger in (b"MK-", b"mk", b"MJK"):
        with pytest.raises(AssertionError):
            spelling.encode(stranger)


def test_a_spelling_is_used_without_torch_and_transformers(tmp_path):
    spelling = opened("ESM C")[2]
    (tmp_path / "spelling.json").write_text(json.dumps(spelling.as_json()))
    script = """
import json, sys
for absent in ("torch", "transformers", "tokenizers"):
    sys.modules[absent] = None
from hf_plm.models.families import FAMILIES, Spelling
spelling = Spelling.from_json(json.load(open("spelling.json")))
print(FAMILIES[0].name, *spelling.encode(b"MKUX"))
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.split() == ["ESM-2", *map(str, spelling.encode(b"MKUX"))]
