"""`hf-plm evaluate`."""

import argparse
import hashlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import has_magic
from pathlib import Path
from typing import Any

from hf_plm.cli.knobs import meaning
from hf_plm.cli.process import quick_imports
from hf_plm.config import KNOBS, UserError
from hf_plm.files import check_writable, keep_inputs

NO_CONTEXT = "under what needs no context"
FEW_TARGETS = 5000
"""The best guess without context has some 400 free numbers: fitted to so many targets it gains 0.04 nats by that."""


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="loss, perplexity and recovery of models on one fixed protocol",
        description="How well models predict held-out residues, with 95% intervals, beside what needs no context; "
        "several models are compared on the very same targets.",
    )
    evaluate.add_argument("models", nargs="+", metavar="MODEL", help="a folder, a finished run, or a name on the Hub")
    evaluate.add_argument(
        "--data", nargs="+", required=True, help="FASTA or Parquet files, or a prepared corpus, that was not trained on"
    )
    evaluate.add_argument("--split", help="of a corpus: train, validation or test (validation)")
    evaluate.add_argument("--sequences", type=int, default=2000, help="proteins, a fixed choice by hash; 0: all (2000)")
    evaluate.add_argument(
        "--pseudo",
        type=int,
        default=0,
        metavar="N",
        help="pseudo-perplexity too, on N of the proteins: a forward for each of their residues (0)",
    )
    evaluate.add_argument("--clusters", type=Path, help="table of cluster and member: losses by depth of cluster")
    evaluate.add_argument("--crop", type=int, help="residues of the longest window; the protocol's are 1022")
    evaluate.add_argument("--out", type=Path, help="JSON file to write (of a run also kept in RUN/findings)")
    evaluate.add_argument("--precision", default="auto", help="of products: fp32, bf16, fp16 (fp32, on GPUs bf16)")
    evaluate.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps (the GPU where there is one)")
    evaluate.add_argument("--threads", type=int, help="CPU cores to use (all)")
    for name in ("illegal", "gaps"):
        item = KNOBS[f"data.{name}"]
        evaluate.add_argument(f"--{name}", default=item.default, help=meaning(item.name))
    evaluate.add_argument("--max-rejected", type=float, default=0.1, help=meaning("data.max_rejected"))
    evaluate.add_argument("--sequence-column", help=meaning("data.sequence_column"))
    evaluate.set_defaults(run=_run)


def _run(parsed: argparse.Namespace, rest: Sequence[str]) -> None:
    for name, least in (("sequences", 0), ("pseudo", 0), ("crop", 1)):
        value = getattr(parsed, name)
        if value is not None and value < least:
            raise UserError(f"--{name} is a number from {least}, not {value}.")
    if len(set(parsed.models)) < len(parsed.models):
        raise UserError("A model is named twice; name each once.")
    if parsed.split and all(Path(one).is_file() or has_magic(one) for one in parsed.data):
        raise UserError("--split goes with a prepared corpus or a data set on the Hub; files have no splits.")
    if parsed.out:
        keep_inputs([*parsed.data, parsed.clusters], parsed.out)
        check_writable(parsed.out)
    with quick_imports():
        from hf_plm.inference.worklist import Cleaning
        from hf_plm.judging.evaluation import evaluate_models
        from hf_plm.judging.findings import home, write_findings
        from hf_plm.judging.protocol import CROP, Protocol, read_sample
        from hf_plm.models.masked_lm import MaskedLM, open_masked_lm

    def open_model(name: str) -> MaskedLM:
        return open_masked_lm(name, precision=parsed.precision, device=parsed.device, threads=parsed.threads)

    protocol = Protocol(parsed.crop or CROP)
    cleaning = Cleaning(parsed.illegal, parsed.gaps, parsed.max_rejected, parsed.sequence_column)
    split = parsed.split or "validation"
    with _reading() as on_bytes:
        sample = read_sample(parsed.data, protocol, parsed.sequences, split, cleaning, parsed.clusters, on_bytes)
    facts, found = evaluate_models(parsed.models, sample, protocol, open_model, parsed.pseudo)
    written = []
    if parsed.out:
        write_findings(parsed.out, "evaluation", facts, found)
        written.append(f"Written to {parsed.out}")
    for index, name in enumerate(parsed.models):
        if path := home(name, "evaluation", _label(parsed, sample.facts, name)):
            own_first = [index, *(other for other in range(len(facts)) if other != index)]
            results = [found["results"][one] for one in own_first]
            write_findings(path, "evaluation", [facts[one] for one in own_first], {**found, "results": results})
            written.append(f"Kept in {path}")
    # Last, so that whoever stops reading loses nothing.
    print("\n".join([*_report(found), *(["", *written] if written else [])]))


def _label(parsed: argparse.Namespace, facts: dict[str, Any], model: str) -> str:
    """What tells an evaluation from others of the same model: one does not replace another of other proteins."""
    parts = [
        "+".join(Path(source).name for source in facts["sources"]),
        f"{facts['proteins']}",
        facts["fingerprint"][:6],
    ]
    parts += [f"crop{parsed.crop}"] if parsed.crop else []
    parts += [f"pseudo{parsed.pseudo}"] if parsed.pseudo else []
    parts += ["clusters"] if parsed.clusters else []
    others = [one for one in parsed.models if one != model]
    if others:  # runs/a/hub and runs/b/hub have one name
        digest = hashlib.sha256("\n".join(others).encode()).hexdigest()[:6]
        parts += ["with", *(Path(one).name for one in others), digest]
    return "-".join(parts)


