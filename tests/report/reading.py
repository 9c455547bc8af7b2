"""Reading a page as a browser does: its elements, its text, its tables."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

_VOID = {"meta", "br", "link", "img"}


@dataclass
class Element:
    """attributes: by name; text: its own and its children's."""

    tag: str
    attributes: dict[str, str]
    parts: "list[str | Element]" = field(default_factory=list)

    def all(self, *tags: str) -> "Iterator[Element]":
        """It and everything in it that has one of these tags; any without one."""
        if not tags or self.tag in tags:
            yield self
        for part in self.parts:
            if isinstance(part, Element):
                yield from part.all(*tags)

    @property
    def text(self) -> str:
        """With single spaces between words."""
        return " ".join(self.raw.split())

    @property
    def raw(self) -> str:
        """As it is written."""
        return "".join(part if isinstance(part, str) else part.raw for part in self.parts)

    def table(self, caption: str) -> list[list[str]]:
        """The cells of the body of the one table whose caption begins so."""
        (found,) = (
            table
            for table in self.all("table")
            if next(table.all("caption")).text.startswith(caption)
        )
        (body,) = found.all("tbody")
        return [[cell.text for cell in row.all("th", "td")] for row in body.all("tr")]


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.open = [Element("", {})]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        found = Element(tag, {name: value or "" for name, value in attrs})
        self.open[-1].parts.append(found)
        if tag not in _VOID:
            self.open.append(found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in _VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        self.open[-1].parts.append(data)


def parsed(html: str) -> Element:
    """A page, whose elements are all closed in their order."""
    parser = _Parser()
    parser.feed(html)
    parser.close()
    (root,) = parser.open
    return root
