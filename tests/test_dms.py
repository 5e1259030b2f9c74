"""The benchmark: both layouts, ProteinGym's metrics and averages, and a run that goes on after it was killed."""

import csv
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
import torch

from hf_plm.config import UserError
from hf_plm.judging.findings import read_findings
from hf_plm.judging.scores.agreement import METRICS, agreement_intervals, averages, blosum62, metrics
from hf_plm.judging.scores.dms import find_assays, quick_dms, read_quick, run_dms
from hf_plm.judging.scores.variants import parse
from hf_plm.models.hub import save_hub_folder
from hf_plm.models.masked_lm import LETTERS, open_masked_lm
from hf_plm.models.presets import build_model, esm_config

TYPES = ("OrganismalFitness", "Stability", "Binding")
NUM_ASSAYS = 6


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dms") / "hub"
    model = build_model(esm_config("2x32x2"), seed=0)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    save_hub_folder(model, folder, "# random weights")
    return folder


@pytest.fixture(scope="module")
def model(hub):
    return open_masked_lm(hub)


def write_benchmark(folder, num_assays=NUM_ASSAYS, length=40):
    """ProteinGym's layout, two assays of each protein, all numbers random."""
    draw = np.random.default_rng(0)
    folder.mkdir()
    rows = []
    for number in range(num_assays):
        protein = np.random.default_rng(number // 2).choice(list(LETTERS), size=length)
        mutants = [
            f"{protein[place]}{place + 1}{letter}"
            for place in range(length)
            for letter in "ACD"
            if letter != protein[place]
        ]
        mutants.append(f"{mutants[0]}:{mutants[-1]}")
        scores = draw.normal(size=len(mutants)).round(3)
        with open(folder / f"assay_{number}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["mutant", "mutated_sequence", "DMS_score", "DMS_score_bin"])
            writer.writerows(
                [mutant, "", score, int(score > 0.1)] for mutant, score in zip(mutants, scores, strict=True)
            )
        rows.append(
            {
                "DMS_id": f"assay_{number}",
                "DMS_filename": f"assay_{number}.csv",
                "UniProt_ID": f"P{number // 2}",
                "target_seq": "".join(protein),
                "DMS_binarization_cutoff": 0.1,
                "coarse_selection_type": TYPES[number % 3],
            }
        )
    pd.DataFrame(rows).to_csv(folder / "DMS_substitutions.csv", index=False)
    return folder


@pytest.fixture
def benchmark(tmp_path):
    return write_benchmark(tmp_path / "gym")


def run(model, folder, out, method="masked"):
    return run_dms(model, "no run", "gym", *find_assays(folder), method, out)


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.glob("*.csv"))}


def test_a_benchmark_in_proteingyms_layout(model, benchmark, tmp_path):
    found = run(model, benchmark, tmp_path / "out")
    summary = pd.read_csv(tmp_path / "out" / "summary.csv")
    assert summary["assay"].tolist() == [f"assay_{number}" for number in range(NUM_ASSAYS)]
    for _, row in summary.iterrows():
        scored = pd.read_csv(tmp_path / "out" / f"{row['assay']}.csv")
        given = pd.read_csv(benchmark / f"{row['assay']}.csv")
        assert scored[["mutant", "DMS_score", "DMS_score_bin"]].equals(given[["mutant", "DMS_score", "DMS_score_bin"]])
        assert row["spearman"] == pytest.approx(scored["hf_plm_score"].corr(given["DMS_score"], method="spearman"))
        assert row["variants"] == len(given)
    kept = read_findings(tmp_path / "out" / "findings.json")
    assert (kept["kind"], kept["method"], kept["missing"]) == ("dms", "masked", [])
    assert kept["averages"]["spearman"]["mean"] == found["averages"]["spearman"]["mean"]


