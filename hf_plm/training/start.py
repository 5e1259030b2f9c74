"""Everything before the first step: data, weights to start from, and the recipe with nothing left at `auto`."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

from accelerate import Accelerator, DistributedType
from transformers import EsmConfig, EsmForMaskedLM

from hf_plm.config import Recipe, UserError
from hf_plm.data.corpus import Corpus, open_corpus
from hf_plm.data.loader import count_tokens
from hf_plm.data.prepare import ensure_prepared
from hf_plm.models.layers import compile_obstacle
from hf_plm.models.objective import PackedMaskedLM, Shape
from hf_plm.models.presets import build_model, esm_config, preset_of
from hf_plm.models.published import find_published, identity, read_published
from hf_plm.training import run_folder
from hf_plm.training.checkpoint import list_checkpoints
from hf_plm.training.push import check_right_to_push
from hf_plm.training.runtime import (
    engine_name,
    gather,
    in_turn,
    measure_speed,
    on_main,
    say,
)
from hf_plm.training.schedule import resolve


def find_weights(recipe: Recipe, accelerator: Accelerator) -> Path | None:
    """Where the weights that a run starts from are on this machine; one that has a checkpoint needs them no more."""
    name, checkpoints = recipe.init.from_, recipe.run_folder / run_folder.CHECKPOINTS
    if name is None or on_main(accelerator, lambda: bool(list_checkpoints(checkpoints))):
        return None
    return in_turn(accelerator, f"weights of {recipe.run_folder}", partial(find_published, name))


def first_model(recipe: Recipe, weights: Path) -> tuple[Recipe, EsmForMaskedLM]:
    """The network with published weights, and the recipe with its size."""
    published = read_published(weights)
    preset = preset_of(published.config)
    if recipe.model.preset not in ("auto", preset):
        raise UserError(
            f"{recipe.init.from_} is a network of size {preset}, and model.preset says {recipe.model.preset}; "
            "leave --model.preset out."
        )
    if published.config.token_dropout != recipe.model.token_dropout:
        raise UserError(
            f"{recipe.init.from_} was trained with token dropout {'on' if published.config.token_dropout else 'off'}; "
            f"give --model.token_dropout {str(published.config.token_dropout).lower()}."
        )
    recipe = recipe.replace(model__preset=preset)
    model = build_model(config_of(recipe), recipe.run.seed)
    # Without the rotary table, which a file in half precision has rounded; checkpoints do not hold it.
    model.load_state_dict(dict(published.named_parameters()), strict=False)
    return recipe, model


def config_of(recipe: Recipe) -> EsmConfig:
    return esm_config(recipe.model.preset, token_dropout=recipe.model.token_dropout)


def begin(recipe: Recipe, earlier: Recipe | None, train: Corpus, held_out: Corpus, weights: Path | None) -> None:
    """Write down what the run is made of, and find out whether it may be pushed; on the main process."""
    folder = recipe.run_folder
    start_sha256 = identity(weights) if weights else None
    if recipe.hub.push:
        check_right_to_push(recipe.hub, print)
        if recipe.hub.every and recipe.hub.every % (recipe.checkpoint.every or 1):
            print(f"Checkpoints are {recipe.checkpoint.every} steps apart: pushed is the first after each hub.every.")
    if earlier is None:
        run_folder.write_data(folder, train)
        run_folder.write_config(recipe, run_folder.origin_of(recipe, train, held_out, start_sha256))
        return
    origin = run_folder.read_config(folder)[1]
    if weights and origin.start_sha256 != start_sha256:
        raise UserError(
            f"{recipe.init.from_} are not the weights any more that the run in {folder} began from, and it has no "
            "checkpoint yet; give a new --run.folder."
        )
    if recipe.hub.dataset and recipe.hub.dataset not in origin.datasets:
        origin = replace(origin, datasets=(recipe.hub.dataset, *origin.datasets))
    run_folder.write_config(recipe, origin)  # with what may change from one start to the next


def check_split(recipe: Recipe, accelerator: Accelerator) -> None:
    """Refuse what the engine cannot do; say, or refuse, that some processes idle in the last round of each step."""
    world_size, micro_batches = accelerator.num_processes, recipe.batch.micro_batches
    assert micro_batches is not None
    if recipe.spike.action == "skip" and accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(
            "spike.action skip cannot drop an update under DeepSpeed, which applies it in the backward pass; "
            "use --spike.action rollback, or another engine."
        )
    idle = 1 - micro_batches / (math.ceil(micro_batches / world_size) * world_size)
    if idle and recipe.batch.strict:
        raise UserError(
            f"batch.micro_batches ({micro_batches}) is no multiple of the {world_size} processes, so {idle:.0%} of "
            "their time is idle, and batch.strict refuses that; change one of them."
        )
    if idle:
        say(
            accelerator,
            f"{micro_batches} micro-batches on {world_size} processes: the step is the same, and {idle:.0%} of the "
            "processes' time idles.",
        )


def shape_to_compile(recipe: Recipe, accelerator: Accelerator) -> Shape | None:
    """What the layers are compiled for, the same on all processes; None where they run uncompiled."""
    wanted, device = recipe.run.compile, accelerator.device
    if wanted is False or (wanted is None and device.type != "cuda"):
        return None
    if engine_name(accelerator) == "ZeRO-3":
        obstacle = "ZeRO-3 brings the weights together module by module"
    elif recipe.model.activation_checkpointing and wanted is None:
        # Recomputed on another thread than the first time, a graph may be another one: not proven on a GPU yet.
        obstacle = "activations are recomputed; --run.compile true tries it"
    else:
        obstacle = next(filter(None, gather(accelerator, compile_obstacle(device))), "")
    if obstacle and wanted:
        raise UserError(f"The layers cannot be compiled ({obstacle}); leave --run.compile out.")
    if obstacle:
        say(accelerator, f"The layers run uncompiled ({obstacle}): the same numbers, more slowly.")
    return None if obstacle else Shape(recipe.batch.tokens, recipe.data.crop)


def recompute_activations(model: EsmForMaskedLM) -> None:
    # transformers 5.23 renamed it and warns of the old name; 5.17 has only the old one.
    name = "activation_checkpointing_enable"
    enable = getattr(model, name if hasattr(model, name) else "gradient_checkpointing_enable")
    enable({"use_reentrant": False})


def open_corpora(recipe: Recipe, show_progress: bool = True) -> tuple[Corpus, Corpus]:
    """The training and the held-out split, prepared first where they are not."""
    data = recipe.data
    if not data.train:
        raise UserError(
            "Nothing to train on: name a FASTA file, a folder or a dataset with --data.train "
            "(hf-plm simulate makes a small FASTA to try with)."
        )
    folder = ensure_prepared(
        data.train,
        recipe.cache_folder,
        validation=data.validation,
        illegal=data.illegal,
        gaps=data.gaps,
        duplicates=data.duplicates,
        max_rejected=data.max_rejected,
        sequence_column=data.sequence_column,
        show_progress=show_progress,
    )
    train = open_corpus(folder, "train")
    if "validation" not in train.manifest.splits:
        raise UserError(
            f"The corpus {train.name} has {len(train):,} sequences, too few to hold some out; "
            "give more, or others to validate on with --data.validation."
        )
    return train, open_corpus(folder, "validation")


def resolve_on(
    recipe: Recipe, accelerator: Accelerator, module: PackedMaskedLM, train: Corpus, held_out: Corpus
) -> Recipe:
    """The recipe with every `auto` replaced by what this machine and corpus suggest, the same on every process."""
    epoch_tokens = count_tokens(train, recipe.data.crop)
    is_cpu = accelerator.device.type == "cpu"
    speed = None
    if recipe.budget_seconds is not None:
        say(accelerator, "Measuring the speed of this machine, a few seconds ...")
        speed = measure_speed(accelerator, module, train, recipe)
    mean_tokens = count_tokens(held_out, recipe.data.crop) / len(held_out)
    resolved = resolve(recipe, speed, epoch_tokens, mean_tokens, is_cpu, accelerator.num_processes)
    resolved = resolved.replace(run__precision="bf16" if accelerator.mixed_precision == "bf16" else "fp32")
    assert resolved.batch.micro_batches is not None
    step_tokens = resolved.batch.micro_batches * resolved.batch.tokens
    if epoch_tokens < step_tokens:
        micro_batches = epoch_tokens // resolved.batch.tokens
        smaller = f"--batch.micro_batches {micro_batches}"
        if not micro_batches:
            crop = min(epoch_tokens, recipe.data.crop)
            smaller = f"--batch.micro_batches 1 --batch.tokens {epoch_tokens} --data.crop {crop}"
        raise UserError(
            f"The corpus {train.name} has {epoch_tokens:,} tokens to train on, fewer than one step takes "
            f"({step_tokens:,}); give a smaller step, such as {smaller}, or more sequences."
        )
    return resolved
