"""A checkpoint is whole or not there, and a damaged one is found out."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from hf_plm.config import UserError
from hf_plm.data.order import Cursor
from hf_plm.training.checkpoint import (
    Progress,
    Saver,
    checksum,
    list_checkpoints,
    newest_whole,
    read_state,
    restore,
    sweep,
)
from hf_plm.training.spikes import Trend


def model_and_optimizer(seed: int) -> tuple[nn.Module, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    for _ in range(3):
        train_once(model, optimizer)
    return model, optimizer


def train_once(model: nn.Module, optimizer: torch.optim.AdamW) -> None:
    model(torch.ones(2, 4)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def save_state(
    folder: Path, progress: Progress, model: nn.Module, optimizer: torch.optim.AdamW, keep: int = 3, world_size: int = 1
) -> Path:
    savers = [Saver(folder, {"torch": "2"}, keep, rank, world_size) for rank in range(world_size)]
    for saver in savers:
        saver.begin(progress, model, optimizer)
    try:
        for saver in savers:
            saver.wait()
        return savers[0].commit()
    finally:
        savers[0].forget()


def save(folder: Path, step: int, keep: int = 3) -> Path:
    return save_state(folder, Progress(step, Cursor(1, 2), 300, 4.5), *model_and_optimizer(step), keep)


@pytest.mark.parametrize("world_size", [1, 3])
def test_what_is_restored_goes_on_the_same(tmp_path: Path, world_size: int) -> None:
    model, optimizer = model_and_optimizer(0)
    progress = Progress(3, Cursor(1, 2), 300, 4.5, 0, Trend(3, 2.9, 0.01))
    path = save_state(tmp_path, progress, model, optimizer, 1, world_size)
    assert len(list(path.glob("model-*.safetensors"))) == world_size
    other, other_optimizer = model_and_optimizer(1)
    assert restore(path, read_state(path), other, other_optimizer) == progress
    for _ in range(2):
        train_once(model, optimizer)
        train_once(other, other_optimizer)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    # The twin: without the moments the next updates differ.
    fresh = torch.optim.AdamW(other.parameters(), lr=0.1)
    train_once(model, optimizer)
    train_once(other, fresh)
    assert not all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30, 40):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000030", "step-00000040"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000030", "step-00000040"]


@pytest.mark.parametrize(
    "damage", ["truncate", "flip", "remove", "no state", "another place", "another format", "null"]
)
def test_a_damaged_checkpoint_is_passed_over_and_said(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 10)
    path = save(tmp_path, 20)
    file = path / ("optimizer-00001-of-00001.safetensors" if damage in ("truncate", "flip", "remove") else "state.json")
    content = bytearray(file.read_bytes())
    if damage == "another place":
        file.write_bytes(content.replace(b'"place": 2', b'"place": 3'))
    elif damage == "another format":
        file.write_bytes(content.replace(b'"format": 2', b'"format": 3'))
    elif damage == "null":
        file.write_text("null")
    elif damage == "truncate":
        file.write_bytes(content[:-10])
    elif damage == "flip":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    else:
        file.unlink()
    found, state, complaints = newest_whole(tmp_path)
    assert found == tmp_path / "step-00000010"
    assert state["progress"]["step"] == 10
    assert len(complaints) == 1
    assert "is damaged" in complaints[0]
    assert (tmp_path / "damaged-step-00000020").is_dir()
    save(tmp_path, 15, keep=1)
    assert list_checkpoints(tmp_path) == [tmp_path / "step-00000015"]


def test_no_whole_checkpoint_is_no_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 10) / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(UserError, match=r"No checkpoint in .* is whole \(step-00000010: .* bring one back from a copy"):
        newest_whole(tmp_path)
    assert (tmp_path / "step-00000010").is_dir()
    assert newest_whole(tmp_path / "nothing") == (None, {}, [])


def test_what_is_being_written_is_never_evicted(tmp_path: Path) -> None:
    """A run that went back to step 10 saves 15 while a 30 of its earlier life is there."""
    save(tmp_path, 30)
    save(tmp_path, 15, keep=1)
    assert list_checkpoints(tmp_path) == [tmp_path / "step-00000015"]


def test_restored_moments_are_not_views_of_the_file(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    model, optimizer = model_and_optimizer(1)
    restore(path, read_state(path), model, optimizer)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(path) not in maps.read_text()


def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    model, optimizer = model_and_optimizer(0)
    save(tmp_path, 10)
    with torch.no_grad():
        next(model.parameters()).fill_(float("inf"))
    with pytest.raises(UserError, match=r"After step 19 the weights 0\.weight are not finite"):
        save_state(tmp_path, Progress(20), model, optimizer, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_leftovers_of_a_killed_run_are_swept(tmp_path: Path) -> None:
    save(tmp_path, 10)
    (tmp_path / ".partial-step-00000020").mkdir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_what_is_saved_is_what_was_there_when_it_was_begun(tmp_path: Path) -> None:
    """The thread that writes has copies: the training goes on and changes the originals."""
    model, optimizer = model_and_optimizer(0)
    saver = Saver(tmp_path, {}, 1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    saver.begin(Progress(3), model, optimizer)
    train_once(model, optimizer)
    saver.wait()
    other, other_optimizer = model_and_optimizer(1)
    path = saver.commit()
    restore(path, read_state(path), other, other_optimizer)
    assert all(torch.equal(before[name], parameter) for name, parameter in other.named_parameters())
    assert not all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())


def test_without_every_share_there_is_no_checkpoint(tmp_path: Path) -> None:
    savers = [Saver(tmp_path, {}, 1, rank, 2) for rank in range(2)]
    savers[0].begin(Progress(3), *model_and_optimizer(0))
    savers[0].wait()
    with pytest.raises(UserError, match="checkpoint of step 3 could not be written"):
        savers[0].commit()
    assert not list_checkpoints(tmp_path)


def test_half_a_save_is_invisible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 10)

    def full_disk(*_: object) -> None:  # what safetensors raises then, which is no OSError
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("hf_plm.training.checkpoint.save_file", full_disk)
    with pytest.raises(UserError, match=r"step 20 could not be written .*No space left.*run the same command again"):
        save(tmp_path, 20)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000010"]


def test_a_newer_format_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 10)
    state = {**json.loads((path / "state.json").read_text()), "format": 99}
    del state["checksum"]
    (path / "state.json").write_text(json.dumps({**state, "checksum": checksum(state)}))
    with pytest.raises(UserError, match=r"format 99, not 2; it is of a newer version: update hf_plm"):
        newest_whole(tmp_path)


def test_a_checkpoint_that_somebody_reads_stays(tmp_path: Path) -> None:
    oldest = save(tmp_path, 5)
    save(tmp_path, 10)
    saver = Saver(tmp_path, {"torch": "2"}, keep=1)
    saver.held = {oldest.name}
    saver.begin(Progress(15), *model_and_optimizer(15))
    saver.wait()
    saver.commit()
    assert [path.name for path in list_checkpoints(tmp_path)] == [oldest.name, "step-00000015"]
