"""Stop texts are found wherever the text is cut, and nothing else is held back for long."""

from hypothesis import given
from hypothesis import strategies as st

from lib.serving.stops import StopFinder

LETTERS = st.text("ab", min_size=1, max_size=4)


def expected(text: str, stops: list[str]) -> tuple[str, bool]:
    """Read a character at a time: the answer ends before the stop text that is complete first."""
    for end in range(1, len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            return text[: end - max(map(len, ended))], True
    return text, False


@given(st.lists(st.text("abc", max_size=5), max_size=8), st.lists(LETTERS, max_size=3))
def test_any_cut_of_a_text_gives_the_same(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    shown = ""
    longest = max(map(len, stops), default=1)
    read = ""
    for piece in pieces:
        shown += finder.put(piece)
        read += piece
        assert finder.found or len(read) - len(shown) < longest
    shown += finder.end()
    assert (shown, finder.found) == expected("".join(pieces), stops)
