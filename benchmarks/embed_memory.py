"""Memory of `hf-plm embed` over a file of a million short proteins, against what the model takes by itself.

    python benchmarks/embed_memory.py --out embed_memory.json

The model is a tiny one, so that the file's length is what counts. Each run is a process of its own; its peak is the
kernel's (`ru_maxrss`). The base is the same command on one protein.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from outcome import Row, finish, table

from hf_plm.models.hub import save_hub_folder
from hf_plm.models.presets import build_model, esm_config
from hf_plm.proteins.vocabulary import STANDARD_RESIDUES

CHILD = """
import resource, sys
from hf_plm.cli import main
main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def write_fasta(path: Path, count: int) -> None:
    generator = np.random.default_rng(0)
    letters = np.frombuffer(STANDARD_RESIDUES.encode(), dtype=np.uint8)
    with open(path, "w") as file:
        for first in range(0, count, 10_000):
            lengths = generator.integers(8, 41, min(10_000, count - first))
            bounds = np.cumsum([0, *lengths])
            residues = generator.choice(letters, bounds[-1]).tobytes().decode()
            file.write(
                "".join(
                    f">p{first + number}\n{residues[bounds[number] : bounds[number + 1]]}\n"
                    for number in range(len(lengths))
                )
            )


def peak_bytes(words: Sequence[str]) -> tuple[int, float]:
    """Peak resident memory of `hf-plm` with these words, and its seconds."""
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    scale = 1 if sys.platform == "darwin" else 1024
    return int(done.stdout.split()[-1]) * scale, time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--proteins", type=int, default=1_000_000)
    parser.add_argument("--formats", nargs="+", default=["safetensors", "parquet", "npz"])
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    lines: list[list[str]] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_hub_folder(build_model(esm_config("1x32x2"), 0), folder / "model", "# random weights")
        write_fasta(folder / "one.fasta", 1)
        write_fasta(folder / "many.fasta", arguments.proteins)
        model = ["--model", str(folder / "model")]
        base, _ = peak_bytes(["embed", str(folder / "one.fasta"), *model, "--out", str(folder / "one.npz")])
        for suffix in arguments.formats:
            out = folder / f"many.{suffix}"
            peak, seconds = peak_bytes(["embed", str(folder / "many.fasta"), *model, "--out", str(out)])
            size = out.stat().st_size
            out.unlink()
            lines.append(
                [suffix, f"{base / 1e9:.2f}", f"{(peak - base) / 1e9:.2f}", f"{size / 1e6:,.0f}", f"{seconds:.0f}"]
            )
            rows += [
                (f"embed_memory.{suffix}.above_model", (peak - base) / 1e9, "GB"),
                (f"embed_memory.{suffix}.seconds", seconds, "s"),
            ]
    heading = ["format", "peak with one protein, GB", "above it with all, GB", "result, MB", "seconds"]
    text = f"{arguments.proteins:,} proteins of 8 to 40 residues, a mean of 32 numbers each\n\n{table(heading, lines)}"
    finish(text, rows, arguments.out)


if __name__ == "__main__":
    main()
