"""Embedding on a CPU, side by side: hf_plm against what people's scripts do.

    python benchmarks/cpu_embed.py --out cpu_embed.json

Real proteins (HF_PLM_DATA, default `../shared/data`) of mixed lengths, models of random weights: the shapes of ESM-2 8m
and 35m, and a T5 encoder like Ankh's of a size between. Contestants, in turns (A B A B ...), in one process:

- loop: one protein at a time through the stock model, as tutorials do; on all cores, nothing padded
- padded: batches of 16 in the order of the file; sorted: the same, sorted by length
- hf_plm: torch in fp32 and bf16, ONNX Runtime in fp32 and int8, from residues to arrays

Each gives every residue's vector as a NumPy array. Ratios are medians of the rounds' ratios; accuracy is against the
loop. The floor is what the machine's matrix rate in fp32, measured in the same run, allows for the products that no
implementation can leave out.
"""

import argparse
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from outcome import Row, finish, table

from hf_plm.config import UserError
from hf_plm.inference.embedder import Embedder
from hf_plm.proteins.fasta import read_fasta

SOURCE = Path(os.environ.get("HF_PLM_DATA", "../shared/data")) / "corpus" / "valid_iid.fasta.gz"
LONGEST, BATCH = 1022, 16
MODELS = ("8m", "35m", "t5")
OURS: dict[str, dict[str, Any]] = {
    "torch.fp32": {},
    "torch.bf16": {"precision": "bf16"},
    "onnx.fp32": {"backend": "onnx"},
    "onnx.int8": {"backend": "onnx", "int8": True},
}
THEIRS = ("loop", "padded", "sorted")
TITLES = {
    "loop": "loop, one protein at a time, fp32",
    "padded": f"batches of {BATCH} in file order, fp32",
    "sorted": f"batches of {BATCH} sorted by length, fp32",
    "torch.fp32": "hf_plm, torch, fp32",
    "torch.bf16": "hf_plm, torch, bf16",
    "onnx.fp32": "hf_plm, ONNX Runtime, fp32",
    "onnx.int8": "hf_plm, ONNX Runtime, int8",
}


def save_model(name: str, folder: Path) -> None:
    """A folder as on the Hub, with random weights."""
    from tokenizers import Tokenizer
    from tokenizers.models import Unigram
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    from hf_plm.models.hub import save_hub_folder
    from hf_plm.models.presets import build_model, esm_config

    if name != "t5":
        save_hub_folder(build_model(esm_config(name), 0), folder, "# random weights")
        return
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=144,
        d_model=384,
        d_kv=64,
        d_ff=1024,
        num_layers=8,
        num_heads=6,
        relative_attention_num_buckets=64,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
    )
    T5EncoderModel(config).save_pretrained(folder)
    pieces = ["<pad>", "</s>", "<unk>", *"ALGVSREDTIPKFQNYMHWCXBOUZ"]
    backend = Tokenizer(Unigram([(piece, -float(rank)) for rank, piece in enumerate(pieces)], unk_id=2))
    backend.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(folder)


class Script:
    """What people's scripts do with the stock model."""

    def __init__(self, folder: Path, name: str):
        from transformers import AutoTokenizer, EsmModel, T5EncoderModel

        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        kind = T5EncoderModel if name == "t5" else EsmModel
        options = {} if name == "t5" else {"add_pooling_layer": False}
        self.model = kind.from_pretrained(folder, **options).eval()
        self.begin = 0 if name == "t5" else 1

    @torch.no_grad()
    def __call__(self, sequences: Sequence[str], batch: int, is_sorted: bool) -> list[np.ndarray]:
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i])) if is_sorted else range(len(sequences))
        found: dict[int, np.ndarray] = {}
        for first in range(0, len(sequences), batch):
            chosen = list(order[first : first + batch])
            inputs = self.tokenizer([sequences[i] for i in chosen], padding=len(chosen) > 1, return_tensors="pt")
            hidden = self.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).last_hidden_state.numpy()
            for row, i in enumerate(chosen):
                found[i] = hidden[row, self.begin : self.begin + len(sequences[i])]
        return [found[i] for i in range(len(sequences))]


def sample(num_proteins: int) -> list[str]:
    records = [record.sequence for record in read_fasta(SOURCE) if len(record.sequence) <= LONGEST]
    return random.Random(0).sample(records, num_proteins)


def flops(name: str, config: Any, lengths: Sequence[int]) -> float:
    """Operations of the products in a forward pass."""
    tokens, squares = sum(lengths), sum(length * length for length in lengths)
    if name == "t5":
        inner = config.d_kv * config.num_heads
        weights = config.num_layers * (4 * config.d_model * inner + 3 * config.d_model * config.d_ff)
        return 2 * weights * tokens + 4 * config.num_layers * inner * squares
    weights = 12 * config.num_hidden_layers * config.hidden_size**2
    return 2 * weights * tokens + 4 * config.num_hidden_layers * config.hidden_size * squares


def matrix_rate(repeats: int = 20) -> float:
    """FLOP/s of (2048, 480) x (480, 1920) on all cores."""
    left, right = torch.randn(2048, 480), torch.randn(1920, 480)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        torch.nn.functional.linear(left, right)
        seconds.append(time.perf_counter() - began)
    return 2 * 2048 * 480 * 1920 / median(seconds)


