"""Variants as people write them, and what is said of those that do not fit."""

import gzip

import pytest

from hf_plm.config import UserError
from hf_plm.judging.scores.variants import find_variants, parse, read_proteins, read_table, read_wild_type

WILD_TYPE = b"MKTAYIAKQRQISFVKXHFSRQ"
#             1   5    10   15   20


def substitutions(variant):
    return [f"{old}{place + 1}{new}" for old, place, new in variant]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("K2A", ["K2A"]),
        ("k2a", ["K2A"]),
        ("K2A:T3L", ["K2A", "T3L"]),
        ("T3L;K2A", ["T3L", "K2A"]),
        ("K2A, T3L", ["K2A", "T3L"]),
        ("p.Lys2Ala", ["K2A"]),
        ("NP_000537.3:p.(Lys2Ala)", ["K2A"]),
        ("p.[Lys2Ala;Thr3Leu]", ["K2A", "T3L"]),
        ("K2=", ["K2K"]),
        ("WT", []),
        ("_wt", []),
        ("p.=", []),
    ],
)
def test_ways_to_write_a_variant(written, expected):
    assert substitutions(parse(written)) == expected


def table(tmp_path, text, name="v.csv"):
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return read_table(path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("v.csv", 'note,mutant\n"a, b",K2A\n,K2A:T3L\n'),
        ("v.tsv", "Variant\tDMS_score\nK2A\t1\n\nK2A:T3L\t2\n"),
        ("v.csv.gz", "\ufeffmutations;x\nK2A;1\n'K2A,T3L';2\n".replace("'", "")),
        ("v.txt", "hgvs_pro\np.Lys2Ala\np.[Lys2Ala;Thr3Leu]\n"),
        ("v.csv", "mutated_sequence,DMS_score\nMATAYIAKQRQISFVKXHFSRQ,1\nMALAYIAKQRQISFVKXHFSRQ,1\n"),
    ],
)
def test_columns_and_delimiters(tmp_path, name, text):
    _, variants = find_variants(table(tmp_path, text, name), WILD_TYPE)
    assert [substitutions(one) for one in variants] == [["K2A"], ["K2A", "T3L"]]


def test_a_named_column_and_an_offset(tmp_path):
    read = table(tmp_path, "mutant,mine\nQ9Q,K25A\nQ9Q,T26L:A27C\n")
    mutants, variants = find_variants(read, WILD_TYPE, offset=23, mutant_column="mine")
    assert mutants == ["K25A", "T26L:A27C"]
    assert [substitutions(one) for one in variants] == [["K2A"], ["T3L", "A4C"]]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("K2A\nT4L", r"v.csv: 1 of 2 rows .* line 3: T4L: the wild type has A at position 4\.$"),
        ("K2A\nT99L", "line 3: T99L: the wild type has 22 residues, and none at position 99"),
        ("K0A", "none at position 0"),
        ("K2del", "line 2: K2del: insertions and deletions are not scored"),
        ("K2_T3insA", "insertions and deletions"),
        ("p.Lys2fs", "insertions and deletions"),
        ("K2-", "insertions and deletions"),
        ("K2*", r"\* is a stop"),
        ("p.Lys2Ter", r"\* is a stop"),
        ("K2X", "X is no standard residue"),
        ("X17A", "X at position 17 is no standard residue"),
        ("p.Lys2Foo", "Foo is no residue"),
        ("K2A:K2C", "names one position twice"),
        ("lysine", "a substitution is written as A42G"),
    ],
)
def test_rows_that_do_not_fit(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        find_variants(table(tmp_path, f"mutant\n{rows}\n"), WILD_TYPE)


def test_an_empty_cell_is_no_wild_type(tmp_path):
    with pytest.raises(UserError, match="in line 3: the cell is empty"):
        find_variants(table(tmp_path, "mutant,x\nK2A,1\n,2\n"), WILD_TYPE)


def test_the_offset_that_would_fit_is_named(tmp_path):
    read = table(tmp_path, "mutant\nK25A\nT26L:A27C\nR33A\n")
    with pytest.raises(UserError, match=r"line 2: K25A: .*With --offset 23 all positions would fit"):
        find_variants(read, WILD_TYPE)
    with pytest.raises(UserError, match=r"position 5 \(25 less the offset 20\)\. With --offset 23"):
        find_variants(read, WILD_TYPE, offset=20)
    with pytest.raises(UserError) as caught:  # a row of another protein: no offset fits
        find_variants(table(tmp_path, "mutant\nK25A\nW26L\n"), WILD_TYPE)
    assert "--offset" not in str(caught.value)


def test_a_sequence_of_another_length_is_refused(tmp_path):
    with pytest.raises(UserError, match="line 2: MK: it has 2 residues and the wild type 22"):
        find_variants(table(tmp_path, "mutated_sequence\nMK\n"), WILD_TYPE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("mutant\n", "no rows"),
        ("a,b\n1,2\n", "should have one of mutant, variant, .* which are a, b"),
        ("mutant,x\nK2A,T3L,1\n", "line 2: 3 fields, where the header has 2"),
        ("mutant\n\udcff\n", "not text in UTF-8"),
    ],
)
def test_files_that_are_no_tables(tmp_path, text, message):
    (tmp_path / "v.csv").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        find_variants(read_table(tmp_path / "v.csv"), WILD_TYPE)


def test_a_cut_or_absent_file(tmp_path):
    (tmp_path / "v.csv.gz").write_bytes(gzip.compress(b"mutant\n" + b"K2A\n" * 999)[:-12])
    with pytest.raises(UserError, match="cut or damaged"):
        read_table(tmp_path / "v.csv.gz")
    with pytest.raises(UserError, match="cannot be read: No such file"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        read_table(tmp_path)


def test_numbers(tmp_path):
    read = table(tmp_path, "mutant,DMS_score\nK2A,1.5\nK2C,\n")
    assert read.numbers(1, may_lack=True)[0] == 1.5
    with pytest.raises(UserError, match="line 3: DMS_score should be a number, not ''"):
        read.numbers(1)
    with pytest.raises(UserError, match="not 'high'"):
        table(tmp_path, "mutant,DMS_score\nK2A,high\n").numbers(1, may_lack=True)


def test_the_wild_type_is_one_protein(tmp_path):
    path = tmp_path / "p.fasta"
    path.write_text(">a some\nmkt\nAY*\n")
    assert read_wild_type(path) == ("a", b"MKTAY")
    path.write_text(">a\nMK\n>b\nMT\n")
    with pytest.raises(UserError, match=r"should hold one protein, the wild type, not 2 \(a, b"):
        read_wild_type(path)
    path.write_text(">a\nMK1\n")
    with pytest.raises(UserError, match=r"record 1 \(a\): .*'1' at position 3"):
        read_wild_type(path)


def test_a_decimal_comma_and_a_column_that_is_there_twice(tmp_path):
    path = tmp_path / "v.csv"
    path.write_text("mutant;DMS_score;Mutant\nK2A;0,5;K2A\n")
    table = read_table(path)
    with pytest.raises(UserError, match="not '0,5'; write a point for the decimal comma"):
        table.numbers(1)
    with pytest.raises(UserError, match="has several columns mutant"):
        table.find("mutant")


def test_dna_is_told(tmp_path, capsys):
    path = tmp_path / "p.fasta"
    path.write_text(f">gene\n{'ACGT' * 40}\n>protein\n{'MKTAYIAK' * 20}\n")
    read_proteins(path)
    told = capsys.readouterr().err
    assert "record 1 (gene): almost only A C G T" in told
    assert "record 2" not in told
