"""Knobs on the command line: `--section.knob value`, as a recipe has them."""

from collections.abc import Sequence

from hf_plm.config import KNOBS, UserError


def parse_knobs(words: Sequence[str]) -> dict[str, str | list[str]]:
    """`--section.knob value`, `--section.knob=value`, several values for a list, or none for a switch."""
    knobs: dict[str, str | list[str]] = {}
    name = ""
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, _, value = word[2:].partition("=")
            if name in knobs:
                raise UserError(f"--{name} is given twice; give it once.")
            knobs[name] = [value] if "=" in word else []
        elif not name:
            raise UserError(f"{word!r} is not a flag; knobs are given as --section.knob value.")
        else:
            values = knobs[name]
            assert isinstance(values, list)
            values.append(word)
    return {name: _one_or_many(name, values) for name, values in knobs.items() if isinstance(values, list)}


def _one_or_many(name: str, values: list[str]) -> str | list[str]:
    if name in KNOBS and KNOBS[name].type is bool and not values:
        return "true"
    if name in KNOBS and KNOBS[name].type == tuple[str, ...]:
        if not values:
            raise UserError(f"--{name} needs a value.")
        return values[0] if values == ["none"] else values
    if name in KNOBS and len(values) != 1:
        raise UserError(f"--{name} takes one value, not {len(values)}.")
    return values[0] if values else ""


def knob_table() -> str:
    lines = ["knobs (default):"]
    section = ""
    for item in KNOBS.values():
        if item.name.split(".")[0] != section:
            section = item.name.split(".")[0]
            lines.append("")
        default = " ".join(item.default) if isinstance(item.default, tuple) else item.default
        if default in (None, ""):
            default = "auto" if item.may_be_auto else "none"
        lines.append(f"  --{item.name} ({default})\n        {item.meaning}")
    return "\n".join(lines)


def meaning(name: str) -> str:
    return KNOBS[name].meaning.replace("%", "%%")  # argparse formats help texts
