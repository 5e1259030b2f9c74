"""The learning rate at each corner, and what a run derives from its machine."""

import dataclasses
from types import SimpleNamespace

import pytest
from accelerate import DistributedType

from hf_plm.config import Recipe, Schedule, UserError
from hf_plm.recipe import load_recipe
from hf_plm.training.schedule import MAX_BATCH_TOKENS, rate_factor, resolve
from hf_plm.training.start import check_split

STEPS = Schedule(steps=1000, warmup=100)
CORPUS = {"corpus_tokens": 10**12, "mean_tokens": 300.0}


@pytest.mark.parametrize(
    ("step", "factor"), [(0, 0.01), (49, 0.5), (99, 1.0), (100, 1.0), (500, 0.55), (900, 0.1), (999, 0.1)]
)
def test_rate_by_steps(step: int, factor: float) -> None:
    """Warm-up ends at step 100, decay at 900 of 1,000 (90%), half-way at 500."""
    assert rate_factor(STEPS, step, step / 1000) == pytest.approx(factor, abs=2e-3)


def test_rate_by_wall_clock_follows_the_share_and_not_the_step() -> None:
    budget = dataclasses.replace(STEPS, budget="8h")
    assert rate_factor(budget, 10_000, 0.45) == pytest.approx(0.55)
    assert rate_factor(budget, 10, 0.45) == pytest.approx(0.11 * 0.55)
    assert rate_factor(budget, 10_000, 0.95) == pytest.approx(0.1)
    # The twin: counted in steps, the same moment has another rate.
    assert rate_factor(STEPS, 10_000, 0.45) != pytest.approx(0.55, abs=0.01)


@pytest.mark.parametrize(
    ("speed", "is_cpu", "batch_tokens"),
    [
        (2_000, True, 4096),  # 58 million tokens in 8 hours: small steps, many of them
        (100_000, False, 262_144),  # 2.9 billion
        (2_000_000, False, MAX_BATCH_TOKENS),
    ],
)
def test_a_budget_sizes_the_batch(speed: float, is_cpu: bool, batch_tokens: int) -> None:
    recipe = resolve(load_recipe("mine"), speed, is_cpu=is_cpu, **CORPUS)
    assert recipe.batch.micro_batches is not None
    assert recipe.batch.micro_batches * recipe.batch.tokens == batch_tokens
    assert recipe.batch.tokens >= recipe.data.crop
    assert 0 < (recipe.schedule.warmup or 0) <= 2000
    assert None not in (recipe.validation.every, recipe.validation.sequences, recipe.checkpoint.every)


def test_a_small_corpus_bounds_the_batch() -> None:
    recipe = resolve(load_recipe("mine"), 2e6, corpus_tokens=100_000, mean_tokens=300.0, is_cpu=False)
    assert recipe.batch.micro_batches is not None
    assert recipe.batch.micro_batches * recipe.batch.tokens <= 100_000


def test_validation_takes_no_more_than_its_share() -> None:
    recipe = resolve(load_recipe("demo"), None, is_cpu=True, **CORPUS)
    assert recipe.validation.sequences is not None
    assert recipe.validation.every is not None
    validated = recipe.validation.sequences * 300 * (recipe.schedule.steps / recipe.validation.every)
    assert validated / 3 <= 0.05 * recipe.schedule.steps * recipe.batch.tokens


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(UserError, match=r"give --schedule.warmup auto"):
        resolve(load_recipe("esm2_8m", {"schedule.steps": "100"}), None, is_cpu=True, **CORPUS)
    short = load_recipe("esm2_8m", {"schedule.steps": "100", "schedule.warmup": "auto"})
    assert resolve(short, None, is_cpu=True, **CORPUS).schedule.warmup == 5


def test_auto_micro_batches_need_a_budget() -> None:
    with pytest.raises(UserError, match="needs a budget"):
        resolve(Recipe().replace(batch__micro_batches=None), None, is_cpu=True, **CORPUS)


def test_a_fitted_batch_leaves_no_process_idle() -> None:
    recipe = resolve(load_recipe("mine"), 100_000, is_cpu=False, world_size=6, **CORPUS)
    assert recipe.batch.micro_batches is not None
    assert recipe.batch.micro_batches % 6 == 0
    assert recipe.batch.micro_batches * recipe.batch.tokens == pytest.approx(262_144, rel=0.2)


@pytest.mark.parametrize(("micro_batches", "idles"), [(4, True), (6, False), (2, True)])
def test_micro_batches_that_processes_do_not_divide_are_said_or_refused(
    micro_batches: int, idles: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerator = SimpleNamespace(num_processes=3, is_main_process=True, distributed_type="MULTI_CPU")
    recipe = Recipe().replace(batch__micro_batches=micro_batches)
    check_split(recipe, accelerator)
    said = f"{micro_batches} micro-batches on 3 processes: the step is the same, and 33% of the processes' time idles."
    assert (said in capsys.readouterr().out) == idles
    strict = recipe.replace(batch__strict=True)
    if idles:
        with pytest.raises(UserError, match=r"no multiple of the 3 processes, so 33% of their time is idle"):
            check_split(strict, accelerator)
    else:
        check_split(strict, accelerator)


def test_dropping_updates_is_refused_under_deepspeed() -> None:
    accelerator = SimpleNamespace(num_processes=2, is_main_process=True, distributed_type=DistributedType.DEEPSPEED)
    with pytest.raises(UserError, match=r"skip cannot drop an update under DeepSpeed.* use --spike\.action rollback"):
        check_split(Recipe().replace(spike__action="skip"), accelerator)
