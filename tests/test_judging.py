"""Evaluations during a run: the commands' numbers, in the metrics, without a trace in the training."""

import json

import numpy as np
import pytest
import torch

from hf_plm.config import UserError
from hf_plm.judging.evaluation import evaluate_sample
from hf_plm.judging.protocol import Protocol, read_sample
from hf_plm.models.masked_lm import open_masked_lm
from hf_plm.models.presets import build_model, esm_config
from hf_plm.recipe import load_recipe
from hf_plm.training.judging import Judge, check_tasks, probed, told
from hf_plm.training.pretrain import pretrain


@pytest.fixture
def tasks(tmp_path, family_fasta):
    """A scan, structures and a task of a few simulated proteins."""
    from hf_plm.proteins.fasta import read_fasta

    draw = np.random.default_rng(0)
    proteins = [record.sequence for record in read_fasta(family_fasta)][:60]
    folder = tmp_path / "dms"
    folder.mkdir()
    wild_type = proteins[0]
    (folder / "DMS_substitutions.csv").write_text(
        "DMS_id,DMS_filename,UniProt_ID,target_seq,coarse_selection_type,DMS_binarization_cutoff\n"
        f"one,one.csv,ONE,{wild_type},Activity,0\n"
    )
    rows = [f"{wild_type[place]}{place + 1}{'A' if wild_type[place] != 'A' else 'G'}" for place in range(20)]
    lines = [f"{mutant},{value:.3f},{int(value > 0)}" for mutant, value in zip(rows, draw.normal(size=20), strict=True)]
    (folder / "one.csv").write_text("mutant,DMS_score,DMS_score_bin\n" + "\n".join(lines) + "\n")
    with open(tmp_path / "structures.jsonl", "w") as file:
        for number, residues in enumerate(proteins[:40]):
            pairs = [[i, i + 30] for i in range(0, len(residues) - 30, 2)]
            row = {"id": f"s{number}", "set": "made", "atom": "CA", "cutoff": 8, "seq": residues, "pairs": pairs}
            file.write(json.dumps(row) + "\n")
    counts = np.array([residues.count("L") for residues in proteins])
    labels = np.where(counts > np.median(counts), "yes", "no")
    rows = [
        f"t{number},{residues},{label},{'train' if number % 4 else 'test'}"
        for number, (residues, label) in enumerate(zip(proteins, labels, strict=True))
    ]
    (tmp_path / "task.csv").write_text("\n".join(["id,sequence,label,split", *rows]) + "\n")
    return tmp_path


def recipe(family_corpus, folder, **knobs):
    small = {
        "model.preset": "1x32x2",
        "data.train": [str(family_corpus)],
        "data.crop": "128",
        "batch.tokens": "512",
        **({} if "schedule__budget" in knobs else {"schedule.steps": "6"}),
        "run.log_every": "1",
        "run.trackers": "none",
        "run.folder": str(folder),
    }
    return load_recipe("demo", {**small, **{name.replace("__", "."): value for name, value in knobs.items()}})


def test_tasks_are_judged_during_a_run_and_leave_it_alone(family_corpus, family_fasta, tasks, tmp_path):
    judged = recipe(
        family_corpus,
        tmp_path / "judged",
        evaluate__every="3",
        evaluate__data=[str(family_fasta)],
        evaluate__dms=str(tasks / "dms"),
        evaluate__contacts=str(tasks / "structures.jsonl"),
        evaluate__probe=[str(tasks / "task.csv")],
        evaluate__sample="40",
    )
    pretrain(judged)
    pretrain(recipe(family_corpus, tmp_path / "plain"))
    lines, plain = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("judged", "plain")
    )
    found = [line for line in lines if "evaluate_loss" in line]
    assert [line["step"] for line in found] == [3, 6]
    for name in ("dms_spearman", "dms_blosum62_spearman", "contacts_long", "contacts_long_chance"):
        assert all(np.isfinite(line[name]) for line in found), name
    probes = {name for name in found[0] if name.startswith("probe_task")}
    assert len(probes) >= 2
    assert any(name.endswith("_baseline") for name in probes)

    def losses(some):
        return [line["loss"] for line in some if "loss" in line]

    assert losses(lines) == losses(plain)
    # The last evaluation is of the weights that were exported.
    numbers = evaluate_sample(
        open_masked_lm(tmp_path / "judged"), read_sample([family_fasta], Protocol(), 40)
    ).summary()
    assert found[-1]["evaluate_loss"] == pytest.approx(numbers["validation_loss"], abs=1e-6)
    assert found[0]["evaluate_loss"] != pytest.approx(numbers["validation_loss"], abs=1e-6)


