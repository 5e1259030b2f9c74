"""The report as a page: read by html.parser as any reader would, and opened in Chromium where there is one."""

import argparse
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from transformers import EsmModel

from hf_plm.cli import report as command
from hf_plm.config import UserError
from hf_plm.judging.findings import write_findings
from hf_plm.models.hub import save_hub_folder
from hf_plm.models.presets import build_model, esm_config
from hf_plm.proteins.vocabulary import STANDARD_RESIDUES
from hf_plm.report.charts import Axis, Series, rows_chart, scatter, span, xy_chart
from hf_plm.report.families import Labelled, by_chance, map_of, mean_with_interval, of_families, read_families
from hf_plm.report.page import Section, estimate, number, page, paragraph
from hf_plm.report.report import Asked, write_report

SECTIONS = (
    "summary training evaluation variants contacts probes families recipe data machine findings".split()  # noqa: SIM905
)
VOID = {"meta", "link", "br", "img", "hr"}
MARKUP = "<script>alert(1)<"


class Page(HTMLParser):
    """What a page holds, with every fault that a reader, a screen reader or a missing network would meet."""

    def __init__(self, text: str):
        super().__init__()
        self.text, self.ids, self.tags, self.faults = "", [], [], []
        self._open: list[list[Any]] = []  # tag, and the tags inside
        self._links: list[str] = []
        self.feed(text)
        self.close()
        self.faults += [f"<{tag}> is never closed" for tag, _ in self._open]
        self.faults += [f"id {one} twice" for one in set(self.ids) if self.ids.count(one) > 1]
        self.faults += [f"{link} leads nowhere" for link in self._links if link[1:] not in self.ids]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        for _, inside in self._open:
            inside.append(tag)
        if tag not in VOID:
            self._open.append([tag, []])
        self.ids += [given["id"]] if "id" in given else []
        for name in ("src", "href", "srcset", "poster"):
            if name not in given:
                continue
            if given[name].startswith("#"):
                self._links.append(given[name])
            elif not given[name].startswith("data:"):
                self.faults.append(f"{tag} {name} {given[name]}")
        if tag == "script" or any(name.startswith("on") for name in given):
            self.faults.append(f"a script in {tag}")
        if tag == "img" and not given.get("alt"):
            self.faults.append("a picture without words")
        if tag == "svg" and not (given.get("aria-label") or given.get("aria-hidden") or given.get("class") == "clip"):
            self.faults.append("a chart without words")
        if tag == "html" and given.get("lang") != "en":
            self.faults.append("no language")

    def handle_endtag(self, tag: str) -> None:
        opened, inside = self._open.pop()
        if opened != tag:
            self.faults.append(f"</{tag}> closes <{opened}>")
        if tag == "figure" and inside.count("figcaption") != 1:
            self.faults.append("a figure without a caption")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1][0] == "style":
            self.faults += [f"style has {word}" for word in ("url(", "@import", "http") if word in data]
        else:
            self.text += data


def read(path: Path) -> Page:
    found = Page(path.read_text(encoding="utf-8"))
    assert not found.faults
    assert [one for one in found.ids if one in SECTIONS] == SECTIONS
    return found


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "mine"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = build_model(esm_config("demo", num_layers=1, width=16, num_heads=2), seed=3)
    return save_hub_folder(model, tmp_path_factory.mktemp("models") / "other", "# test\n")


