"""`hf-plm probe` from the command line, small: what is printed, kept and read again."""

import argparse
import csv
import json
import os
import shutil

import numpy as np
import pytest

from hf_plm.cli import probe as cli
from hf_plm.config import UserError
from hf_plm.judging.findings import read_findings, write_findings
from hf_plm.judging.intervals import Interval
from hf_plm.judging.probes import probing
from hf_plm.judging.probes.measures import NAMES
from hf_plm.judging.probes.predictors import load_fitted
from hf_plm.judging.probes.probing import site_groups
from hf_plm.judging.probes.task import read_task
from hf_plm.judging.probes.telling import counted, text_table, verdict


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    from support.encoders import save_encoder

    return str(save_encoder("ESM-2", tmp_path_factory.mktemp("probing") / "model"))


@pytest.fixture(scope="session")
def table(tmp_path_factory):
    """60 proteins; S after P is a site, which any model's vector of the S may tell."""
    draw = np.random.default_rng(0)
    lines = ["id\tsplit\tsequence\tlabels"]
    for number in range(60):
        sequence = "".join(draw.choice(list("ACDEGKLPSTY"), 24))
        labels = [
            "-" if letter not in "STY" else str(int(before == "P"))
            for before, letter in zip("M" + sequence, sequence, strict=False)
        ]
        split = "train" if number < 40 else "valid" if number < 48 else "test"
        lines.append(f"p{number}\t{split}\t{sequence}\t{''.join(labels)}")
    path = tmp_path_factory.mktemp("tasks") / "sites.tsv"
    path.write_text("\n".join(lines) + "\n")
    return path


def run(*arguments):
    parser = argparse.ArgumentParser()
    cli.add(parser.add_subparsers())
    parsed = parser.parse_args(["probe", *map(str, arguments), "--threads", "1", "--resamples", "20"])
    parsed.run(parsed, [])


def test_probe_and_predict(model, table, tmp_path, capsys):
    run(model, "--task", table, "--out", tmp_path / "out", "--predictor", "linear")
    said = capsys.readouterr().out
    assert "sites: 60 proteins" in said
    assert "test: 12 proteins" in said
    plain = read_findings(tmp_path / "out" / "findings.json")
    assert (plain["kind"], plain["predictor"], plain["task"]["letters"]) == ("probe", "linear", "STY")
    assert [row["predictor"] for row in plain["results"]] == ["linear", "label shares", "one-hot window, linear"]
    assert plain["results"][0]["measures"]["auroc"]["value"] > 0.5
    with open(tmp_path / "out" / "predictions.csv") as file:
        rows = list(csv.DictReader(file))
    task = read_task(table)
    tested = [row for row in range(len(task)) if task.splits[task.proteins_R[row]] == "test"]
    assert [(row["id"], int(row["position"]) - 1) for row in rows] == [
        (task.ids[task.proteins_R[row]], task.positions_R[row]) for row in tested
    ]
    assert [row["truth"] for row in rows] == [task.numbers_written(row) for row in tested]

    fasta = tmp_path / "new.fasta"
    fasta.write_text("".join(f">{task.ids[index]}\n{task.sequences[index]}\n" for index in range(48, 60)))
    run(model, "--predict", tmp_path / "out", "--data", fasta, "--out", tmp_path / "new.csv")
    with open(tmp_path / "new.csv") as file:
        new = list(csv.DictReader(file))
    assert [(row["id"], row["position"], row["residue"]) for row in new] == [
        (row["id"], row["position"], row["residue"]) for row in rows
    ]
    assert [float(row["p_1"]) for row in new] == pytest.approx([float(row["linear"]) for row in rows], abs=1e-5)
    assert {row["seen"] for row in new} == {"no"}
    assert "has learnt from" not in capsys.readouterr().out
    fasta.write_text("".join(f">{task.ids[index]}\n{task.sequences[index]}\n" for index in (0, 50)))
    run(model, "--predict", tmp_path / "out", "--data", fasta, "--out", tmp_path / "new.csv")
    assert "has learnt from 1 of these 2 proteins" in capsys.readouterr().out
    with open(tmp_path / "new.csv") as file:
        assert {(row["id"], row["seen"]) for row in csv.DictReader(file)} == {("p0", "yes"), ("p50", "no")}
    assert load_fitted(tmp_path / "out").name == "linear"
    write_findings(tmp_path / "out" / "findings.json", "probe", [], {})
    with pytest.raises(UserError, match="its findings lack something"):
        run(model, "--predict", tmp_path / "out", "--data", fasta)


