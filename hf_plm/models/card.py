"""The model card: front matter that the Hub reads, and what a stranger needs to judge a model by.

Every number comes from the run; what was not measured is said to be so. No path, user or host name is in it.
"""

import re
from dataclasses import dataclass
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from hf_plm.config import Recipe
from hf_plm.data.manifest import SPLIT_KINDS, Manifest, report
from hf_plm.remote import is_repository, split_revision

CURVES = "curves.png"
_TAGS = ["biology", "protein", "protein-language-model", "masked-language-modeling", "esm", "hf_plm"]
_METRICS = (
    ("validation_loss", "loss", "Loss of all targets (nats per target)"),
    ("context_free_loss", "context_free_loss", "Loss of all targets, of a predictor without context (nats per target)"),
    ("validation_loss_masked", "masked_loss", "Loss of masked targets (nats per target)"),
    ("unigram_entropy", "unigram_entropy", "Loss of masked targets, of a predictor without context (nats per target)"),
    ("validation_perplexity", "perplexity", "Perplexity of all targets"),
    ("validation_recovery", "recovery", "Share of targets recovered"),
)
NO_LICENCE = "No licence was chosen for this model yet: it may be read, and nothing more is granted."
_MARGINS = ("margin_context_free", "margin_unigram_masked")


@dataclass(frozen=True)
class Facts:
    """What a card says of a run.

    `numbers` are those of its last validation, by their names in summary.json: losses in nats per target, None or left
    out where not measured. `machine` is what checkpoints record of hardware and versions.
    """

    name: str  # repository, or folder
    recipe: Recipe
    num_parameters: int
    steps: int
    tokens: int
    seconds: float
    numbers: dict[str, Any]
    machine: dict[str, Any]
    data: Manifest
    data_hash: str
    is_simulated: bool = False
    is_finished: bool = True
    has_curves: bool = False
    datasets: tuple[str, ...] = ()  # on the Hub
    start: str | None = None  # weights that it started from: a repository, or the last part of a path
    start_sha256: str | None = None


def card_name(recipe: Recipe) -> str:
    """The name that a card has until it is pushed somewhere: the repository, or the run folder as a repository's."""
    return recipe.hub.push or re.sub(r"[^\w.-]+", "-", recipe.run_folder.resolve().name).strip("-.") or "model"


def model_card(facts: Facts) -> str:
    """The README.md of a Hub folder; `save_hub_folder` adds the checksums of its files."""
    recipe, manifest = facts.recipe, facts.data
    size = f"size `{recipe.model.preset}`, {facts.num_parameters:,} parameters"
    curves = f"\n![loss, learning rate and speed over the tokens seen]({CURVES})\n" if facts.has_curves else ""
    licence = "" if recipe.hub.license else f"\n{NO_LICENCE}\n"
    return f"""---
{_front_matter(facts)}
---

# {facts.name}

A protein language model: ESM-2 architecture, {size},
pretrained by masked-language modelling from {_start(facts)}.
It is a stock `EsmForMaskedLM`: it opens in plain transformers, without remote code.
{_notes(facts)}
```python
from transformers import AutoModelForMaskedLM, AutoTokenizer
model = AutoModelForMaskedLM.from_pretrained("{facts.name}")
tokenizer = AutoTokenizer.from_pretrained("{facts.name}")
```

`pipeline("fill-mask", "{facts.name}")` proposes residues for `<mask>`. `AutoModel` gives a vector for each token; leave
out `<cls>` and `<eos>`, the first and the last, before you average them. `EsmForTokenClassification` and
`EsmForSequenceClassification` start from it.

## Intended use

Embeddings of proteins like those it was trained on, a starting point for predictors of sites and properties, and
likelihoods of residues in their context. It saw what is in its training data and nothing else; its likelihoods measure
neither function, stability nor safety, and are no basis for a medical decision.

## Limits

- It was trained on windows of at most {recipe.data.crop:,} tokens: of longer proteins it has seen parts.
- Proteins unlike its training data are scored worse, and what is common there is scored better.
- {_contacts(facts.start)}
- Sequences are upper-case letters, one per residue; `J` is written `X`. Gaps and chain breaks mean nothing to it.
{licence}
## What it learned

Losses on held-out sequences, in nats per target. A predictor without any context reaches the baseline; a model that has
learned from context is under it; a negative difference is worse than no context.

{_losses(facts)}
{curves}
## Data

{_data_name(facts)}, hash `{facts.data_hash}`; {SPLIT_KINDS.get(manifest.split_kind, manifest.split_kind)}.
{_warnings(manifest)}
```
{report(manifest)}
```

## Training

| | |
|---|---|
{_training(facts)}

The recipe as it ran:

```yaml
{_recipe(facts)}```

To go on training from these weights, on other data too:

```
hf-plm pretrain RECIPE --init.from {facts.name} --data.train FILE --run.folder FOLDER
```

The run itself goes on from its checkpoints, with the command that started it; they are not in this repository.

## How to cite

Cite this model by its name, its revision and the hash of its data; hf_plm, the program that trained it; and ESM-2, its
architecture: Lin et al. 2023, *Evolutionary-scale prediction of atomic-level protein structure with a language model*,
Science 379:1123.
"""


