"""The program: help at once, mistakes in one sentence and without a traceback."""

import errno
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from hf_plm.cli import main, quick_imports
from hf_plm.config import KNOBS

COMMANDS = ("pretrain", "launch", "prepare", "inspect", "push", "export", "simulate")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hf_plm.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a mistake prints: one line, no traceback, exit code 1."""
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 1
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("hf-plm: ")
    return error


HEAVY = {"torch", "transformers", "accelerate", "datasets", "huggingface_hub", "pyarrow", "pandas", "numpy", "Bio"}


def imported_by(tmp_path: Path, statements: str) -> set[str]:
    """Which of HEAVY a Python has imported after the statements, from anywhere but this repository."""
    script = f"import sys\nfrom hf_plm.cli import main\n{statements}\nprint('imported:', *sys.modules)"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    return HEAVY & set(done.stdout.split("imported:")[1].split())


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=str)
def test_help_imports_nothing_heavy(tmp_path: Path, command: list[str]) -> None:
    assert not imported_by(tmp_path, f"try: main([*{command}, '--help'])\nexcept SystemExit: pass")


def test_importing_the_package_imports_nothing_heavy(tmp_path: Path) -> None:
    assert not imported_by(tmp_path, "import hf_plm; hf_plm.load_recipe, hf_plm.UserError")
    assert imported_by(tmp_path, "import hf_plm; hf_plm.build_model") >= {"torch", "transformers"}


def test_mistakes_in_flags_import_nothing_heavy(tmp_path: Path) -> None:
    mistake = "try: main(['pretrain', 'demo', '--data.trian', 'x.fasta'])\nexcept SystemExit: pass"
    assert not imported_by(tmp_path, mistake)


def collector_after(tmp_path: Path, statement: str) -> list[str]:
    """After a subcommand imported torch: whether collections go on, and whether its imports are kept out of them."""
    (tmp_path / "script.py").write_text(
        f"{statement}\n"
        "import gc\n"
        "from hf_plm.cli import main\n"
        "try: main(['pretrain', 'demo', '--data.train', 'none.fasta', '--run.folder', 'run'])\n"
        "except SystemExit: print(gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
    )
    command = [sys.executable, "script.py"]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout.split()


def test_imports_are_kept_out_of_collections(tmp_path: Path) -> None:
    assert collector_after(tmp_path, "") == ["True", "True"]
    assert collector_after(tmp_path, "import torch") == ["True", "False"]  # another program's, perhaps


def test_collections_go_on_after_an_import_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(gc, "freeze", lambda: None)  # of this process, which goes on

    def fail() -> None:
        with quick_imports():
            assert not gc.isenabled()
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert gc.isenabled()


def test_help_of_pretrain_names_every_knob() -> None:
    done = run("pretrain", "--help")
    assert done.returncode == 0
    assert all(f"--{name} " in done.stdout for name in KNOBS)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_subcommand_has_help(capsys: pytest.CaptureFixture[str], command: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        main([command, "--help"])
    assert exit_.value.code == 0
    assert "1%%" not in capsys.readouterr().out


def test_version() -> None:
    from hf_plm import __version__

    assert run("--version").stdout == f"hf-plm {__version__}\n"


def test_a_misspelt_flag_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    error = complaint(capsys, "pretrain", "demo", "--data.trian", "x.fasta", "--run.folder", "runs/x")
    assert error == "hf-plm: Unknown flag --data.trian; did you mean --data.train?"


def test_a_run_without_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--run.folder" in complaint(capsys, "pretrain", "mine", "--data.train", "x.fasta")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "there is no file"),
        (b"", "empty"),
        (b"# STOCKHOLM 1.0\nseq1 ACDE\n//\n", "FASTA"),
        (b">a\nMK1V\n>b\nMKV\n", "illegal"),
        (b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03cut", "gz"),
    ],
)
def test_bad_files_from_the_command_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    """The sentences themselves are in test_messy.py and test_prepare.py; here they reach the user, alone on a line."""
    path = tmp_path / "proteins.fasta"
    if content is not None:
        path.write_bytes(content)
    for arguments in (
        ["prepare", str(path), "--out", str(tmp_path / "corpus")],
        ["pretrain", "demo", "--data.train", str(path), "--run.folder", str(tmp_path / "run")],
    ):
        error = complaint(capsys, *arguments)
        assert sentence.lower() in error.lower()
        assert "proteins.fasta" in error
    assert not (tmp_path / "corpus").exists()


def test_prepare_prints_what_it_kept(capsys: pytest.CaptureFixture[str], family_fasta: Path, tmp_path: Path) -> None:
    main(["prepare", str(family_fasta), "--out", str(tmp_path / "corpus")])
    printed = capsys.readouterr().out
    assert "240 records read, 240 kept" in printed
    assert f"--data.train {tmp_path / 'corpus'}" in printed
    main(["inspect", str(tmp_path / "corpus")])
    assert "240 records read" in capsys.readouterr().out


def test_simulate_writes_a_fasta(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    main(["simulate", str(tmp_path / "x.fasta"), "--families", "2", "--members", "3"])
    assert "6 simulated proteins in 2 families" in capsys.readouterr().out
    assert (tmp_path / "x.fasta").read_text().count(">sim_") == 6
    (tmp_path / "real.fasta").write_text(">a\nMKV\n")
    assert "is there already" in complaint(capsys, "simulate", str(tmp_path / "real.fasta"))
    assert "cannot be written: No such file" in complaint(capsys, "simulate", str(tmp_path / "no" / "x.fasta"))


def test_inspect_of_something_else(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "neither a prepared corpus nor a run" in complaint(capsys, "inspect", str(tmp_path))


def test_a_dna_file_is_warned_of(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "genes.fasta"
    path.write_text("".join(f">g{number}\n{'ACGT' * (20 + number)}\n" for number in range(50)))
    main(["prepare", str(path), "--out", str(tmp_path / "corpus")])
    assert "A C G T" in capsys.readouterr().err


def test_a_full_disk_is_one_sentence(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x/config.yaml")

    monkeypatch.setattr("hf_plm.cli.train._inspect", full)
    error = complaint(capsys, "inspect", "runs/x")
    assert error == "hf-plm: The disk is full (runs/x/config.yaml); free space and run the same command again."
    # The twin: what is no full disk is not called one.
    monkeypatch.setattr("hf_plm.cli.train._inspect", lambda *_: Path("/no/such/file").read_text())
    with pytest.raises(FileNotFoundError):
        main(["inspect", "runs/x"])
