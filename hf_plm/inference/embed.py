"""`hf-plm embed`: a file of proteins in, a file of vectors out.

All that is unfinished lies in `OUT.partial`: the cleaned proteins, the vectors' file with a place for every row, and
for each process a list of what it has written. Whatever stops a run, the same command goes on, in the same calls to the
model, so that the result is the one that an undisturbed run would have given. Several processes share the proteins by
tokens and write into the one file.
"""

import json
import os
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from hf_plm.config import UserError
from hf_plm.data.sources import Source, find_sources
from hf_plm.inference.embedder import limit_of, open_encoder
from hf_plm.inference.formats import check_format, finish, format_of, read_metadata
from hf_plm.inference.job import Job, check_same, digest_of, metadata_of, request_of
from hf_plm.inference.ranks import Ranks
from hf_plm.inference.results import WorkingFile
from hf_plm.inference.rows import create_rows, read_sites, rows_of, window_counts, write_portion
from hf_plm.inference.sites import find_sites
from hf_plm.inference.unfinished import (
    READY,
    REQUEST,
    ROWS,
    Range,
    cut_portions,
    open_done,
    remaining_ranges,
    shares,
)
from hf_plm.inference.vectors import Encoder, check_poolings, embed_stream
from hf_plm.inference.worklist import REJECTED, Worklist, write_worklist
from hf_plm.lock import locked
from hf_plm.progress import Progress, duration

COMMIT_SECONDS = 2.0
NOTHING = np.zeros((0, 0), dtype=np.float32)
CHUNK_BYTES = 64_000_000
"""Of vectors that wait to be written."""
SAMPLE_RESIDUES = 4000
"""That int8 is compared with fp32 on."""
LEAST_COSINE = 0.99
"""Of a residue's vector in int8 to the one in fp32; below, it is warned of."""


def embed_file(job: Job) -> None:
    """Embeds the sources of a job into its `out`, or goes on with it. Raises `UserError` for what the user can mend."""
    check_format(format_of(job.out))
    partial = job.out.with_name(f"{job.out.name}.partial")
    began = time.monotonic()
    ranks = Ranks()
    with ExitStack() as held:
        held.callback(ranks.close)
        opened: list[Encoder] = []

        def begin() -> list[Range] | None:
            _hold(job.out, held)
            sources = find_sources(job.sources, "train")
            opened.append(open_encoder(job.model, job.options))
            check_poolings(opened[0], job.wants)
            request = request_of(job, opened[0], sources, limit_of(opened[0], job.options))
            if job.out.exists():
                _check_finished(job.out, partial, request)
                return None
            return _begin(job, opened[0], sources, partial, request)

        portions = ranks.agree(begin)
        if portions is None:
            return
        try:
            encoder = opened[0] if opened else open_encoder(job.model, job.options)
            _run(job, encoder, partial, shares(portions, partial, ranks.size)[ranks.rank], ranks)
        except UserError as error:
            if os.environ.get("LOCAL_RANK", "0") != "0":  # those are told by nobody else
                print(f"hf-plm: process {ranks.rank}: {error}", file=sys.stderr, flush=True)
            raise
        ranks.wait()
        if ranks.rank == 0:
            _finish(job, partial, began)


def _hold(out: Path, held: ExitStack) -> None:
    """Keeps other runs from the same result, until `held` lets go."""
    path = out.with_name(f".{out.name}.lock")
    try:
        lock = locked(path, f"embeds into {out} already", ", or name another --out")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror} ({out.parent}).") from None
    held.callback(lock.close)
    held.callback(path.unlink, missing_ok=True)


def _check_finished(out: Path, partial: Path, request: dict[str, Any]) -> None:
    """A result that was asked for before is not made again; any other in its place is not touched."""
    if read_metadata(out).get("request") != digest_of(request):
        raise UserError(f"{out} is there already, and was asked for otherwise; name another --out, or move it away.")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed at its very end
    print(f"{out} is there already, whole and as asked for.")


def _begin(job: Job, encoder: Encoder, sources: list[Source], partial: Path, request: dict[str, Any]) -> list[Range]:
    """Makes the folder of what is unfinished, or opens it; the portions that are left."""
    limit = limit_of(encoder, job.options)
    print(f"model      {_describe(encoder)}", flush=True)
    if (partial / READY).exists():
        check_same(json.loads((partial / REQUEST).read_text(encoding="utf-8")), request, partial, job.out)
        worklist = Worklist(partial)
        portions = cut_portions(worklist, encoder, remaining_ranges(partial))
        _tell(job, worklist, limit, partial)
        done = len(worklist) - sum(end - begin for begin, end in portions)
        print(f"going on   after {done:,} of {len(worklist):,} proteins of an earlier run", flush=True)
        return portions
    if partial.exists() and not (partial / REQUEST).exists() and any(partial.iterdir()):
        raise UserError(f"{partial} is in the way and not of an embedding; move it away.")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise UserError(f"{job.out} cannot be written: {error.strerror} ({partial}).") from None
    (partial / REQUEST).write_text(json.dumps(request, indent=1), encoding="utf-8")
    _rejected_name(job.out).unlink(missing_ok=True)  # of an earlier try
    try:
        worklist = _take_in(job, sources, partial)
        _create(job, encoder, worklist, limit, partial, request)
    except UserError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _tell(job, worklist, limit, partial)
    (partial / READY).touch()
    return cut_portions(worklist, encoder, [(0, len(worklist))])


