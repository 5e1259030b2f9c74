"""Reading FASTA in every dress, and the cleaning of sequences."""

import bz2
import gzip
import string
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_plm.config import UserError
from hf_plm.proteins.fasta import FastaReader, IllegalResidueError, Record, clean, clean_sequence, read_fasta
from hf_plm.proteins.vocabulary import RESIDUES

ids = st.text(string.ascii_letters + string.digits + "|_.-", min_size=1, max_size=12)
descriptions = st.text(string.ascii_letters + string.digits + " =[]>;#éµ", max_size=30).map(
    lambda s: " ".join(s.split())
)
records = st.builds(Record, ids, descriptions, st.text(RESIDUES, max_size=200))
COMPRESSORS = {"plain": lambda data: data, "gzip": gzip.compress, "bzip2": bz2.compress}


def _text(records: list[Record], width: int, line_end: str, final_newline: bool = True) -> str:
    lines = []
    for record in records:
        lines.append(f">{record.id} {record.description}".rstrip())
        lines += [record.sequence[start : start + width] for start in range(0, len(record.sequence), width)]
    return line_end.join(lines) + (line_end if final_newline else "")


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(records, min_size=1, max_size=6),
    st.integers(1, 90),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from(sorted(COMPRESSORS)),
    st.booleans(),
    st.booleans(),
)
def test_round_trip_over_widths_line_ends_and_compression(
    tmp_path: Path, records: list[Record], width: int, line_end: str, compression: str, bom: bool, final_newline: bool
) -> None:
    data = _text(records, width, line_end, final_newline).encode("utf-8-sig" if bom else "utf-8")
    # The name says nothing of the compression: the first bytes do.
    path = _write(tmp_path / "proteins.txt", COMPRESSORS[compression](data))
    assert list(read_fasta(path)) == records


