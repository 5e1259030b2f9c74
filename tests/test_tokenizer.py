"""The tokenizer against transformers' and fair-esm's. Dimensions: B texts, L tokens of a padded row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, EsmConfig, EsmTokenizer
from transformers.models.auto.tokenization_auto import TOKENIZER_MAPPING

from hf_plm.config import UserError
from hf_plm.proteins.tokenizer import ProteinTokenizer
from hf_plm.proteins.vocabulary import CLS_ID, EOS_ID, RESIDUES, TOKENS, UNK_ID, encode

cleaned_sequences = st.text(alphabet=RESIDUES, min_size=0, max_size=60)
TOKENIZER = ProteinTokenizer()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def esm_tokenizer(folder):
    return EsmTokenizer(str(folder / "vocab.txt"))


@pytest.fixture(scope="module")
def fair_esm_alphabet():
    from esm.data import Alphabet

    return Alphabet.from_architecture("ESM-1b")


@given(sequence=cleaned_sequences)
def test_ids_are_those_of_transformers_fair_esm_and_the_table(esm_tokenizer, fair_esm_alphabet, sequence):
    ids = TOKENIZER(sequence)["input_ids"]
    assert ids == esm_tokenizer(sequence)["input_ids"]
    assert ids == [CLS_ID, *fair_esm_alphabet.encode(sequence), EOS_ID]
    assert ids[1:-1] == encode(sequence.encode()).tolist()


@given(sequence=cleaned_sequences.filter(lambda sequence: len(set(sequence)) > 1))
def test_ids_twin(esm_tokenizer, sequence):
    assert TOKENIZER(sequence[::-1] + "A")["input_ids"] != esm_tokenizer(sequence)["input_ids"]


def test_encode_is_the_table_for_every_byte():
    every_byte = bytes(range(256)) * 3
    expected = [TOKENS.index(chr(byte)) if chr(byte) in RESIDUES + ".-" else UNK_ID for byte in every_byte]
    array = np.frombuffer(every_byte, dtype=np.uint8)
    for given_form in (every_byte, array, np.repeat(array, 2)[::2]):  # the last is not contiguous
        ids = encode(given_form)
        assert ids.dtype == np.uint8
        assert ids.tolist() == expected
    assert encode(b"").tolist() == []
    with pytest.raises(AssertionError):
        encode(array.astype(np.int64))
    # The twin: a lower-case letter is not its residue.
    assert encode(b"mk").tolist() != encode(b"MK").tolist()


def test_the_33_tokens_are_fair_esms(fair_esm_alphabet):
    assert list(TOKENS) == fair_esm_alphabet.all_toks
    assert TOKENIZER.get_vocab() == fair_esm_alphabet.tok_to_idx
    assert len(TOKENIZER) == TOKENIZER.vocab_size == 33


def test_every_unknown_character_is_one_unk(esm_tokenizer):
    assert TOKENIZER("Mk1*V")["input_ids"] == [CLS_ID, 20, UNK_ID, UNK_ID, UNK_ID, 7, EOS_ID]
    # The twin, and the reason for this class: transformers' own makes the sequence shorter.
    assert esm_tokenizer("Mk1*V")["input_ids"] == [CLS_ID, 20, UNK_ID, 7, EOS_ID]


def test_special_tokens_in_text():
    assert TOKENIZER("M<mask>C<null_1>V")["input_ids"] == [CLS_ID, 20, 32, 23, 31, 7, EOS_ID]
    assert TOKENIZER("M K\tV\n")["input_ids"] == TOKENIZER("MKV")["input_ids"]


@given(sequence=cleaned_sequences)
def test_decoding_gives_the_sequence_back(sequence):
    assert TOKENIZER.decode(TOKENIZER(sequence)["input_ids"], skip_special_tokens=True) == sequence


def test_pads_and_returns_tensors():
    batch_BL = TOKENIZER(["MK", "MKTV"], padding=True, return_tensors="pt")
    assert batch_BL["input_ids"].tolist() == [[0, 20, 15, 2, 1, 1], [0, 20, 15, 11, 7, 2]]
    assert batch_BL["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert set(batch_BL) == {"input_ids", "attention_mask"}


def test_pairs_and_special_tokens_mask(esm_tokenizer):
    for texts in (("MK",), ("MK", "AAV")):
        ours = TOKENIZER(*texts, return_special_tokens_mask=True)
        assert dict(ours) == dict(esm_tokenizer(*texts, return_special_tokens_mask=True))
    ids = TOKENIZER("MK")["input_ids"]
    assert TOKENIZER.get_special_tokens_mask(ids, already_has_special_tokens=True) == [1, 0, 0, 1]


def test_long_proteins_are_not_cut():
    assert len(TOKENIZER("M" * 35_000, truncation=True)["input_ids"]) == 35_002


def test_saved_folder_opens_as_a_stock_tokenizer(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["tokenizer_config.json", "vocab.txt"]
    stock = AutoTokenizer.from_pretrained(folder)
    assert type(stock) is EsmTokenizer
    texts = ["MKTV", "M<mask>K", RESIDUES]
    assert dict(stock(texts, padding=True)) == dict(TOKENIZER(texts, padding=True))


def test_from_pretrained_and_saved_again_is_the_same_file(folder, tmp_path):
    again = ProteinTokenizer.from_pretrained(folder)
    assert type(again) is ProteinTokenizer
    again.save_pretrained(tmp_path)
    for name in ("tokenizer_config.json", "vocab.txt"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_another_vocabulary_is_refused(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(TOKENS[:-1]))
    with pytest.raises(UserError, match="32 tokens, which are not the 33 of ESM-2"):
        ProteinTokenizer.from_pretrained(tmp_path)


def test_nothing_is_registered_at_import():
    registered = TOKENIZER_MAPPING[EsmConfig]
    assert ProteinTokenizer not in (registered if isinstance(registered, tuple) else (registered,))
