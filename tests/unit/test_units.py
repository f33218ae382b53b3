import pytest

from lib.errors import InputError
from lib.units import format_bytes, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("4096", 4096), ("700MiB", 700 * 2**20), ("1.5 GiB", 3 * 2**29), ("2GB", 2 * 10**9)],
)
def test_sizes_are_parsed(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "-1MiB", "12 parsecs", "MiB", "1e3"])
def test_bad_sizes_name_the_value(text: str) -> None:
    with pytest.raises(InputError, match="size"):
        parse_bytes(text)


def test_quantities_are_printed_in_readable_units() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(1536 * 2**20) == "1.5 GiB"
    assert format_seconds(0.00123) == "1.23 ms"
    assert format_seconds(2e-9) == "2 ns"
