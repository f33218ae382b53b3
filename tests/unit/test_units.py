from lib.units import format_bytes, format_seconds


def test_quantities_are_printed_in_readable_units() -> None:
    assert format_bytes(512) == "512 B"
    assert format_bytes(1536 * 2**20) == "1.5 GiB"
    assert format_seconds(0.00123) == "1.23 ms"
    assert format_seconds(2e-9) == "2 ns"
