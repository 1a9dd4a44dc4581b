"""HTML that is well-formed by construction: every text is escaped, and every element is closed."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is HTML already, and is not escaped again."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element. Children that are not `Markup` are escaped. An attribute like `class_` is written without the
    underscore."""
    inside = "".join(child if isinstance(child, Markup) else escape(str(child)) for child in children)
    given = "".join(f' {key.rstrip("_")}="{escape(str(value))}"' for key, value in attributes.items())
    return Markup(f"<{name}{given}>{inside}</{name}>")


def table(head: list[str], rows: list[list[object]], kinds: list[str] | None = None) -> Markup:
    """A table. Columns whose heading begins with `>` are aligned to the right.

    kinds  the CSS class of each row
    """
    right = ["right" if name.startswith(">") else "" for name in head]
    cells = [
        tag("tr", *(tag("td", value, class_=side) for value, side in zip(row, right, strict=True)), class_=kind)
        for row, kind in zip(rows, kinds or [""] * len(rows), strict=True)
    ]
    heading = tag("tr", *(tag("th", name.removeprefix(">"), class_=side) for name, side in zip(head, right)))
    return tag("div", tag("table", tag("thead", heading), tag("tbody", *cells)), class_="scroll")