def findings_of_all_kinds(folder: Path, name: str = "mine", protein: str = "P1") -> None:
    """One file of each kind, as the commands write them; `name` and `protein` stand wherever names do."""
    models = [{"model": name, "family": "ESM-2", "precision": "fp32"}]
    agreement = {"spearman": 0.31, "auc": 0.6, "mcc": float("nan"), "ndcg": 0.7, "recall": 0.1}
    averages = {"mean": 0.31, "standard_error": float("nan"), "by_selection": {protein: 0.31}}
    assay = {"assay": protein, "variants": 12, **agreement, "blosum62_spearman": 0.2}
    both = {"spearman": averages, "blosum62_spearman": {**averages, "mean": 0.2}}
    dms = {"dms": protein, "method": "masked", "missing": [protein], "assays": [assay]}
    write_findings(folder / "dms.json", "dms", models, {**dms, "averages": both})
    score = {"protein": protein, "table": protein, "variants": 3, "metrics": agreement, "blosum62": agreement}
    write_findings(folder / "score.json", "score", models, score)
    scores_NA = np.full((4, 20), -1.5)
    scores_NA[2] = np.nan
    scan = {"protein": protein, "residues": "MKXV", "method": "masked", "scores_NA": scores_NA}
    write_findings(folder / "scan.json", "scan", models, scan)
    mean = {"mean": 0.2, "low": 0.1, "high": 0.3, "num_proteins": 7}
    means = {f"{one} {cut}": mean for one in ("long", "medium", "short") for cut in ("P@L", "chance", "nearest P@L")}
    contacts = {"structures": protein, "means": {"all": means}, "verdict": protein, "example": {"id": protein}}
    write_findings(folder / "contacts.json", "contacts", models, contacts)
    interval = {"value": 0.5, "low": 0.4, "high": 0.6}
    rows = [
        {"test": "test", "predictor": one, "baseline": one == protein, "measures": {"mcc": interval}}
        for one in ("linear", protein)
    ]
    task = {"name": protein, "level": "residue", "kind": "binary", "rows": 9, "proteins": 3}
    tests = {"test": {"rows": 9, "proteins": 3, "above_letters": interval}}
    probe = {"task": task, "headline": "mcc", "results": rows, "tests": tests, "notes": [protein]}
    write_findings(folder / "probe.json", "probe", models, probe)
    rows = [{**row, "model": name} for row in rows]
    difference = {"linear": {**interval, "permutation_p_value": 0.01}}
    compared = {"labels": [name, "B"], "tests": {"test": {"differences": difference}}, "results": rows}
    write_findings(folder / "comparison.json", "comparison", models * 2, {**probe, **compared})
    write_findings(folder / "novel.json", "crystal ball", models, {})


def test_a_finished_run(run: Path) -> None:
    path = write_report(Asked(str(run), sequences=20))
    assert path == run / "report.html"
    found = read(path)
    assert "It has not been shown to learn from context" in found.text
    assert "Tasks during the run" not in found.text
    assert "simulated, not natural" in found.text
    assert "Which families they are of is not known" in found.text
    for sentence in ("No variants were scored", "No contacts were predicted", "No probe was trained"):
        assert sentence in found.text
    summary = json.loads((run / "summary.json").read_text())
    assert number(summary["validation_loss"], ".4f") in found.text
    assert len(path.read_bytes()) < 3e6
    (kept,) = (run / "findings").iterdir()
    result = json.loads(kept.read_text())["results"][0]
    assert estimate(result["overall"]["loss"]) in found.text
    assert all(f">{one['residue']}</text>" in path.read_text() for one in result["by_residue"] if one["loss"][0])


def test_findings_are_shown_once_they_are_there(run: Path) -> None:
    findings_of_all_kinds(run / "findings")
    found = read(write_report(Asked(str(run), sequences=0)))
    for text in ("0.310", "crystal ball (not known to this version", "Above BLOSUM62.", "Above what the letters give."):
        assert text in found.text
    assert found.tags.count("img") == 1  # the scan
    assert "0.200 (0.100 to 0.300)" in found.text
    without = read(
        write_report(Asked(str(run), sequences=0, out=run / "b.html", findings=(run / "findings/dms.json",)))
    )
    assert without.text == found.text, "a file is shown once"


def test_names_are_text_and_never_markup(finished_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / MARKUP))
    findings_of_all_kinds(run / "findings", MARKUP, MARKUP)
    path = write_report(Asked(str(run), sequences=0))
    assert read(path).text.count(MARKUP) > 20
    assert "<script" not in path.read_text()


