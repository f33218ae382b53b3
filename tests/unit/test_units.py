import pytest
from hypothesis import given
from hypothesis import strategies as st

from lib.errors import InputError
from lib.units import format_bytes, format_seconds, parse_bytes


def test_quantities_are_printed_in_readable_units() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(1536 * 2**20) == "1.5 GiB"
    assert format_seconds(0.00123) == "1.23 ms"
    assert format_seconds(2e-9) == "2 ns"


@pytest.mark.parametrize(
    ("size", "num_bytes"),
    [
        ("700MiB", 700 * 2**20),
        ("1.5GiB", 3 * 2**29),
        (" 1.5 gib ", 3 * 2**29),
        ("6GB", 6 * 10**9),
        ("6gb", 6 * 10**9),
        ("0.1kB", 100),
        ("0.3B", 0),
        ("2TiB", 2**41),
        ("4096", 4096),
        ("0", 0),
        (4096, 4096),
        (0, 0),
    ],
)
def test_sizes_are_read_with_their_units(size: str | int, num_bytes: int) -> None:
    assert parse_bytes(size) == num_bytes


@pytest.mark.parametrize(
    "size",
    ["", "MiB", "-1", -1, "1e3", "1,5GiB", "1.GiB", "700M", "7 0MiB", "1MiBs", "٣", 1.5, True, None]
    + [2**63, "9000000TiB", "nan", "inf", b"1"],
)
def test_other_sizes_are_refused_with_the_allowed_forms(size: object) -> None:
    with pytest.raises(InputError, match=r"size .* 700MiB, 1.5GiB .* 6GB"):
        parse_bytes(size)


@given(st.integers(0, 2**43), st.sampled_from(["KiB", "kB", "MiB", "MB", "B"]))
def test_whole_numbers_of_units_are_exact(count: int, unit: str) -> None:
    factor = {"KiB": 2**10, "kB": 10**3, "MiB": 2**20, "MB": 10**6, "B": 1}[unit]
    if count * factor < 2**63:
        assert parse_bytes(f"{count}{unit}") == count * factor
