"""Lines for a terminal: wrapped with a hanging indent, tables that fit, paths in one piece."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from gradctl.report._text import clean

NARROWEST = 40
Row = tuple[str, ...]


class Lines:
    """Prints one line after another, wrapped to the console, safe for its encoding.

    Args:
        console: where to; plain text where it is no terminal.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._encoding = console.encoding or "utf-8"
        self.width = max(NARROWEST, console.width)
        self.is_terminal = console.is_terminal

    def clean(self, text: str) -> str:
        """Return `text` made harmless for this console."""
        return clean(text, encoding=self._encoding)

    def gap(self) -> None:
        """Leave a line empty."""
        self._console.print()

    def say(self, text: str, style: str = "", *, indent: int = 0, hang: int = 0) -> None:
        """Print `text`; lines after the first stand `hang` columns further in."""
        # the first line starts at the margin and the others hang: wrapping all to the narrower room keeps both inside
        for place, line in enumerate(self.wrapped(text, room=self.width - indent - hang, style=style)):
            self.put(Text(" " * (indent + hang if place else indent)) + line)

    def wrapped(self, text: str, *, room: int, style: str = "") -> list[Text]:
        """Return the lines of `text`, each at most `room` columns wide; at least one."""
        found = list(Text(self.clean(text), style=style).wrap(self._console, max(20, room), overflow="fold"))
        for line in found:
            line.rstrip()
        return found or [Text("")]

    def unbroken(self, text: str) -> None:
        """Print a path or a command in one piece, however long, so that it can be copied."""
        self.put(Text(self.clean(text)))

    def put(self, line: Text) -> None:
        """Print a line as it is, however long."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def table(self, head: Row, rows: list[Row]) -> None:
        """Print columns, the first one as wide as it may be, the others to the right of it."""
        cells = [tuple(self.clean(cell) for cell in row) for row in (head, *rows)]
        widths = [max(Text(row[k]).cell_len for row in cells) for k in range(len(head))]
        room = self.width - 2 - sum(widths[1:]) - 2 * (len(widths) - 1)
        widths[0] = max(8, min(widths[0], room))
        for at, row in enumerate(cells):
            line = Text("  ", style="dim" if at == 0 else "")
            for k, cell in enumerate(row):
                text = Text(_shorten(cell, widths[k]))
                text.align("left" if k == 0 else "right", widths[k])
                line += Text("  " if k else "") + text
            line.rstrip()
            line.truncate(self.width)
            self.put(line)


def _shorten(text: str, width: int) -> str:
    """Cut the front of a name: its end tells layers apart."""
    if Text(text).cell_len <= width:
        return text
    mark = ".." if width > 4 else ""
    cut = text[-(width - len(mark)) :]
    while Text(cut).cell_len > width - len(mark):
        cut = cut[1:]
    return mark + cut