def test_predict_with_another_model_is_refused(model, table, tmp_path):
    from support.encoders import save_encoder

    run(model, "--task", table, "--out", tmp_path / "out", "--predictor", "linear", "--sites", "ST")
    fasta = tmp_path / "new.fasta"
    fasta.write_text(">a\nMSTY\n")
    other = save_encoder("ESM C", tmp_path / "other")
    with pytest.raises(UserError, match="is another model"):
        run(other, "--predict", tmp_path / "out", "--data", fasta, "--out", tmp_path / "new.csv")
    run(model, "--predict", tmp_path / "out", "--data", fasta, "--out", tmp_path / "new.csv")
    assert [line.split(",")[1:3] for line in (tmp_path / "new.csv").read_text().splitlines()[1:]] == [
        ["2", "S"],
        ["3", "T"],
    ]
    with pytest.raises(UserError, match="findings"):
        run(model, "--predict", tmp_path / "other", "--data", fasta)


def test_s_and_t_together_and_y_apart(table, tmp_path, capsys):
    task = read_task(table)
    groups = site_groups(task, "STY")
    assert [group.name for group in groups] == ["sites_ST", "sites_Y"]
    assert sum(map(len, groups)) == len(task)
    (only,) = site_groups(task.residues("ST"), "STY")
    assert only.name.endswith("ST")
    assert "no labelled residue Y: that group is left out" in capsys.readouterr().out
    with pytest.raises(UserError, match="no residues W"):
        site_groups(task, "W")


def test_a_group_that_is_left_has_its_folder_too(model, table, tmp_path):
    """One S or T and Y group, as many as the data has: the command that reads them later is the same."""
    text = table.read_text().replace("Y", "F")
    (path := tmp_path / "sites.tsv").write_text(text)
    run(model, "--task", path, "--sites", "STY", "--out", tmp_path / "out", "--predictor", "linear")
    assert (tmp_path / "out" / "sites_ST" / "predictor.json").exists()
    (fasta := tmp_path / "new.fasta").write_text(">a\nMSTY\n")
    with pytest.raises(UserError, match="holds predictors in folders of its own; give one of sites_ST in it"):
        run(model, "--predict", tmp_path / "out", "--data", fasta)


def test_leaks_are_refused_or_listed(model, table, tmp_path):
    lines = table.read_text().splitlines()
    lines.append("\t".join(["copy", "train", *lines[-1].split("\t")[2:]]))
    path = tmp_path / "leaking.tsv"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"line 62 \(copy, train\) and line 61 \(p59, test\) have the same sequence"):
        run(model, "--task", path)
    run(model, "--task", path, "--leaks", "drop", "--out", tmp_path / "out", "--predictor", "linear")
    assert (tmp_path / "out" / "left_out.tsv").read_text().splitlines()[1] == "62\tcopy\tsequence\t61\tp59\t1"
    assert json.loads((tmp_path / "out" / "findings.json").read_text())["leaks_dropped"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give one MODEL, or two with --compare"),
        (("m", "--compare", "a", "b"), "Give one MODEL, or two"),
        (("m",), "Give the labels with --task"),
        (("m", "--predict", "f"), "--predict FOLDER and --data FASTA go together"),
        (("m", "--task", "none.tsv"), "There is no file none.tsv"),
        (("m", "--task", "TABLE", "--sites", "S1"), "--sites are letters"),
        (("m", "--task", "TABLE", "--illegal", "drop"), "--illegal is reject or x"),
        (("m", "--task", "TABLE", "--out", "TABLE"), "is a file, where a folder was expected"),
        (("m", "--task", "TABLE", "--features", "mean"), "--features is one of"),
        (("no_such_model", "--task", "TABLE"), "There is no model no_such_model"),
    ],
)
def test_mistakes(arguments, message, table):
    with pytest.raises(UserError, match=message):
        run(*(table if argument == "TABLE" else argument for argument in arguments))


