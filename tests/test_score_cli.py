"""`hf-plm score` as it is typed: a table, a scan, a benchmark, and what is no sensible request."""

import argparse
import csv
import re

import matplotlib.image
import numpy as np
import pytest
from test_dms import write_benchmark

from hf_plm.cli import score
from hf_plm.config import UserError
from hf_plm.judging.findings import read_findings
from hf_plm.models.hub import save_hub_folder
from hf_plm.models.presets import build_model, esm_config

WILD_TYPE = "MKTAYIAKQRXISFVKSHFS"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """What a finished run looks like to who asks for its model."""
    folder = tmp_path_factory.mktemp("score") / "run"
    save_hub_folder(build_model(esm_config("2x32x2"), seed=0), folder / "hub", "# random weights")
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.fasta").write_text(f">wild/type\n{WILD_TYPE}\n")
    (tmp_path / "v.tsv").write_text(
        'note\tmutant\tDMS_score\nfirst\tK2A\t0.5\n\tT3L:Y5F\t1.5\n"a\tb"\tA4G\t\nlast\tM1L\t-1\n'
    )
    return tmp_path


def run(*arguments):
    parser = argparse.ArgumentParser()
    score.add(parser.add_subparsers())
    parsed = parser.parse_args(["score", *map(str, arguments)])
    parsed.run(parsed, [])


def rows_of(path, delimiter=","):
    with open(path, newline="") as file:
        return list(csv.reader(file, delimiter=delimiter))


def test_a_table_comes_back_with_one_column_more(run_folder, here, capsys):
    run(run_folder, "--wild-type", "p.fasta", "--variants", "v.tsv", "--out", "deep/scores.tsv")
    given, found = rows_of("v.tsv", "\t"), rows_of("deep/scores.tsv", "\t")
    assert found[0] == [*given[0], "hf_plm_score"]
    assert [row[:-1] for row in found] == given
    assert np.isfinite([float(row[-1]) for row in found[1:]]).all()
    printed = capsys.readouterr().out
    assert "4 variants of wild/type (20 residues), masked: 5 forward passes" in printed
    assert "without a measurement: 1 of 4 rows" in printed
    assert "BLOSUM62" in printed
    assert "(95%, bootstrap over positions)" in printed
    kept = read_findings(run_folder / "findings" / "score-v-wild_type-masked.json")
    given_V, blosum62_V = (kept[name]["spearman"] for name in ("metrics", "blosum62"))
    assert kept["spearman"]["value"] == given_V
    assert kept["above_blosum62"]["value"] == pytest.approx(given_V - blosum62_V)
    assert (kept["kind"], kept["variants"], kept["measured"]) == ("score", 4, 3)
    assert kept["blosum62"]["spearman"] is not None

    with pytest.raises(UserError, match="has a column hf_plm_score already"):
        run(run_folder, "--wild-type", "p.fasta", "--variants", "deep/scores.tsv")


def test_variants_of_one_position_have_no_interval(run_folder, here, capsys):
    (here / "one.csv").write_text("mutant,DMS_score\nK2A,1\nK2C,3\nK2D,2\n")
    run(run_folder, "--wild-type", "p.fasta", "--variants", "one.csv", "--out", "out.csv")
    assert re.search(r"Spearman -?\d\.\d+, less BLOSUM62's [+-]\d\.\d+: not shown", capsys.readouterr().out)


def test_a_scan_has_all_substitutions_and_a_picture(run_folder, here, capsys):
    run(run_folder, "--scan", "p.fasta")
    rows = rows_of("scan.csv")
    assert rows[0] == ["mutant", "position", "wild_type", "substitution", "score"]
    assert len(rows) == 1 + 19 * 19  # X is not scanned
    assert "Not scanned, since it is none of the 20: 1 of 20" in capsys.readouterr().out
    assert {row[0] for row in rows[1:]} >= {"M1A", "M1Y", "S20A"}
    picture = matplotlib.image.imread("scan.png")
    assert picture.shape[0] > 200
    assert picture.std() > 0.05
    kept = read_findings(run_folder / "findings" / "scan-wild_type-masked.json")
    assert np.shape(kept["scores_NA"]) == (20, 20)

    (here / "v.csv").write_text("mutant\n" + "\n".join(row[0] for row in rows[1:]))
    run(run_folder, "--wild-type", "p.fasta", "--variants", "v.csv")
    np.testing.assert_allclose(
        [float(row[-1]) for row in rows_of("variant_scores.csv")[1:]], [float(row[-1]) for row in rows[1:]], atol=1e-4
    )