def accuracy(found: list[np.ndarray], exact: list[np.ndarray]) -> tuple[float, float]:
    """Largest difference, smallest cosine, over all residues."""
    a, b = np.concatenate(found), np.concatenate(exact)
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    return float(np.abs(a - b).max()), float(cosines.min())


def compete(
    name: str, folder: Path, proteins: list[str], rounds: int, rate: float
) -> tuple[list[list[str]], list[Row]]:
    save_model(name, folder)
    script = Script(folder, name)
    runs: dict[str, Callable[[], list[np.ndarray]]] = {
        "loop": lambda: script(proteins, 1, False),
        "padded": lambda: script(proteins, BATCH, False),
        "sorted": lambda: script(proteins, BATCH, True),
    }
    for ours, options in OURS.items():
        try:
            embedder = Embedder(folder, **options)
        except UserError as error:  # without ONNX Runtime
            print(f"{name}, {ours}: {error}")
            continue
        runs[ours] = lambda embedder=embedder: embedder.embed(proteins, "none")  # type: ignore[misc]
    seconds: dict[str, list[float]] = {contestant: [] for contestant in runs}
    vectors = {contestant: run() for contestant, run in runs.items()}  # warms up, too
    for number in range(rounds):
        for contestant, run in runs.items():
            began = time.perf_counter()
            run()
            seconds[contestant].append(time.perf_counter() - began)
        latest = ", ".join(f"{contestant} {spent[-1]:.1f}" for contestant, spent in seconds.items())
        print(f"{name}, round {number + 1} of {rounds}, seconds: {latest}", flush=True)
    special = 1 if name == "t5" else 2
    lengths = [len(protein) + special for protein in proteins]
    floor = flops(name, script.model.config, lengths) / rate
    lines: list[list[str]] = []
    rows: list[Row] = []
    for contestant, spent in seconds.items():
        difference, cosine = accuracy(vectors[contestant], vectors["loop"])
        ratios = [median(a / b for a, b in zip(seconds[theirs], spent, strict=True)) for theirs in THEIRS]
        lines.append(
            [
                f"{name}: {TITLES[contestant]}",
                f"{len(proteins) / median(spent):.1f}",
                f"{sum(lengths) / median(spent):,.0f}",
                *(f"{ratio:.2f}" for ratio in ratios),
                f"{floor / median(spent):.0%}",
                "" if contestant == "loop" else f"{difference:.0e}",
                "" if contestant == "loop" else f"{cosine:.5f}",
            ]
        )
        rows.append((f"embed.{name}.{contestant}", len(proteins) / median(spent), "proteins/s"))
        if contestant in OURS:
            rows += [
                (f"embed.{name}.{contestant}.over.{theirs}", ratio, "x")
                for theirs, ratio in zip(THEIRS, ratios, strict=True)
            ]
            rows.append((f"embed.{name}.{contestant}.difference", difference, "of_any_number"))
            rows.append((f"embed.{name}.{contestant}.cosine", cosine, "at_worst"))
    for precision, candidates in (("fp32", ("torch.fp32", "onnx.fp32")), ("best", tuple(OURS))):
        fastest = min((one for one in candidates if one in seconds), key=lambda one: median(seconds[one]))
        for theirs in THEIRS:
            ratio = median(a / b for a, b in zip(seconds[theirs], seconds[fastest], strict=True))
            rows.append((f"embed.{name}.{precision}.over.{theirs}", ratio, "x"))
    rows.append((f"embed.{name}.floor", len(proteins) / floor, "proteins/s"))
    return lines, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each contestant (3)")
    parser.add_argument("--proteins", type=int, default=64, help="proteins in a turn (64)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--out", type=Path, help="write the result as JSON")
    arguments = parser.parse_args()
    if not SOURCE.exists():
        sentence = f"{SOURCE} is not there: say with HF_PLM_DATA where the real proteins are."
        names = [
            f"embed.{name}.{kind}.over.{theirs}" for name in MODELS for kind in ("fp32", "best") for theirs in THEIRS
        ]
        finish(sentence, [(name, None, "x") for name in names], arguments.out)
        return
    proteins = sample(arguments.proteins)
    rate = matrix_rate()
    lines: list[list[str]] = []
    rows: list[Row] = [("embed.matrix_rate.fp32", rate / 1e9, "GFLOP/s")]
    with tempfile.TemporaryDirectory() as home:
        os.environ["HF_PLM_CACHE"] = str(Path(home) / "cache")
        for name in arguments.models:
            more_lines, more_rows = compete(name, Path(home) / name, proteins, arguments.rounds, rate)
            lines += more_lines
            rows += more_rows
    heading = ["model and contestant", "proteins/s", "tokens/s", *(f"x {theirs}" for theirs in THEIRS)]
    heading += ["of the fp32 floor", "difference", "cosine"]
    mean = sum(map(len, proteins)) / len(proteins)
    text = f"{len(proteins)} proteins of {mean:.0f} residues on average, {torch.get_num_threads()} cores\n\n"
    finish(text + table(heading, lines), rows, arguments.out, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