def _create(job: Job, encoder: Encoder, worklist: Worklist, limit: int, partial: Path, request: dict[str, Any]) -> None:
    _check_long(worklist, limit, job.options.long)
    lengths = worklist.lengths
    kept = np.minimum(lengths, limit) if job.options.long == "crop" else lengths
    sites = find_sites(job.sites, worklist, kept) if job.sites is not None else None
    metadata = metadata_of(job, encoder, limit, rows_of(job.wants, sites), request)
    if job.options.int8:
        metadata["int8"] = _measure_int8(job, encoder, worklist)
        print(f"int8       {metadata['int8']}", flush=True)
    windows = window_counts(kept, limit)
    create_rows(partial, worklist, encoder.width, job.wants, job.dtype, kept, windows, sites, metadata)


def _take_in(job: Job, sources: list[Source], partial: Path) -> Worklist:
    total = sum(path.stat().st_size for source in sources for path in source.files)
    is_quiet = not sys.stderr.isatty()
    try:
        with tqdm(total=total, unit="B", unit_scale=True, desc="reading", leave=False, disable=is_quiet) as bar:
            return write_worklist(sources, partial, job.cleaning, bar.update)
    except UserError as error:
        listed = _rejected_name(job.out)
        rejected = (partial / REJECTED).exists() and len((partial / REJECTED).read_bytes().splitlines()) > 1
        if rejected:
            os.replace(partial / REJECTED, listed)
        raise UserError(f"{error} All are listed in {listed}." if rejected else str(error)) from None


def _check_long(worklist: Worklist, limit: int, long: str) -> None:
    too_long = np.flatnonzero(worklist.lengths > limit)
    if long == "refuse" and len(too_long):
        first = int(too_long[0])
        raise UserError(
            f"{len(too_long):,} of {len(worklist):,} proteins have more than {limit:,} residues, the first: "
            f"{worklist.ids(first, first + 1)[0]} with {worklist.lengths[first]:,}; --long window takes them in "
            "overlapping windows, --long crop their beginning."
        )


def _measure_int8(job: Job, encoder: Encoder, worklist: Worklist) -> str:
    """How far int8 is from fp32 on the first proteins: the cosines of their vectors."""
    sample: list[bytes] = []
    for _, residues in worklist:
        if sample and sum(map(len, sample)) + len(residues) > SAMPLE_RESIDUES:
            break
        sample.append(residues)
    exact = open_encoder(job.model, replace(job.options, int8=False))
    limit = limit_of(encoder, job.options)
    found = [list(embed_stream(one, [sample], ("none", "mean"), "window", limit)) for one in (exact, encoder)]
    residues_R, proteins_P = (
        np.concatenate([_cosine(a[name], b[name]) for a, b in zip(*found, strict=True)]) for name in ("none", "mean")
    )
    if residues_R.min() < LEAST_COSINE:
        print(
            f"warning: some vectors of this model are far off in 8 bits (cosine to fp32 {residues_R.min():.3f}); leave "
            "--int8 out where that matters",
            file=sys.stderr,
        )
    return (
        f"cosine to fp32 on the first {len(sample):,} proteins: residues {residues_R.mean():.4f} on average, "
        f"{residues_R.min():.4f} at worst; protein means {proteins_P.mean():.4f}, {proteins_P.min():.4f} at worst"
    )


def _cosine(a_ND: np.ndarray, b_ND: np.ndarray) -> np.ndarray:
    a_ND, b_ND = np.atleast_2d(a_ND), np.atleast_2d(b_ND)
    norms_N = np.linalg.norm(a_ND, axis=1) * np.linalg.norm(b_ND, axis=1)
    return (a_ND * b_ND).sum(axis=1) / np.maximum(norms_N, 1e-30)


class _Progress(Progress):
    """Over the first process's share."""

    def __init__(self, worklist: Worklist, portions: list[Range], ranks: Ranks):
        self._proteins = self._residues = 0
        self._num_proteins = sum(end - begin for begin, end in portions)
        self._of_all = f" (process 1 of {ranks.size})" if ranks.size > 1 else ""
        total = sum(int(worklist.bounds[end] - worklist.bounds[begin]) for begin, end in portions)
        super().__init__("embedding", total, is_shown=ranks.rank == 0)

    def count(self, amount: int = 1) -> None:
        """One more protein is done, of so many residues."""
        self._proteins += 1
        self._residues += amount
        super().count(amount)

    def words(self, seconds: float) -> str:
        return (
            f"{self._proteins:,} of {self._num_proteins:,} proteins{self._of_all}, "
            f"{self._proteins / seconds:,.1f} proteins/s, {self._residues / seconds:,.0f} residues/s"
        )


