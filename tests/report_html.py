"""A small strict reader of HTML for the tests of the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = {"meta", "link", "img", "br", "hr", "input", "source", "wbr", "col"}
LOADING = {"src", "href", "srcset", "action", "data", "poster", "xlink:href", "formaction"}


@dataclass
class Element:
    """One element: its tag, its attributes, its own text."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""


@dataclass
class Read:
    """What was read: elements in order, and what was wrong."""

    elements: list[Element] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        """The elements of one tag."""
        return [e for e in self.elements if e.tag == tag]

    @property
    def loads(self) -> list[str]:
        """Everything that a browser would fetch or follow."""
        return [
            f"{e.tag} {name}={value}"
            for e in self.elements
            for name, value in e.attributes.items()
            if name in LOADING and not (value or "").startswith("#")
        ]

    @property
    def handlers(self) -> list[str]:
        """Attributes that run script."""
        return [f"{e.tag} {n}" for e in self.elements for n in e.attributes if n.startswith("on")]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.read, self.open = Read(), list[Element]()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        if len(set(names)) < len(names):
            self.read.wrong.append(f"{tag} has an attribute twice: {names}")
        element = Element(tag, dict(attrs))
        self.read.elements.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.read.elements.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1].tag != tag:
            inside = self.open[-1].tag if self.open else "nothing"
            self.read.wrong.append(f"</{tag}> closes {inside} at {self.getpos()}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open:
            self.open[-1].text += data


def read(text: str) -> Read:
    """Reads a page; `wrong` is empty when every element closes in order and ids are unique."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    reader.read.wrong += [f"<{e.tag}> never closes" for e in reader.open]
    ids = [e.attributes["id"] for e in reader.read.elements if "id" in e.attributes]
    reader.read.wrong += [f"id {i} is used twice" for i in {i for i in ids if ids.count(i) > 1}]
    return reader.read
