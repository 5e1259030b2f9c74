"""Tables of tasks, as people have them, and what is wrong with others."""

import gzip

import pytest

from hf_plm.config import UserError
from hf_plm.judging.probes.table import read_table

ROWS = [(2, ["p1", "MK", "0.5"]), (3, ["p2", "GA,V", ""])]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    "text", ["id\tsequence\ty\np1\tMK\t0.5\np2\tGA,V\t\n", 'id,sequence,y\np1,MK,0.5\np2,"GA,V",\n']
)
def test_the_same_table_in_every_form(tmp_path, text, packed, end):
    raw = b"\xef\xbb\xbf" + text.replace("\n", end).encode()
    path = tmp_path / "t"
    path.write_bytes(gzip.compress(raw) if packed else raw)
    head, rows = read_table(path)
    assert head == ["id", "sequence", "y"]
    assert list(rows) == ROWS


def test_a_cell_of_a_million_characters(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text(f"id\tlabels\np\t{'01' * 500_000}\n")
    assert len(next(read_table(path)[1])[1][1]) == 1_000_000


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "its first line is empty"),
        (b">p1\nMK\n", "is FASTA"),
        (b"id\tid\n", "two columns named 'id'"),
        (b"id\ty\np1\n", "line 2: 2 cells were expected"),
        (b"\xff\xfe\x00", "not text in UTF-8"),
        (gzip.compress(b"id\ty\n" * 99)[:-9], "cannot be read"),
        (gzip.compress(b"id\ty\n" * 99)[:10] + b"\xff" * 30, "cannot be read"),
    ],
)
def test_what_is_no_table(tmp_path, raw, message):
    path = tmp_path / "t.tsv"
    path.write_bytes(raw)
    with pytest.raises(UserError, match=message):
        list(read_table(path)[1])


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="There is no file"):
        read_table(tmp_path / "none.tsv")
    with pytest.raises(UserError, match="is a folder"):
        read_table(tmp_path)