@pytest.mark.parametrize(
    "plain",
    [
        {},
        {"results": [{}], "assays": [{}], "tests": {}, "means": {}, "labels": ["A", "B"]},
        {"results": None, "assays": 3, "tests": [], "means": "?", "data": [], "protocol": None, "missing": None},
        {
            "results": [
                {
                    "model": None,
                    "overall": {"loss": [None, None, None], "recovery": float("nan")},
                    "by_residue": [{"residue": "A", "loss": None}, {"residue": "C", "loss": [3, None, 4]}],
                    "by_length": [{"from": 1, "to": None, "loss": [None]}, {"from": 100}],
                    "measures": {"mcc": {}},
                }
            ],
            "differences": [{"a": "x", "b": "y", "loss": None}],
            "scores_NA": [[1, 2], [3, 4]],
            "example": {"picture": "../../config.yaml"},
        },
    ],
)
def test_fields_that_are_missing_or_strange_are_dashes(run: Path, plain: dict[str, Any]) -> None:
    for kind in ("evaluation", "dms", "score", "scan", "contacts", "probe", "comparison"):
        write_findings(run / "findings" / f"{kind}.json", kind, [{"model": "mine"}], plain)
    text = read(write_report(Asked(str(run), sequences=0))).text
    assert not re.search(r"\b(nan|None|inf)\b", text.partition("The whole recipe")[0])


def test_a_run_that_goes_on(run: Path) -> None:
    shutil.rmtree(run / "hub")
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write(
            '{"step": 5, "loss": NaN, "tokens": 999, "tokens_per_second": 7, "learning_rate": 1}\n{"step": 6, "lo'
        )
    found = read(write_report(Asked(str(run))))
    assert "This run is not finished: what follows is how it stood after step 5" in found.text
    assert "1 line of metrics.jsonl could not be read, and is not" in found.text
    assert found.tags.count("figure") >= 5
    assert not (run / "findings").exists()
    (run / "metrics.jsonl").unlink()
    assert "There are no metrics" in read(write_report(Asked(str(run)))).text


def test_tasks_that_a_run_was_evaluated_on(run: Path) -> None:
    lines = [
        {"step": step, "tokens": step * 250, "dms_spearman": 0.1 * step, "dms_blosum62_spearman": 0.2}
        | {"probe_my_sites_balanced_accuracy": None, "probe_my_sites_balanced_accuracy_baseline": 0.1}
        for step in (2, 4)
    ]
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    text = read(write_report(Asked(str(run), sequences=0))).text
    assert "Tasks during the run" in text
    assert "BLOSUM62" in text
    assert "Variants' Spearman." in text
    assert "my_sites balanced accuracy." in text


def chart_of(path: Path, title: str) -> str:
    """The figure with this title, as markup."""
    (found,) = [one for one in re.findall("<figure.*?</figure>", path.read_text(), re.DOTALL) if f"<b>{title}" in one]
    return found


def test_a_task_with_one_point_has_a_line_to_beat(run: Path) -> None:
    line = {"step": 4, "tokens": 1000, "dms_spearman": 0.1, "dms_blosum62_spearman": 0.2}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    chart = chart_of(write_report(Asked(str(run), sequences=0)), "Variants")
    assert re.search(r'<circle class="f0"', chart.partition("role=")[2])
    assert re.search(r'<path class="line s7"[^>]* d="M[\d.]+ [\d.]+L[\d.]+ [\d.]+"/>', chart.partition("role=")[2])


