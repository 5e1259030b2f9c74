"""What `hf-plm embed` is asked for, what makes its result the one it is, and what the result says of itself."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hf_plm.config import UserError
from hf_plm.data.sources import Source
from hf_plm.inference.embedder import Options
from hf_plm.inference.sites import site_letters
from hf_plm.inference.vectors import POOLINGS, Encoder
from hf_plm.inference.worklist import Cleaning


@dataclass(frozen=True)
class Job:
    """What is embedded, how, and what is kept of it."""

    sources: Sequence[str]
    model: str
    out: Path
    pool: tuple[str, ...] = ("mean",)
    dtype: str = "float32"
    sites: str | None = None
    options: Options = field(default_factory=Options)
    cleaning: Cleaning = field(default_factory=Cleaning)

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "float16"):
            raise UserError(f"--dtype is float32 or float16, not {self.dtype!r}.")
        for name in self.pool:
            if name not in POOLINGS:
                raise UserError(f"A pooling is one of {', '.join(POOLINGS)}, not {name!r}.")
        if self.sites is not None and not Path(self.sites).is_file() and not site_letters(self.sites):
            raise UserError(
                f"--sites takes residue letters, such as STY, or a table of sites; there is no file {self.sites}."
            )
        if len(set(self.pool)) != len(self.pool):
            raise UserError(f"--pool names a pooling twice: {' '.join(self.pool)}.")

    @property
    def wants(self) -> tuple[str, ...]:
        """The poolings, that of the rows first."""
        if self.sites is not None:
            return ("none", "mean")
        return tuple(sorted(self.pool, key=lambda name: name != "none"))


def request_of(job: Job, encoder: Encoder, sources: list[Source], limit: int) -> dict[str, Any]:
    """What makes a result the one it is; a run goes on only with the same."""
    files = [
        [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]
        for source in sources
        for path in source.files
    ]
    sites: Any = job.sites
    if job.sites is not None and Path(job.sites).is_file():
        sites = [str(Path(job.sites).resolve()), Path(job.sites).stat().st_mtime_ns]
    return {
        "sources": files + [source.location for source in sources if not source.files],
        "pool": list(job.wants),
        "dtype": job.dtype,
        "sites": sites,
        "long": job.options.long,
        "window": limit,
        "cleaning": asdict(job.cleaning),
        **{f"model {name}": value for name, value in encoder.facts.items()},
        "layer": encoder.layer,
        "int8": job.options.int8,
    }


def check_same(was: dict[str, Any], request: dict[str, Any], partial: Path, out: Path) -> None:
    """Raises `UserError` where what is unfinished was asked for otherwise."""
    for name in sorted(was.keys() | request.keys()):
        if was.get(name) == request.get(name):
            continue
        change = "other sources, or they have changed" if name == "sources" else f"another {name}"
        values = "" if name == "sources" else f" ({_plain(was.get(name))}, now {_plain(request.get(name))})"
        raise UserError(
            f"{partial} is of an unfinished embedding with {change}{values}; finish that, name another --out than "
            f"{out}, or remove the folder."
        )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {one}" for name, one in value.items())
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def digest_of(request: dict[str, Any]) -> str:
    """A request in short, by which its result is known again."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def metadata_of(job: Job, encoder: Encoder, limit: int, rows: str, request: dict[str, Any]) -> dict[str, str]:
    """What the file says of itself."""
    facts = dict(encoder.facts)
    facts.pop("cls")
    if job.options.long == "window":
        long = f"windows of {limit} residues that overlap by a quarter, blended"
    else:
        long = f"{job.options.long} at {limit} residues"
    names = ("hf_plm", "torch", "transformers") if facts.get("backend") == "torch" else ("hf_plm", "onnxruntime")
    versions = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "format": "hf_plm embeddings 1",
        "rows": rows,
        "pooling": " ".join(job.wants),
        "layer": str(encoder.layer),
        "dtype": job.dtype,
        "long": long,
        "sources": " ".join(Path(str(one)).name for one in job.sources),
        **facts,
        "request": digest_of(request),
        "versions": " ".join(f"{name} {number}" for name, number in versions.items()),
    }
