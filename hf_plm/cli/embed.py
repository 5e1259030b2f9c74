"""`hf-plm embed`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_plm.cli.knobs import meaning
from hf_plm.cli.process import quick_imports
from hf_plm.config import KNOBS, UserError


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    embed = commands.add_parser(
        "embed",
        help="embed proteins with any published encoder",
        description="The vectors of proteins, from any model that AutoModel opens with one token per residue. Stopped "
        "in any way, the same command goes on.",
        epilog="Under accelerate launch (launch/embed.py) several processes share the proteins.",
    )
    embed.add_argument("sources", nargs="+", help=meaning("data.train"))
    embed.add_argument("--model", required=True, help="a folder, a finished run or a repository on the Hub")
    embed.add_argument(
        "--out", required=True, type=Path, help="file to write: .safetensors, .h5, .parquet or .npz, by its name"
    )
    embed.add_argument(
        "--pool",
        metavar="POOLING",
        help="mean, cls or max over a protein, none: a row per residue; several side by side: none,mean (mean)",
    )
    embed.add_argument("--layer", type=int, default=-1, help="0 the embeddings, -1 what the last layer gives (-1)")
    embed.add_argument("--precision", default="auto", help="of products: fp32, bf16, fp16 (fp32, on GPUs bf16)")
    embed.add_argument("--dtype", default="float32", help="of what is written: float32 or float16 (float32)")
    embed.add_argument(
        "--sites", help="a row for each residue of these letters (STY) or of this table: its vector, the protein's mean"
    )
    embed.add_argument(
        "--long", default="window", help="longer proteins than --max-length: window, crop or refuse (window)"
    )
    embed.add_argument("--max-length", type=int, help="residues taken at once (what the model takes)")
    embed.add_argument("--backend", default="torch", help="torch, or onnx: ONNX Runtime on CPUs (torch)")
    embed.add_argument("--int8", action="store_true", help="with --backend onnx: 8-bit products; says what that costs")
    embed.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (the GPU where there is one)")
    embed.add_argument("--threads", type=int, help="CPU cores to use (all)")
    for name in ("illegal", "gaps"):
        item = KNOBS[f"data.{name}"]
        embed.add_argument(f"--{name}", f"--{item.name}", default=item.default, help=meaning(item.name))
    item = KNOBS["data.max_rejected"]
    embed.add_argument("--max-rejected", f"--{item.name}", type=float, default=item.default, help=meaning(item.name))
    item = KNOBS["data.sequence_column"]
    embed.add_argument("--sequence-column", f"--{item.name}", help=meaning(item.name))
    embed.set_defaults(run=_embed)


def _embed(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    from hf_plm.inference.embed import embed_file
    from hf_plm.inference.embedder import Options, require_torch
    from hf_plm.inference.job import Job
    from hf_plm.inference.worklist import Cleaning

    options = Options(
        parsed.layer,
        parsed.precision,
        parsed.backend,
        parsed.int8,
        parsed.long,
        parsed.max_length,
        parsed.device,
        parsed.threads,
    )
    cleaning = Cleaning(parsed.illegal, parsed.gaps, parsed.max_rejected, parsed.sequence_column)
    if parsed.sites is not None and parsed.pool:
        raise UserError("--sites gives a residue's vector and its protein's mean; leave --pool out.")
    pool = tuple(name.strip() for name in (parsed.pool or "mean").split(","))
    job = Job(parsed.sources, parsed.model, parsed.out, pool, parsed.dtype, parsed.sites, options, cleaning)
    if parsed.backend == "torch":
        with quick_imports():
            require_torch()
    try:
        embed_file(job)
    except KeyboardInterrupt:
        print(f"\nInterrupted; the same command goes on with {parsed.out}.", file=sys.stderr)
        raise
