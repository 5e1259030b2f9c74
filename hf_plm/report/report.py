"""`hf-plm report`: all that is known of a model on one page, beside another one where that is asked for.

Findings that evaluate, score, contacts and probe have kept are shown; what is quick is computed where it is missing:
the evaluation on held-out proteins, and the map of them. Nothing that fails there loses the page: its section says why.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hf_plm.config import UserError
from hf_plm.data.manifest import read_manifest
from hf_plm.data.sources import find_sources, has_cluster, read_records
from hf_plm.files import check_writable, keep_inputs, write_whole
from hf_plm.judging.evaluation import evaluate_models
from hf_plm.judging.findings import FOLDER, home, read_findings, write_findings
from hf_plm.judging.protocol import CROP, Protocol, read_sample
from hf_plm.judging.requirements import require_judge
from hf_plm.models.locate import locate, revision
from hf_plm.models.masked_lm import MaskedLM, open_masked_lm
from hf_plm.proteins.fasta import IllegalResidueError, clean
from hf_plm.report import curves as curves_part
from hf_plm.report import evaluation as evaluation_part
from hf_plm.report import families as families_part
from hf_plm.report import probes as probes_part
from hf_plm.report import run as run_part
from hf_plm.report import zero_shot as zero_shot_part
from hf_plm.report.families import Labelled, Map, composition_map, embed_map, of_families, read_families
from hf_plm.report.findings import Finding, dict_of, list_of, listing, short, source_name
from hf_plm.report.page import Html, Section, element, facts, join, missing, page, paragraph
from hf_plm.report.run import Run
from hf_plm.training import run_folder
from hf_plm.version import __version__

SEQUENCES = 500
"""Held-out proteins that are evaluated and embedded here: a minute's work for a small model on a laptop."""
MARK = "Made by hf_plm"
"""At the foot of every page: a file without it is not replaced by one."""


@dataclass(frozen=True)
class Asked:
    """What a report is made of. `data` are held-out proteins, where a run's own shall not be taken."""

    model: str
    against: str | None = None
    findings: tuple[Path, ...] = ()  # files, and folders of them
    data: tuple[str, ...] = ()
    families: Path | None = None
    sequences: int = SEQUENCES  # 0: nothing is computed
    out: Path | None = None
    precision: str = "auto"
    device: str = "auto"
    threads: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        return {"precision": self.precision, "device": self.device, "threads": self.threads}


@dataclass(frozen=True)
class Subject:
    """A model of the report. `run` is its run, where it is one; `revision` is None where that has no model yet."""

    model: str
    name: str
    run: Run | None
    revision: str | None


def write_report(asked: Asked) -> Path:
    """Write the page, whole or not; its path. Raises `UserError` for a model, data or findings that cannot be read."""
    given = [asked.model] + ([asked.against] if asked.against else [])
    if len({str(Path(name).expanduser().resolve()) for name in given}) < len(given):
        raise UserError(f"{asked.model} is given twice; --against names another model.")
    out = _place(asked)
    families = read_families(asked.families) if asked.families else None
    subjects = [_subject(name) for name in given]
    findings, unread = _gather(subjects, asked.findings)
    ready = [subject for subject in subjects if subject.revision is not None]
    why_not = {"evaluation": "", "families": ""}
    if asked.sequences and ready:
        for models in (ready, ready[:1]):  # the first alone, where the other has no head, say
            try:
                findings += _evaluated(asked, subjects, models, findings)
                break
            except UserError as error:
                why_not["evaluation"] = why_not["evaluation"] or str(error)
        try:
            families, maps, baseline = _mapped(asked, subjects, ready, families)
        except UserError as error:
            why_not["families"], maps, baseline = str(error), [], None
    else:
        maps, baseline = [], None
    # What is about all models of the page comes first.
    findings.sort(key=lambda one: not {subject.revision for subject in ready} <= _revisions(one))
    for section, sentence in why_not.items():
        if sentence:
            print(f"The section on {section} lacks something: {sentence}", file=sys.stderr)
    for sentence in unread:
        print(sentence, file=sys.stderr)
    body = _sections(asked, subjects, findings, unread, families, maps, baseline, why_not)
    title = " against ".join(subject.name for subject in subjects)
    made = datetime.now(UTC).strftime("%d %B %Y")
    text = page(title, f"Protein language model · report of {made}", body, f"{MARK} {__version__}, {made}.")
    write_whole(out, text.encode())
    return out