def _run(job: Job, encoder: Encoder, partial: Path, portions: list[Range], ranks: Ranks) -> None:
    """Embeds this process's portions into the file of vectors."""
    if not portions:
        return
    with ExitStack() as stack:
        worklist = Worklist(partial)
        stack.callback(worklist.close)
        file = stack.enter_context(WorkingFile.open(partial / ROWS, is_shared=ranks.size > 1))
        done = stack.enter_context(open_done(partial, ranks.rank))
        sites = read_sites(partial) if job.sites is not None else None
        limit = limit_of(encoder, job.options)
        progress = stack.enter_context(_Progress(worklist, portions, ranks))
        # A list of sites may name few proteins; the others need no vectors.
        is_needed = np.diff(sites.bounds) > 0 if sites else np.ones(len(worklist), dtype=bool)
        proteins = (
            [one for one, needed in zip(worklist.residues(begin, end), is_needed[begin:end], strict=True) if needed]
            for begin, end in portions
        )
        stream = embed_stream(encoder, proteins, job.wants, job.options.long, limit)
        stack.callback(stream.close)
        unwritten: list[Range] = []
        last_commit = time.monotonic()
        for begin, end in portions:
            first, arrays = begin, _empty(job)
            for number in range(begin, end):
                if is_needed[number]:
                    for name, array in next(stream).items():
                        arrays[name].append(array)
                elif sites:
                    for array_list in arrays.values():
                        array_list.append(NOTHING)
                progress.count(int(worklist.bounds[number + 1] - worklist.bounds[number]))
                if number + 1 == end or sum(array.nbytes for kind in arrays.values() for array in kind) > CHUNK_BYTES:
                    write_portion(file, first, arrays, sites)
                    first, arrays = number + 1, _empty(job)
            unwritten.append((begin, end))
            if time.monotonic() - last_commit > COMMIT_SECONDS or end == portions[-1][1]:
                file.sync()
                done.write("".join(f"{first} {last}\n" for first, last in unwritten))
                done.flush()
                os.fsync(done.fileno())
                unwritten, last_commit = [], time.monotonic()


def _empty(job: Job) -> dict[str, list[np.ndarray]]:
    return {name: [] for name in job.wants}


def _describe(encoder: Encoder) -> str:
    facts = encoder.facts
    revision = facts["revision"].removeprefix("sha256:")[:12]
    how = f"{facts['backend']} {facts['precision']}"
    return f"{facts['model']} ({facts['family']}, {encoder.width} wide, {revision}), {how}"


def _tell(job: Job, worklist: Worklist, limit: int, partial: Path) -> None:
    counts = worklist.counts
    print(f"proteins   {counts.kept:,} with {int(worklist.bounds[-1]):,} residues")
    num_long = int((worklist.lengths > limit).sum())
    if num_long:
        how = "embedded in overlapping windows" if job.options.long == "window" else "of which the beginning is kept"
        print(f"long       {num_long:,} of more than {limit:,} residues, {how}")
    if counts.rejected:
        print(
            f"rejected   {counts.rejected:,} of {counts.read:,} records, listed in {_rejected_name(job.out)} at the end"
        )
    for what, number in (
        ("J written as X", counts.j_to_x),
        ("illegal characters written as X", counts.illegal_to_x),
        ("gaps taken out", counts.gaps_stripped),
    ):
        if number:
            print(f"changed    {number:,} {what}")
    if counts.repeated_ids:
        print(f"ids        {counts.repeated_ids:,} records have an id that an earlier one has; all are kept")
    for note in counts.notes:
        print(f"warning: {note}", file=sys.stderr)
    with WorkingFile.open(partial / ROWS, read_only=True) as file:
        tensor = file.tensors["embeddings"]
        shape = f"{tensor.shape[0]:,} x {tensor.shape[1]:,} {tensor.dtype}"
        print(f"writing    {job.out}: {file.metadata['rows']}, {shape}, {file.num_bytes / 1e6:,.1f} MB", flush=True)


def _rejected_name(out: Path) -> Path:
    return out.with_name(f"{out.name}.rejected.tsv")


def _finish(job: Job, partial: Path, began: float) -> None:
    """The result in its format and place, the list of rejected records beside it, and nothing else."""
    assert not remaining_ranges(partial), "a process has not written its share"
    worklist = Worklist(partial)
    num_proteins, num_residues = len(worklist), int(worklist.bounds[-1])
    has_rejected = worklist.counts.rejected > 0
    worklist.close()
    if has_rejected:
        shutil.copyfile(partial / REJECTED, _rejected_name(job.out))
    with WorkingFile.open(partial / ROWS, read_only=True) as file:
        num_records = file.tensors["lengths"].shape[0]
    is_quiet = job.out.suffix == ".safetensors" or not sys.stderr.isatty()
    with tqdm(total=num_records, desc="writing", unit=" records", leave=False, disable=is_quiet) as bar:
        finish(partial / ROWS, job.out, bar.update)
    shutil.rmtree(partial)
    seconds = time.monotonic() - began
    print(
        f"Finished: {num_proteins:,} proteins, {num_residues:,} residues in {duration(seconds)}; "
        f"{job.out} has {job.out.stat().st_size / 1e6:,.1f} MB."
    )