@contextmanager
def _reading() -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(desc="reading", unit="B", unit_scale=True, disable=not sys.stderr.isatty(), leave=False) as bar:
        yield bar.update


def _report(found: dict[str, Any]) -> list[str]:
    data, results = found["data"], found["results"]
    rejected = "rejected, the first: {}, record {} ({}): {}".format(*(data["rejected_records"] or [[""] * 4])[0])
    lines = [
        f"protocol   {found['protocol']['name']}",
        f"data       {data['proteins']:,} proteins, {data['residues']:,} residues, {data['targets']:,} targets "
        f"({', '.join(data['sources'])})",
    ]
    for count, text in (
        (data["cropped"], f"longer than {found['protocol']['crop_residues']:,} residues: one window of each"),
        (data["repeated"], "repeated sequences left out"),
        (data["rejected"], rejected),
        (data["j_to_x"], "J read as X"),
        (data["illegal_to_x"], "illegal characters read as X"),
        (data["gaps_stripped"], "gaps taken out"),
    ):
        if count:
            lines.append(f"           {count:,} {text}")
    lines += [f"note       {note}" for note in data["notes"]]
    if data["targets"] < FEW_TARGETS:
        lines.append(
            f"note       what needs no context is fitted to these very targets, and {data['targets']:,} are few: it "
            "looks better here than on new ones"
        )
    width = max(len(NO_CONTEXT), *(len(result["model"]) for result in results))
    lines += ["", f"{'model':<{width}}  {'loss':<22} {'perplexity':<22} recovery, %"]
    for result in results:
        overall = result["overall"]
        cells = [
            _interval(overall["loss"]),
            _interval(overall["perplexity"], 2),
            _interval(overall["recovery"], 1, 100),
        ]
        lines.append(f"{result['model']:<{width}}  " + " ".join(f"{cell:<22}" for cell in cells).rstrip())
    lines += ["", f"{NO_CONTEXT:<{width}}  {'all targets':<39}masked targets"]
    for result in results:
        overall = result["overall"]
        cells = [
            f"{overall['context_free_loss']:.4f}: {_interval(overall['margin_context_free'], 4, sign=True)}",
            f"{overall['unigram_entropy']:.4f}: {_interval(overall['margin_unigram_masked'], 4, sign=True)}",
        ]
        lines.append(f"{result['model']:<{width}}  {cells[0]:<39}{cells[1]}")
    for result in results:
        if "pseudo" in result:
            pseudo = result["pseudo"]
            lines.append(
                f"\n{result['model']}: pseudo-perplexity {_interval(pseudo['pseudo_perplexity'], 2)} on "
                f"{pseudo['proteins']:,} proteins; mean of each protein's own {pseudo['mean_of_proteins']:.2f}"
            )
    for name, title in (("by_length", "residues"), ("by_cluster_size", "cluster members")):
        lines += _groups(results, name, title, width)
    for difference in found["differences"]:
        lines += ["", _difference(difference)]
    lines += ["", "Losses in nats per target; intervals are 95%, by bootstrap over proteins."]
    return lines


def _groups(results: list[dict[str, Any]], name: str, title: str, width: int) -> list[str]:
    """A table of groups: how far each model is under the context-free loss of the group."""
    groups = results[0][name]
    if not groups:
        return []
    names = [f"{group['from']:,}+" if group["to"] is None else f"{group['from']:,}-{group['to']:,}" for group in groups]
    size = max(12, *(len(one) + 2 for one in names))
    lines = ["", f"{title:<{width}}  " + "".join(f"{one:>{size}}" for one in names)]
    counts = "".join(f"{group['num_sequences']:>{size},}" for group in groups)
    lines.append(f"{'proteins':<{width}}  {counts}")
    for result in results:
        cells = "".join(f"{group['loss'][0]:>{size}.3f}" for group in result[name])
        lines.append(f"{result['model']:<{width}}  {cells}")
    cells = "".join(f"{group['context_free_loss']:>{size}.3f}" for group in groups)
    lines.append(f"{'context-free':<{width}}  {cells}")
    return lines


def _difference(found: dict[str, Any]) -> str:
    _, low, high = found["loss"]
    verdict = "better" if high < 0 else "worse" if low > 0 else "no difference shown"
    return (
        f"{found['a']} against {found['b']}: loss {_interval(found['loss'], 4, sign=True)}, recovery "
        f"{_interval(found['recovery'], 2, 100, sign=True)} points: {verdict} (better on "
        f"{found['share_of_proteins_better']:.0%} of the proteins)"
    )


def _interval(values: Sequence[float], digits: int = 3, factor: float = 1, sign: bool = False) -> str:
    plus = "+" if sign else ""
    value, low, high = (f"{factor * one:{plus}.{digits}f}" for one in values)
    return value if "nan" in low else f"{value} ({low} to {high})"
