import json

import pytest

from scripts.experiments.codecs import bench_codecs


def test_the_bench_reports_every_precision_and_ends_with_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_codecs, "CYCLED_BYTES", 1)
    assert bench_codecs.main(["--shapes", "64x64,48x32", "--rounds", "1"]) == 0
    *table, last = capsys.readouterr().out.splitlines()
    document = json.loads(last)
    assert len(document["rows"]) == len(table) - 2 == 18
    errors = [row["error_normal"] for row in document["rows"][3:9]]
    assert errors == sorted(errors)  # int8 to int2
    for row in document["rows"]:
        assert row["decode_gweights_s"] > 0
        assert [product["activation_rows"] for product in row["products"]] == [1, 16, 128]