def _start(facts: Facts) -> str:
    if facts.start is None:
        return "random weights"
    return f"the weights of `{facts.start}`" + (f" (sha256 `{facts.start_sha256}`)" if facts.start_sha256 else "")


def _notes(facts: Facts) -> str:
    """What nobody may overlook."""
    notes = []
    if facts.is_simulated:
        notes.append("**The sequences are simulated, not natural: this model is a demonstration.**")
    if not facts.is_finished:
        notes.append(f"**This is a checkpoint from the middle of the run, after step {facts.steps:,}.**")
    lows = [(facts.numbers.get(margin) or [None, None])[1] for margin in _MARGINS]
    if facts.is_finished and any(low is None or low <= 0 for low in lows):
        notes.append("**It has not been shown to have learned from context: see below.**")
    return "".join(f"\n{note}\n" for note in notes)


def _front_matter(facts: Facts) -> str:
    name = facts.name.split("/")[-1]
    dataset = facts.datasets[0] if facts.datasets else facts.data.name
    results = [
        EvalResult(
            task_type="fill-mask",
            task_name="Masked language modelling",
            dataset_type=dataset,
            dataset_name=f"{facts.data.name} (held out: {facts.data.split_kind})",
            dataset_split="validation",
            metric_type=kind,
            metric_name=label,
            metric_value=round(facts.numbers[key], 5),
        )
        for key, kind, label in _METRICS
        if facts.numbers.get(key) is not None
    ]
    return ModelCardData(
        license=facts.recipe.hub.license,
        library_name="transformers",
        pipeline_tag="fill-mask",
        tags=_TAGS,
        datasets=list(facts.datasets) or None,
        base_model=split_revision(facts.start)[0] if facts.start and is_repository(facts.start) else None,
        model_name=name if results else None,
        eval_results=results or None,
    ).to_yaml()


def _data_name(facts: Facts) -> str:
    on_hub = ", ".join(f"`{name}`" for name in facts.datasets)
    return f"`{facts.data.name}`" + (f" ({on_hub} on the Hub)" if on_hub else "")


def _losses(facts: Facts) -> str:
    rows = ["| | model | without context | better by (95% interval) |", "|---|---|---|---|"]
    for label, loss, baseline, margin in (
        ("all targets", "validation_loss", "context_free_loss", _MARGINS[0]),
        ("`<mask>` inputs only", "validation_loss_masked", "unigram_entropy", _MARGINS[1]),
    ):
        value, low, high = facts.numbers.get(margin) or (None, None, None)
        under = "not measured" if value is None else f"{value:+.4f} ({low:+.4f} to {high:+.4f})"
        rows.append(f"| {label} | {_nats(facts.numbers.get(loss))} | {_nats(facts.numbers.get(baseline))} | {under} |")
    return "\n".join(rows)


def _nats(loss: float | None) -> str:
    return "not measured" if loss is None else f"{loss:.4f}"


def _warnings(manifest: Manifest) -> str:
    return "".join(f"\n- {warning}" for warning in manifest.warnings) + ("\n" if manifest.warnings else "")


def _training(facts: Facts) -> str:
    machine = facts.machine
    versions = ("hf_plm", "python", "torch", "transformers", "accelerate", "numpy")
    processes = machine.get("processes", 1)
    rows = {
        "steps": f"{facts.steps:,}",
        "tokens": f"{facts.tokens:,}",
        "tokens of a step": f"{facts.recipe.batch.micro_batches} micro-batches of {facts.recipe.batch.tokens:,}",
        "hours": f"{facts.seconds / 3600:.3g}" if facts.seconds > 360 else f"{facts.seconds:.0f} seconds",
        "hardware": f"{processes} x {machine.get('device', 'unknown')}",
        "engine": f"{machine.get('engine', 'unknown')}, {machine.get('precision', 'unknown')}",
        "software": ", ".join(f"{name} {machine[name]}" for name in versions if name in machine),
    }
    return "\n".join(f"| {name} | {text} |" for name, text in rows.items())


def _contacts(start: str | None) -> str:
    if start:
        return "The contact head is that of the weights it started from, unchanged: its contacts are to be checked."
    return "The contact head is in the file because the architecture has one, and is untrained."


def _recipe(facts: Facts) -> str:
    """The recipe without what says where it ran."""
    plain = facts.recipe.to_dict()
    del plain["hub"]
    del plain["run"]["folder"]
    del plain["data"]["cache"]
    for name in ("train", "validation"):
        plain["data"][name] = [_without_path(value, facts.datasets) for value in plain["data"][name]]
    plain["init"]["from"] = facts.start
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def _without_path(name: str, datasets: tuple[str, ...]) -> str:
    """The last part of a path; the name of a dataset on the Hub as it is."""
    return name if split_revision(name)[0] in datasets else re.split(r"[/\\]", name.rstrip("/\\"))[-1]
