"""Beginnings of texts, and who holds them: for a router, no Ray is needed."""

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from lib.serving.beginnings import Beginnings, digest_beginnings

SYSTEM = {"role": "system", "content": "You are a helpful assistant of the tiers. " * 8}
MESSAGES = st.lists(st.text(max_size=200), min_size=1, max_size=6)


def chat(*texts: str, **fields: Any) -> list[int]:
    roles = ("user", "assistant")
    messages = [SYSTEM, *({"role": roles[i % 2], "content": text} for i, text in enumerate(texts))]
    return digest_beginnings(json.dumps({"messages": messages, **fields}).encode())


class TestDigests:
    @given(MESSAGES, st.text(max_size=200))
    def test_a_conversation_that_goes_on_begins_as_before(
        self, texts: list[str], more: str
    ) -> None:
        before, after = chat(*texts), chat(*texts, more)
        assert before and after[: len(before)] == before

    @given(st.text(max_size=400), st.text(max_size=200))
    def test_so_does_a_prompt(self, text: str, more: str) -> None:
        before, after = (
            digest_beginnings(json.dumps({"prompt": prompt, "max_tokens": size}).encode())
            for size, prompt in enumerate((text, text + more))
        )
        assert after[: len(before)] == before

    def test_tokens_are_a_prompt_as_well(self) -> None:
        before, after = (
            digest_beginnings(json.dumps({"prompt": list(range(size))}).encode())
            for size in (100, 120)
        )
        assert before and after[: len(before)] == before

    def test_tools_are_part_of_it(self) -> None:
        tool = {"type": "function", "function": {"name": "f"}}
        assert set(chat("a", tools=[tool])).isdisjoint(chat("a"))

    def test_other_texts_share_none(self) -> None:
        assert set(chat("a" * 99)[:-1]).issubset(chat("b" * 99))
        assert chat("a" * 99)[-1] not in chat("b" * 99)

    def test_what_has_no_text_has_none(self) -> None:
        for body in (
            b"",
            b"{",
            b"[1]",
            b'"a"',
            b"{}",
            b'{"prompt": "short"}',
            b"[" * 9999,
            b"\xff",
        ):
            assert digest_beginnings(body) == []


class TestChoice:
    def test_texts_that_begin_alike_go_to_one(self) -> None:
        beginnings: Beginnings[str] = Beginnings()
        idle = {"a": 0, "b": 0}
        first = beginnings.choose([1, 2], idle)
        assert beginnings.choose([7, 8], idle) != first
        for _ in range(3):
            assert beginnings.choose([1, 2, 3], idle) == first

    def test_the_longest_beginning_counts(self) -> None:
        beginnings: Beginnings[str] = Beginnings()
        first = beginnings.choose([1, 2], {"a": 0, "b": 0})
        busy = {"a": 9, "b": 9, first: 20}
        other = beginnings.choose([1, 3], busy)
        assert other != first
        assert beginnings.choose([1, 2, 4], {"a": 0, "b": 0}) == first
        assert beginnings.choose([1, 3, 5], {"a": 0, "b": 0}) == other

    def test_a_small_share_of_a_text_does_not(self) -> None:
        beginnings: Beginnings[str] = Beginnings()
        first = beginnings.choose([1], {"a": 0, "b": 0})
        assert beginnings.choose([1, 5, 6, 7], {"a": 0, "b": 0}) != first

    def test_a_busy_holder_is_passed_over_and_then_not_the_holder(self) -> None:
        beginnings: Beginnings[str] = Beginnings()
        first = beginnings.choose([1], {"a": 0, "b": 0})
        (other,) = {"a", "b"} - {first}
        assert beginnings.choose([1], {first: 4, other: 0}) == first
        assert beginnings.choose([1], {first: 5, other: 0}) == other
        assert beginnings.choose([1], {first: 0, other: 0}) == other

    def test_one_that_is_gone_holds_nothing(self) -> None:
        beginnings: Beginnings[str] = Beginnings()
        first = beginnings.choose([1, 2], {"a": 0, "b": 0})
        (other,) = {"a", "b"} - {first}
        assert beginnings.choose([1, 2], {other: 3}) == other

    @given(st.lists(st.lists(st.integers(0, 50), max_size=6), max_size=60))
    def test_the_least_recent_are_forgotten(self, texts: list[list[int]]) -> None:
        beginnings: Beginnings[str] = Beginnings(most=8)
        for digests in texts:
            assert beginnings.choose(digests, {"a": 1, "b": 1, "c": 2}) in "abc"
            assert len(beginnings._holders) <= 8

    def test_what_nobody_knows_goes_around(self) -> None:
        beginnings: Beginnings[str] = Beginnings()
        names = [beginnings.choose([], {"a": 0, "b": 0, "c": 0}) for _ in range(6)]
        assert names[:3] == names[3:] and len(set(names)) == 3