def judged_steps(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "evaluate_loss" in line]


def test_the_last_step_is_judged_once(family_corpus, family_fasta, tmp_path, monkeypatch):
    """Where it is no multiple, whatever stopped the run between its last step and its end, and however often."""
    tasks = {"evaluate__every": "3", "evaluate__data": [str(family_fasta)], "evaluate__sample": "10"}
    short = recipe(family_corpus, tmp_path / "run", schedule__steps="5", **tasks)

    def stopped(*arguments):
        raise KeyboardInterrupt

    for name, steps in (("judge_now", [3]), ("finish", [3, 5]), ("finish", [3, 5])):
        with monkeypatch.context() as patch:
            patch.setattr(f"hf_plm.training.pretrain.{name}", stopped)
            with pytest.raises(KeyboardInterrupt):
                pretrain(short)
        assert judged_steps(tmp_path / "run") == steps
    pretrain(short)
    assert judged_steps(tmp_path / "run") == [3, 5]
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    pretrain(short)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before, "a finished run is left as it is"


def test_a_run_within_a_budget_is_judged_at_its_end(family_corpus, family_fasta, tmp_path):
    tasks = {"evaluate__every": "1000000", "evaluate__data": [str(family_fasta)], "evaluate__sample": "10"}
    result = pretrain(recipe(family_corpus, tmp_path / "run", schedule__budget="1s", **tasks))
    assert judged_steps(tmp_path / "run") == [result.summary["steps"]]


def test_names_of_probes_in_words():
    assert probed("probe_loc_mcc") == "loc MCC"
    assert probed("probe_my_sites_balanced_accuracy") == "my_sites balanced accuracy"
    assert probed("probe_odd") == "odd"
    assert told({"probe_loc_mcc": 0.5, "probe_loc_mcc_baseline": 0.25}) == "loc MCC 0.5000 (0.2500)"


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"evaluate__every": "5"}, "needs something to evaluate on"),
        ({"evaluate__data": ["x.fasta"]}, "give it too"),
        ({"evaluate__every": "0", "evaluate__data": ["x.fasta"]}, "a number of steps from 1"),
        ({"evaluate__every": "5", "evaluate__data": ["x.fasta"], "evaluate__sample": "2"}, "a number from 10"),
    ],
)
def test_mistakes(knobs, message, family_corpus, tmp_path):
    with pytest.raises(UserError, match=message):
        check_tasks(recipe(family_corpus, tmp_path / "run", **knobs))


def test_a_task_that_is_not_there_is_told_before_the_first_step(family_corpus, tmp_path):
    wrong = recipe(family_corpus, tmp_path / "run", evaluate__every="3", evaluate__data=["nowhere.fasta"])
    with pytest.raises(UserError, match=r"nowhere\.fasta"):
        pretrain(wrong)
    assert not list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_a_task_that_fails_is_told_and_the_others_count(family_corpus, tmp_path):
    def without_room(stock, device):
        raise RuntimeError("no room on the device\nand a trace")

    judge = Judge(recipe(family_corpus, tmp_path / "run"))
    judge._tasks = [without_room, lambda stock, device: {"fine": 1.0}]
    found, complaints = judge.numbers(build_model(esm_config("1x32x2"), seed=0), torch.device("cpu"))
    assert found == {"fine": 1.0}
    assert complaints == ["no room on the device"]
