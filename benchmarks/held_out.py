"""Losses of a Hub folder on FASTA files, beside the baselines that know no context.

    python benchmarks/held_out.py runs/mine/hub valid.fasta.gz valid_iid.fasta.gz

The corruption is that of validation during a run (seed 0); every sequence is used. The last lines are rows of
`name value unit`; intervals are 95% bootstrap intervals over sequences.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from hf_plm.config import Mask
from hf_plm.data.corpus import Corpus, open_corpus
from hf_plm.data.loader import validation_micro_batches, validation_windows
from hf_plm.data.prepare import prepare
from hf_plm.data.simulate import write_simulated_fasta
from hf_plm.inference.evaluate import Evaluation, evaluate
from hf_plm.models.hub import load_hub_folder
from hf_plm.models.objective import PackedMaskedLM


def held_out_corpus(fasta: Path, folder: Path) -> Corpus:
    """The whole file as one split; a corpus must have something to train on, so that is simulated."""
    other = folder.with_name("other.fasta")
    write_simulated_fasta(other, num_families=1, members_per_family=2)
    prepare([other], folder, validation=[fasta], max_rejected=1.0, show_progress=False)
    return open_corpus(folder, "validation")


def evaluate_file(module: PackedMaskedLM, corpus: Corpus, crop: int) -> Evaluation:
    windows, keys = validation_windows(corpus, crop, len(corpus), seed=0)
    batches = validation_micro_batches(corpus, windows, keys, max(crop, 4096), 0, Mask())
    return evaluate(module, batches, len(windows), Mask(), torch.device("cpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("hub_folder", type=Path)
    parser.add_argument("fasta", type=Path, nargs="+")
    parser.add_argument("--crop", type=int, default=1024)
    arguments = parser.parse_args()
    model, _ = load_hub_folder(arguments.hub_folder)
    module = PackedMaskedLM(model)
    rows = []
    for fasta in arguments.fasta:
        with tempfile.TemporaryDirectory() as folder:
            found = evaluate_file(module, held_out_corpus(fasta, Path(folder) / "corpus"), arguments.crop)
        name = fasta.name.split(".")[0]
        rows.append((f"{name}.sequences", f"{found.num_sequences}", "sequences"))
        rows += [(f"{name}.{key}", f"{value:.4f}", "") for key, value in found.summary().items()]
        for key, (mean, low, high) in found.margins().items():
            rows.append((f"{name}.{key}", f"{mean:+.4f} ({low:+.4f} to {high:+.4f})", "nats"))
    for row in rows:
        print(*row)


if __name__ == "__main__":
    main()