def test_points_of_a_short_run_are_inside_the_axes(run: Path) -> None:
    """Its last line of training is long before its last validation, whose loss is far above the baseline."""
    lines = [
        {"step": 1, "loss": 3.4, "tokens": 100, "tokens_per_second": 7, "learning_rate": 1, "gradient_norm": 1},
        {"step": 9, "tokens": 900, "validation_loss": 4.5, "context_free_loss": 2.8},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    chart = chart_of(write_report(Asked(str(run), sequences=0)), "Loss of all targets").partition("role=")[2]
    left, top, bottom, right = map(float, re.findall(r'class="frame" d="M(\S+) (\S+)V(\S+)H([\d.]+)"', chart)[0])
    ((x, y),) = re.findall(r'<path class="f1" d="M([\d.]+) ([\d.]+)h', chart)
    assert left < float(x) <= right
    assert top + 2 < float(y) < bottom


@pytest.mark.parametrize("margin", [[-0.037, -0.05, -0.02], [0.01, -0.02, 0.04]])
def test_a_loss_is_under_or_above(run: Path, margin: list[float]) -> None:
    """And never under by less than nothing."""
    summary = json.loads((run / "summary.json").read_text())
    for name in ("margin_context_free", "margin_unigram_masked"):
        summary[name] = margin
    (run / "summary.json").write_text(json.dumps({**summary, "validation_sequences": 1}))
    text = read(write_report(Asked(str(run), sequences=0))).text
    side = "under" if margin[0] > 0 else "above"
    amount = "0.010 (\u22120.020 to 0.040)" if margin[0] > 0 else "0.037 (0.020 to 0.050)"
    assert f"On 1 held-out protein its loss is {side} that of the best guess without context by {amount}" in text
    assert f"on masked residues {side} that of letter frequencies by {amount}" in text
    assert not re.search(r"(?i)(by|better|above|under) \u2212", text)


def write_benchmark(path: Path, method: str, numbers: dict[str, tuple[float, float]], variants: int = 12) -> None:
    """Findings of `--dms` in a folder named dms: of each assay the Spearman of the model and of BLOSUM62."""
    rows = [
        {"assay": name, "variants": variants, "spearman": own, "blosum62_spearman": other}
        for name, (own, other) in numbers.items()
    ]
    averages = {
        key: {"mean": float(np.mean([row[key] for row in rows])), "by_selection": {"Activity": rows[0][key]}}
        for key in ("spearman", "blosum62_spearman")
    }
    plain = {"dms": "dms", "method": method, "missing": ["gone"], "assays": rows, "averages": averages}
    write_findings(path, "dms", [{"model": "mine"}], plain)


def test_each_benchmark_stands_by_itself(run: Path) -> None:
    """Three methods on the same assays, the same assays with other variants, and more assays: of one name all."""
    folder = run / "findings"
    for place, method in enumerate(("masked", "random-masks", "wild-type", "pseudo-likelihood")):
        write_benchmark(folder / f"a{method}.json", method, {"P1": (0.31, 0.2), "P2": (0.1 * place, 0.25)})
    write_benchmark(folder / "b.json", "masked", {"P1": (0.31, 0.11), "P2": (0.1, 0.15)}, variants=13)
    write_benchmark(folder / "c.json", "masked", {"P3": (-0.1, 0.4)})
    path = write_report(Asked(str(run), sequences=0))
    text = read(path).text
    assert "Not above BLOSUM62. mine (masked) on dms, 2 assays: mean Spearman 0.155, that of BLOSUM62 0.225" in text
    assert "Above BLOSUM62. mine (pseudo-likelihood) on dms, 2 assays: mean Spearman 0.305" in text
    assert (
        "mine (masked) on dms, 2 assays (2): mean Spearman 0.205, that of BLOSUM62 0.130; it is higher in 1 of" in text
    )
    assert (
        "mine (masked) on dms, 1 assay: mean Spearman \u22120.100, that of BLOSUM62 0.400; it is higher in 0 of 1"
        in text
    )
    assert text.count("1 assay had no file and is in no mean: gone.") == 1
    charts = re.findall("<figure.*?</figure>", path.read_text(), re.DOTALL)
    charts = [one for one in charts if "By what was selected for" in one]
    legends = [re.findall("</svg>([^<]*)</li>", one) for one in charts]
    methods = ("masked", "random-masks", "wild-type", "pseudo-likelihood")
    assert sorted(legends[0]) == sorted(["BLOSUM62", *(f"mine, {method}" for method in methods)])
    assert legends[1:] == [["BLOSUM62", "mine, masked"]] * 2
    drawn = [one.partition("role=")[2] for one in charts]
    assert [one.count('class="f7"') for one in drawn] == [1, 1, 1], "BLOSUM62 of each"
    assert len({re.findall('class="f7" cx="([^"]*)"', one)[0] for one in drawn}) == 3
    rows = re.findall('<tr><th scope="row">dms, ([^<]*)</th><td>BLOSUM62</td><td>([^<]*)', path.read_text())
    assert rows == [("2 assays", "0.225"), ("2 assays (2)", "0.130"), ("1 assay", "0.400")]


def test_what_is_read_is_kept_and_so_is_what_is_no_report(run: Path, family_fasta: Path, tmp_path: Path) -> None:
    fasta = Path(shutil.copy(family_fasta, tmp_path / "q.html"))
    for asked in (
        Asked(str(run), data=(str(fasta),), out=fasta),
        Asked(str(run), families=fasta, out=fasta),
        Asked(str(run), findings=(fasta,), out=fasta),
    ):
        with pytest.raises(UserError, match="is what is read"):
            write_report(asked)
    with pytest.raises(UserError, match=r"q\.html is there already and is no report"):
        write_report(Asked(str(run), sequences=0, out=fasta))
    with pytest.raises(UserError, match=r"ends in \.html, not .*w\.fasta"):
        write_report(Asked(str(run), sequences=0, out=tmp_path / "w.fasta"))
    assert fasta.read_bytes() == family_fasta.read_bytes()
    assert not (tmp_path / "w.fasta").exists()
    page = write_report(Asked(str(run), sequences=0, out=tmp_path / "new" / "page.htm"))
    assert write_report(Asked(str(run), sequences=0, out=page)) == page, "a report is replaced by another"


def test_data_that_is_named_is_evaluated_on(run: Path, family_fasta: Path) -> None:
    """An earlier evaluation answers for the proteins that it was on, and no evaluation on the train split for any."""
    write_report(Asked(str(run), sequences=8))
    (kept,) = (run / "findings").iterdir()
    before = kept.read_bytes()
    asked = Asked(str(run), sequences=9, data=(str(family_fasta),))
    text = read(write_report(asked)).text
    assert "On families.fasta.gz: 9 proteins" in text
    assert "On the validation split: 8 proteins" in text
    files = {path: path.read_bytes() for path in (run / "findings").iterdir()}
    assert len(files) == 2
    write_report(asked)
    assert {path: path.read_bytes() for path in (run / "findings").iterdir()} == files, "what is known is not repeated"
    for path in files:
        path.unlink()
    plain = json.loads(before)
    plain["data"] |= {"sources": ["train-00000-of-00001.parquet"], "fingerprint": "another"}
    kept.write_text(json.dumps(plain))
    assert "On the validation split: 8 proteins" in read(write_report(Asked(str(run), sequences=8))).text


def test_a_damaged_file_loses_one_section(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    findings_of_all_kinds(run / "findings")
    damaged = {"results": [{"model": ["no", "name"]}]}
    write_findings(run / "findings" / "evaluation.json", "evaluation", [{"revision": []}], damaged)
    text = read(write_report(Asked(str(run), sequences=0))).text
    assert text.count("This section could not be made (TypeError") == 1
    assert "Above BLOSUM62." in text
    assert "Evaluation: This section could not be made" in capsys.readouterr().err


def test_a_picture_that_is_not_shown_is_named(run: Path) -> None:
    for picture, why in ((b"", "is no PNG there"), (b"\x89PNG" + bytes(1_000_001), "is larger than 1 MB")):
        write_findings(run / "findings" / "c.json", "contacts", [], {"example": {"id": "P9", "picture": "c.png"}})
        (run / "findings" / "c.png").write_bytes(picture)
        text = read(write_report(Asked(str(run), sequences=0))).text
        assert f"The contact map of P9 is not shown: c.png {why}" in text


def test_findings_that_cannot_be_shown(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = run / "findings"
    folder.mkdir()
    (folder / "later.json").write_text('{"kind": "dms", "format": 99, "models": []}')
    write_findings(folder / "stale.json", "dms", [{"model": "mine", "revision": "sha256:old"}], {"averages": {}})
    text = read(write_report(Asked(str(run), sequences=0))).text
    assert "newer than this one" in text
    assert "stale.json is of other weights than the model has now" in text
    assert "No variants were scored" in text
    assert "stale.json" in capsys.readouterr().err
    for path, message in (
        (folder / "later.json", "newer"),
        (run / "absent", "no such file"),
        (run / "config.yaml", "not JSON"),
    ):
        with pytest.raises(UserError, match=message):
            write_report(Asked(str(run), sequences=0, findings=(path,)))


def test_against_another_model(run: Path, other: Path) -> None:
    asked = Asked(str(run), str(other), sequences=10)
    text = read(write_report(asked)).text
    assert "mine against other" in text
    (kept,) = (run / "findings").iterdir()
    plain = json.loads(kept.read_text())
    ((difference),) = plain["differences"]
    assert estimate(difference["loss"], "+.4f") in text
    before = kept.read_bytes()
    assert "nats per target, on the same targets of 10 proteins" in text or "cannot be told apart" in text
    again = read(write_report(Asked(str(run / ".." / "mine"), str(other), sequences=10))).text
    end = "No variants were scored"  # by a command that names the model as it was named
    assert again.partition(end)[0] == text.partition(end)[0], "a model is known by its weights, not by its path"
    assert kept.read_bytes() == before, "what is known is not computed again"
    # The same findings as the other model's run keeps them, its own numbers first.
    turned = {**plain, "models": plain["models"][::-1], "results": plain["results"][::-1]}
    (run / "findings" / "evaluation-turned.json").write_text(json.dumps(turned))
    thrice = read(write_report(asked)).text
    assert thrice.count("Differences, on the same targets") == text.count("Differences, on the same targets") == 1
    (run / "findings" / "evaluation-turned.json").unlink()
    with pytest.raises(UserError, match="given twice"):
        write_report(Asked(str(run), str(run)))


def test_against_a_model_that_cannot_be_evaluated(run: Path, tmp_path: Path) -> None:
    model = EsmModel(esm_config("demo", num_layers=1, width=16, num_heads=2), add_pooling_layer=False)
    model.save_pretrained(tmp_path / "headless")
    for name in ("vocab.txt", "tokenizer_config.json", "special_tokens_map.json"):
        if (run / "hub" / name).exists():
            shutil.copy(run / "hub" / name, tmp_path / "headless")
    text = read(write_report(Asked(str(run), str(tmp_path / "headless"), sequences=10))).text
    assert "Not all of it could be measured" in text
    assert "On the validation split: 10 proteins" in text


def test_a_model_that_is_no_run(
    other: Path, family_fasta: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    text = read(write_report(Asked(str(other), out=out))).text
    assert "This is no run of hf_plm" in text
    assert "name some with --data" in text
    assert "name some with --data" in capsys.readouterr().err
    text = read(write_report(Asked(str(other), out=out, data=(str(family_fasta),), sequences=15))).text
    assert "On families.fasta.gz: 15 proteins" in text
    with pytest.raises(UserError, match="There is no model"):
        write_report(Asked(str(tmp_path / "nothing"), out=out))
    with pytest.raises(UserError, match="is a folder"):
        write_report(Asked(str(other), out=tmp_path))


def test_a_corpus_that_is_gone_loses_no_page(run: Path) -> None:
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(re.sub(r"(?m)^  folder: .*families.*$", "  folder: /gone", config))
    assert "is not in /gone any more" in read(write_report(Asked(str(run)))).text


def random_families(num_families: int, num_members: int) -> list[tuple[bytes, str | None]]:
    draw = np.random.default_rng(0)
    letters = np.frombuffer(STANDARD_RESIDUES.encode(), dtype=np.uint8)
    return [
        (draw.choice(letters, 30).tobytes(), f"family {family}")
        for family in range(num_families)
        for _ in range(num_members)
    ]


def test_clusters_of_held_out_proteins_are_families(other: Path, tmp_path: Path) -> None:
    proteins = random_families(4, 5)
    columns = {"sequence": [one.decode() for one, _ in proteins], "cluster": [name for _, name in proteins]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "held_out.parquet")
    out = tmp_path / "page.html"
    text = read(write_report(Asked(str(other), out=out, data=(str(tmp_path / "held_out.parquet"),), sequences=20))).text
    assert "20 proteins of the 4 largest families in held_out.parquet" in text
    assert "is not shown to know families better than composition does" in text


def test_the_largest_families_are_taken() -> None:
    proteins = [*random_families(14, 4), (b"MKV", None), (b"MKL", "alone")]
    chosen = of_families([*proteins, *proteins], "here")
    assert chosen is not None
    assert len(chosen.residues) == 12 * 4
    assert len(set(chosen.residues)) == len(chosen.residues), "a copy is no neighbour"
    assert of_families(proteins[:5], "here") is None


def test_neighbours_are_of_the_family_where_the_vectors_say_so() -> None:
    names = [f"family {index // 10}" for index in range(40)]
    centres_PD = np.repeat(np.eye(4), 10, axis=0)
    vectors_PD = centres_PD + 0.01 * np.random.default_rng(0).normal(size=centres_PD.shape)
    found = map_of("m", vectors_PD, names)
    assert found.same == [1, 1, 1]
    assert found.silhouette is not None
    assert found.silhouette > 0.9
    shuffled = map_of("m", vectors_PD, np.random.default_rng(1).permutation(names).tolist())
    assert shuffled.same is not None
    assert shuffled.same[1] <= by_chance(names) + 0.1
    assert shuffled.same[0] < 0.6
    assert map_of("m", vectors_PD[:5], None).same is None


def test_families_are_drawn_and_not_their_members() -> None:
    """Four families of which one is known: the share may be anything, however many members say the same."""
    known = np.repeat([1.0, 0, 0, 0], 40)
    value, low, high = mean_with_interval(known, [f"family {index // 40}" for index in range(160)])
    assert (value, low) == (0.25, 0)
    assert high >= 0.5
    alone = mean_with_interval(known, [str(index) for index in range(160)])
    assert alone[1] > 0.15
    assert alone[2] < 0.35


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("sequence,clan\nMKV,a\n", "should have the columns sequence and family; it has sequence, clan"),
        ("sequence,family\nMKV,a\nM1V,a\n", "line 3: Residues .* not '1' at position 2"),
        ("sequence,family\nMKV,a\nMKL,a\nMKA,a\n", "fewer than two families with 3"),
    ],
)
def test_a_table_of_families_that_is_none(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "families.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        read_families(path)


def test_real_families(real_data: Path) -> None:
    found = read_families(real_data / "probes" / "family" / "families.tsv.gz")
    assert isinstance(found, Labelled)
    assert (len(found.residues), len(set(found.families or []))) == (480, 12)


def test_numbers() -> None:
    assert number(-0.5) == "\u22120.500"
    assert [number(value) for value in (None, math.nan, math.inf, "x", True)] == ["\u2013"] * 5
    assert estimate([1, 0.5, 2], ".1f") == "1.0 (0.5 to 2.0)"
    assert estimate([1, None, 2], ".1f") == "1.0"
    assert estimate([]) == estimate(None) == "\u2013"


def test_charts_leave_out_what_is_no_number() -> None:
    nan = math.nan
    gap = xy_chart([Series("a", [0, 1, 2, 3], [1, nan, 2, 3])], Axis("x", 0, 3), Axis("y", 0, 3), "alt")
    assert re.search(r'd="M[\d.]+ [\d.]+M[\d.]+ [\d.]+L', gap)
    empty = xy_chart([Series("a", [], [])], Axis("x", 0, 1), Axis("y", 0.1, 1, is_log=True), "alt")
    rows = rows_chart(["A", "C"], [Series("a", range(2), [1, nan], [nan, nan], [nan, 2])], Axis("", 0, 2), "alt")
    dots = scatter([Series("<a>", [0, nan], [1, 1], kind="points")], "alt")
    for chart in (gap, empty, rows, dots):
        assert "nan" not in chart
        assert not Page(f'<html lang="en">{chart}</html>').faults
    assert rows.count("<circle") == 1 + 1  # and the legend's
    assert "&lt;a&gt;" in dots


def test_an_axis_of_zeros_has_a_length() -> None:
    assert span([0.0, 0.0], zero=True) == (0, 1)
    assert span([0.0, 2.0], zero=True, pad=0.5) == (0, 3)
    low, high = span([0.0, 0.0])
    assert low < 0 < high


def test_ticks_stand_on_the_axis() -> None:
    for low, high in ((0, 1), (-3, 2e-5), (2.61, 2.79), (0, 3e6), (1e-5, 4e-4)):
        texts = [float(text.replace("\u2212", "-").replace(",", "")) for _, text in Axis("", low, high).ticks()]
        assert 3 <= len(texts) <= 8
        assert all(low - 1e-9 <= one <= high + 1e-9 for one in texts)
        assert len(set(texts)) == len(texts)


GOOD = paragraph("good")
FAULTS = {
    "external": '<img alt="a" src="https://example.org/a.png">',
    "no caption": "<figure><p>a</p></figure>",
    "no words": "<svg></svg>",
    "unclosed": "<div>",
    "twice": '<p id="a"></p><p id="a"></p>',
    "script": "<script></script>",
    "handler": '<p onclick="a()"></p>',
    "nowhere": '<a href="#b">b</a>',
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_check_finds_each_fault(fault: str) -> None:
    text = page("t", "k", [Section("summary", "S", GOOD)], "f")
    assert not Page(text).faults
    assert Page(text.replace(str(GOOD), FAULTS[fault])).faults


def test_the_command(run: Path, other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    command.add(parser.add_subparsers())
    out = tmp_path / "a" / "page.html"
    parsed = parser.parse_args(["report", str(run), "--sequences", "0", "--out", str(out)])
    parsed.run(parsed, [])
    assert capsys.readouterr().out.strip() == str(out)
    read(out)
    parsed = parser.parse_args(["report", str(run), "--sequences", "-1"])
    with pytest.raises(UserError, match="--sequences is a number from 0"):
        parsed.run(parsed, [])


def in_chromium(chromium: str, report: Path, width: int) -> tuple[int, str]:
    """How wide a page is that is shown at a width, and what the console says. Chromium's own windows start at 500."""
    frame = report.with_name("frame.html")
    frame.write_text(
        f'<!DOCTYPE html><iframe src="{report.name}" style="width:{width}px;height:800px;border:0"></iframe>'
        "<p id=w></p>"
        "<script>onload=()=>{w.textContent='width '+frames[0].document.documentElement.scrollWidth}</script>"
    )
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    flags += ["--enable-logging=stderr", "--virtual-time-budget=5000", f"--user-data-dir={report.parent / 'profile'}"]
    command = [chromium, *flags, "--dump-dom", frame.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r"width (\d+)", shown.stdout)
    assert found, shown.stdout[-500:]
    return int(found[1]), "\n".join(line for line in shown.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.slow
def test_chromium_opens_it(run: Path, other: Path, tmp_path: Path) -> None:
    """No message of the console, and no sideways scrolling at the width of a phone; the twin has both."""
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next((found for name in names if (found := shutil.which(name))), None)
    if chromium is None:
        pytest.skip("needs Chromium on the PATH")
    findings_of_all_kinds(run / "findings")
    report = write_report(Asked(str(run), str(other), sequences=20, out=tmp_path / "page.html"))
    assert in_chromium(chromium, report, 390) == (390, "")
    twin = '<div style="width:900px">wide</div><script>console.error("heard")</script></main>'
    report.write_text(report.read_text().replace("</main>", twin))
    width, console = in_chromium(chromium, report, 390)
    assert width > 900
    assert "heard" in console
