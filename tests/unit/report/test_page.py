"""report.html: self-contained, escaped, and honest about what is missing."""

import json
import re
import shlex
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lib.commands.benchmark import _parser as benchmark_parser
from lib.commands.report import draw_pictures, main
from lib.errors import InputError
from lib.report.page import render_page, summarize
from lib.report.run import load_run, read_metrics

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Checker(HTMLParser):
    """Collects what a page would fetch, and checks that every tag is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"src", "href"} and not (value or "").startswith("data:"):
                self.fetched.append(f"{tag} {value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def check(page: str) -> str:
    """Parse a page, assert that it is sound, and return its text."""
    checker = Checker()
    checker.feed(page)
    assert not checker.open and not checker.fetched
    assert "url(" not in page and "@import" not in page and "<script" not in page
    return checker.text


def test_page_of_a_complete_run(sample_run: Path) -> None:
    run = load_run(sample_run)
    assert not run.missing
    page = render_page(run, draw_pictures(run))
    text = check(page)
    assert len(re.findall(r"data:image/png;base64,", page)) == 7
    assert not run.missing
    for phrase in (
        "held-out loss is 3.521 nats per token, below the unigram entropy of 6.210",
        "adam_exp_avg_sq",
        "blocks fill HBM to 30% of the weight bytes, CPU to 80%",
        "tiered, emulated",
        "Emulated tiers charge +12.0\u00a0% of the untouched model's latency",
        "latency, charged by emulated tiers",
        "bit-identical",
        "transformer.h.0.attn",
        "tierhints benchmark --model runs/sample/checkpoint",
        "--sequence-length 128 --samples 64",
        "2.13.0+cpu",
        "256 of 256 tokens are the resident model's",
        "--exact",
    ):
        assert phrase in text, phrase
    assert "Missing from this report" not in text


@pytest.mark.parametrize(
    ("lost", "part"),
    [
        ("config.json", "configuration"),
        ("versions.json", "versions"),
        ("metrics.jsonl", "training curve"),
        ("checkpoint", "model"),
        ("tier_hints.json", "tier hints"),
        ("benchmark_real.json", "benchmark, real"),
        ("benchmark_emulated.json", "benchmark, emulated"),
    ],
)
def test_a_missing_part_is_named_with_its_command(sample_run: Path, lost: str, part: str) -> None:
    path = sample_run / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = load_run(sample_run)
    text = check(render_page(run, {}))
    assert part in {missing.part for missing in run.missing}
    assert "Missing from this report" in text and lost in text
    assert "python " in text or "tierhints benchmark --model" in text


@pytest.mark.parametrize("broken", ["config.json", "tier_hints.json", "benchmark_real.json"])
@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_part_does_not_break_the_page(sample_run: Path, broken: str, content: str) -> None:
    (sample_run / broken).write_text(content)
    run = load_run(sample_run)
    check(render_page(run, {}))
    assert bool(run.missing) is (broken != "config.json" or content != "{}")


def test_a_benchmark_that_was_not_asked_for_is_not_missed(sample_run: Path) -> None:
    config = json.loads((sample_run / "config.json").read_text())
    config["tiering"] |= {"mode": "real", "inference_benchmark": True}
    (sample_run / "benchmark_emulated.json").unlink()
    for both, missing in ((True, ["benchmark, emulated"]), (False, [])):
        config["bench"] = {"both_modes": both}
        (sample_run / "config.json").write_text(json.dumps(config))
        run = load_run(sample_run)
        assert [part.part for part in run.missing] == missing
        assert [document["mode"] for document in run.benchmarks] == ["real"]


def test_flat_hints_have_a_page_without_their_pictures(sample_run: Path) -> None:
    (sample_run / "tier_hints.json").write_text('{"transformer": "CPU"}')
    with pytest.warns(UserWarning, match="flat hints"):
        run = load_run(sample_run)
    text = check(render_page(run, draw_pictures(run)))
    assert "Flat hints" in text
    assert {"picture of importance", "picture of tiers"} <= {part.part for part in run.missing}


def test_text_of_files_is_escaped(sample_run: Path) -> None:
    versions = {"platform": "<script>alert(1)</script>", "<b>": '"&'}
    (sample_run / "versions.json").write_text(json.dumps(versions))
    text = check(render_page(load_run(sample_run), {}))
    assert "<script>alert(1)</script>" in text


def test_a_worse_loss_than_unigram_is_said(sample_run: Path) -> None:
    (sample_run / "metrics.jsonl").write_text('{"step": 1, "heldout_loss": 7.5}\n')
    assert "NOT below the unigram entropy" in summarize(load_run(sample_run))


def test_half_a_last_line_of_metrics_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 2, "loss": 1.0}\n{"step": 1, "loss": 2.0}\n{"step": 3, "lo')
    assert [entry["step"] for entry in read_metrics(path)] == [1, 2]
    path.write_text('{"st\n{"step": 1}\n')
    with pytest.raises(InputError, match="line 1"):
        read_metrics(path)


def test_command_writes_page_pictures_and_json(
    sample_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(sample_run), "--json", str(tmp_path / "out.json")]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert last == json.loads((tmp_path / "out.json").read_text())
    assert last["missing"] == [] and last["unigram_entropy_nats"] == 6.2104
    check((sample_run / "report.html").read_text())
    for name in ("loss", "importance", "tiers", "latency", "memory", "stays"):
        assert (sample_run / f"{name}.png").is_file()


@pytest.mark.parametrize(
    ("folder", "problem"),
    [
        ("absent", "does not exist"),
        ("empty", "holds no part of a run"),
        ("file", "is not a folder"),
    ],
)
def test_folder_without_a_run_is_refused(tmp_path: Path, folder: str, problem: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(InputError, match=f"{problem}: give the folder of a run, runs/<name>"):
        main([str(tmp_path / folder)])
    assert not (tmp_path / folder / "report.html").exists()


def test_the_command_of_a_benchmark_is_one_that_tierhints_takes(sample_run: Path) -> None:
    document = json.loads((sample_run / "benchmark_real.json").read_text())
    document |= {"budget": "HBM=1MiB,SSD=", "epsilon": "0.02", "canary": 5, "spec_file": "s.json"}
    (sample_run / "benchmark_real.json").write_text(json.dumps(document))
    text = check(render_page(load_run(sample_run), {}))
    (command,) = re.findall(r"tierhints benchmark (.*--mode real.*)", text)
    args = benchmark_parser().parse_args(shlex.split(command))
    assert (args.budget, args.epsilon, args.canary) == ("HBM=1MiB,SSD=", "0.02", 5)
    assert (args.samples, args.sequence_length, args.batch_size) == (64, 128, 4)
    assert (str(args.spec), args.dtype, args.num_iterations) == ("s.json", "float32", 20)


def test_without_matplotlib_the_page_is_written_and_says_so(
    sample_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lib.extras.importlib.util.find_spec", lambda name: None)
    assert main([str(sample_run)]) == 0
    said = check((sample_run / "report.html").read_text())
    assert "picture of loss: this needs matplotlib: pip install 'tierhints[report]'" in said
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["pictures"] == {} and len(document["missing"]) == 7
