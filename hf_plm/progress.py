"""How far long work is: a bar, or now and then a line where there is no terminal."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

Item = TypeVar("Item")

FIRST_SECONDS, SAY_SECONDS = 10.0, 60.0
"""Before the first line, and between two, where there is no terminal for a bar."""


class Progress:
    """Over `total` units that cost alike, such as residues, so that the time left is right; on stderr."""

    def __init__(self, doing: str, total: int, is_shown: bool = True):
        self._doing, self._total, self._done, self._is_shown = doing, max(total, 1), 0, is_shown
        shown_as = doing.replace("{", "{{").replace("}", "}}")
        self._bar = tqdm(
            total=self._total,
            disable=not (is_shown and sys.stderr.isatty()),
            bar_format=f"{shown_as}  {{percentage:3.0f}}% |{{bar}}| {{desc}}{{remaining}} left",
            dynamic_ncols=True,
            leave=False,
        )
        self._began = time.monotonic()
        self._said = self._began - SAY_SECONDS + FIRST_SECONDS

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def words(self, seconds: float) -> str:
        """What else to say after so many seconds, such as a speed."""
        del seconds
        return ""

    def count(self, amount: int = 1) -> None:
        """So many units more are done."""
        self._done += amount
        now = time.monotonic()
        if not self._is_shown or (self._bar.disable and now - self._said < SAY_SECONDS):
            return
        seconds = max(now - self._began, 1e-9)
        words = self.words(seconds)
        if not self._bar.disable:
            self._bar.set_description_str(words and f"{words}, ", refresh=False)
            self._bar.update(amount)
        elif self._done < self._total:
            self._said = now
            left = duration(seconds * (self._total - self._done) / max(self._done, 1))
            line = f"{self._done / self._total:4.0%}  {self._doing}, {words and f'{words}, '}{left} left"
            print(line, file=sys.stderr, flush=True)

    def say(self, line: str) -> None:
        """A line on stdout that does not break the bar."""
        if self._is_shown:
            tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()


def shown(doing: str, items: Iterable[Item], amounts: Iterable[int]) -> Iterator[Item]:
    """The items, counted by what each costs when the next is asked for."""
    amounts = list(amounts)
    with Progress(doing, sum(amounts)) as progress:
        for item, amount in zip(items, amounts, strict=True):
            yield item
            progress.count(amount)


def duration(seconds: float) -> str:
    """Two units at most: 45s, 12m 05s, 3h 20m, 2d 4h."""
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {whole % 60:02d}s" if minutes else f"{whole}s"
