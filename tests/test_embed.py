"""`hf-plm embed` as people run it: whole files, stopped and killed ones, several processes, bad input."""

import functools
import itertools
import operator
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas
import pytest
from safetensors import safe_open
from support.encoders import UBIQUITIN, authors_vectors, save_encoder
from test_messy import KEPT, MESSY, REFUSED, UNREADABLE

from hf_plm.config import UserError
from hf_plm.inference.embed import embed_file
from hf_plm.inference.embedder import Embedder, Options, embed
from hf_plm.inference.formats import read_result
from hf_plm.inference.job import Job
from hf_plm.inference.unfinished import remaining_ranges
from hf_plm.inference.worklist import Cleaning

ROOT = Path(__file__).parents[1]
DRAW = random.Random(0)
LETTERS = "LAGVSERTIDPKQNFYMHWC"


def protein(length):
    return "".join(DRAW.choices(LETTERS, k=length))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_encoder("ESM-2", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Ids as they come: a duplicate, one with bars and slashes, one not in ASCII; one protein longer than the model."""
    names = ["a", "b", "a", "sp|P1|X/Y", "prot\u00e9ine", *(f"p{number}" for number in range(40))]
    return [(name, protein(DRAW.choice([1, 7, 60, 200]))) for name in names] + [("titin", protein(2500))]


@pytest.fixture(scope="module")
def fasta(records, tmp_path_factory):
    path = tmp_path_factory.mktemp("fasta") / "proteome.fasta"
    path.write_text("".join(f">{name} description\n{sequence}\n" for name, sequence in records))
    return path


def job(fasta, model, out, **values):
    return Job([str(fasta)], str(model), Path(out), **values)


def command(*words):
    return [sys.executable, "-m", "hf_plm.cli", "embed", *map(str, words)]


@pytest.mark.parametrize("suffix", [".safetensors", ".h5", ".parquet", ".npz"])
def test_every_format_holds_the_same(suffix, records, fasta, model, tmp_path):
    out = tmp_path / f"result{suffix}"
    embed_file(job(fasta, model, out, pool=("mean", "none")))
    found = list(read_result(out))
    assert [name for name, _ in found] == [name for name, _ in records]
    for (_, sequence), (_, arrays) in zip(records, found, strict=True):
        assert arrays["embeddings"].shape == (len(sequence), 48)
        np.testing.assert_allclose(arrays["mean"], arrays["embeddings"].mean(0), atol=1e-5)
    np.testing.assert_allclose(found[5][1]["embeddings"], authors_vectors("ESM-2", model, records[5][1]), atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_safetensors_result_needs_no_hf_plm(records, fasta, model, tmp_path):
    out = tmp_path / "result.safetensors"
    embed_file(job(fasta, model, out, pool=("none",), dtype="float16"))
    with safe_open(out, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    ids, bounds, offsets = tensors["ids"].tobytes(), tensors["id_offsets"], tensors["offsets"]
    names = [ids[begin:end].decode() for begin, end in itertools.pairwise(bounds)]
    assert names == [name for name, _ in records]
    assert np.diff(offsets).tolist() == tensors["lengths"].tolist() == [len(sequence) for _, sequence in records]
    assert tensors["embeddings"].dtype == np.float16
    expected = authors_vectors("ESM-2", model, records[3][1])
    np.testing.assert_allclose(tensors["embeddings"][offsets[3] : offsets[4]], expected, rtol=2e-3, atol=2e-3)
    assert tensors["windows"].tolist() == [1] * (len(records) - 1) + [3]
    assert metadata["model"] == str(model)
    assert metadata["revision"].startswith("sha256:")
    assert "torch" in metadata["versions"]
    assert metadata["pooling"] == "none"
    assert metadata["layer"] == "3"
    assert metadata["family"] == "ESM-2"
    assert "overlap" in metadata["long"]


def test_long_proteins_blend_windows_of_the_authors_vectors(records, fasta, model, tmp_path):
    out = tmp_path / "result.safetensors"
    embed_file(job(fasta, model, out, pool=("none",)))
    sequence, vectors = records[-1][1], list(read_result(out))[-1][1]["embeddings"]
    # Three windows of 1,022, at 0, 739 and 1,478.
    first, second = (authors_vectors("ESM-2", model, sequence[begin : begin + 1022]) for begin in (0, 739))
    np.testing.assert_allclose(vectors[:739], first[:739], atol=1e-4)
    np.testing.assert_allclose(vectors[1022:1478], second[1022 - 739 : 1478 - 739], atol=1e-4)
    places = np.arange(739, 1022)
    weights = np.minimum(1022 - places, 255)[:, None], np.minimum(places - 739 + 1, 255)[:, None]
    blended = (weights[0] * first[739:] + weights[1] * second[: 1022 - 739]) / (weights[0] + weights[1])
    np.testing.assert_allclose(vectors[739:1022], blended, atol=1e-4)
    assert np.abs(blended - first[739:]).max() > 1e-2


def test_crop_and_refuse(records, fasta, model, tmp_path):
    out = tmp_path / "result.npz"
    embed_file(job(fasta, model, out, pool=("none",), options=Options(long="crop", max_length=50)))
    for (_, sequence), (_, arrays) in zip(records, read_result(out), strict=True):
        assert len(arrays["embeddings"]) == min(len(sequence), 50)
    with pytest.raises(UserError, match=r"1 of 46 proteins have more than 1,022 residues, the first: titin with 2,500"):
        embed_file(job(fasta, model, tmp_path / "no.npz", options=Options(long="refuse")))
    assert not (tmp_path / "no.npz.partial").exists()
    with pytest.raises(UserError, match="--max-length is at most 1,022"):
        embed_file(job(fasta, model, tmp_path / "no.npz", options=Options(max_length=5000)))


def test_sites_stand_beside_their_proteins_mean(records, fasta, model, tmp_path):
    out, listed = tmp_path / "sites.parquet", tmp_path / "sites.tsv"
    embed_file(job(fasta, model, out, sites="STY"))
    rows = dict(read_result(out))
    name, sequence = records[8]
    vectors = authors_vectors("ESM-2", model, sequence)
    expected = {f"{name}_{letter}{place}" for place, letter in enumerate(sequence, start=1) if letter in "STY"}
    assert {row for row in rows if row.startswith(f"{name}_")} == expected
    for row in expected:
        place = int(row.rsplit("_", 1)[1][1:])
        joined = np.concatenate((vectors[place - 1], vectors.mean(0)))
        np.testing.assert_allclose(rows[row]["embeddings"], joined, atol=1e-4)

    listed.write_text(
        "".join(f"{name}\t{place}\n" for name, place in [("id", "site"), ("titin", 2000), ("b", 1), ("titin", 3)])
    )
    embed_file(job(fasta, model, tmp_path / "listed.h5", sites=str(listed)))
    found = list(read_result(tmp_path / "listed.h5"))
    assert [name.rsplit("_", 1)[0] for name, _ in found] == ["titin", "b", "titin"]
    titin = records[-1][1]
    assert [name.rsplit("_", 1)[1] for name, _ in found[::2]] == [f"{titin[1999]}2000", f"{titin[2]}3"]
    np.testing.assert_array_equal(found[0][1]["embeddings"][48:], found[2][1]["embeddings"][48:])
    np.testing.assert_allclose(
        found[2][1]["embeddings"][:48], authors_vectors("ESM-2", model, titin[:1022])[2], atol=1e-4
    )


def test_pools_side_by_side_and_cls(records, fasta, model, tmp_path):
    out = tmp_path / "result.safetensors"
    embed_file(job(fasta, model, out, pool=("cls", "max", "mean")))
    with safe_open(out, "np") as file:
        assert file.get_tensor("embeddings").shape == file.get_tensor("max").shape == (len(records), 48)
        assert file.metadata()["pooling"] == "cls max mean"
        assert np.array_equal(file.get_tensor("offsets"), np.arange(len(records) + 1))
        assert np.abs(file.get_tensor("embeddings") - file.get_tensor("mean")).max() > 1e-2


def test_from_python(records, model):
    sequences = [sequence for _, sequence in records]
    embedder = Embedder(model)
    means = embedder.embed(sequences)
    assert means.shape == (len(sequences), embedder.width)
    assert means.dtype == np.float32
    np.testing.assert_array_equal(means, embed(sequences, model))
    drawn = []

    def endless():
        while True:
            drawn.append(UBIQUITIN.lower() + "*")
            yield drawn[-1]

    stream = embedder.stream(endless(), "none")
    np.testing.assert_allclose(next(stream), authors_vectors("ESM-2", model, UBIQUITIN), atol=1e-4)
    assert len(drawn) < 2000
    stream.close()
    assert embedder.embed([]).shape == (0, 48)
    for wrong, message in (
        ("MKT", "not one str"),
        ({"a": "MKT"}, "not one dict"),
        (pandas.DataFrame({"sequence": ["MKT"]}), "not one DataFrame"),
        (["MKT", None], "Sequence 2 should be a string, not NoneType"),
        (["MK", "M1K"], "Sequence 2: Residues"),
        (["MK", "*"], "Sequence 2 has no residues"),
    ):
        with pytest.raises(UserError, match=message):
            embedder.embed(wrong)


def test_the_same_command_goes_on(fasta, model, tmp_path, monkeypatch, capsys):
    """Stopped between two portions: what is written stays, what follows is the same to the bit."""
    whole, out = tmp_path / "whole.safetensors", tmp_path / "out.safetensors"
    monkeypatch.setattr("hf_plm.inference.unfinished.CALLS_PER_PORTION", 1)
    monkeypatch.setattr("hf_plm.inference.unfinished.LEAST_TOKENS", 1)
    monkeypatch.setattr("hf_plm.inference.embed.COMMIT_SECONDS", 0.0)
    embed_file(job(fasta, model, whole, pool=("none", "mean")))
    from hf_plm.inference import embed as module

    real, portions = module.write_portion, []

    def stop_at_the_third(*arguments):
        if len(portions) == 2:
            raise KeyboardInterrupt
        portions.append(arguments[1])
        real(*arguments)

    monkeypatch.setattr(module, "write_portion", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        embed_file(job(fasta, model, out, pool=("none", "mean")))
    partial = tmp_path / "out.safetensors.partial"
    assert not out.exists()
    ((first, _),) = remaining_ranges(partial)
    assert first > portions[1] > 0
    # A line that was cut counts as not there.
    with open(partial / "done-0.txt", "a") as file:
        file.write("0 46")
    # Stopped once more, after it.
    portions.pop()
    with pytest.raises(KeyboardInterrupt):
        embed_file(job(fasta, model, out, pool=("none", "mean")))
    ((first, _),) = remaining_ranges(partial)
    for values, message in (
        ({"pool": ("mean",)}, "with another pool"),
        ({"pool": ("none", "mean"), "options": Options(layer=1)}, "with another layer"),
        ({"pool": ("none", "mean"), "cleaning": Cleaning(illegal="x")}, "with another cleaning"),
    ):
        with pytest.raises(UserError, match=message):
            embed_file(job(fasta, model, out, **values))
    monkeypatch.setattr(module, "write_portion", real)
    capsys.readouterr()
    embed_file(job(fasta, model, out, pool=("none", "mean")))
    assert f"going on   after {first} of 46" in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes()
    with pytest.raises(UserError, match="is there already, and was asked for otherwise"):
        embed_file(job(fasta, model, out))
    embed_file(job(fasta, model, out, pool=("none", "mean")))
    assert "is there already, whole and as asked for" in capsys.readouterr().out
    assert out.read_bytes() == whole.read_bytes()


def test_a_run_killed_at_its_very_end_is_cleared_away(fasta, model, tmp_path, monkeypatch, capsys):
    from hf_plm.inference import embed as module

    out, real = tmp_path / "out.npz", module.finish

    def killed_after(*arguments):
        real(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "finish", killed_after)
    with pytest.raises(KeyboardInterrupt):
        embed_file(job(fasta, model, out))
    monkeypatch.undo()
    assert out.exists()
    assert (tmp_path / "out.npz.partial").exists()
    embed_file(job(fasta, model, out))
    assert "is there already, whole" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


@pytest.mark.slow
@pytest.mark.parametrize("num_kills", [2, 20])
def test_random_kills_change_nothing(num_kills, model, tmp_path):
    num_proteins = 1600 if num_kills < 5 else 5000
    fasta = tmp_path / "many.fasta"
    fasta.write_text("".join(f">p{number}\n{protein(DRAW.randint(20, 600))}\n" for number in range(num_proteins)))
    embed_file(job(fasta, model, tmp_path / "whole.h5", pool=("mean", "none")))
    out, kills, went_on = tmp_path / "out.h5", 0, 0
    done = Path(f"{out}.partial") / "done-0.txt"

    def written():
        return done.stat().st_size if done.exists() else 0

    while not out.exists():
        before = written()
        process = subprocess.Popen(
            command(fasta, "--model", model, "--out", out, "--pool", "mean,none"), stdout=subprocess.PIPE, cwd=ROOT
        )
        if kills < num_kills:
            # At any moment from the start on; every other time, after it has got somewhere.
            while process.poll() is None and (not done.exists() or (kills % 2 == 0 and written() == before)):
                time.sleep(0.02)
            time.sleep(DRAW.uniform(0.0, 1.0))
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                kills += 1
        text = process.communicate()[0].decode()
        went_on += "going on   after" in text and "going on   after 0 of" not in text
    assert kills
    assert went_on
    same = (
        (a[0] == b[0] and all(np.array_equal(a[1][name], b[1][name]) for name in a[1]))
        for a, b in zip(read_result(tmp_path / "whole.h5"), read_result(out), strict=True)
    )
    assert all(same)


def test_two_runs_do_not_share_a_result(fasta, model, tmp_path):
    out = tmp_path / "out.npz"
    code = (
        "import sys, time; from pathlib import Path; from hf_plm.lock import locked; "
        "held = locked(Path(sys.argv[1]), 'is here'); print('held', flush=True); time.sleep(60)"
    )
    path = str(tmp_path / ".out.npz.lock")
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"Process {holder.pid} of .* embeds into .*out.npz already"):
            embed_file(job(fasta, model, out))
    finally:
        holder.kill()
        holder.wait()
    embed_file(job(fasta, model, out))
    assert [path.name for path in tmp_path.iterdir()] == ["out.npz"]


def test_two_processes_give_one_result(model, tmp_path):
    """Enough proteins that each has portions of its own."""
    fasta = tmp_path / "p.fasta"
    fasta.write_text(
        "".join(f">p{number}\n{protein(DRAW.randint(30, 900))}\n" for number in range(150))
        + f">titin\n{protein(2500)}\n"
    )
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "launch/embed.py"]
    words = [fasta, "--model", model, "--pool", "mean,none", "--out"]
    done = subprocess.run(
        [*launch, *map(str, words), str(tmp_path / "two.safetensors")],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Finished:") == 1
    embed_file(job(fasta, model, tmp_path / "one.safetensors", pool=("mean", "none")))
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    done = subprocess.run(
        [*launch, *map(str, words), str(tmp_path / "no.safetensors"), "--long", "refuse"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode
    assert done.stderr.count("hf-plm: ") == 1
    assert "titin" in done.stderr
    assert not list(tmp_path.glob("*.partial"))


def test_each_process_takes_portions(model, tmp_path, monkeypatch):
    """What two ranks write, one after the other, is what one writes."""
    from hf_plm.inference import embed as module

    fasta = tmp_path / "p.fasta"
    fasta.write_text("".join(f">p{number}\n{protein(DRAW.randint(30, 900))}\n" for number in range(150)))
    embed_file(job(fasta, model, tmp_path / "one.npz"))
    shared = []

    class Rank:
        size, rank = 2, 0

        def agree(self, work):
            shared.append(work())
            return shared[-1]

        def wait(self):
            raise KeyboardInterrupt

        def close(self):
            pass

    class Second(Rank):
        rank = 1

        def agree(self, work):
            return shared[-1]

    for kind in (Rank, Second):
        monkeypatch.setattr(module, "Ranks", kind)
        with pytest.raises(KeyboardInterrupt):
            embed_file(job(fasta, model, tmp_path / "two.npz"))
    done = [(tmp_path / "two.npz.partial" / f"done-{rank}.txt").read_text() for rank in range(2)]
    assert all(done)
    assert len(shared[0]) > 3
    monkeypatch.undo()
    embed_file(job(fasta, model, tmp_path / "two.npz"))
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()


def test_onnx_needs_no_torch_once_it_is_exported(records, fasta, model, tmp_path, monkeypatch, capsys):
    """The cache is found again by the model's revision; its folder is a model of its own."""
    monkeypatch.setenv("HF_PLM_CACHE", str(tmp_path / "cache"))
    onnx = Options(backend="onnx")
    embed_file(job(fasta, model, tmp_path / "onnx.npz", pool=("none", "cls"), options=onnx))
    assert "Exporting" in capsys.readouterr().out
    embed_file(job(fasta, model, tmp_path / "torch.npz", pool=("none", "cls")))
    for (name, expected), (other, found) in zip(
        read_result(tmp_path / "torch.npz"), read_result(tmp_path / "onnx.npz"), strict=True
    ):
        assert name == other
        for key in expected:
            np.testing.assert_allclose(expected[key], found[key], atol=1e-4)
    code = (
        "import sys; sys.modules.update(torch=None, transformers=None)\nfrom hf_plm.cli import main; main(sys.argv[1:])"
    )
    (exported,) = (tmp_path / "cache" / "onnx").iterdir()
    for number, name in enumerate((model, exported)):
        out = tmp_path / f"{number}.npz"
        words = ["embed", fasta, "--model", name, "--out", out, "--pool", "none", "--backend", "onnx", "--int8"]
        done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert re.search(
            r"int8       cosine to fp32 on the first \d+ proteins: residues [01]\.\d+ on average", done.stdout
        )
        with np.load(out) as file:
            assert "cosine to fp32" in str(file["metadata"])
    words = ["embed", fasta, "--model", model, "--out", tmp_path / "no.npz"]
    done = subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 1
    assert re.fullmatch(r"hf-plm: This needs \w+, which is not installed: .*--backend onnx .*\n", done.stderr)
    for options, message in (
        (Options(layer=1, backend="onnx"), "was exported for layer 3"),
        (Options(), "give --backend onnx with it"),
    ):
        with pytest.raises(UserError, match=message):
            embed_file(job(fasta, exported, tmp_path / "no.npz", options=options))


def test_shares_are_even_in_tokens(tmp_path):
    from hf_plm.inference.unfinished import shares

    np.savez(tmp_path / "bounds.npz", residues=np.cumsum([0] + [100] * 50 + [1000] * 20))
    portions = [(begin, begin + 2) for begin in range(0, 70, 2)]
    for count in (1, 2, 3, 8):
        parts = shares(portions, tmp_path, count)
        assert functools.reduce(operator.iadd, parts, []) == portions
        tokens = [sum(200 if begin < 50 else 2000 for begin, _ in part) for part in parts]
        assert max(tokens) - min(tokens) <= 4000


def test_rejected_records_are_listed_beside_the_result(model, tmp_path, capsys):
    from hf_plm.cli import main

    fasta = tmp_path / "p.fasta"
    fasta.write_text("".join(f">p{number}\n{protein(30)}\n" for number in range(30)) + ">odd\nMK1T\n>none\n\n")
    words = ["embed", str(fasta), "--model", str(model), "--out"]
    main([*words, str(tmp_path / "out.npz")])
    told = capsys.readouterr().out
    assert "rejected   2 of 32 records" in told
    assert "out.npz.rejected.tsv" in told
    lines = (tmp_path / "out.npz.rejected.tsv").read_text().splitlines()
    assert lines[1:] == ["p.fasta\t31\todd\t3\tillegal character '1'", "p.fasta\t32\tnone\t\tno residues"]
    main([*words, str(tmp_path / "all.npz"), "--illegal", "x", "--data.max_rejected", "0.5"])
    assert "1 illegal characters written as X" in capsys.readouterr().out
    assert [name for name, _ in read_result(tmp_path / "all.npz")][-1] == "odd"
    with pytest.raises(SystemExit):
        main([*words, str(tmp_path / "no.npz"), "--max-rejected", "0.01"])
    assert capsys.readouterr().err.startswith("hf-plm: 2 of 32 records are rejected")
    assert (tmp_path / "no.npz.rejected.tsv").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--pool", "average"], "A pooling is one of none, mean, max, cls, not 'average'."),
        (["--dtype", "bf16"], "--dtype is float32 or float16"),
        (["--layer", "9"], "--layer is from 0 (the embeddings) to 3"),
        (["--int8"], "--int8 is ONNX Runtime's"),
        (["--precision", "fp8"], "--precision is one of auto, fp32, bf16, fp16"),
        (["--threads", "0"], "--threads is a number from 1"),
        (["--pool", "mean,mean"], "--pool names a pooling twice"),
        (["--sites", "S1"], "--sites takes residue letters"),
        (
            ["--pool", "max", "--sites", "STY"],
            "--sites gives a residue's vector and its protein's mean; leave --pool out",
        ),
    ],
)
def test_flags_that_make_no_sense(words, message, fasta, model, tmp_path, capsys):
    from hf_plm.cli import main

    with pytest.raises(SystemExit) as stopped:
        main(["embed", str(fasta), "--model", str(model), "--out", str(tmp_path / "out.npz"), *words])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("out.npz*"))


