"""How far long work is, in a terminal and elsewhere."""

import pytest

from hf_plm import progress
from hf_plm.progress import Progress, duration, shown


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (45, "45s"), (59.7, "1m 00s"), (725, "12m 05s"), (12_000, "3h 20m"), (190_000, "2d 4h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    items = []
    for item in shown("counting", "abcd", [1, 1, 3, 5]):
        items.append(item)
        now[0] += 40 if item != "d" else 400
    assert items == list("abcd")
    said = capsys.readouterr()
    # At 40 s (the first after 10) and 120 s (60 later), and none when all is done.
    assert said.err.splitlines() == [" 10%  counting, 6m 00s left", " 50%  counting, 2m 00s left"]
    assert said.out == ""


class Terminal:
    """Standard error of a terminal."""

    encoding = "utf-8"

    def __init__(self):
        self.text = ""

    def isatty(self):
        return True

    def write(self, text):
        self.text += text

    def flush(self):
        pass


def test_a_bar_and_words_in_a_terminal(monkeypatch, capsys):
    class Spoken(Progress):
        def words(self, seconds):
            return "some words"

    terminal = Terminal()
    monkeypatch.setattr(progress.sys, "stderr", terminal)
    with Spoken("counting {x}", 4) as spoken:
        spoken._bar.mininterval = 0
        spoken.count(2)
        spoken.say("a line")
    assert "counting {x}   50% |" in terminal.text
    assert "| some words, " in terminal.text
    assert capsys.readouterr().out == "a line\n"


def test_a_process_that_does_not_tell(monkeypatch, capsys):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0)
    with Progress("counting", 4, is_shown=False) as silent:
        silent.count(1)
        silent.say("a line")
    assert capsys.readouterr() == ("", "")