def test_averages_are_proteingyms():
    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "uniprot": ["A", "A", "A", "B", "C", "C", "D", "E"],
            "selection": ["x", "x", "y", "x", "x", "y", "y", "z"],
            "spearman": draw.normal(size=8),
        }
    )
    by_type = table.groupby(["uniprot", "selection"])["spearman"].mean().groupby("selection").mean()
    found = averages(table.to_dict("records"), "spearman")
    assert found["mean"] == pytest.approx(by_type.mean())
    assert found["by_selection"] == pytest.approx(by_type.to_dict())
    assert abs(found["mean"] - table["spearman"].mean()) > 0.01  # where the way of averaging does not matter
    assert abs(found["mean"] - table.groupby("uniprot")["spearman"].mean().mean()) > 0.01

    # The error of a mean of three means of 3, 3 and 1 proteins, as the bootstrap of each is known to be.
    groups = table.groupby(["uniprot", "selection"])["spearman"].mean().groupby("selection")
    expected = np.sqrt(sum(one.var(ddof=0) / len(one) for _, one in groups)) / 3
    assert found["standard_error"] == pytest.approx(expected, rel=0.03)

    rows = [*table.to_dict("records"), {"uniprot": "F", "selection": "z", "spearman": float("nan")}]
    assert averages(rows, "spearman")["mean"] == found["mean"]


def test_metrics_are_proteingyms():
    draw = np.random.default_rng(1)
    measured_V = draw.normal(size=157)
    scores_V = measured_V + draw.normal(size=157)
    is_fit_V = measured_V > 0.3
    found = metrics(scores_V, measured_V, is_fit_V)
    assert tuple(found) == METRICS

    gains_V = (measured_V - measured_V.min()) / (measured_V.max() - measured_V.min())
    discounts_K = 1 / np.log2(np.arange(15) + 2)  # the best tenth, rounded down
    best, ideal = gains_V[np.argsort(-scores_V)][:15], np.sort(gains_V)[::-1][:15]
    assert found["ndcg"] == pytest.approx((best @ discounts_K) / (ideal @ discounts_K))
    pairs = scores_V[is_fit_V][:, None] - scores_V[~is_fit_V]
    assert found["auc"] == pytest.approx((pairs > 0).mean())
    is_called_V = scores_V >= np.median(scores_V)
    assert found["mcc"] == pytest.approx(np.corrcoef(is_fit_V, is_called_V)[0, 1])
    is_best_V = measured_V > np.percentile(measured_V, 90)
    assert found["recall"] == pytest.approx((scores_V > np.percentile(scores_V, 90))[is_best_V].mean())
    assert found["spearman"] == pytest.approx(pd.Series(scores_V).corr(pd.Series(measured_V), method="spearman"))
    worse = metrics(-scores_V, measured_V, is_fit_V)
    assert all(worse[metric] < found[metric] for metric in METRICS)


def test_intervals_are_over_positions():
    random = np.random.default_rng(1)
    measured = random.normal(size=200)
    good, bad = measured + random.normal(size=200), random.normal(size=200)
    positions = np.repeat(np.arange(20), 10).astype(str)
    own, above = agreement_intervals(good, bad, measured, positions)
    assert own.value == metrics(good, measured)["spearman"]
    assert above.value == pytest.approx(own.value - metrics(bad, measured)["spearman"])
    assert 0 < above.low < above.value < above.high
    # All variants of a position alike: as many draws as positions, so wider than of independent variants.
    alike = [np.repeat(random.normal(size=20), 10) for _ in range(2)]
    by_position, by_variant = (
        agreement_intervals(alike[0], bad, alike[0] + alike[1], groups)[0]
        for groups in (positions, np.arange(200).astype(str))
    )
    assert by_position.high - by_position.low > 2 * (by_variant.high - by_variant.low)
    assert str(agreement_intervals(good, bad, measured, np.zeros(200))[0]) == f"{own.value:.3f}"


def test_what_is_not_defined_is_nan():
    same, different = np.zeros(4), np.arange(4.0)
    assert np.isnan(list(metrics(same, different).values())).all()
    assert np.isnan(list(metrics(different, same).values())).all()
    assert np.isnan(list(metrics(same[:0], same[:0]).values())).all()
    found = metrics(different, different, np.ones(4, dtype=bool))
    assert np.isnan(found["auc"])
    assert found["spearman"] == pytest.approx(1)


