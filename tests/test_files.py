"""Files that are there whole or not at all, and never in the place of what was read."""

import os

import pytest

from hf_plm.config import UserError
from hf_plm.files import check_writable, keep_inputs, write_whole


def test_whole_or_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.txt"
    write_whole(path, b"first")
    write_whole(path, b"second")
    assert path.read_bytes() == b"second"

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"file\.txt cannot be written: No space left on device"):
        write_whole(path, b"third")
    assert path.read_bytes() == b"second"
    assert list(path.parent.iterdir()) == [path]


def test_what_could_not_be_written_is_told_before(tmp_path):
    (tmp_path / "file").touch()
    check_writable(tmp_path / "file")
    check_writable(tmp_path / "a" / "b" / "c.csv")
    assert not (tmp_path / "a").exists()
    with pytest.raises(UserError, match="is a folder, where the name of a file to write was expected"):
        check_writable(tmp_path)
    with pytest.raises(UserError, match="is no folder that can be written to"):
        check_writable(tmp_path / "file" / "c.csv")


def test_what_is_no_plain_file_is_not_replaced(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is no plain file"):
        check_writable(tmp_path / "pipe")


def test_what_is_read_is_kept(tmp_path, monkeypatch):
    (tmp_path / "a.fasta").touch()
    (tmp_path / "link").symlink_to("a.fasta")
    monkeypatch.chdir(tmp_path)
    keep_inputs([tmp_path / "a.fasta", None, "user/dataset", tmp_path / "folder"], tmp_path / "b.fasta")
    keep_inputs([tmp_path], tmp_path / "b.fasta")
    (tmp_path / "result.json").touch()
    keep_inputs([tmp_path], tmp_path / "result.json")
    for read in (tmp_path, str(tmp_path / "*.fasta"), "~/a.fasta"):
        monkeypatch.setenv("HOME", str(tmp_path))
        with pytest.raises(UserError, match="would be written, but is what is read"):
            keep_inputs([read], tmp_path / "a.fasta")
    for out in (tmp_path / "a.fasta", tmp_path / "link"):
        with pytest.raises(UserError, match="would be written, but is what is read"):
            keep_inputs(["a.fasta", None], out)
