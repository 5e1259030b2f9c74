"""Masked marginals of every position of a protein: hf_plm against a loop over the stock model, on all cores or a GPU.

    python benchmarks/score.py --out score.json [--device cuda]

Real wild types (HF_PLM_DATA, default `../shared/data`): beta-lactamase TEM-1 (BLAT_ECOLX, 286 residues) and the toxin
CcdB (CCDB_ECOLI, 101); the shapes of ESM-2 8m and 35m and of the demo, random weights. The loop is what fair-esm's
examples/variant-prediction/predict.py does: one position masked at a time, a batch of one, log-softmax of all logits.
Both have the same precision, fp32, or bf16 autocast; contestants take turns, and ratios are medians of the turns'.
Beside them, since it asks about every position too, in fewer passes and with other numbers: random masks.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from outcome import Row, finish, table

from hf_plm.judging.scores.dms import find_assays
from hf_plm.judging.scores.marginals import marginals
from hf_plm.models.hub import save_hub_folder
from hf_plm.models.masked_lm import LETTERS, MaskedLM, open_masked_lm
from hf_plm.models.presets import build_model, esm_config

FOLDER = Path(os.environ.get("HF_PLM_DATA", "../shared/data")) / "probes" / "dms"
ASSAYS = {"BLAT_ECOLX": "BLAT_ECOLX_Stiffler_2015", "CCDB_ECOLI": "CCDB_ECOLI_Tripathi_2016"}
MODELS = ("demo", "8m", "35m")
PRECISIONS = ("fp32", "bf16")


class Loop:
    """One forward pass of the stock model for each position."""

    def __init__(self, folder: Path, precision: str, device: str):
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        self.model = AutoModelForMaskedLM.from_pretrained(folder).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.columns = self.tokenizer.convert_tokens_to_ids(list(LETTERS))
        self.device, self.is_bf16 = device, precision == "bf16"

    @torch.no_grad()
    def __call__(self, residues: bytes, places: np.ndarray) -> np.ndarray:
        input_ids = self.tokenizer(residues.decode(), return_tensors="pt")["input_ids"].to(self.device)
        rows = []
        with torch.autocast(self.device, torch.bfloat16, enabled=self.is_bf16):
            for place in places.tolist():
                masked = input_ids.clone()
                masked[0, 1 + place] = self.tokenizer.mask_token_id
                log_probs = torch.log_softmax(self.model(masked).logits.float(), dim=-1)
                rows.append(log_probs[0, 1 + place, self.columns])
        return torch.stack(rows).cpu().numpy()


def compete(
    name: str, protein: str, residues: bytes, contestants: tuple[Loop, MaskedLM], precision: str, rounds: int, most: int
) -> tuple[list[str], list[Row]]:
    loop, model = contestants
    places = np.unique(np.linspace(0, len(residues) - 1, min(most or len(residues), len(residues))).astype(np.int64))
    loop(residues, places[:2])  # warms up
    marginals(model, residues, places[:: 1 if loop.device == "cuda" else 8], "masked")
    spent: dict[str, list[float]] = {"loop": [], "hf_plm": [], "random_masks": []}
    for number in range(rounds):
        began = time.perf_counter()
        expected = loop(residues, places)
        middle = time.perf_counter()
        found = marginals(model, residues, places, "masked")
        end = time.perf_counter()
        marginals(model, residues, np.arange(len(residues)), "random-masks")
        spent["loop"].append(middle - began)
        spent["hf_plm"].append(end - middle)
        # Of as many positions as the others.
        spent["random_masks"].append((time.perf_counter() - end) * len(places) / len(residues))
        latest = ", ".join(f"{contestant} {seconds[-1]:.1f}" for contestant, seconds in spent.items())
        print(f"{name}, {protein}, {precision}, round {number + 1} of {rounds}, seconds: {latest}", flush=True)
    ratio, other = (
        median(a / b for a, b in zip(spent["loop"], spent[one], strict=True)) for one in ("hf_plm", "random_masks")
    )
    rates = {contestant: len(places) / median(seconds) for contestant, seconds in spent.items()}
    difference = float(np.abs(found - expected).max())
    title = f"{name}, {protein} ({len(residues)} residues), {precision}"
    numbers = [f"{rates['loop']:.1f}", f"{rates['hf_plm']:.1f}", f"{ratio:.2f}", f"{difference:.0e}"]
    line = [title, *numbers, f"{rates['random_masks']:.1f}", f"{other:.2f}"]
    begin = f"score.{name}.{protein}.{precision}"
    return line, [
        *((f"{begin}.{contestant}", rate, "positions/s") for contestant, rate in rates.items()),
        (f"{begin}.over.loop", ratio, "x"),
        (f"{begin}.random_masks.over.loop", other, "x"),
        (f"{begin}.difference", difference, "nats"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant (3)")
    parser.add_argument("--positions", type=int, default=0, help="of a protein, spread evenly; 0: all (0)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cpu or cuda (cpu)")
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    if not FOLDER.is_dir():
        names = [f"score.{name}.{one}.{how}.over.loop" for name in MODELS for one in ASSAYS for how in PRECISIONS]
        sentence = f"{FOLDER} is not there: say with HF_PLM_DATA where the real proteins are."
        finish(sentence, [(name, None, "x") for name in names], arguments.out)
        return
    wild_types = {assay.name: assay.residues for assay in find_assays(FOLDER)[0]}
    lines: list[list[str]] = []
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as home:
        for name in arguments.models:
            folder = Path(home) / name
            save_hub_folder(build_model(esm_config(name), 0), folder, "# random weights")
            for precision in PRECISIONS:
                model = open_masked_lm(folder, precision=precision, device=arguments.device)
                contestants = (Loop(folder, precision, arguments.device), model)
                for protein, assay in ASSAYS.items():
                    line, more = compete(
                        name, protein, wild_types[assay], contestants, precision, arguments.rounds, arguments.positions
                    )
                    lines.append(line)
                    rows += more
    heading = ["model, protein, precision", "loop, positions/s", "hf_plm, positions/s", "ratio", "difference"]
    heading += ["random masks, positions/s", "ratio"]
    text = f"on {arguments.device}, {torch.get_num_threads()} cores\n\n{table(heading, lines)}"
    finish(text, rows, arguments.out, rounds=arguments.rounds, positions=arguments.positions, device=arguments.device)


if __name__ == "__main__":
    main()