def test_places_that_cannot_be_written(fasta, model, tmp_path, capsys):
    for out, message in (
        (tmp_path / "out.csv", r"none of \.safetensors"),
        (fasta / "sub" / "out.npz", "cannot be written"),
    ):
        with pytest.raises(UserError, match=message):
            embed_file(job(fasta, model, out))
    (tmp_path / "out.npz.partial").mkdir()
    (tmp_path / "out.npz.partial" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is in the way and not of an embedding"):
        embed_file(job(fasta, model, tmp_path / "out.npz"))
    assert (tmp_path / "out.npz.partial" / "thesis.txt").exists()


@pytest.mark.skipif(not MESSY.is_dir(), reason=f"no messy files at {MESSY} (HF_PLM_DATA)")
@pytest.mark.parametrize("name", [*KEPT, *REFUSED, *UNREADABLE])
def test_messy_files_give_all_their_records_or_one_sentence(name, model, tmp_path):
    """What `prepare` keeps has vectors, and duplicates too; what it refuses is refused in like words."""
    out = tmp_path / "out.npz"
    one = job(MESSY / name, model, out, pool=("none",))
    if name not in KEPT:
        sentence = "{} of {} records are rejected".format(*REFUSED[name]) if name in REFUSED else UNREADABLE[name]
        with pytest.raises(UserError, match=re.escape(sentence)):
            embed_file(one)
        assert {path.name for path in tmp_path.iterdir()} <= {"out.npz.rejected.tsv"}
        return
    embed_file(one)
    read, kept, duplicates, rejected = KEPT[name]
    found = list(read_result(out))
    assert len(found) == kept + duplicates == read - rejected
    assert all(np.isfinite(arrays["embeddings"]).all() for _, arrays in found)
    listed = tmp_path / "out.npz.rejected.tsv"
    assert (len(listed.read_text().splitlines()) - 1 if listed.exists() else 0) == rejected


@pytest.mark.parametrize("suffix", [".safetensors", ".h5", ".parquet", ".npz"])
def test_a_finished_result_is_known_again(suffix, fasta, model, tmp_path, capsys):
    out = tmp_path / f"out{suffix}"
    embed_file(job(fasta, model, out))
    before = out.stat().st_mtime_ns
    embed_file(job(fasta, model, out))
    assert "is there already, whole and as asked for" in capsys.readouterr().out
    with pytest.raises(UserError, match="was asked for otherwise"):
        embed_file(job(fasta, model, out, dtype="float16"))
    assert out.stat().st_mtime_ns == before
    out.write_bytes(b"a thesis")
    with pytest.raises(UserError, match=r"is no result of hf-plm embed|is not a safetensors file"):
        embed_file(job(fasta, model, out))
    assert out.read_bytes() == b"a thesis"


def test_a_list_of_a_few_sites_embeds_a_few_proteins(records, fasta, model, tmp_path, monkeypatch):
    from hf_plm.models.encoder import TorchEncoder

    given, run = [], TorchEncoder.encode
    monkeypatch.setattr(
        TorchEncoder, "encode", lambda self, proteins, wants: given.extend(proteins) or run(self, proteins, wants)
    )
    (tmp_path / "sites.tsv").write_text("name\tsite\nb\t1.0\np7\t1\n")
    embed_file(job(fasta, model, tmp_path / "out.npz", sites=str(tmp_path / "sites.tsv")))
    chosen = [sequence for name, sequence in records if name in ("b", "p7")]
    assert [one.decode() for one in given] == chosen
    for (_, arrays), sequence in zip(read_result(tmp_path / "out.npz"), chosen, strict=True):
        vectors = authors_vectors("ESM-2", model, sequence)
        np.testing.assert_allclose(arrays["embeddings"], np.concatenate((vectors[0], vectors.mean(0))), atol=1e-4)
    embed_file(job(fasta, model, tmp_path / "crop.npz", sites="STY", options=Options(long="crop", max_length=9)))
    expected = sum(letter in "STY" for _, sequence in records for letter in sequence[:9])
    assert len(list(read_result(str(tmp_path / "crop.npz")))) == expected


def test_an_earlier_list_of_rejected_records_does_not_stay(model, tmp_path):
    fasta = tmp_path / "p.fasta"
    fasta.write_text(">a\nMK*T\n")
    with pytest.raises(UserError, match="1 of 1 records are rejected"):
        embed_file(job(fasta, model, tmp_path / "out.npz"))
    assert (tmp_path / "out.npz.rejected.tsv").exists()
    fasta.write_text(">a\nMKT\n>a\nMKV\n")
    embed_file(job(fasta, model, tmp_path / "out.npz"))
    assert not (tmp_path / "out.npz.rejected.tsv").exists()


def test_dna_is_warned_of(model, tmp_path, capsys):
    (tmp_path / "genes.fasta").write_text(">gene\n" + "ACGT" * 50 + "\n")
    embed_file(job(tmp_path / "genes.fasta", model, tmp_path / "out.npz"))
    assert "genes.fasta: almost only A C G T (100% of the letters" in capsys.readouterr().err
