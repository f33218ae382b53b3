"""Stop texts: an answer ends before the first of them, and never shows its beginning."""

from collections.abc import Sequence


class StopFinder:
    """Passes text on, but for an end that may be the beginning of a stop text."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.found = False
        """Whether the answer has ended: nothing comes after it."""

    def put(self, text: str) -> str:
        """Take a piece of text; returns what is known to be the answer's."""
        if self.found:
            return ""
        text = self._held + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        keep = max((_begun(text, stop) for stop in self._stops), default=0)
        shown = text[: len(text) - keep]
        self._held = text[len(text) - keep :]
        return shown

    def end(self) -> str:
        """Return what was held back: no stop text has come of it."""
        held, self._held = self._held, ""
        return held


def _begun(text: str, stop: str) -> int:
    """Return how many of the last characters of a text are the first ones of a stop text."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
