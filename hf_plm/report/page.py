"""The page of a report: one HTML file that needs no network and no script, read alike on a phone, in print and aloud.

Text is escaped unless it is `Html`, so that no name of a run, protein or file becomes markup.
"""

import base64
import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

MISSING = "\u2013"
"""Where a number is not there."""


class Html(str):
    """Text that is markup already."""


@dataclass(frozen=True)
class Section:
    id: str
    title: str
    body: Html


def escape(value: object) -> Html:
    """Markup as it is, anything else as text."""
    return value if isinstance(value, Html) else Html(html.escape(str(value)))


def join(parts: Iterable[object], between: str = "") -> Html:
    return Html(between.join(escape(part) for part in parts))


def element(tag: str, *content: object, **attributes: str) -> Html:
    """An element with its content; `class_` and the like without the underscore."""
    shown = "".join(f' {name.rstrip("_")}="{html.escape(value)}"' for name, value in attributes.items() if value)
    return Html(f"<{tag}{shown}>{join(content)}</{tag}>")


def paragraph(*content: object, kind: str = "") -> Html:
    return element("p", *content, class_=kind)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, form: str = ".3f") -> str:
    """A number, with a true minus sign; a dash for what is none."""
    return format(value, form).replace("-", "\u2212") if is_number(value) else MISSING


def counted(count: Any, noun: str, form: str = ",.0f") -> str:
    """Such as `1 protein`, `2 proteins`."""
    return f"{number(count, form)} {noun}{'' if count == 1 else 's'}"


def estimate(value: Any, form: str = ".3f") -> str:
    """`[value, low, high]` as value (low to high); a bare number as it is."""
    if not isinstance(value, list | tuple):
        return number(value, form)
    if not value or not is_number(value[0]):
        return MISSING
    if len(value) < 3 or not (is_number(value[1]) and is_number(value[2])):
        return number(value[0], form)
    return f"{number(value[0], form)} ({number(value[1], form)} to {number(value[2], form)})"


def first(value: Any) -> float:
    """The value of `[value, low, high]`, or of a bare number; NaN for what is none."""
    value = value[0] if isinstance(value, list | tuple) and value else value
    return float(value) if is_number(value) else math.nan


def bounds(value: Any) -> tuple[float, float]:
    """Low and high of `[value, low, high]`; NaN where they are not known."""
    if isinstance(value, list | tuple) and len(value) >= 3 and is_number(value[1]) and is_number(value[2]):
        return float(value[1]), float(value[2])
    return math.nan, math.nan


def table(caption: str, head: Sequence[object], rows: Iterable[Sequence[object]]) -> Html:
    """A table that scrolls in its own box where the page is narrow; the first cell of a row is its heading."""
    cells = [
        element("tr", element("th", row[0], scope="row"), *(element("td", cell) for cell in row[1:])) for row in rows
    ]
    whole = element(
        "table",
        element("caption", element("span", caption)),
        element("thead", element("tr", *(element("th", name, scope="col") for name in head))),
        element("tbody", *cells),
    )
    return scrolling(caption, whole)


def scrolling(name: str, content: Html) -> Html:
    """A box of its own for what may be wider than the page; reached by the keyboard too."""
    return Html(f'<div class="scroll" role="region" tabindex="0" aria-label="{html.escape(name)}">{content}</div>')


def image(png: bytes, alt: str) -> Html:
    """A picture inside the page."""
    data = base64.b64encode(png).decode()
    return Html(f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt)}">')


def facts(pairs: Iterable[tuple[object, object]]) -> Html:
    """Names and what they are, two columns."""
    return element(
        "dl", *(element("div", element("dt", name), element("dd", value)) for name, value in pairs), class_="facts"
    )


def details(summary: str, *content: object) -> Html:
    """What opens at a click, without a script."""
    return element("details", element("summary", summary), *content)


def figure(caption: object, *content: object, kind: str = "") -> Html:
    return element("figure", *content, element("figcaption", caption), class_=kind)


def grid(*figures: object, kind: str = "grid") -> Html:
    """Side by side where there is room."""
    return element("div", *figures, class_=kind)


def missing(what: str, *commands: str) -> Html:
    """One line on what was not measured, with the command that does it."""
    shown = join((element("code", command) for command in commands), " or ")
    return paragraph(what, *((" Made by ", shown, ".") if commands else ()), kind="missing")


def notice(*content: object) -> Html:
    return element("p", *content, class_="notice", role="note")


def page(title: str, kicker: str, sections: Sequence[Section], footer: object) -> str:
    """The whole document. Section ids must be unique."""
    assert len({section.id for section in sections}) == len(sections)
    links = [element("li", element("a", section.title, href=f"#{section.id}")) for section in sections]
    bodies = [
        element("section", element("h2", section.title, id=f"{section.id}-title"), section.body, id=section.id)
        for section in sections
    ]
    style = files(__package__).joinpath("report.css").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<link rel="icon" href="data:,">
<style>
{style}</style>
</head>
<body>
<a class="skip" href="#main">Skip to the report</a>
<header>
<p class="kicker">{escape(kicker)}</p>
<h1>{escape(title)}</h1>
<nav aria-label="Sections"><ul>{join(links)}</ul></nav>
</header>
<main id="main">
{join(bodies, chr(10))}
</main>
<footer>{escape(footer)}</footer>
</body>
</html>
"""