def _place(asked: Asked) -> Path:
    """Where the page goes. Raises `UserError` where that is read, is another's file, or cannot be written."""
    out = asked.out or (Path(asked.model) / "report.html" if Path(asked.model).is_dir() else Path("report.html"))
    keep_inputs([*asked.data, *asked.findings, asked.families], out)
    check_writable(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out names the HTML file to write, which ends in .html, not {out}.")
    try:
        is_other = out.is_file() and MARK.encode() not in out.read_bytes()
    except OSError as error:
        raise UserError(f"{out} cannot be read: {error.strerror}.") from None
    if is_other:
        raise UserError(f"{out} is there already and is no report of hf-plm; name another file with --out.")
    return out


def _subject(name: str) -> Subject:
    path = Path(name).expanduser()
    run = run_part.read_run(path) if run_folder.is_run(path) else None
    if run is not None and not run.is_finished:
        return Subject(name, run.name, run, None)
    return Subject(name, run.name if run else short(name), run, revision(locate(name)))


def _gather(subjects: Sequence[Subject], given: Sequence[Path]) -> tuple[list[Finding], list[str]]:
    """The findings of the runs and those given, each once, and a sentence for each that is not shown.

    Raises `UserError` where one that was given by its name cannot be read.
    """
    found: dict[Path, Finding] = {}
    unread = []
    for path in given:
        if not path.exists():
            raise UserError(f"There are no findings in {path}: no such file or folder.")
        if path.is_file():
            found[path.resolve()] = Finding(path, read_findings(path))
    folders: list[tuple[Path, str | None]] = [(path, None) for path in given if path.is_dir()]
    folders += [(subject.run.folder / FOLDER, subject.revision) for subject in subjects if subject.run]
    for folder, current in folders:
        for path in sorted(folder.glob("*.json")):
            if path.resolve() in found:
                continue
            try:
                finding = Finding(path, read_findings(path))
            except UserError as error:
                unread.append(str(error))
                continue
            revisions = _revisions(finding)
            if current and revisions and current not in revisions:
                unread.append(f"{path} is of other weights than the model has now, and is left out; make it again.")
                continue
            found[path.resolve()] = finding
    return [found[path] for path in sorted(found)], unread


def _revisions(finding: Finding) -> set[str]:
    return {one["revision"] for one in finding.rows("models") if isinstance(one.get("revision"), str)}


def _held_out(asked: Asked, subjects: Sequence[Subject]) -> tuple[str, ...]:
    """Where held-out proteins are. Raises `UserError` where there are none, or others than the run was validated on."""
    if asked.data:
        return asked.data
    run = next((subject.run for subject in subjects if subject.run), None)
    if run is None:
        raise UserError(f"{asked.model} is no run, so that its held-out proteins are not known; name some with --data.")
    corpus = Path(run.origin.folder)
    try:
        manifest = read_manifest(corpus)
    except UserError:
        raise UserError(
            f"The corpus of the run {run.name} is not in {corpus} any more; name held-out proteins with --data."
        ) from None
    if run.manifest and manifest.splits.get("validation") != run.manifest.splits.get("validation"):
        raise UserError(f"{corpus} holds other proteins out than when {run.name} began; name some with --data.")
    return (str(corpus),)


def _evaluated(
    asked: Asked, subjects: Sequence[Subject], ready: Sequence[Subject], findings: Sequence[Finding]
) -> list[Finding]:
    """An evaluation of all models on the same targets, where there is none yet; of a run it is kept."""
    wanted = {subject.revision for subject in ready}
    known = [
        dict_of(finding.plain, "data")
        for finding in findings
        if finding.kind == "evaluation" and wanted <= _revisions(finding)
    ]
    if not asked.data and any("the train split" not in map(source_name, list_of(data, "sources")) for data in known):
        return []
    opened: dict[str, MaskedLM] = {}

    def open_model(name: str) -> MaskedLM:
        if name not in opened:
            opened[name] = open_masked_lm(name, **asked.options)
        return opened[name]

    data = _held_out(asked, subjects)
    names = [subject.model for subject in ready]
    protocol = Protocol(min([CROP, *(open_model(name).limit for name in names)]))
    sample = read_sample(list(data), protocol, asked.sequences, "validation")
    if any(one.get("fingerprint") == sample.facts["fingerprint"] for one in known):
        return []
    models, plain = evaluate_models(names, sample, protocol, open_model)
    label = "+".join(Path(source).name for source in sample.facts["sources"])
    if len(ready) > 1:
        label += f"-against-{ready[1].name}"
    path = home(asked.model, "evaluation", f"{label}-{len(sample.proteins)}")
    if path is None:
        return [Finding(Path("computed for this report"), {"kind": "evaluation", "models": models, **plain})]
    write_findings(path, "evaluation", models, plain)
    return [Finding(path, read_findings(path))]


def _mapped(
    asked: Asked, subjects: Sequence[Subject], ready: Sequence[Subject], families: Labelled | None
) -> tuple[Labelled, list[Map], Map | None]:
    """The maps of held-out proteins by each model; those of known families, and composition's, where there are any."""
    require_judge()
    if families is None:
        data = _held_out(asked, subjects)
        families = _clustered(data) or _unlabelled(data, asked.sequences)
    maps = [embed_map(subject.model, families, **asked.options) for subject in ready]
    return families, maps, composition_map(families) if families.families else None


def _clustered(data: Sequence[str]) -> Labelled | None:
    """The largest clusters of held-out proteins, where their files say which they are of."""
    sources = [source for source in find_sources(data, "validation") if has_cluster(source, None)]
    proteins = []
    for source in sources:
        for record in read_records(source, None, [], lambda _: None):
            try:
                proteins.append((clean(record.sequence).residues, record.cluster))
            except IllegalResidueError:  # counted where they are evaluated
                continue
    return of_families(proteins, ", ".join(dict.fromkeys(source_name(source.name) for source in sources)))


def _unlabelled(data: Sequence[str], num_sequences: int) -> Labelled:
    sample = read_sample(list(data), Protocol(), num_sequences, "validation")
    if len(sample.proteins) < 3:
        raise UserError(f"{', '.join(data)} has fewer than three held-out proteins, too few for a map.")
    return Labelled(
        [one.residues for one in sample.proteins],
        None,
        ", ".join(dict.fromkeys(map(source_name, sample.facts["sources"]))),
    )


def _sections(
    asked: Asked,
    subjects: Sequence[Subject],
    findings: Sequence[Finding],
    unread: Sequence[str],
    families: Labelled | None,
    maps: Sequence[Map],
    baseline: Map | None,
    why_not: dict[str, str],
) -> list[Section]:
    """In the order of a reader's questions: is it any good, at what, and how was it made."""
    model = asked.model
    runs = [subject.run for subject in subjects if subject.run]
    no_run = missing("This is no run of hf_plm, so that is not known.")
    if not any(subject.revision for subject in subjects):  # what measures a model cannot open one
        model = "EXPORTED_FOLDER"
    bodies: list[tuple[str, str, Callable[[], Html]]] = [
        ("summary", "Summary", lambda: _summary(subjects, findings)),
        ("training", "Training", lambda: curves_part.curves(runs) if runs else no_run),
        ("evaluation", "Evaluation", lambda: evaluation_part.evaluation(findings, model, why_not["evaluation"])),
        ("variants", "Variants", lambda: zero_shot_part.variants(findings, model)),
        ("contacts", "Contacts", lambda: zero_shot_part.contacts(findings, model)),
        ("probes", "Probes", lambda: probes_part.probes(findings, model)),
        ("families", "Families", lambda: families_part.section(families, maps, baseline, why_not["families"])),
        ("recipe", "Recipe", lambda: run_part.recipe(runs) if runs else no_run),
        ("data", "Data", lambda: run_part.data(runs) if runs else no_run),
        ("machine", "Hardware and versions", lambda: run_part.machine(runs) if runs else no_run),
        ("findings", "Sources of this report", lambda: listing(findings, unread)),
    ]
    return [Section(name, heading, _whole_or_why(heading, body)) for name, heading, body in bodies]


def _whole_or_why(heading: str, body: Callable[[], Html]) -> Html:
    """A section, or one sentence: what a damaged file of findings breaks is one section and not the page."""
    try:
        return body()
    except Exception as error:  # of any kind, since such a file may hold anything
        what = f"This section could not be made ({type(error).__name__}: {error})"
        print(f"{heading}: {what}", file=sys.stderr)
        return missing(f"{what}. A file that it reads may be damaged; all of them are named below.")


def _summary(subjects: Sequence[Subject], findings: Sequence[Finding]) -> Html:
    parts = []
    for subject in subjects:
        if len(subjects) > 1:
            parts.append(element("h3", subject.name))
        parts.append(run_part.summary(subject.run) if subject.run else _stranger(subject))
    if len(subjects) > 1:
        parts.insert(0, evaluation_part.against(findings, [subject.revision for subject in subjects]))
    return join(parts)


def _stranger(subject: Subject) -> Html:
    """What the configuration of a model that is no run of ours says of it."""
    path = locate(subject.model) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not JSON; copy or download the model again.") from None
    names = (
        ("Architecture", ", ".join(config.get("architectures") or [config.get("model_type", "unknown")])),
        ("Layers", config.get("num_hidden_layers", config.get("num_layers", "unknown"))),
        ("Width", config.get("hidden_size", config.get("d_model", "unknown"))),
        ("Attention heads", config.get("num_attention_heads", config.get("num_heads", "unknown"))),
        ("Revision", element("code", subject.revision)),
    )
    lead = paragraph(
        f"{subject.name} is a published or exported model. How it was trained is not known here; what it can do is "
        "below.",
        kind="lead",
    )
    return join([lead, facts(names)])
