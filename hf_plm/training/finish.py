"""The end of a run: the Hub folder, summary.json and curves.png. What comes last says that the run is finished."""

from pathlib import Path
from typing import Any

from transformers import EsmForMaskedLM

from hf_plm.config import Recipe
from hf_plm.data.corpus import Corpus
from hf_plm.data.simulate import is_simulated
from hf_plm.inference.evaluate import Evaluation
from hf_plm.models.card import CURVES, Facts, card_name, model_card
from hf_plm.models.hub import save_hub_folder
from hf_plm.progress import duration
from hf_plm.training import run_folder
from hf_plm.training.checkpoint import Progress, write_json
from hf_plm.training.curves import draw_curves
from hf_plm.training.meter import Meter


def finish(
    recipe: Recipe,
    model: EsmForMaskedLM,
    progress: Progress,
    evaluation: Evaluation,
    train: Corpus,
    held_out: Corpus,
    facts: dict[str, Any],
    meter: Meter,
    origin: run_folder.Origin,
) -> None:
    """Write everything that a finished run leaves; summary.json last, because its presence means finished."""
    folder = recipe.run_folder
    numbers = evaluation.summary()
    meter.is_finished = True
    meter.write({"step": progress.step, "tokens": progress.tokens, **numbers, "final": True})
    summary = {
        "steps": progress.step,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        **numbers,
        **evaluation.margins(),
        "validation_sequences": evaluation.num_sequences,
        "validation_targets": len(evaluation.losses_K),
        "validation_split": held_out.manifest.split_kind,
        "preset": recipe.model.preset,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "corpus_name": train.name,
        "corpus_sequences": len(train),
        "is_simulated": is_simulated(train),
        "corpus": train.fingerprint,
        **facts,
    }
    simulated = " (simulated proteins)" if summary["is_simulated"] else ""
    title = f"the {recipe.model.preset} network on {train.name}{simulated}"
    curves = folder / run_folder.CURVES
    draw_curves(folder / run_folder.METRICS, curves, title)
    card = Facts(
        name=card_name(recipe),
        recipe=recipe,
        num_parameters=summary["parameters"],
        steps=progress.step,
        tokens=progress.tokens,
        seconds=progress.seconds,
        numbers=_without_nan(summary),
        machine=facts,
        data=train.manifest,
        data_hash=train.fingerprint,
        is_simulated=summary["is_simulated"],
        has_curves=curves.exists(),
        datasets=origin.datasets,
        start=origin.start,
        start_sha256=origin.start_sha256,
    )
    extras = {CURVES: curves} if curves.exists() else {}
    save_hub_folder(model, folder / run_folder.HUB, model_card(card), extras)
    write_json(folder / run_folder.SUMMARY, _without_nan(summary))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN: what could not be measured, for want of targets, is null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if value != value else value


def summary_lines(summary: dict[str, Any], folder: Path) -> str:
    """What a finished run says: the losses beside their baselines, and how to load the model."""

    def row(name: str, loss: str, baseline: str, margin: str) -> str:
        value, low, high = summary[margin]
        if value is None:
            return f"  {name:<16}{'-':>8}"
        return (
            f"  {name:<16}{summary[loss]:>8.4f}{summary[baseline]:>17.4f}    {value:+.4f} ({low:+.4f} to {high:+.4f})"
        )

    has_learned = all((summary[margin][1] or 0) > 0 for margin in ("margin_context_free", "margin_unigram_masked"))
    verdict = (
        "It has learned from context." if has_learned else "Not yet learned from context: both must be above zero."
    )
    simulated = ", all simulated" if summary["is_simulated"] else ""
    hub = folder / run_folder.HUB
    return "\n".join(
        [
            "",
            f"Finished: {summary['steps']:,} steps, {summary['tokens']:,} tokens in {duration(summary['seconds'])}.",
            "",
            f"  {'validation':<16}{'loss':>8}{'without context':>17}    under it by (95% interval)",
            row("all targets", "validation_loss", "context_free_loss", "margin_context_free"),
            row("masked targets", "validation_loss_masked", "unigram_entropy", "margin_unigram_masked"),
            "",
            f"  Nats per target, {summary['validation_sequences']:,} held-out sequences "
            f"({summary['validation_split']}{simulated}). {verdict}",
            f"  Perplexity {summary['validation_perplexity']:.2f}, recovery {summary['validation_recovery']:.1%}.",
            "",
            f"The model is in {hub}; load it in plain transformers with:",
            "",
            "    from transformers import AutoModelForMaskedLM, AutoTokenizer",
            f'    model = AutoModelForMaskedLM.from_pretrained("{hub.as_posix()}")',
            f'    tokenizer = AutoTokenizer.from_pretrained("{hub.as_posix()}")',
        ]
    )
