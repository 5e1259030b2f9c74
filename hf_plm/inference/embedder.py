"""A model opened for embedding, for use inside a program: sequences in, arrays out, or a stream of them.

    embedder = Embedder("facebook/esm2_t6_8M_UR50D")
    means = embedder.embed(["MKTAYIAK", "GAVLI"])       # (2, 320)
    for vectors in embedder.stream(sequences, "none"):  # (N, 320), one protein after the other
        ...

With `backend="onnx"` and a model that was exported before, neither torch nor transformers is imported.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hf_plm.config import UserError
from hf_plm.inference.vectors import LONG, Encoder, Vectors, check_poolings, embed_stream
from hf_plm.models.locate import ENCODER_FILE, cache_folder, locate, revision
from hf_plm.proteins.fasta import IllegalResidueError, clean

BACKENDS = ("torch", "onnx")
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
LONGEST_BIAS = 2048


@dataclass(frozen=True)
class Options:
    """How proteins are embedded, whatever becomes of the vectors."""

    layer: int = -1  # as transformers counts hidden states: 0 the embeddings, -1 what the last layer gives
    precision: str = "auto"  # of products: fp32, or bf16 on a GPU
    backend: str = "torch"
    int8: bool = False
    long: str = "window"
    max_length: int | None = None  # residues that are taken at once; none: what the model takes
    device: str = "auto"
    threads: int | None = None

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("backend", self.backend, BACKENDS),
            ("precision", self.precision, PRECISIONS),
            ("long", self.long, LONG),
        ):
            if value not in allowed:
                raise UserError(f"--{name} is one of {', '.join(allowed)}, not {value!r}.")
        for name, count in (("max-length", self.max_length), ("threads", self.threads)):
            if count is not None and count < 1:
                raise UserError(f"--{name} is a number from 1, not {count}.")
        if self.int8 and self.backend != "onnx":
            raise UserError("--int8 is ONNX Runtime's: give --backend onnx too.")
        if self.backend == "onnx" and (self.precision not in ("auto", "fp32") or self.device not in ("auto", "cpu")):
            raise UserError(
                "--backend onnx runs on the CPU in fp32, or with --int8; leave --precision and --device out."
            )


def require_torch() -> None:
    """Imports what runs and exports stock models. Raises `UserError` where torch or transformers is not there."""
    try:
        import hf_plm.models.encoder  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(
            f"This needs {error.name}, which is not installed: install hf_plm with what it depends on, or give "
            "--backend onnx and a folder that it has exported elsewhere."
        ) from None


def open_encoder(model: str | Path, options: Options) -> Encoder:
    """The model, ready; with `--backend onnx` it is exported once and found again by its revision."""
    name = str(model)
    folder = locate(name)
    if (folder / ENCODER_FILE).is_file() and options.backend != "onnx":
        raise UserError(f"{name} is an exported encoder; give --backend onnx with it.")
    if options.backend == "onnx":
        return _open_onnx(name, folder, options)
    require_torch()
    from hf_plm.models.encoder import load_encoder
    from hf_plm.models.stock import pick_device, pick_precision

    device = pick_device(options.device)
    precision = pick_precision(options.precision, device)
    encoder = load_encoder(folder, name, options.layer, precision, device, options.threads)
    encoder.facts["revision"] = revision(folder)
    return encoder


def _open_onnx(name: str, folder: Path, options: Options) -> Encoder:
    from hf_plm.models.session import FORMAT, OnnxEncoder

    if (folder / ENCODER_FILE).is_file():
        exported = folder
    else:
        found = revision(folder)
        exported = cache_folder() / "onnx" / f"{found.removeprefix('sha256:')[:16]}-layer{options.layer}-{FORMAT}"
        if not (exported / ENCODER_FILE).is_file():
            require_torch()
            from transformers import T5EncoderModel

            from hf_plm.models.families import longest
            from hf_plm.models.graphs import write_graphs
            from hf_plm.models.stock import open_encoder as open_in_torch

            print(f"Exporting {name} to ONNX, once ({exported}) ...", flush=True)
            stock, spelling, facts = open_in_torch(folder, name)
            facts["revision"] = found
            limit = longest(stock.config, spelling)
            # T5's bias is written out for each pair of tokens here: 0.7 GB a call for 2,048 tokens and 16 heads.
            limit = min(limit, LONGEST_BIAS) if isinstance(stock, T5EncoderModel) else limit
            write_graphs(stock, exported, options.layer, spelling, facts, limit)
    encoder = OnnxEncoder(exported, options.int8, options.threads)
    if (folder / ENCODER_FILE).is_file() and options.layer not in (-1, encoder.layer):
        raise UserError(f"{name} was exported for layer {encoder.layer}, so that --layer {options.layer} is not in it.")
    return encoder


def limit_of(encoder: Encoder, options: Options) -> int:
    """Residues that are taken at once; raises `UserError` where `max_length` asks for more than the model takes."""
    if options.max_length is None:
        return encoder.limit
    if options.max_length > encoder.limit:
        raise UserError(
            f"--max-length is at most {encoder.limit:,} for {encoder.facts['model']} ({encoder.facts['family']}), not "
            f"{options.max_length:,}."
        )
    return options.max_length


class Embedder:
    """A model that stays open. `model` is a folder, a finished run or a repository on the Hub; for the other arguments
    see `Options`. Raises `UserError` for what cannot be opened."""

    def __init__(
        self,
        model: str | Path,
        *,
        layer: int = -1,
        precision: str = "auto",
        backend: str = "torch",
        int8: bool = False,
        long: str = "window",
        max_length: int | None = None,
        device: str = "auto",
        threads: int | None = None,
    ):
        self.options = Options(layer, precision, backend, int8, long, max_length, device, threads)
        self.encoder = open_encoder(model, self.options)
        self._limit = limit_of(self.encoder, self.options)

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.encoder.width

    def __repr__(self) -> str:
        return f"Embedder({self.encoder.facts['model']!r}, {self.width} wide, {self.encoder.facts['precision']})"

    def embed(self, sequences: Iterable[str], pool: str = "mean") -> np.ndarray | list[np.ndarray]:
        """fp32 (P, D) of P sequences; with `pool="none"` a list of (N, D), a row for each residue."""
        # All are cleaned first: a mistake in the last one should not cost the work on the others.
        found = [vectors[pool] for vectors in self.vectors(list(_cleaned(sequences)), (pool,))]
        if pool == "none":
            return found
        return np.stack(found) if found else np.zeros((0, self.width), dtype=np.float32)

    def stream(self, sequences: Iterable[str], pool: str = "mean") -> Iterator[np.ndarray]:
        """The same one by one, in order, with a few sequences read ahead: (D,), or (N, D) with `pool="none"`."""
        for vectors in self.vectors(_cleaned(sequences), (pool,)):
            yield vectors[pool]

    def vectors(self, proteins: Iterable[bytes], pools: Collection[str]) -> Iterator[Vectors]:
        """Several poolings at once, of proteins as `proteins.fasta.clean` leaves them."""
        check_poolings(self.encoder, pools)
        return embed_stream(self.encoder, [proteins], pools, self.options.long, self._limit)


def embed(
    sequences: Iterable[str],
    model: str | Path,
    pool: str = "mean",
    *,
    layer: int = -1,
    precision: str = "auto",
) -> np.ndarray | list[np.ndarray]:
    """The vectors of sequences: fp32 (P, D), or with `pool="none"` a list of (N, D).

    `Embedder` keeps the model open, and has more to choose.
    """
    return Embedder(model, layer=layer, precision=precision).embed(sequences, pool)


def _cleaned(sequences: Iterable[str]) -> Iterator[bytes]:
    # Of these, iteration gives letters, keys or names of columns, which would pass for proteins.
    if isinstance(sequences, str | Mapping) or hasattr(sequences, "columns"):
        raise UserError(
            f"A list of sequences was expected, or another iterable of them, not one {type(sequences).__name__}."
        )
    return _clean_each(sequences)


def _clean_each(sequences: Iterable[str]) -> Iterator[bytes]:
    for number, sequence in enumerate(sequences, start=1):
        if not isinstance(sequence, str):
            raise UserError(f"Sequence {number} should be a string, not {type(sequence).__name__}.")
        try:
            residues = clean(sequence).residues
        except IllegalResidueError as error:
            raise UserError(f"Sequence {number}: {error}") from None
        if not residues:
            raise UserError(f"Sequence {number} has no residues.")
        yield residues