def test_round_trip_twin(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.fasta", _text([Record("a", "", "MKV")], 60, "\n").encode())
    assert list(read_fasta(path)) != [Record("a", "", "MKX")]


def test_zstandard_frames_and_a_cut_one(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    rng = np.random.default_rng(0)
    sequences = ["".join(rng.choice(list(RESIDUES), 400)) for _ in range(2000)]
    text = "".join(f">p{number}\n{sequence}\n" for number, sequence in enumerate(sequences)).encode()
    half = len(text) // 2
    frames = zstandard.compress(text[:half]) + zstandard.compress(text[half:])
    assert [record.sequence for record in read_fasta(_write(tmp_path / "a.zst", frames))] == sequences
    cut = _write(tmp_path / "cut.zst", frames[:-1000])
    with pytest.raises(UserError, match=r"cut\.zst is cut or damaged: its Zstandard stream breaks off in record \d+; "):
        list(read_fasta(cut))


def test_zstandard_without_the_package_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.version_info >= (3, 14):
        pytest.skip("Python 3.14 reads Zstandard itself")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    path = _write(tmp_path / "a.zst", b"\x28\xb5\x2f\xfd....")
    with pytest.raises(UserError, match="`pip install zstandard` to read it"):
        list(read_fasta(path))


def test_a_protein_of_35000_residues_and_no_final_newline(tmp_path: Path) -> None:
    titin = "MKVLAGHEW" * 4000
    path = _write(tmp_path / "titin.fa", f">titin\n{titin}".encode())
    assert [record.sequence for record in read_fasta(path)] == [titin]


@pytest.mark.parametrize(
    ("header", "id_", "description"),
    [
        (b">sp|P1|A_B name OS=x", "sp|P1|A_B", "name OS=x"),
        (b"> spaced name", "spaced", "name"),
        (b">tab\tafter", "tab", "after"),
        (b">a one\x01b two", "a", "one >b two"),
        (b">a\x01b", "a", ">b"),
        (b">", "record_2", ""),
        (b">   ", "record_2", ""),
        ("> é µ".encode(), "é", "µ"),
        ("> é µ".encode("latin-1"), "é", "µ"),
        (b">" + b"x" * 5000, "x" * 5000, ""),
    ],
)
def test_headers(tmp_path: Path, header: bytes, id_: str, description: str) -> None:
    path = _write(tmp_path / "a.fa", b">first\nMK\n" + header + b"\nMKV\n")
    assert list(read_fasta(path))[1] == Record(id_, description, "MKV")


def test_pir_reads_the_line_after_the_header_as_description(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.pir", b">P1;CRAB\nalpha crystallin\n MDIT IHNP\n LIRR*\n")
    reader = FastaReader(path)
    (record,) = reader
    assert record.description == "alpha crystallin"
    assert clean_sequence(record.sequence) == "MDITIHNPLIRR"
    assert reader.notes == ["PIR headers (>P1;) on 1 records: the line after each is read as a description"]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.fa", b"Some header\nMKV\n\n>a\n;note\nMK\n#note\nVL\n")
    reader = FastaReader(path)
    assert [record.sequence for record in reader] == ["MKVL"]
    assert reader.notes == [
        "2 lines before the first '>' left out, the first: 'Some header'",
        "2 lines of comment left out, the first: ';note'",
    ]


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", r"is empty; FASTA was expected \(records that begin with '>'\)\."),
        (b"\n \n", r"is not FASTA: no line begins with '>' and it holds only blank lines\."),
        (b"MKVLA\nMKV\n", r"is not FASTA: no line begins with '>' \(it begins with 'MKVLA'\)\."),
        (b"# STOCKHOLM 1.0\n", r"is not FASTA but a Stockholm alignment: it begins with '# STOCKHOLM 1\.0'\."),
        (b"@read\nACGT\n+\n>>>>\n", r"is not FASTA but FASTQ or SAM: it begins with '@read'\."),
        (b"<html>\n>a\nMK", r"is not FASTA but HTML or XML"),
        (b"PAR1....", r"is not FASTA but a Parquet file"),
        (b"PK\x03\x04..", r"is not FASTA but a zip archive: unpack it first\."),
        (b">a\n\0\0\0\0", r"is not FASTA: it is binary data\."),
        ("\ufeff>a\nMK".encode("utf-16"), r"is UTF-16 text; save it as UTF-8 or plain text\."),
    ],
)
def test_what_is_not_fasta(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = _write(tmp_path / "odd.fasta", content)
    with pytest.raises(UserError, match=r"odd\.fasta " + sentence):
        list(read_fasta(path))


def test_no_such_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"There is no file .*nowhere\.fasta\."):
        read_fasta(tmp_path / "nowhere.fasta")
    with pytest.raises(UserError, match="is a folder, where a FASTA file was expected"):
        read_fasta(tmp_path)


@pytest.mark.parametrize("compression", ["gzip", "bzip2"])
def test_a_cut_stream_names_the_record(tmp_path: Path, compression: str) -> None:
    rng = np.random.default_rng(0)
    text = "".join(f">p{i}\n{''.join(rng.choice(list(RESIDUES), 300))}\n" for i in range(4000))
    whole = COMPRESSORS[compression](text.encode())
    path = _write(tmp_path / "cut.gz", whole[: len(whole) * 9 // 10])
    read: list[Record] = []
    with pytest.raises(UserError) as raised:
        read.extend(read_fasta(path))
    assert 2000 < len(read) < 4000, "what comes before the cut is read"
    assert str(raised.value) == (
        f"{path} is cut or damaged: its {compression} stream breaks off in record {len(read) + 1}; "
        "copy or download it again."
    )


@given(st.text(RESIDUES.lower() + RESIDUES + "jJ \t\n", max_size=80), st.booleans())
def test_clean_is_upper_case_without_white_space_stop_and_j(sequence: str, stop: bool) -> None:
    expected = "".join(sequence.split()).upper().replace("J", "X")
    assert clean_sequence(sequence + "*" * stop) == expected
    assert clean(sequence).num_j == sequence.upper().count("J")
    assert clean_sequence(clean_sequence(sequence)) == clean_sequence(sequence)


@given(st.text(RESIDUES, max_size=30), st.characters(exclude_characters=RESIDUES + RESIDUES.lower() + "jJ"), st.data())
def test_an_illegal_character_is_named_with_its_position(before: str, stranger: str, data: st.DataObject) -> None:
    after = data.draw(st.text(RESIDUES, min_size=1, max_size=30))  # not empty, so that a `*` is never at the end
    spaced = " ".join(before) + " " + stranger + after
    if stranger.isspace():
        assert clean_sequence(spaced) == before + after
        return
    if stranger.encode("utf-8", "replace").isalpha() and stranger.upper() in RESIDUES:
        return
    with pytest.raises(IllegalResidueError) as raised:
        clean(spaced)
    assert (raised.value.position, raised.value.character) == (len(before) + 1, stranger)
    assert clean(spaced, illegal="x") == ((before + "X" + after).encode(), 0, 1, 0)


def test_clean_rules() -> None:
    with pytest.raises(IllegalResidueError, match=r"were expected, not '\*' at position 3\."):
        clean_sequence("MK**")
    assert clean_sequence("MK**", illegal="x") == "MKX"
    with pytest.raises(IllegalResidueError, match="not '-' at position 2"):
        clean_sequence("M-K.")
    assert clean("M-K.*", gaps="strip") == (b"MK", 0, 0, 2)
    assert clean_sequence("M-K", illegal="x") == "MXK"
    assert clean_sequence("") == clean_sequence(" *") == ""


def test_clean_twin_would_miss_an_internal_stop() -> None:
    naive = "MK*V".replace("*", "")
    assert naive == "MKV"
    with pytest.raises(IllegalResidueError):
        clean_sequence("MK*V")
