"""Sites by letters and by list."""

import numpy as np
import pytest

from hf_plm.config import UserError
from hf_plm.data.sources import find_sources
from hf_plm.inference.sites import find_sites, site_letters
from hf_plm.inference.worklist import Cleaning, Worklist, write_worklist

FASTA = ">sp|P1|ONE_HUMAN first\nMSTAY\n>two\nGGG\n>three\nYSSTK*\n>bad\nM1\n>sp|P4|D\nS\n"


@pytest.fixture
def worklist(tmp_path):
    (tmp_path / "p.fasta").write_text(FASTA)
    folder = tmp_path / "work"
    folder.mkdir()
    return write_worklist(
        find_sources(tmp_path / "p.fasta", "train"), folder, Cleaning(max_rejected=0.5), lambda _: None
    )


def table(tmp_path, text):
    path = tmp_path / "sites.tsv"
    path.write_text(text)
    return str(path)


def test_a_worklist_is_what_was_read(worklist):
    assert worklist.ids(0, 4) == ["sp|P1|ONE_HUMAN", "two", "three", "sp|P4|D"]
    assert worklist.residues(1, 3) == [b"GGG", b"YSSTK"]
    assert list(Worklist(worklist.folder)) == list(worklist)
    assert worklist.lengths.tolist() == [5, 3, 5, 1]
    assert worklist.counts.read == 5
    assert worklist.counts.rejected == 1
    rejected = (worklist.folder / "rejected.tsv").read_text().splitlines()
    assert rejected[1] == "p.fasta\t4\tbad\t2\tillegal character '1'"


def test_letters(worklist):
    sites = find_sites("s,t,y", worklist, worklist.lengths)
    assert list(sites.ids(worklist)) == [
        *("sp|P1|ONE_HUMAN_S2", "sp|P1|ONE_HUMAN_T3", "sp|P1|ONE_HUMAN_Y5"),
        *("three_Y1", "three_S2", "three_S3", "three_T4", "sp|P4|D_S1"),
    ]
    assert sites.bounds.tolist() == [0, 3, 3, 7, 8]
    assert sites.proteins().tolist() == [0, 0, 0, 2, 2, 2, 2, 3]
    assert len(find_sites("Y", worklist, worklist.lengths)) == 2


def test_a_list_keeps_its_order_and_may_name_accessions(worklist, tmp_path):
    text = "label\tprotein\tposition\tresidue\n1\tthree\t4\tT\n0\tP1\t2\ts\n1\tthree\t1\tY\n0\tsp|P4|D\t1\t\n"
    sites = find_sites(table(tmp_path, text), worklist, worklist.lengths)
    assert list(sites.ids(worklist)) == ["three_T4", "sp|P1|ONE_HUMAN_S2", "three_Y1", "sp|P4|D_S1"]
    assert sites.proteins().tolist() == [2, 0, 2, 3]
    assert sites.in_rows(sites.positions).tolist() == [4, 2, 1, 1]
    assert bytes(sites.in_rows(sites.letters)) == b"TSYS"
    assert np.diff(sites.bounds).tolist() == [1, 0, 2, 1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("protein\tposition\nfour\t1\n", "line 2: there is no protein 'four'"),
        (
            "protein\tposition\ntwo\t1\ntwo\t4\n",
            "1 of 2 rows do not fit, the first in line 3: two has 3 residues, and none at",
        ),
        ("protein\tposition\ntwo\t0\n", "none at position 0"),
        ("protein\tposition\ntwo\tG1\n", "line 2: a position is a number from 1, not 'G1'"),
        ("id,site,aa\ntwo,1,S\n", r"line 2: two has G at position 1, not S \(from 1\)"),
        ("protein\tposition\n", "lists no site"),
        ("two\t1\n", "should begin with a line of column names"),
    ],
)
def test_a_list_that_does_not_fit_names_the_line(text, message, worklist, tmp_path):
    with pytest.raises(UserError, match=message):
        find_sites(table(tmp_path, text), worklist, worklist.lengths)


def test_letters_that_are_none(worklist):
    assert site_letters("sty") == site_letters("S,T,Y") == "STY"
    assert site_letters("sites.csv") == ""
    with pytest.raises(UserError, match="None of the proteins has a residue W"):
        find_sites("W", worklist, worklist.lengths)


def test_only_kept_residues_are_sites(worklist, tmp_path):
    kept = np.minimum(worklist.lengths, 3)
    assert list(find_sites("Y", worklist, kept).ids(worklist)) == ["three_Y1"]
    with pytest.raises(UserError, match="line 2: --long crop keeps 3 residues of P1, and position 5 is not"):
        find_sites(table(tmp_path, "id\tpos\nP1\t5\n"), worklist, kept)


def test_an_id_that_several_have_cannot_be_meant(tmp_path):
    (tmp_path / "p.fasta").write_text(">a\nMS\n>a\nMT\n>b\nS\n")
    (tmp_path / "work").mkdir()
    both = write_worklist(find_sources(tmp_path / "p.fasta", "train"), tmp_path / "work", Cleaning(), lambda _: None)
    assert len(find_sites(table(tmp_path, "id\tpos\nb\t1\n"), both, both.lengths)) == 1
    with pytest.raises(UserError, match="several sequences have the id 'a'"):
        find_sites(table(tmp_path, "id\tpos\na\t2\n"), both, both.lengths)