def test_several_proteins_get_a_pair_each(run_folder, here):
    (here / "many.fasta").write_text(">a|b\nMKT\n>a|b\nMKTAYIAKQR\n>../c\nMK\n")
    run(run_folder, "--scan", "many.fasta", "--out", "scans", "--method", "wild-type")
    assert sorted(path.name for path in (here / "scans").iterdir()) == [
        f"{name}.{kind}" for name in ("_c", "a_b", "a_b_2") for kind in ("csv", "png")
    ]
    assert len(rows_of("scans/a_b_2.csv")) == 1 + 190
    kept = [read_findings(run_folder / "findings" / f"scan-{name}-wild-type.json") for name in ("a_b", "a_b_2", "_c")]
    assert [one["residues"] for one in kept] == ["MKT", "MKTAYIAKQR", "MK"]


def test_a_benchmark(run_folder, here, capsys):
    write_benchmark(here / "gym", num_assays=2)
    run(run_folder, "--dms", "gym", "--method", "wild-type")
    printed = capsys.readouterr().out
    assert "assay_1" in printed
    assert "standard error" in printed
    assert (here / "dms_scores" / "summary.csv").is_file()
    assert read_findings(run_folder / "findings" / "dms-gym-wild-type.json")["averages"]["spearman"]["mean"] is not None
    run(run_folder, "--dms", "gym", "--method", "wild-type")
    assert "2 of 2 assays have their scores already" in capsys.readouterr().out


@pytest.mark.parametrize("link", [False, True])
def test_what_is_read_is_not_written_even_by_default(run_folder, here, link):
    (here / "v.tsv").rename("variant_scores.csv")
    (here / "p.fasta").rename("scan.csv")
    write_benchmark(here / "dms_scores", num_assays=1)
    words = ["variant_scores.csv", "scan.csv", "dms_scores"]
    if link:
        for index, name in enumerate(words):
            (here / f"link{index}").symlink_to(name)
        words = ["link0", "link1", "link2"]
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    table, fasta, folder = words
    for request in (("--variants", table, "--wild-type", fasta), ("--scan", fasta), ("--dms", folder)):
        with pytest.raises(UserError, match="would be written, but is what is read"):
            run(run_folder, *request)
    (here / "other").mkdir()
    (here / "other" / "assay_0.csv").write_text("of the user's")
    with pytest.raises(UserError, match=r"holds files that are no scores of --dms \(assay_0\.csv\)"):
        run(run_folder, "--dms", folder, "--out", "other")
    (here / "other" / "assay_0.csv").unlink()
    assert {path: path.read_bytes() for path in before} == before


def test_a_protein_that_cannot_be_scanned_is_told_before_the_others_are(run_folder, here):
    (here / "many.fasta").write_text(">a\nMKT\n>unknown\nXXX\n>c\nMK\n")
    with pytest.raises(UserError, match=r"many\.fasta, record 2 \(unknown\) has no standard residue"):
        run(run_folder, "--scan", "many.fasta")
    assert not (here / "scan").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--variants v.tsv", "--variants needs --wild-type"),
        ("--scan p.fasta --offset 3", "--offset goes with --variants"),
        ("--scan p.fasta --reference v.tsv", "--reference goes with --dms"),
        ("--scan p.fasta --method pseudo-likelihood", "--scan takes --method masked, random-masks or"),
        ("--scan p.fasta --out scan.png", r"--out of a scan is a \.csv file"),
        ("--scan p.fasta --out p.fasta", "p.fasta would be written, but is what is read"),
        ("--variants v.tsv --wild-type p.fasta --out p.fasta/x.csv", "p.fasta/x.csv cannot be written"),
        ("--variants v.tsv --wild-type none.fasta", "There is no file none.fasta"),
        ("--variants v.tsv --wild-type p.fasta --out .", "is a folder, where the name of a file"),
        ("--variants v.tsv --wild-type p.fasta --out x.xlsx", r"which \.xlsx files are not; name x\.csv"),
        ("--dms v.tsv", r"v\.tsv is a file; --dms takes a folder"),
        ("--variants v.tsv --wild-type p.fasta --offset 1", r"line 2: K2A: the wild type has M at position 1 \(2 less"),
    ],
)
def test_what_cannot_be_meant(run_folder, here, words, message):
    before = {path: path.read_bytes() for path in here.iterdir()}
    with pytest.raises(UserError, match=message):
        run(run_folder, *words.split())
    assert {path: path.read_bytes() for path in here.iterdir()} == before