def test_blosum62():
    assert blosum62([parse("W5C"), parse("I1V:A2A"), ()]).tolist() == [-2, 3 + 4, 0]


def test_another_method_or_model_or_other_data_are_refused(model, hub, benchmark, tmp_path):
    out = tmp_path / "out"
    run(model, benchmark, out)
    before = contents(out)
    with pytest.raises(UserError, match=r"another method \(masked, now wild-type\)"):
        run(model, benchmark, out, "wild-type")
    other = tmp_path / "other"
    save_hub_folder(build_model(esm_config("2x32x2"), seed=1), other, "# random weights")
    with pytest.raises(UserError, match=r"another revision \(sha256:"):
        run(open_masked_lm(other), benchmark, out)
    with pytest.raises(UserError, match=r"another precision \(fp32, now bf16\)"):
        run(open_masked_lm(hub, precision="bf16"), benchmark, out)
    assert contents(out) == before

    text = (benchmark / "assay_3.csv").read_text().splitlines()
    (benchmark / "assay_3.csv").write_text("\n".join(text[:-1]) + "\n")
    with pytest.raises(UserError, match=r"assay_3.csv is of other variants than assay_3 has now"):
        run(model, benchmark, out)


def test_what_is_wrong_is_told_before_anything_is_scored(model, benchmark, tmp_path):
    path = benchmark / "assay_5.csv"
    path.write_text(path.read_text() + "B1A,,0.1,1\n")
    with pytest.raises(UserError, match=r"assay_5.csv: 1 of \d+ rows do not fit the wild type"):
        run(model, benchmark, tmp_path / "out")
    assert contents(tmp_path / "out") == {}


def test_files_that_are_not_there(model, benchmark, tmp_path, capsys):
    (benchmark / "assay_1.csv").unlink()
    found = run(model, benchmark, tmp_path / "out", "wild-type")
    assert found["missing"] == ["assay_1"]
    assert "has no file of them: 1 of the reference (assay_1 ...)" in capsys.readouterr().out
    with pytest.raises(UserError, match="There is no folder"):
        find_assays(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no DMS_substitutions.csv .* nor dms_assays.tsv.gz"):
        find_assays(tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"holds none of the 6 files that the reference names \(assay_0"):
        find_assays(tmp_path / "empty", benchmark / "DMS_substitutions.csv")
    (tmp_path / "bad.csv").write_text("DMS_id,target_seq\na,MK\n")
    with pytest.raises(UserError, match="lacks DMS_filename, UniProt_ID, coarse_selection_type"):
        find_assays(benchmark, tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("DMS_id", "ASSAY_0", "the assay ASSAY_0 is there twice"),
        ("DMS_id", "Summary", "the name of another file"),
        ("DMS_id", "../assay_1", "'../assay_1' cannot be the name of an assay"),
        ("DMS_id", "..", "cannot be the name of an assay"),
        ("DMS_binarization_cutoff", "median", "DMS_binarization_cutoff of assay_1 should be a number, not 'median'"),
        ("DMS_binarization_cutoff", "inf", "of assay_1 should be a number"),
    ],
)
def test_a_reference_that_cannot_be_meant(benchmark, column, value, message):
    table = pd.read_csv(benchmark / "DMS_substitutions.csv", dtype=str)
    table.loc[1, column] = value
    table.to_csv(benchmark / "DMS_substitutions.csv", index=False)
    with pytest.raises(UserError, match=message):
        find_assays(benchmark)


def test_two_tables_that_cannot_be_meant(tmp_path):
    (tmp_path / "dms_single.csv").write_text("assay,mutant,score\na,K2A,1\nA,K2C,2\n")
    head = "assay,uniprot,selection,binarization_cutoff,wt_sequence\n"
    (tmp_path / "dms_assays.csv").write_text(f"{head}a,P,Activity,,MKT\nA,P,Activity,,MKT\n")
    with pytest.raises(UserError, match="the assay A is there twice"):
        find_assays(tmp_path)
    (tmp_path / "dms_assays.csv").write_text(f"{head}a,P,Activity,low,MKT\nb,P,Activity,,MKT\n")
    (tmp_path / "dms_single.csv").write_text("assay,mutant,score\na,K2A,1\nb,K2C,2\n")
    with pytest.raises(UserError, match="binarization_cutoff of a should be a number, not 'low'"):
        find_assays(tmp_path)


