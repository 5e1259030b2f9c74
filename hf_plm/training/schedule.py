"""The learning rate at each step, and the knobs that a run derives from what its machine can do.

Warm-up always counts optimizer steps. The decay counts the share of the run that is spent: of its steps, or of its wall
clock where the recipe gives a budget.
"""

import math

from hf_plm.config import Recipe, Schedule, UserError

MAX_WARMUP = 2000  # ESM-2
MAX_BATCH_TOKENS = 2**21  # ESM-2
MIN_BATCH_TOKENS = 4096
BUDGET_STEPS = 10_000
"""A budget is cut into about as many steps: enough for AdamW to average over, few enough to fill a GPU."""
VALIDATIONS = 20
VALIDATION_SHARE = 0.05
FORWARD_SHARE = 1 / 3
"""A forward pass costs about a third of a training step of as many tokens."""


def rate_factor(schedule: Schedule, step: int, share: float) -> float:
    """Learning rate of the update that ends step `step` (0-based) over its peak; `share` of the run in [0, 1] is spent.

    Linear warm-up, then linear decay to `final_ratio` at `decay_share` of the run, then constant (ESM-2, A.2.4).
    """
    assert schedule.warmup is not None
    warmup_share = 0.0 if schedule.budget else schedule.warmup / schedule.steps
    falling = (share - warmup_share) / max(schedule.decay_share - warmup_share, 1e-9)
    decayed = 1 - (1 - schedule.final_ratio) * min(max(falling, 0.0), 1.0)
    return min(1.0, (step + 1) / max(schedule.warmup, 1)) * decayed


def resolve(
    recipe: Recipe,
    tokens_per_second: float | None,
    corpus_tokens: int,
    mean_tokens: float,
    is_cpu: bool,
    world_size: int = 1,
) -> Recipe:
    """The recipe with nothing left at `auto`.

    `tokens_per_second`, over all processes, is measured where the recipe has a budget; `corpus_tokens` bounds the
    batch; `mean_tokens` is the mean window of a held-out sequence.
    """
    batch = recipe.batch
    if recipe.budget_seconds is None:
        if batch.micro_batches is None:
            raise UserError("batch.micro_batches: auto needs a budget to fit to; give a number, or schedule.budget.")
        steps = recipe.schedule.steps
    else:
        assert tokens_per_second is not None
        total_tokens = tokens_per_second * recipe.budget_seconds
        if batch.micro_batches is None:
            micro_batches, tokens = _fit_batch(total_tokens, recipe.data.crop, batch.tokens, corpus_tokens, is_cpu)
            micro_batches = math.ceil(micro_batches / world_size) * world_size  # none of them idles
            recipe = recipe.replace(batch__micro_batches=micro_batches, batch__tokens=tokens)
        assert recipe.batch.micro_batches is not None
        steps = max(1, round(total_tokens / (recipe.batch.micro_batches * recipe.batch.tokens)))
    twentieth = max(1, steps // VALIDATIONS)
    if recipe.schedule.warmup is None:
        recipe = recipe.replace(schedule__warmup=min(MAX_WARMUP, twentieth))
    elif recipe.budget_seconds is None and recipe.schedule.warmup >= recipe.schedule.decay_share * steps:
        raise UserError(
            f"schedule.warmup ({recipe.schedule.warmup} steps) leaves nothing of a run of {steps} steps; "
            "lower it, or give --schedule.warmup auto."
        )
    if recipe.validation.every is None:
        recipe = recipe.replace(validation__every=twentieth)
    if recipe.validation.sequences is None:
        assert recipe.batch.micro_batches is not None
        assert recipe.validation.every is not None
        run_tokens = steps * recipe.batch.micro_batches * recipe.batch.tokens
        tokens_each = VALIDATION_SHARE * run_tokens / FORWARD_SHARE / (steps / recipe.validation.every)
        recipe = recipe.replace(validation__sequences=int(min(max(tokens_each / mean_tokens, 20), 1000)))
    if recipe.checkpoint.every is None:
        recipe = recipe.replace(checkpoint__every=min(1000, twentieth))
    return recipe


def _fit_batch(total_tokens: float, crop: int, tokens: int, corpus_tokens: int, is_cpu: bool) -> tuple[int, int]:
    """Micro-batches per step and tokens of each, as powers of two, for a run that will see `total_tokens`."""
    largest = min(MAX_BATCH_TOKENS, corpus_tokens // 2)
    wanted = max(min(total_tokens / BUDGET_STEPS, largest), MIN_BATCH_TOKENS)
    batch_tokens = 1 << int(wanted).bit_length() - 1
    if is_cpu:  # a CPU gains nothing from large micro-batches
        tokens = max(crop, min(tokens, batch_tokens))
    return max(1, batch_tokens // tokens), tokens
