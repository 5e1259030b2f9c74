"""What huggingface_hub does against the Hub on loopback, in good days and bad: the ground that publishing stands on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.request import Request, urlopen

import pytest
from datasets import Dataset, load_dataset
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import httpx
from support.hub_server import Fault, HubServer

# The client's own way of giving httpx a file.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "tester/esm"
WEIGHTS = bytes(range(256)) * 20
CARD = b"---\nlicense: mit\n---\n# A model\n"
LARGE = 4_000_000
BACKOFF = [1, 2, 4, 8, 8]


@pytest.fixture
def api(hub):
    return HfApi()


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "to_publish"
    (folder / "onnx").mkdir(parents=True)
    (folder / "README.md").write_bytes(CARD)
    (folder / "config.json").write_bytes(b"{}\n")
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "onnx" / "model.onnx").write_bytes(WEIGHTS[::-1])
    return folder


@pytest.fixture
def model(api, folder):
    """A private repository with one upload in it: the hash of that commit."""
    api.create_repo(REPO, private=True)
    return api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="First").oid


def add(path, content):
    return [CommitOperationAdd(path, content)]


def calls(hub, part, method="POST"):
    return [status for known, path, status in hub.requests if known == method and part in path]


# --- Good days


def test_a_repository_is_made_once_and_is_as_private_as_asked(hub, api):
    assert api.create_repo(REPO, private=True).url == f"{hub.url}/{REPO}"
    assert hub.is_private(REPO)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(REPO)
    assert error.value.response.status_code == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    assert hub.is_private(REPO)
    api.update_repo_settings(REPO, private=False)
    assert not hub.is_private(REPO)
    assert not hub.is_private(api.create_repo("open", repo_type="dataset").repo_id, "dataset")
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)
    assert api.whoami()["name"] == "tester"


def test_a_folder_is_one_commit_and_comes_back_the_same(hub, api, folder, model):
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    published = hub.files(REPO)
    assert published.pop(".gitattributes")
    assert published == files
    assert [title for _, title in hub.commits(REPO)] == ["First", "initial commit"]
    assert [commit.commit_id for commit in api.list_repo_commits(REPO)] == [sha for sha, _ in hub.commits(REPO)]
    assert sorted(api.list_repo_files(REPO)) == sorted([".gitattributes", *files])
    local = Path(snapshot_download(REPO))
    assert all((local / path).read_bytes() == content for path, content in files.items())
    assert local.name == model
    assert local.is_relative_to(hub.home)


def test_what_has_not_changed_makes_no_commit(hub, api, folder, model):
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == model
    assert len(hub.commits(REPO)) == 2


def test_files_and_folders_are_described_as_on_the_hub(api, model):
    listed = {entry.path: entry for entry in api.list_repo_tree(REPO, recursive=True, expand=True)}
    assert listed["model.safetensors"].lfs.size == listed["model.safetensors"].size == len(WEIGHTS)
    assert listed["config.json"].lfs is None
    assert listed["config.json"].last_commit.title == "First"
    assert "onnx" in listed
    assert {entry.path for entry in api.list_repo_tree(REPO, "onnx")} == {"onnx/model.onnx"}
    assert [entry.path for entry in api.get_paths_info(REPO, ["onnx", "missing"])] == ["onnx"]
    sizes = {sibling.rfilename: sibling.size for sibling in api.model_info(REPO, files_metadata=True).siblings}
    assert sizes["README.md"] == len(CARD)
    assert api.file_exists(REPO, "README.md")
    assert not api.file_exists(REPO, "missing")


def test_files_are_deleted_and_copied(hub, api, model):
    operations = [
        CommitOperationDelete("onnx/"),
        CommitOperationDelete("config.json"),
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationCopy("README.md", "NOTES.md"),
    ]
    api.create_commit(REPO, operations, commit_message="Tidy")
    assert hub.files(REPO).keys() == {
        ".gitattributes",
        "README.md",
        "NOTES.md",
        "model.safetensors",
        "copy.safetensors",
    }
    assert hub.files(REPO)["copy.safetensors"] == WEIGHTS
    assert hub.files(REPO)["NOTES.md"] == CARD
    with pytest.raises(EntryNotFoundError):
        api.create_commit(REPO, [CommitOperationDelete("config.json")], commit_message="Again")


def test_every_revision_is_downloaded_as_it_was(hub, api, model):
    api.create_tag(REPO, tag="v1", revision=model)
    api.create_branch(REPO, branch="try/longer", revision="v1")
    second = api.create_commit(REPO, add("config.json", b"{2}"), commit_message="Second", parent_commit=model).oid
    api.create_commit(REPO, add("config.json", b"{3}"), commit_message="Third", revision="try/longer")
    found = {
        revision: Path(hf_hub_download(REPO, "config.json", revision=revision)).read_bytes()
        for revision in ("v1", "main", "try/longer", model, second, second[:7])
    }
    assert list(found.values()) == [b"{}\n", b"{2}", b"{3}", b"{}\n", b"{2}", b"{2}"]
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.tags} == {"v1": model}
    assert {ref.name for ref in refs.branches} == {"main", "try/longer"}
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_tag(REPO, tag="v1")
    api.delete_tag(REPO, tag="v1")
    api.delete_branch(REPO, branch="try/longer")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "config.json", revision="v1", force_download=True)
    with pytest.raises(RevisionNotFoundError):
        api.create_commit(REPO, add("config.json", b""), commit_message="Lost", revision="try/longer")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "missing.json")


def test_private_is_hidden_from_those_without_a_token(hub, api, model):
    for name in ("README.md", "model.safetensors"):
        with pytest.raises(RepositoryNotFoundError) as error:
            hf_hub_download(REPO, name, token=False)
        assert error.value.response.status_code == 401
    with pytest.raises(RepositoryNotFoundError):
        snapshot_download(REPO, token=False)
    with pytest.raises(RepositoryNotFoundError) as error:
        api.model_info("tester/no-such-model")
    assert error.value.response.status_code == 404
    assert Path(hf_hub_download(REPO, "README.md", token=hub.read_token)).read_bytes() == CARD
    api.update_repo_settings(REPO, private=False)
    assert api.model_info(REPO, token=False).sha == model


def test_a_gated_repository_says_so(hub, api, model):
    api.update_repo_settings(REPO, private=False, gated="auto")
    for token in (False, hub.read_token):
        with pytest.raises(GatedRepoError):
            hf_hub_download(REPO, "README.md", token=token)


def test_reading_is_not_writing_and_a_wrong_token_is_neither(hub, api, folder, model):
    before = hub.commits(REPO)
    for token, status in ((hub.read_token, 403), ("hf_" + "x" * 34, 401)):
        for write in (
            lambda token=token: api.create_repo("tester/another", token=token),
            lambda token=token: api.create_commit(REPO, add("a", b"a"), commit_message="No", token=token),
            lambda token=token: api.upload_folder(repo_id=REPO, folder_path=folder, token=token),
            lambda token=token: api.create_tag(REPO, tag="v1", token=token),
            lambda token=token: api.delete_repo(REPO, token=token),
        ):
            with pytest.raises(HfHubHTTPError) as error:
                write()
            assert error.value.response.status_code == status
    assert hub.commits(REPO) == before


def test_an_object_that_is_there_is_not_sent_twice(hub, api, model, folder):
    """Resuming: a commit that fails leaves its objects behind, and the next attempt sends the others only."""
    sent = len(calls(hub, "/lfs/", "PUT"))
    assert sent == 2
    (folder / "new.safetensors").write_bytes(b"new" + WEIGHTS)
    hub.play(Fault(500))
    with pytest.raises(HfHubHTTPError):
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(calls(hub, "/lfs/", "PUT")) == sent + 1
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert len(calls(hub, "/lfs/", "PUT")) == sent + 1
    assert hub.files(REPO)["new.safetensors"] == b"new" + WEIGHTS


def test_a_part_of_a_file_can_be_had(hub, api, model):
    with HfFileSystem().open(f"{REPO}/model.safetensors", block_size=100) as file:
        file.seek(1000)
        assert file.read(10) == WEIGHTS[1000:1010]
    assert 206 in calls(hub, "/resolve/", "GET")
    request = Request(f"{hub.url}/{REPO}/resolve/main/config.json")
    request.add_header("Authorization", f"Bearer {hub.token}")
    request.add_header("Range", "bytes=-2")
    with urlopen(request) as answer:
        assert (answer.status, answer.read()) == (206, b"}\n")
        assert answer.headers["Content-Range"] == "bytes 1-2/3"


def test_a_pushed_folder_of_shards_is_streamed(hub, api, tmp_path):
    rows = [{"sequence": "MK" * (i + 1)} for i in range(40)]
    data = tmp_path / "dataset" / "data"
    data.mkdir(parents=True)
    Dataset.from_list(rows).to_parquet(data / "train-00000-of-00001.parquet")
    card = "---\nconfigs:\n- config_name: default\n  data_files:\n  - {split: train, path: data/train-*}\n---\n"
    (data.parent / "README.md").write_text(card)
    api.create_repo("tester/proteins", repo_type="dataset", private=True)
    api.upload_folder(repo_id="tester/proteins", repo_type="dataset", folder_path=data.parent)
    assert list(load_dataset("tester/proteins", split="train", streaming=True)) == rows
    assert api.dataset_info("tester/proteins").private


def test_datasets_pushes_and_loads(hub):
    rows = [{"sequence": "MK" * (i + 1)} for i in range(10)]
    Dataset.from_list(rows).push_to_hub("tester/pushed", private=True)
    assert hub.is_private("tester/pushed", "dataset")
    assert load_dataset("tester/pushed", split="train").to_list() == rows


def test_a_process_of_its_own_uses_the_environment(hub, model):
    code = f"from huggingface_hub import hf_hub_download as get; print(get('{REPO}', 'model.safetensors'))"
    environment = {**os.environ, **hub.environment}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    assert path.read_bytes() == WEIGHTS
    assert path.is_relative_to(hub.home)


def test_by_hand_it_says_what_to_export():
    server = Path(__file__).parent / "support" / "hub_server.py"
    with subprocess.Popen([sys.executable, server], stdout=subprocess.PIPE, text=True) as process:
        lines = [process.stdout.readline().strip().removeprefix("export ").split("=", 1) for _ in range(3)]
        environment = dict(lines)
        headers = {"Authorization": f"Bearer {environment['HF_TOKEN']}"}
        with urlopen(Request(f"{environment['HF_ENDPOINT']}/api/whoami-v2", headers=headers)) as answer:
            assert json.load(answer)["name"] == "tester"
        process.terminate()


# --- Bad days


def unchanged(hub, before, files):
    return hub.commits(REPO) == before and hub.files(REPO) == files


@pytest.mark.parametrize("status", [401, 403, 404, 409, 412, 429, 500, 503])
def test_a_refused_commit_is_not_tried_again_and_leaves_nothing(hub, api, naps, folder, model, status):
    before, files = hub.commits(REPO), hub.files(REPO)
    (folder / "model.safetensors").write_bytes(b"new")
    hub.play(Fault(status, retry_after=1 if status == 429 else None))
    with pytest.raises(HfHubHTTPError) as error:
        api.upload_folder(repo_id=REPO, folder_path=folder)
    assert type(error.value) is (RepositoryNotFoundError if status == 404 else HfHubHTTPError)
    assert error.value.response.status_code == status
    assert naps == []
    assert unchanged(hub, before, files)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert hub.files(REPO)["model.safetensors"] == b"new"


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize(("method", "path"), [("POST", "/preupload/"), ("POST", "/objects/batch"), ("PUT", "/lfs/")])
def test_all_calls_before_the_commit_are_tried_again(hub, api, naps, model, method, path, status):
    hub.play(Fault(status, method, path, times=2, retry_after=7 if status == 429 else None))
    api.create_commit(REPO, add("new.safetensors", b"new"), commit_message="Patience")
    assert naps == ([8, 8] if status == 429 else [1, 2])
    assert hub.files(REPO)["new.safetensors"] == b"new"


@pytest.mark.parametrize(("method", "path"), [("POST", "/preupload/"), ("POST", "/objects/batch"), ("PUT", "/lfs/")])
def test_and_given_up_after_the_sixth_time(hub, api, naps, model, method, path):
    before, files = hub.commits(REPO), hub.files(REPO)
    hub.play(Fault(503, method, path, times=6))
    expected = RuntimeError if path == "/lfs/" else HfHubHTTPError
    with pytest.raises(expected) as error:
        api.create_commit(REPO, add("new.safetensors", b"new"), commit_message="No")
    cause = error.value.__cause__ if path == "/lfs/" else error.value
    assert isinstance(cause, HfHubHTTPError)
    assert cause.response.status_code == 503
    assert naps == BACKOFF
    assert unchanged(hub, before, files)


@pytest.mark.parametrize("status", [401, 403, 404])
@pytest.mark.parametrize(("method", "path"), [("POST", "/preupload/"), ("POST", "/objects/batch"), ("PUT", "/lfs/")])
def test_a_no_is_taken_for_an_answer(hub, api, naps, model, method, path, status):
    before, files = hub.commits(REPO), hub.files(REPO)
    hub.play(Fault(status, method, path))
    with pytest.raises(RuntimeError if path == "/lfs/" else HfHubHTTPError):
        api.create_commit(REPO, add("new.safetensors", b"new"), commit_message="No")
    assert naps == []
    assert unchanged(hub, before, files)


def test_the_making_of_a_repository_is_not_tried_again(hub, api, naps):
    for status in (403, 429, 500):
        hub.play(Fault(status, path="/repos/create"))
        with pytest.raises(HfHubHTTPError) as error:
            api.create_repo(REPO, exist_ok=True)
        assert error.value.response.status_code == status
    assert naps == []
    assert not hub.repositories


def test_a_commit_by_somebody_else_is_not_overwritten(hub, api, model):
    hub.play(Fault(kind="overtake"))
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(REPO, add("notes.txt", b"mine"), commit_message="Mine", parent_commit=model)
    assert error.value.response.status_code == 412
    assert [title for _, title in hub.commits(REPO)] == ["A commit by somebody else", "First", "initial commit"]
    assert hub.files(REPO)["notes.txt"] != b"mine"


def test_without_a_parent_it_is(hub, api, model):
    """The twin: `parent_commit` is what the refusal above comes from."""
    hub.play(Fault(kind="overtake"))
    api.create_commit(REPO, add("notes.txt", b"mine"), commit_message="Mine")
    assert hub.files(REPO)["notes.txt"] == b"mine"


@pytest.mark.parametrize("size", [10, LARGE])
def test_a_broken_upload_is_sent_again_from_its_start(hub, api, naps, model, tmp_path, size):
    path = tmp_path / "new.safetensors"
    path.write_bytes(os.urandom(size))
    hub.play(Fault(kind="drop", method="PUT", path="/lfs/", times=2))
    api.create_commit(REPO, add("new.safetensors", path), commit_message="Patience")
    assert naps == [1, 2]
    assert calls(hub, "/lfs/", "PUT")[-3:] == [0, 0, 200]
    assert hub.files(REPO)["new.safetensors"] == path.read_bytes()


def test_an_upload_that_breaks_every_time_leaves_nothing(hub, api, naps, model):
    before, files = hub.commits(REPO), hub.files(REPO)
    hub.play(Fault(kind="drop", method="PUT", path="/lfs/", times=6))
    with pytest.raises(RuntimeError, match=r"Error while uploading 'new.safetensors' to the Hub") as error:
        api.create_commit(REPO, add("new.safetensors", os.urandom(LARGE)), commit_message="No")
    assert isinstance(error.value.__cause__, httpx.TransportError)
    assert naps == BACKOFF
    assert unchanged(hub, before, files)


@pytest.mark.parametrize("kind", ["drop", "lose_answer"])
def test_a_commit_whose_connection_breaks_may_be_made_or_not(hub, api, naps, model, kind):
    """The same error for both, and it is no HfHubHTTPError: who gets it has to look at the head."""
    hub.play(Fault(kind=kind))
    with pytest.raises(httpx.TransportError) as error:
        api.create_commit(REPO, add("config.json", b"{2}"), commit_message="Second", parent_commit=model)
    assert not isinstance(error.value, HfHubHTTPError)
    assert naps == []
    assert (hub.commits(REPO)[0][0] == model) == (kind == "drop")
    assert (hub.files(REPO)["config.json"] == b"{2}") == (kind == "lose_answer")


def test_a_broken_download_goes_on_where_it_stopped(hub, api, naps, model, monkeypatch):
    """In whole pieces of 10 MiB: of smaller files it begins again."""
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 100_000)
    content = os.urandom(LARGE)
    api.create_commit(REPO, add("large.bin", content), commit_message="Large")
    hub.play(Fault(kind="drop", method="GET", path="/resolve/", times=2))
    assert Path(hf_hub_download(REPO, "large.bin")).read_bytes() == content
    assert naps == [1, 1]
    assert calls(hub, "/resolve/", "GET") == [200, 206, 206]


def test_a_download_that_is_refused_leaves_no_file(hub, api, naps, model):
    hub.play(Fault(500, method="GET", path="/resolve/"))
    with pytest.raises(HfHubHTTPError):
        hf_hub_download(REPO, "model.safetensors")
    assert not [path for path in hub.home.rglob("*") if path.is_file() and path.read_bytes() == WEIGHTS]
    assert naps == []


def test_a_hub_that_is_down_is_told_apart_from_a_file_that_is_missing(hub, api, naps, model):
    """The first question is asked once, for the sake of the cache; without one it is asked six times more."""
    hub.play(Fault(503, method="HEAD", path="/resolve/", times=7))
    with pytest.raises(LocalEntryNotFoundError):
        hf_hub_download(REPO, "README.md")
    assert naps == BACKOFF
    assert Path(hf_hub_download(REPO, "README.md")).read_bytes() == CARD
    hub.play(Fault(503, method="HEAD", path="/resolve/"))
    assert Path(hf_hub_download(REPO, "README.md")).read_bytes() == CARD


def test_a_slow_answer_is_waited_for(hub, api, model):
    hub.play(Fault(kind="slow", seconds=0.1))
    api.create_commit(REPO, add("config.json", b"{2}"), commit_message="Second")
    assert hub.files(REPO)["config.json"] == b"{2}"


def test_the_client_repeats_what_a_rude_proxy_says_of_the_token(hub, api, model):
    """Its error messages are not safe to print or to keep: the caller has to take the token out."""
    hub.play(Fault(kind="echo_token"))
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(REPO, add("config.json", b"{2}"), commit_message="Second")
    assert hub.token in str(error.value)


def test_no_server_is_a_connection_error(hub, api, naps, folder):
    hub.__exit__(None, None, None)
    with pytest.raises(httpx.ConnectError):
        api.create_repo(REPO)
    with pytest.raises(httpx.ConnectError):
        api.upload_folder(repo_id=REPO, folder_path=folder)


# --- Xet

XET = """
import sys
from types import SimpleNamespace
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.utils import _http
_http.time = SimpleNamespace(sleep=lambda seconds: None)
what, repo, folder, parent = [*sys.argv[1:], None, None][:4]
try:
    if what == "upload":
        print(HfApi().upload_folder(repo_id=repo, folder_path=folder, parent_commit=parent).oid)
    else:
        print(hf_hub_download(repo, "model.safetensors"))
