"""How far an embedding is: a bar, or now and then a line where there is no terminal."""

import sys
import time

from tqdm import tqdm

from hf_plm.inference.ranks import Ranks
from hf_plm.inference.unfinished import Range
from hf_plm.inference.worklist import Worklist

FIRST_SECONDS, SAY_SECONDS = 10.0, 60.0
"""Before the first line, and between two, where there is no terminal for a bar."""


class Progress:
    """A bar for the first process's share, or now and then a line where there is no terminal."""

    def __init__(self, worklist: Worklist, portions: list[Range], ranks: Ranks):
        self._is_main = ranks.rank == 0
        self._num_proteins = sum(end - begin for begin, end in portions)
        total = sum(int(worklist.bounds[end] - worklist.bounds[begin]) for begin, end in portions)
        of_all = f" (process 1 of {ranks.size})" if ranks.size > 1 else ""
        self._bar = tqdm(
            total=total,
            disable=not (self._is_main and sys.stderr.isatty()),
            bar_format=f"embedding  {{percentage:3.0f}}% |{{bar}}| {{desc}}{of_all}, {{remaining}} left",
            dynamic_ncols=True,
            leave=False,
        )
        self._proteins = self._residues = 0
        self._began = time.monotonic()
        self._said = self._began - SAY_SECONDS + FIRST_SECONDS

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def count(self, num_residues: int) -> None:
        """One more protein is done."""
        self._proteins += 1
        self._residues += num_residues
        now = time.monotonic()
        if not self._is_main or (self._bar.disable and now - self._said < SAY_SECONDS):
            return
        seconds = max(now - self._began, 1e-9)
        text = (
            f"{self._proteins:,} of {self._num_proteins:,} proteins, {self._proteins / seconds:,.1f} proteins/s, "
            f"{self._residues / seconds:,.0f} residues/s"
        )
        if self._bar.disable:
            self._said = now
            left = seconds * (self._bar.total - self._residues) / max(self._residues, 1)
            print(f"{self._residues / self._bar.total:4.0%}  {text}, {duration(left)} left", flush=True)
        else:
            self._bar.set_description_str(text, refresh=False)
            self._bar.update(num_residues)


def duration(seconds: float) -> str:
    """In words, such as 2m 05s."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s" if minutes else f"{rest}s"
