"""Knobs of the smallest run that still validates and saves twice."""

FOUR_STEPS = {
    "schedule.steps": "4",
    "checkpoint.every": "2",
    "validation.every": "2",
    "data.crop": "64",
    "batch.tokens": "256",
    "batch.micro_batches": "1",
    "run.log_every": "1",
    "run.trackers": "none",
}