except Exception as error:
    print(f"{type(error).__module__}.{type(error).__name__}: {error}")
"""


def with_xet(hub, disable, *arguments):
    pytest.importorskip("hf_xet")
    environment = {**os.environ, **hub.environment, "HF_HUB_DISABLE_XET": disable, "HF_XET_LOG_DEST": ""}
    command = [sys.executable, "-c", XET, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


@pytest.mark.parametrize(("xet", "status"), [("off", 404), ("refused", 403)])
def test_where_xet_is_refused_the_client_does_not_fall_back(hub, api, folder, model, xet, status):
    hub.xet = xet
    before, files = hub.commits(REPO), hub.files(REPO)
    (folder / "model.safetensors").write_bytes(b"new")
    said = with_xet(hub, "0", "upload", REPO, folder)
    assert said.startswith(
        f"builtins.ConnectionError: Network error: Request error: HTTP status client error ({status}"
    )
    assert calls(hub, "/xet-write-token/", "GET") == [status]
    assert unchanged(hub, before, files)
    with_xet(hub, "1", "upload", REPO, folder)
    assert hub.files(REPO)["model.safetensors"] == b"new"


def test_nor_for_downloads(hub, api, model):
    hub.xet = "refused"
    assert with_xet(hub, "0", "download", REPO).startswith("huggingface_hub.errors.HfHubHTTPError: 403 Forbidden")
    assert Path(with_xet(hub, "1", "download", REPO).strip()).read_bytes() == WEIGHTS


@pytest.fixture
def small_files(tmp_path):
    """No file for Xet, so that it is the commit that is met first."""
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "config.json").write_bytes(b"{2}")
    return tmp_path / "small"


def test_with_xet_the_commit_of_a_folder_is_tried_again(hub, small_files, model):
    hub.play(Fault(503, times=2))
    with_xet(hub, "0", "upload", REPO, small_files, model)
    assert calls(hub, "/commit/")[-3:] == [503, 503, 200]
    assert hub.files(REPO)["config.json"] == b"{2}"


def test_so_a_lost_answer_is_taken_for_a_commit_by_somebody_else(hub, small_files, model):
    """The commit is made, and tried again from a parent that it has itself replaced."""
    hub.play(Fault(kind="lose_answer"))
    said = with_xet(hub, "0", "upload", REPO, small_files, model)
    assert said.startswith("huggingface_hub.errors.HfHubHTTPError: Client error '412 ")
    assert hub.files(REPO)["config.json"] == b"{2}"
    assert len(hub.commits(REPO)) == 3


# --- The server itself


def test_two_servers_know_nothing_of_each_other(hub, api, model):
    with HubServer() as other:
        assert not HfApi(other.url, token=other.token).repo_exists(REPO)
        with pytest.raises(HfHubHTTPError, match="Invalid user token"):
            HfApi(other.url, token=hub.token).whoami()


def test_nobody_is_served_by_a_server_that_is_gone(hub, api):
    with HubServer() as first:
        HfApi(first.url, token=first.token).create_repo(REPO)
    with HubServer(first.port) as second:
        assert not HfApi(second.url, token=second.token).repo_exists(REPO)
