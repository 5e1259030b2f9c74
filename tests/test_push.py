"""Publishing: what is sent is whole, verified and names nobody; a bad network costs time and nothing else."""

import getpass
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import HfApi, ModelCard, snapshot_download
from safetensors.torch import load_file, save_file
from support.hub_server import Fault, HubServer
from support.small import FOUR_STEPS
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_plm import load_recipe, pretrain
from hf_plm.config import UserError
from hf_plm.data.prepare import ensure_prepared
from hf_plm.models.hub import without_checksums
from hf_plm.training import run_folder
from hf_plm.training.export import export
from hf_plm.training.push import listing, push
from hf_plm.training.pushes import BackgroundPushes, push_finished
from hf_plm.training.shipment import Request

REPO, DATA = "tester/plm", "tester/families"
# The client's own way of giving httpx a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture
def waits(monkeypatch):
    """The seconds that we would have waited between attempts: noted, not waited."""
    seconds = []
    monkeypatch.setattr("hf_plm.remote.time", SimpleNamespace(sleep=seconds.append))
    return seconds


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy that a test may break."""
    return Path(shutil.copytree(finished_run, tmp_path / "runs" / "mine"))


def pushed(folder, *arguments, **options):
    said = []
    push(Request(folder, *arguments, **options), said.append)
    return said


def writes(hub):
    return [call for call in hub.requests if call[0] in ("POST", "PUT", "DELETE") and "validate-yaml" not in call[1]]


# --- What arrives


def test_a_run_arrives_whole_private_and_under_its_new_name(hub, run):
    pushed(run, REPO)
    assert hub.is_private(REPO)
    assert [title for _, title in hub.commits(REPO)] == ["4 steps", "initial commit"]
    there = hub.files(REPO)
    assert there.pop(".gitattributes")
    local = {path.name: path.read_bytes() for path in (run / "hub").iterdir()}
    card = there.pop("README.md").decode()
    assert there == {name: content for name, content in local.items() if name != "README.md"}
    assert f'AutoModelForMaskedLM.from_pretrained("{REPO}")' in card
    assert f"--init.from {REPO} " in card
    assert f"\n# {REPO}\n" in card
    assert 'from_pretrained("mine")' not in card
    assert 'from_pretrained("mine")' in (run / "hub" / "README.md").read_text()


def test_it_comes_back_as_it_was_for_those_who_may_see_it(hub, run, monkeypatch):
    pushed(run, REPO)
    model, info = AutoModelForMaskedLM.from_pretrained(REPO, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = AutoTokenizer.from_pretrained(REPO)("MKTV<mask>RQ", return_tensors="pt")
    here = AutoModelForMaskedLM.from_pretrained(run / "hub")
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, here(**batch).logits)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody_knows_this_one")
    with pytest.raises(OSError):  # noqa: PT011 (transformers hides whatever the client says)
        AutoModelForMaskedLM.from_pretrained(REPO, force_download=True)


def test_public_only_when_asked_and_an_old_repository_stays_as_it_is(hub, run):
    pushed(run, REPO, is_public=True)
    assert not hub.is_private(REPO)
    pushed(run, REPO)
    assert not hub.is_private(REPO)
    HfApi().create_repo("tester/other", private=True)
    assert "private, and stays so" in pushed(run, "tester/other", is_public=True)[0]
    assert hub.is_private("tester/other")


def test_a_checkpoint_goes_to_a_branch_of_its_own(hub, run):
    pushed(run, REPO, "step-2")
    assert [title for _, title in hub.commits(REPO)] == ["initial commit"]
    found = AutoModelForMaskedLM.from_pretrained(REPO, revision="step-2").state_dict()
    saved = load_file(next((run / "checkpoints" / "step-00000002").glob("model-*.safetensors")))
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    card = hub.files(REPO, revision="step-2")["README.md"].decode()
    assert "middle of the run, after step 2" in card
    assert f'AutoModelForMaskedLM.from_pretrained("{REPO}", revision="step-2")' in card
    assert f"--init.from {REPO}@step-2 " in card
    assert not list(run.glob(".push-*"))
    with pytest.raises(UserError, match=r"no checkpoint of step 3; there are 2, 4 "):
        pushed(run, REPO, "step-3")


@pytest.mark.parametrize("fault", [Fault(500, times=99), Fault(kind="drop", method="PUT", path="", times=999)])
def test_a_branch_never_passes_for_another_model(hub, run, waits, fault):
    pushed(run, REPO)
    hub.play(fault)
    with pytest.raises(UserError):
        pushed(run, REPO, "step-2")
    assert {branch.name for branch in HfApi().list_repo_refs(REPO).branches} == {"main"}
    hub.faults.clear()
    pushed(run, REPO, "step-2")
    assert [title for _, title in hub.commits(REPO, revision="step-2")] == ["Step 2", "initial commit"]
    assert hub.files(REPO)["model.safetensors"] != hub.files(REPO, revision="step-2")["model.safetensors"]


def test_the_same_again_is_no_commit(hub, run):
    pushed(run, REPO)
    commits, sent = hub.commits(REPO), len([call for call in hub.requests if call[0] == "PUT"])
    pushed(run, REPO)
    assert hub.commits(REPO) == commits
    assert len([call for call in hub.requests if call[0] == "PUT"]) == sent


def test_a_step_has_one_branch_however_it_is_written(hub, run):
    for written in ("step-2", "step2", "step-00000002"):
        pushed(run, REPO, written)
    assert {branch.name for branch in HfApi().list_repo_refs(REPO).branches} == {"main", "step-2"}
    assert len(hub.commits(REPO, revision="step-2")) == 2


def test_a_licence_written_into_the_card_reaches_all_branches(hub, run):
    card = run / "hub" / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    pushed(run, REPO)
    pushed(run, REPO, "step-2")
    for branch in ("main", "step-2"):
        there = ModelCard(hub.files(REPO, revision=branch)["README.md"].decode())
        assert there.data.license == "mit"
        assert "No licence was chosen" not in there.text


def test_a_card_edited_on_the_hub_is_said_to_be_replaced(hub, run):
    pushed(run, REPO)
    HfApi().upload_file(path_or_fileobj=b"# mine\n", path_in_repo="README.md", repo_id=REPO, commit_message="web edit")
    assert pushed(run, REPO)[0].startswith("The card on the Hub was changed there (web edit); yours replaces it")
    change(run)
    assert pushed(run, REPO) == []


def test_a_folder_that_others_saved_is_told_what_it_lacks(hub, run, tmp_path):
    AutoModelForMaskedLM.from_pretrained(run / "hub").save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match=r"has no tokenizer; hf-plm export .*saved --out NEW_FOLDER writes a whole one"):
        pushed(tmp_path / "saved", REPO)
    export(str(tmp_path / "saved"), "hub", tmp_path / "whole")
    pushed(tmp_path / "whole", REPO)
    AutoTokenizer.from_pretrained(run / "hub").save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match=r"has no model card \(README.md\)"):
        pushed(tmp_path / "saved", REPO)


@pytest.mark.parametrize("branch", ["refs/pr/1", "-x", "a b", "../main", ""])
def test_a_revision_is_a_branch(hub, run, branch):
    if branch:
        with pytest.raises(UserError, match="--revision names a branch, such as step-10000"):
            pushed(run, REPO, branch)
    assert hub.requests == []


def test_an_unfinished_run_is_not_pushed_by_mistake(hub, run):
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match=r"is not finished; push one of its checkpoints with --revision step-N"):
        pushed(run, REPO)
    pushed(run, REPO, "step-2")


def test_a_later_push_takes_away_what_the_earlier_left_and_no_more(hub, run):
    (run / "hub" / "picture.png").write_bytes(b"png")
    (run / "hub" / "LICENSE").write_text("Do what you like.")
    card = run / "hub" / "README.md"
    card.write_text(card.read_text() + f"| `picture.png` | `{hashlib.sha256(b'png').hexdigest()}` |\n")
    pushed(run, REPO)
    assert hub.files(REPO)["picture.png"] == b"png"
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="notes/usage.md", repo_id=REPO)
    (run / "hub" / "picture.png").unlink()
    card.write_text(re.sub(r"\| `picture.png`.*\n", "", card.read_text()))
    assert "Removing what an earlier push left: picture.png." in pushed(run, REPO)
    there = hub.files(REPO)
    assert "picture.png" not in there
    assert there["notes/usage.md"] == b"mine"
    assert there["LICENSE"] == b"Do what you like."


def test_a_licence_set_on_the_hub_stays(hub, run):
    HfApi().create_repo(REPO)
    HfApi().upload_file(path_or_fileobj=b"---\nlicense: cc0-1.0\n---\n", path_in_repo="README.md", repo_id=REPO)
    said = pushed(run, REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("cc0-1.0", "transformers")
    assert "No licence was chosen" not in card.text
    assert len(said) == 1
    card = run / "hub" / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nlicense: mit\n", 1))
    pushed(run, REPO)
    assert ModelCard(hub.files(REPO)["README.md"].decode()).data.license == "mit"


def test_dry_run_verifies_lists_every_file_and_asks_nothing(hub, run):
    text = listing(Request(run, REPO))
    names = [line.split()[1] for line in text.splitlines() if line.startswith("  ")]
    assert names == sorted(path.name for path in (run / "hub").iterdir())
    assert "(private if new)" in text
    assert hub.requests == []
    (run / "hub" / "vocab.txt").write_text("A\n")
    with pytest.raises(UserError):
        listing(Request(run, REPO))


def test_nobody_is_named_in_what_is_sent(hub, run, finished_run, family_corpus):
    pushed(run, REPO)
    pushed(run, REPO, "step-2")
    pushed(family_corpus, DATA)
    sent = {**hub.files(REPO), **{f"2/{name}": data for name, data in hub.files(REPO, revision="step-2").items()}}
    sent |= hub.files(DATA, "dataset")
    places = {
        str(run),
        str(finished_run),
        str(family_corpus),
        str(Path.home()),
        os.getcwd(),
        "home_of_somebody",
        "/tmp",
    }
    for name, content in sent.items():
        assert not [place for place in places if place.encode() in content], name
        if name.endswith((".md", ".json", ".txt", ".tsv")):
            words = set(re.findall(r"[\w.-]+", content.decode()))
            assert not words & {socket.gethostname(), getpass.getuser(), str(os.getpid())}, name


# --- What is refused, before anything is asked of the Hub


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("bit", r"model.safetensors is not the file that the model card names"),
        ("key", r"does not fit its config.json: missing weights: lm_head.dense.weight"),
        ("nan", r"weights that are not numbers"),
        ("cut", r"cannot be loaded"),
        ("tokenizer", r"vocab.txt"),
        ("front matter", r"cannot be read .*correct its front matter"),
        ("no front matter", r"has no front matter"),
        ("pickle", r"optimizer.pt has no place in a repository of a model"),
        ("code", r"modeling.py has no place in a repository of a model"),
        ("log", r"training.log has no place"),
        ("foreign code", r"config.json has 'auto_map', which points outside"),
        ("token", r"README.md holds what looks like a token of the Hub"),
        ("nothing", r"is neither a run, a Hub folder nor a prepared corpus"),
    ],
)
def test_a_folder_that_is_not_right_is_not_sent(hub, run, fault, sentence):
    folder = run / "hub"
    path = folder / "model.safetensors"
    weights, card = load_file(path), folder / "README.md"
    if fault == "bit":
        weights["lm_head.bias"][3] += 1e-6
    elif fault == "key":
        del weights["lm_head.dense.weight"]
    elif fault == "nan":
        weights["lm_head.bias"][3] = float("nan")
    save_file(weights, path, {"format": "pt"})
    if fault == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif fault == "tokenizer":
        (folder / "vocab.txt").write_text("\n".join(sorted((folder / "vocab.txt").read_text().split())))
    elif fault == "front matter":
        card.write_text("---\nlicense: [mit\n---\n# A\n")
    elif fault == "no front matter":
        card.write_text("# A\n")
    elif fault == "pickle":
        (folder / "optimizer.pt").write_bytes(b"")
    elif fault == "code":
        (folder / "modeling.py").write_text("print()")
    elif fault == "log":
        (folder / "training.log").write_text("at home")
    elif fault == "foreign code":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "a/b--c.D"}}))
        card.write_text(without_checksums(card.read_text()))
    elif fault == "token":
        card.write_text(card.read_text() + "hf_" + "a1B" * 10)
    elif fault == "nothing":
        shutil.rmtree(folder)
        (run / "config.yaml").unlink()
    with pytest.raises(UserError, match=sentence):
        pushed(run, REPO)
    assert hub.requests == []


def test_without_a_token_nothing_is_asked(hub, run, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(UserError, match=r"no token to push the model tester/plm with; log in with `hf auth login`"):
        pushed(run, REPO)
    assert hub.requests == []


# --- A bad network

FINAL = {
    "unknown token": (Fault(401), r"does not accept the token"),
    "no right": (Fault(403), r"token may not do that with the model tester/plm"),
    "gone": (Fault(404), r"The Hub has not got the model tester/plm"),
    "bad card": (Fault(400), r"The Hub refused the model tester/plm \(HTTP 400\)"),
}


@pytest.mark.parametrize("name", FINAL)
def test_what_will_not_pass_is_told_at_once_and_nothing_is_published(hub, run, waits, capfd, name):
    pushed(run, REPO)
    before, commits = hub.files(REPO), hub.commits(REPO)
    change(run)
    fault, sentence = FINAL[name]
    hub.play(fault)
    with pytest.raises(UserError, match=sentence) as error:
        pushed(run, REPO)
    assert (hub.files(REPO), hub.commits(REPO)) == (before, commits)
    assert waits == []
    assert hub.token not in str(error.value) + "".join(capfd.readouterr())


PASSING = {
    "too many requests": (Fault(429, times=2, retry_after=7), r"too many requests .*Trying again in 7 s"),
    "conflict": (Fault(409), r"busy with the model tester/plm \(HTTP 409\)"),
    "refused for a while": (Fault(503, retry_after=4), r"HTTP 503.*Trying again in 4 s"),
    "failed after the commit": (Fault(500, path="/paths-info/", times=3), r"HTTP 500"),
    "failed before all": (Fault(500, path="/repos/create"), r"HTTP 500"),
    "failed at the preupload": (Fault(500, path="/preupload/", times=8), r"HTTP 500"),
    "server failed": (Fault(500, times=2), r"HTTP 500.*Trying again in 1 s"),
    "unavailable": (Fault(503, times=2), r"HTTP 503"),
    "somebody else": (Fault(kind="overtake"), r"Somebody else wrote to the model tester/plm in between"),
    "dropped in the commit": (Fault(kind="drop"), r"connection to the Hub failed"),
    "dropped in a large file": (Fault(kind="drop", method="PUT", path="", times=8), r"connection to the Hub failed"),
    "answer lost": (Fault(kind="lose_answer"), r"connection to the Hub failed"),
    "slow": (Fault(kind="slow"), None),
    "rude": (Fault(kind="echo_token", times=2), r"HTTP 500"),
}


@pytest.mark.parametrize("name", PASSING)
def test_what_passes_is_waited_for_and_then_all_is_there(hub, run, waits, capfd, name):
    pushed(run, REPO)
    change(run)
    fault, sentence = PASSING[name]
    hub.play(fault)
    said = " ".join(pushed(run, REPO))
    if sentence:
        assert re.search(sentence, said), said
    else:
        assert said == ""
    there = hub.files(REPO)
    assert all(there[path.name] == path.read_bytes() for path in (run / "hub").iterdir() if path.name != "README.md")
    titles = [title for _, title in hub.commits(REPO)]
    assert titles.count("4 steps") == 2
    assert len(titles) == (4 if name == "somebody else" else 3)
    assert hub.token not in said + "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "fault",
    [
        Fault(500, times=99),
        Fault(429, times=99, retry_after=1),
        Fault(429, times=99, retry_after=4000),
        Fault(kind="drop", method="PUT", path="", times=999),
        Fault(kind="echo_token", times=99),
    ],
)
def test_what_does_not_pass_is_given_up_and_nothing_is_half_published(hub, run, waits, capfd, fault):
    pushed(run, REPO)
    before, commits = hub.files(REPO), hub.commits(REPO)
    change(run)
    hub.play(fault)
    with pytest.raises(UserError) as error:
        pushed(run, REPO)
    assert (hub.files(REPO), hub.commits(REPO)) == (before, commits)
    assert len(waits) == (0 if fault.retry_after == 4000 else 5)
    assert hub.token not in str(error.value) + "".join(capfd.readouterr())
    assert "\n" not in str(error.value)
    hub.faults.clear()


def change(run):
    """Another model in the run, whole in itself."""
    from hf_plm.models.hub import load_hub_folder, save_hub_folder

    model, _ = load_hub_folder(run / "hub")
    model.lm_head.bias.data += 1
    card = (run / "hub" / "README.md").read_text().split("\n## Files")[0]
    save_hub_folder(model, run / "hub", card, {"curves.png": run / "curves.png"})


def test_what_the_hub_has_otherwise_than_it_was_sent_is_noticed(hub, run, monkeypatch):
    """The twin of the comparison after the commit."""
    monkeypatch.setattr("hf_plm.training.push._differing", lambda *args: ["README.md"])
    with pytest.raises(UserError, match=r"README.md is not on the Hub as it was sent"):
        pushed(run, REPO)


def test_the_command_exits_as_it_should_and_the_token_is_nowhere(hub, run, tmp_path):
    def call(*words):
        command = [sys.executable, "-m", "hf_plm.cli", *words]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hub.environment})

    good = call("push", str(run), REPO)
    assert (good.returncode, good.stdout) == (0, f"Pushed: {hub.url}/{REPO}/tree/main\n")
    hub.play(Fault(kind="echo_token", status=403))
    change(run)
    bad = call("push", str(run), REPO)
    assert (bad.returncode, bad.stdout) == (1, "")
    assert bad.stderr.startswith("hf-plm: The token may not do that")
    assert bad.stderr.count("\n") == 1
    texts = [good.stdout, good.stderr, bad.stdout, bad.stderr]
    assert not [text for text in texts if hub.token in text]
    # huggingface_hub keeps no token either, since it came from the environment.
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and hub.token.encode() in path.read_bytes()]


def test_without_xet_a_push_goes_the_other_way(run, tmp_path):
    """The client asks Xet first where hf_xet is installed, and gives up when it is refused."""
    with HubServer(xet="refused", home=tmp_path / "hf_home") as hub:
        command = [sys.executable, "-m", "hf_plm.cli", "push", str(run), REPO]
        environment = {**os.environ, **hub.environment, "HF_HUB_DISABLE_XET": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        assert "Sending through Xet" in done.stdout
        assert hub.files(REPO)["model.safetensors"] == (run / "hub" / "model.safetensors").read_bytes()


# --- Corpora


def test_a_corpus_goes_and_comes_back_the_same_and_streams(hub, family_corpus, tmp_path):
    pushed(family_corpus, DATA)
    assert hub.is_private(DATA, "dataset")
    there = hub.files(DATA, "dataset")
    del there[".gitattributes"]
    here = {path.relative_to(family_corpus).as_posix() for path in family_corpus.rglob("*") if path.is_file()}
    assert there.keys() == {name for name in here if not name.startswith(".")}
    assert all((family_corpus / name).read_bytes() == content for name, content in there.items())

    stream = load_dataset(DATA, split="train", streaming=True)
    assert {"id", "sequence", "length"} <= set(next(iter(stream)))
    folder = ensure_prepared(DATA, tmp_path / "cache", show_progress=False)
    assert (folder / "corpus.json").read_bytes() == (family_corpus / "corpus.json").read_bytes()

    knobs = {"run.folder": str(tmp_path / "run"), **FOUR_STEPS}
    summary = pretrain(load_recipe("demo", {"data.train": DATA, **knobs})).summary
    local = {**knobs, "run.folder": str(tmp_path / "local")}
    assert (
        summary["corpus"]
        == pretrain(load_recipe("demo", {"data.train": str(family_corpus), **local})).summary["corpus"]
    )
    card = ModelCard((tmp_path / "run" / "hub" / "README.md").read_text())
    assert card.data.to_dict()["datasets"] == [DATA]
    assert "datasets" not in ModelCard((tmp_path / "local" / "hub" / "README.md").read_text()).data.to_dict()


def test_a_push_that_failed_late_does_not_send_large_files_again(hub, family_corpus, waits):
    hub.play(Fault(500, times=99))
    with pytest.raises(UserError):
        pushed(family_corpus, DATA)
    sent = [path for method, path, _ in hub.requests if method == "PUT"]
    assert sent
    assert hub.files(DATA, "dataset").keys() == {".gitattributes"}
    hub.faults.clear()
    pushed(family_corpus, DATA)
    assert [path for method, path, _ in hub.requests if method == "PUT"] == sent
    assert "data/train-00000-of-00001.parquet" in hub.files(DATA, "dataset")


@pytest.mark.parametrize("fault", ["changed", "missing", "foreign"])
def test_a_corpus_that_is_not_as_it_was_prepared_is_not_sent(hub, family_corpus, tmp_path, fault):
    folder = Path(shutil.copytree(family_corpus, tmp_path / "corpus"))
    shard = next(folder.glob("data/train-*.parquet"))
    if fault == "changed":
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    elif fault == "missing":
        shard.unlink()
    else:
        (folder / "notes.txt").write_text("private")
    with pytest.raises(
        UserError, match="notes.txt is no part" if fault == "foreign" else "is not the file that corpus"
    ):
        pushed(folder, DATA)
    assert hub.requests == []


# --- From a run


@pytest.fixture
def online(hub, monkeypatch):
    for name, value in hub.environment.items():
        monkeypatch.setenv(name, value)
    return hub


def recipe(corpus, folder, **knobs):
    named = {name.replace("__", "."): value for name, value in knobs.items()}
    return load_recipe("demo", {"data.train": str(corpus), "run.folder": str(folder), **FOUR_STEPS, **named})


def lines(folder):
    read = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if "second" not in key} for line in read]


def test_a_run_pushes_its_checkpoints_and_its_end(online, family_corpus, tmp_path, finished_run, capfd):
    pretrain(recipe(family_corpus, tmp_path / "mine", hub__push=REPO, hub__every="2", hub__license="mit"))
    said = "".join(capfd.readouterr())
    assert "Pushed step 2 to tester/plm, branch step-2." in said
    assert f"Pushed the model: {online.url}/{REPO}/tree/main" in said
    branches = {branch.name for branch in HfApi().list_repo_refs(REPO).branches}
    assert branches == {"main", "step-2", "step-4"}
    assert "license: mit" in online.files(REPO)["README.md"].decode()
    assert lines(tmp_path / "mine") == lines(finished_run)
    again = len(writes(online))
    pretrain(recipe(family_corpus, tmp_path / "mine", hub__push=REPO))
    assert len(writes(online)) == again


def test_a_hub_that_fails_neither_stops_nor_changes_the_run(online, family_corpus, tmp_path, finished_run, monkeypatch):
    """The pushes of a run are processes of their own, so that their waits are real: one attempt is all they have."""
    monkeypatch.setattr("hf_plm.remote.ATTEMPTS", 1)
    monkeypatch.setattr("hf_plm.remote.attempt.__defaults__", (print, 1))
    online.play(Fault(403, times=99))
    with pytest.raises(
        UserError,
        match=r"The run is finished .* its model was not pushed .* and step 2, 4 waits; .* hf-plm push .* tester/plm",
    ):
        pretrain(recipe(family_corpus, tmp_path / "mine", hub__push=REPO, hub__every="2"))
    assert lines(tmp_path / "mine") == lines(finished_run)
    assert online.files(REPO).keys() == {".gitattributes"}
    assert json.loads((tmp_path / "mine" / "pushed.json").read_text())["pending"] == [2, 4]
    # The next start of the same command takes it up.
    online.faults.clear()
    pretrain(recipe(family_corpus, tmp_path / "mine", hub__push=REPO))
    assert "model.safetensors" in online.files(REPO)
    branches = {branch.name for branch in HfApi().list_repo_refs(REPO).branches}
    assert branches == {"main", "step-2", "step-4"}
    everything = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in everything if online.token.encode() in path.read_bytes()]


def test_a_run_that_may_not_push_does_not_begin(online, family_corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", online.read_token)
    with pytest.raises(UserError, match=r"needs the right to write"):
        pretrain(recipe(family_corpus, tmp_path / "mine", hub__push=REPO))
    assert not (tmp_path / "mine" / "config.yaml").exists()


class FakePush:
    def __init__(self, returncode):
        self.returncode, self.is_over = returncode, False

    def poll(self):
        return self.returncode if self.is_over else None


@pytest.fixture
def pushes(tmp_path, monkeypatch):
    """Pushes whose processes are made up: `outcomes` are their exit codes, `started` their steps."""
    said, started, outcomes = [], [], []
    (tmp_path / "push.log").write_text("hf-plm: The Hub failed.\n")
    monkeypatch.setattr(
        BackgroundPushes,
        "_start",
        lambda self, step: started.append(step) or FakePush(outcomes.pop(0) if outcomes else 0),
    )

    def new(step):
        made = BackgroundPushes(recipe("x", tmp_path, hub__push=REPO, hub__every="10").hub, tmp_path, step, said.append)
        made.said, made.started, made.outcomes = said, started, outcomes
        return made

    return new


def end(pushes):
    pushes._running[1].is_over = True
    pushes.poll()


def test_what_failed_is_tried_again_with_the_next_and_its_checkpoint_is_held(pushes):
    run = pushes(0)
    run.outcomes += [1, 0, 0]
    for step in (5, 10, 15):
        run.offer(step)
    assert (run.started, run.held) == ([10], {"step-00000010"})
    end(run)
    assert run.said == ["Step 10 was not pushed: The Hub failed. The next push tries it again."]
    assert run.held == {"step-00000010"}
    run.offer(20)
    assert (run.started, run.held) == ([10, 10], {"step-00000010", "step-00000020"})
    end(run)
    end(run)
    assert run.started == [10, 10, 20]
    assert run.held == set()


def test_what_waits_is_taken_up_after_a_stop_or_said_to_be_lost(pushes, tmp_path):
    run = pushes(0)
    for step in (10, 20):
        run.offer(step)
        (tmp_path / "checkpoints" / f"step-{step:08d}").mkdir(parents=True)
    run._running = None  # as after a kill
    assert json.loads((tmp_path / "pushed.json").read_text())["pending"] == [10, 20]
    (tmp_path / "checkpoints" / "step-00000010").rmdir()
    again = pushes(25)
    assert again.said == ["Step 10 was never pushed, and its checkpoint is gone."]
    assert again.held == {"step-00000020"}
    again.poll()
    assert again.started == [10, 20]


def test_too_many_that_wait_are_given_up_with_a_word(pushes):
    run = pushes(0)
    for step in (10, 20, 30, 40, 50):
        run.offer(step)
    assert run.held == {"step-00000010", "step-00000040", "step-00000050"}
    assert [line.split(":")[0] for line in run.said] == [
        "Step 20 is not pushed any more",
        "Step 30 is not pushed any more",
    ]


def test_a_log_that_cannot_be_written_is_a_failed_push_and_no_more(tmp_path):
    (tmp_path / "push.log").mkdir()
    said = []
    run = BackgroundPushes(recipe("x", tmp_path, hub__push=REPO, hub__every="1").hub, tmp_path, 0, said.append)
    run.offer(1)
    assert "Step 1 was not pushed: Is a directory" in said[0]
    run.close()


def test_what_a_killed_push_left_is_swept(hub, run):
    (run / ".push-made" / "hub").mkdir(parents=True)
    pushed(run, REPO, "step-2")
    assert not (run / ".push-made").exists()
    (run / ".push-made").mkdir()
    BackgroundPushes(recipe("x", run, hub__push=REPO, hub__every="1").hub, run, 0, print)
    assert not (run / ".push-made").exists()


def test_two_pushes_of_one_checkpoint_do_not_meet(hub, run):
    with run_folder.locked(run / ".push.lock", "is pushing"):
        code = "import sys; from hf_plm.cli import main; main(sys.argv[1:])"
        command = [sys.executable, "-c", code, "push", str(run), REPO, "--revision", "step-2"]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **hub.environment})
    assert done.returncode == 1
    assert "is pushing a checkpoint of" in done.stderr


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"hub__license": "mitt"}, r"The Hub does not take the card of the model tester/plm: .*must be one of"),
        ({"hub__push": "somebody/else"}, r"needs the right to write"),
    ],
)
def test_what_would_fail_at_the_end_is_told_at_the_start(online, family_corpus, tmp_path, knobs, sentence, monkeypatch):
    if "hub__push" in knobs:
        with monkeypatch.context() as other:
            other.setattr("support.hub_server.OWNER", "somebody")
            HfApi().create_repo("somebody/else")
        monkeypatch.setenv("HF_TOKEN", online.read_token)
    with pytest.raises(UserError, match=sentence):
        pretrain(recipe(family_corpus, tmp_path / "mine", **{"hub__push": REPO, **knobs}))
    assert not (tmp_path / "mine" / "config.yaml").exists()


def test_a_mistake_in_the_data_leaves_no_empty_repository(online, tmp_path):
    with pytest.raises(UserError, match=r"no file or folder"):
        pretrain(recipe("nosuch.fasta", tmp_path / "mine", hub__push=REPO))
    assert not HfApi().repo_exists(REPO)


def test_a_finished_run_asked_for_another_card_says_where_it_is(family_corpus, tmp_path, finished_run):
    again = load_recipe(
        "demo", {"data.train": str(family_corpus), "run.folder": str(finished_run), **FOUR_STEPS, "hub.license": "mit"}
    )
    with pytest.raises(
        UserError, match=r"is finished, and hub.license went into its model card then; edit .*README.md"
    ):
        pretrain(again)


def test_a_finished_run_without_a_repository_pushes_nothing(hub, run):
    push_finished(load_recipe("demo", {"run.folder": str(run)}))
    assert hub.requests == []


def test_snapshot_of_a_branch(hub, run):
    pushed(run, REPO, "step-2")
    folder = Path(snapshot_download(REPO, revision="step-2"))
    assert (folder / "model.safetensors").stat().st_size > 1e6