def test_what_is_read_is_kept(model, table, tmp_path, monkeypatch):
    """No output takes the place of an input, by whichever way the same file is named."""
    monkeypatch.chdir(tmp_path)
    text = table.read_text()
    (folder := tmp_path / "out").mkdir()
    for name in ("predictions.csv", "left_out.tsv", "findings.json", "trees_0.txt", "test.png"):
        (folder / name).write_text(text)
        with pytest.raises(UserError, match="would be written, but is what is read"):
            run("no_model", "--task", folder / name, "--out", "out")
    (group := folder / "predictions_ST").mkdir()
    (group / "predictions.csv").write_text(text)
    with pytest.raises(UserError, match="would be written, but is what is read"):
        run("no_model", "--task", group / "predictions.csv", "--sites", "STY", "--out", "out")
    assert {path.read_text() for path in folder.glob("**/*.*")} == {text}


def test_predictions_of_new_proteins_take_no_file_s_place(model, table, tmp_path, monkeypatch, capsys):
    run(model, "--task", table, "--out", tmp_path / "out", "--predictor", "linear")
    (fasta := tmp_path / "new.fasta").write_text(">a\nMSTY\n")
    before = {path: path.read_bytes() for path in [fasta, *(tmp_path / "out").iterdir()]}
    for path in before:
        with pytest.raises(UserError, match="would be written, but is what is read"):
            run("no_model", "--predict", tmp_path / "out", "--data", fasta, "--out", path)
    monkeypatch.chdir(tmp_path / "out")
    run(model, "--predict", ".", "--data", fasta)
    assert "3 predictions in predicted.csv." in capsys.readouterr().out
    assert {path: path.read_bytes() for path in before} == before


def test_a_reader_that_goes_away_loses_nothing(model, table, tmp_path, monkeypatch):
    """As `| head -1` does: what is computed is kept, of the second group too."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as gone:
        monkeypatch.setattr("sys.stdout", gone)
        run(model, "--task", table, "--sites", "STY", "--out", tmp_path / "out", "--predictor", "linear")
    for group in ("sites_ST", "sites_Y"):
        assert {"findings.json", "predictions.csv", "predictor.json"} <= {
            path.name for path in (tmp_path / "out" / group).iterdir()
        }


def test_everything_is_kept_before_it_is_printed(model, table, tmp_path, monkeypatch, capsys):
    class LostError(Exception):
        pass

    def lost(*lines):
        raise LostError

    monkeypatch.setattr(probing, "say", lost)
    with pytest.raises(LostError):
        run(model, "--task", table, "--out", tmp_path / "out", "--predictor", "linear")
    assert (tmp_path / "out" / "findings.json").exists()


def test_a_quick_look_leaves_the_findings_of_the_whole(model, table, tmp_path, monkeypatch, capsys):
    """Of a run: the name says what was asked for."""
    shutil.copytree(model, tmp_path / "run" / "hub")
    for more in ((), ("--max-proteins", "30"), ("--leaks", "drop")):
        run(tmp_path / "run", "--task", table, "--predictor", "linear", *more)
    kept = {path.name: read_findings(path) for path in (tmp_path / "run" / "findings").iterdir()}
    names = [
        f"probe-sites-{asked}-resamples-20.json" for asked in ("31-proteins-linear", "linear-leaks-drop", "linear")
    ]
    assert sorted(kept) == names
    assert [kept[name]["task"]["proteins"] for name in names] == [31, 60, 60]
    monkeypatch.chdir(tmp_path)
    run(model, "--task", table, "--predictor", "linear", "--out", ".")
    assert f"Kept in {tmp_path}.\n" in capsys.readouterr().out


def test_words():
    assert (counted(1, "protein"), counted(1200, "protein")) == ("1 protein", "1,200 proteins")
    nothing = float("nan")
    one_group = {name: Interval(-0.0001, nothing, nothing) for name in NAMES["regression"]}
    said = text_table("regression", {"linear": one_group}, {})
    assert "0.000 (no interval)" in said
    assert "-0.000" not in said
    assert "nan" not in said
    assert "Spearman +0.000 (no interval)" in verdict("linear", "x", "Spearman", one_group["r2"])
    assert "such rows have no Spearman" in verdict("linear", "x", "Spearman", Interval(nothing, nothing, nothing))
    large = text_table("regression", {"linear": dict.fromkeys(one_group, Interval(2e29, 1, 2))}, {})
    assert large.endswith("2e+29")


def test_the_verdict_is_honest():
    assert "are above" in verdict("linear", "x", "MCC", Interval(0.1, 0.05, 0.2))
    assert "not shown to be above" in verdict("linear", "x", "MCC", Interval(0.1, -0.05, 0.2))
    assert "BELOW" in verdict("linear", "x", "MCC", Interval(-0.1, -0.2, -0.05))
