"""Embedding on a GPU: proteins/s and tokens/s of `Embedder`, protein means, against one at a time and padded batches.

    python benchmarks/gpu_embed.py --out gpu_embed.json

ESM-2 shapes with random weights, bf16, on proteins of 350 residues on average, their lengths distributed as nature's.
Each contestant is timed for some seconds, in turns. Without a GPU every row reads `not measured`; what proves the
script there:

    python benchmarks/gpu_embed.py --device cpu --presets 2x64x4 --seconds 2
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from outcome import Row, finish, table

from hf_plm.inference.embedder import Embedder
from hf_plm.models.hub import save_hub_folder
from hf_plm.models.presets import build_model, esm_config
from hf_plm.proteins.vocabulary import STANDARD_RESIDUES

FLOORS = {"150m": 2000, "650m": 600}
"""Proteins/s that one H200 should reach."""
BATCH, MEAN, LONGEST = 16, 350, 1022


def natural_proteins(count: int) -> list[str]:
    """Random letters; lengths log-normal as in UniProt, stretched to the mean."""
    generator = np.random.default_rng(0)
    lengths = generator.lognormal(5.678, 0.762, count).clip(30, LONGEST)
    lengths = (lengths * MEAN / lengths.mean()).clip(30, LONGEST).astype(int)
    letters = np.frombuffer(STANDARD_RESIDUES.encode(), dtype=np.uint8)
    return [generator.choice(letters, length).tobytes().decode() for length in lengths]


@torch.inference_mode()
def padded(model: torch.nn.Module, embedder: Embedder, proteins: Iterator[str], batch: int) -> Iterator[int]:
    """Lengths of the proteins that the stock model has embedded, in batches in the order they come."""
    device = next(model.parameters()).device
    spelling = embedder.encoder.spelling
    while True:
        ids = [spelling.encode(protein.encode()) for protein in islice(proteins, batch)]
        longest = max(map(len, ids))
        input_ids_BL = np.full((len(ids), longest), spelling.pad_id)
        for row, one in enumerate(ids):
            input_ids_BL[row, : len(one)] = one
        tensor_BL = torch.from_numpy(input_ids_BL).to(device)
        mask_BL = (tensor_BL != spelling.pad_id).long()
        hidden_BLD = model(tensor_BL, attention_mask=mask_BL).last_hidden_state
        inside_BL1 = mask_BL[..., None].clone()
        inside_BL1[:, 0] = 0
        ((hidden_BLD * inside_BL1).sum(1) / inside_BL1.sum(1)).float().cpu().numpy()
        yield from (len(one) - 2 for one in ids)


def rate(lengths: Iterator[int], seconds: float) -> tuple[float, float]:
    """Proteins/s and tokens/s over some seconds."""
    next(lengths)
    began, count, tokens = time.perf_counter(), 0, 0
    while (spent := time.perf_counter() - began) < seconds:
        tokens += next(lengths) + 2
        count += 1
    return count / spent, tokens / spent


def compete(preset: str, device: str, seconds: float, rounds: int) -> tuple[list[list[str]], list[Row]]:
    with tempfile.TemporaryDirectory() as folder:
        save_hub_folder(build_model(esm_config(preset), 0), folder + "/model", "# random weights")
        embedder = Embedder(folder + "/model", precision="bf16", device=device)
    stock = build_model(esm_config(preset), 0).esm.to(device, torch.bfloat16).eval()
    proteins = natural_proteins(20_000)

    def ours() -> Iterator[int]:
        lengths = (len(protein) for protein in cycle(proteins))
        return (length for length, _ in zip(lengths, embedder.stream(cycle(proteins)), strict=False))

    contestants: dict[str, Callable[[], Iterator[int]]] = {
        "hf_plm": ours,
        "padded": lambda: padded(stock, embedder, cycle(proteins), BATCH),
        "loop": lambda: padded(stock, embedder, cycle(proteins), 1),
    }
    for make in contestants.values():
        rate(make(), seconds / 4)  # warms up
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, make in contestants.items():  # a new stream each turn, so that none works ahead in another's
            found[name].append(rate(make(), seconds))
    lines: list[list[str]] = []
    rows: list[Row] = []
    for name, values in found.items():
        proteins_s, tokens_s = (median(column) for column in zip(*values, strict=True))
        lines.append([f"{preset}: {name}", f"{proteins_s:,.0f}", f"{tokens_s:,.0f}", str(FLOORS.get(preset, ""))])
        rows += [
            (f"gpu_embed.{preset}.{name}", proteins_s, "proteins/s"),
            (f"gpu_embed.{preset}.{name}.tokens", tokens_s, "tokens/s"),
        ]
    return lines, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=list(FLOORS))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=8.0, help="of a turn (8)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        names = [f"gpu_embed.{preset}.{name}" for preset in arguments.presets for name in ("hf_plm", "padded", "loop")]
        finish("There is no GPU here.", [(name, None, "proteins/s") for name in names], arguments.out)
        return
    lines: list[list[str]] = []
    rows: list[Row] = []
    for preset in arguments.presets:
        more_lines, more_rows = compete(preset, arguments.device, arguments.seconds, arguments.rounds)
        lines += more_lines
        rows += more_rows
    heading = ["model and contestant", "proteins/s", "tokens/s", "floor, proteins/s"]
    finish(f"Proteins of {MEAN} residues on average, means, bf16\n\n" + table(heading, lines), rows, arguments.out)


if __name__ == "__main__":
    main()
