"""Reading HTML pages in tests."""

import re
from html.parser import HTMLParser


class Reader(HTMLParser):
    """Collects the text, and sees to it that every element is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.said: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in ("meta", "br"):
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)


def assert_stands_for_itself(text: str) -> Reader:
    """Nothing in the page is run or fetched, and its ids are its own."""
    reader = Reader(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(reader.tags)
    addresses = set(re.findall(r'https?://[^"\s<]+', text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}, "names, not to be fetched"
    assert "@import" not in text and "url(http" not in text
    assert len(reader.ids) == len(set(reader.ids)), "pictures share ids"
    assert set(re.findall(r'(?:href="#|url\(#)([\w-]+)', text)) <= set(reader.ids)
    return reader