def test_a_reader_that_went_away_is_no_fault_of_the_folder(model, benchmark, tmp_path, monkeypatch):
    run(model, benchmark, tmp_path / "out", "wild-type")

    class Closed:
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr("sys.stdout", Closed())
    with pytest.raises(BrokenPipeError):  # which the command line answers by leaving
        run(model, benchmark, tmp_path / "out", "wild-type")
    monkeypatch.undo()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        run(model, benchmark, tmp_path / "file" / "out", "wild-type")


def test_a_quick_look_is_drawn_at_once(model, benchmark):
    assays, _ = find_assays(benchmark)
    drawn = read_quick(assays, 50)
    assert [(one.assay.name, len(one.variants)) for one in drawn] == [(f"assay_{n}", 50) for n in range(NUM_ASSAYS)]
    whole = drawn[0].assay.read()
    measured = dict(zip(whole.variants, whole.scores_V, strict=True))
    assert drawn[0].scores_V.tolist() == [measured[one] for one in drawn[0].variants]
    assert drawn[0].variants != read_quick(assays[:1], 50, seed=1)[0].variants
    for path in benchmark.glob("assay_*.csv"):
        path.unlink()
    found = quick_dms(model, drawn)
    assert set(found) == {"dms_spearman", "dms_blosum62_spearman", *(f"dms_spearman/{one.name}" for one in assays)}
    with pytest.raises(UserError, match=r"assay_0\.csv cannot be read"):
        read_quick(assays, 50)


def test_a_killed_run_goes_on_to_the_same_result(model, hub, tmp_path):
    folder = write_benchmark(tmp_path / "gym", num_assays=12)
    whole = run(model, folder, tmp_path / "whole")
    out = tmp_path / "killed"
    script = (
        "import sys\nfrom pathlib import Path\nfrom hf_plm.judging.scores.dms import find_assays, run_dms\n"
        "from hf_plm.models.masked_lm import open_masked_lm\nhub, folder, out = map(Path, sys.argv[1:])\n"
        "run_dms(open_masked_lm(hub), 'no run', 'gym', *find_assays(folder), 'masked', out)"
    )
    process = subprocess.Popen([sys.executable, "-c", script, hub, folder, out], env={**os.environ})
    deadline = time.monotonic() + 60
    while not list(out.glob("assay_*.csv")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = contents(out)
    assert 0 < len(done) < 12
    written = {name: (out / name).stat().st_mtime_ns for name in done}
    again = run(model, folder, out)
    assert contents(out) == contents(tmp_path / "whole")
    assert {name: (out / name).stat().st_mtime_ns for name in done} == written
    assert again == whole


def test_two_tables_of_real_assays(model, real_data, benchmark, tmp_path):
    assays, missing = find_assays(real_data / "probes" / "dms")
    assert (len(assays), missing) == (63, [])
    assert {assay.selection for assay in assays} == {
        *("Activity", "Binding", "Expression", "OrganismalFitness", "Stability")
    }
    by_name = {assay.name: assay for assay in assays}
    chosen = [by_name["BLAT_ECOLX_Jacquier_2013"], by_name["TAT_HV1BR_Fernandes_2016"]]
    measured = chosen[0].read()
    assert len(measured.mutants) == 989
    assert 0.3 < metrics(blosum62(measured.variants), measured.scores_V, measured.is_fit_V)["spearman"] < 0.6
    quick = quick_dms(model, read_quick(chosen, 50))
    assert quick == quick_dms(model, read_quick(chosen, 50))
    assert set(quick) == {
        *("dms_spearman", "dms_blosum62_spearman"),
        *(f"dms_spearman/{assay.name}" for assay in chosen),
    }
    assert np.isfinite(list(quick.values())).all()
