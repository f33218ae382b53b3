"""Registries, and the plugins that the environment names."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from lib import registry
from lib.errors import InputError
from lib.registry import Registry

THINGS: Registry[type] = Registry("thing")


class Round:
    pass


@pytest.fixture(autouse=True)
def things() -> Iterator[None]:
    with THINGS.restored():
        THINGS.add("round", Round)
        yield


def write_plugin(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv(registry.PLUGINS_VARIABLE, f" {name} ,")


def test_things_are_found_by_name_in_the_order_of_registration() -> None:
    square = type("Square", (), {})
    THINGS.add("square", square)
    assert list(THINGS) == ["round", "square"] and THINGS.values() == (Round, square)
    assert "round" in THINGS and "flat" not in THINGS
    with pytest.raises(InputError, match="no thing 'flat'; there are: round, square"):
        THINGS["flat"]


def test_a_name_is_taken_once_but_a_definition_may_run_again() -> None:
    with pytest.raises(InputError, match="thing 'round' is registered already .*Round"):
        THINGS.add("round", type("Other", (), {}))
    again = type("Round", (), {"__module__": __name__, "__qualname__": "Round"})
    THINGS.add("round", again)
    assert THINGS["round"] is again


def test_what_was_registered_inside_is_taken_back() -> None:
    with pytest.raises(KeyboardInterrupt), THINGS.restored():
        THINGS.add("square", type("Square", (), {}))
        raise KeyboardInterrupt
    assert list(THINGS) == ["round"]


def test_a_plugin_is_imported_at_the_first_look_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = f"from {__name__} import THINGS\nassert 'flat' not in THINGS\nTHINGS.add('flat', str)\n"
    write_plugin(tmp_path, monkeypatch, "a_plugin_of_things", text)
    assert "flat" in THINGS and THINGS["flat"] is str
    assert list(THINGS) == ["round", "flat"]


def test_a_plugin_that_fails_is_named_each_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_plugin(tmp_path, monkeypatch, "a_broken_plugin", "1 / 0\n")
    for _ in range(2):
        with pytest.raises(InputError, match="'a_broken_plugin' of .TIERHINTS_PLUGINS can't be"):
            list(THINGS)
    monkeypatch.setenv(registry.PLUGINS_VARIABLE, "no_such_plugin")
    with pytest.raises(InputError, match="on PYTHONPATH"):
        THINGS.values()
