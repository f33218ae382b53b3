"""verify_exact.py on a tiny GPT-2, end to end."""

import json
from pathlib import Path

import pytest
import torch
from test_verify_epsilon import save_model

from lib.commands.cli import run_main
from scripts.experiments.exact import verify_exact
from scripts.experiments.exact.prompts import KINDS, read_prompts
from scripts.experiments.exact.verify_exact import Tally, Texts, compare


def test_no_difference_is_found_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_model(tmp_path / "model")
    flags = ["--model", str(folder), "--tier-hints", str(folder / "tier_hints.json")]
    flags += ["--tokens", "120", "--strict-tokens", "20", "--batch", "3", "--share", "0.9"]
    flags += ["--prompt-tokens", "8", "--json", str(tmp_path / "found.json")]
    assert run_main(lambda: verify_exact.main(flags)) == 2
    assert "leaves no text" in capsys.readouterr().err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verify_exact, "KINDS", ("code", "prose"))  # questions are too long for it
        assert run_main(lambda: verify_exact.main([*flags, "--new-tokens", "12"])) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document == json.loads((tmp_path / "found.json").read_text())
    for mode, least in (("greedy", 60), ("sampled", 60), ("strict", 20)):
        assert document[mode]["tokens"] >= least
        assert document[mode]["differences"] == len(document[mode]["listed"]) == 0
    assert document["drafting"]["True"]["windows"] > 0
    assert document["tolerance"]["strict"] > 0


def test_differences_are_near_ties_or_not() -> None:
    want = Texts(
        new_BT=torch.tensor([[5, 6, 7, 8]] * 4),
        gaps_BT=torch.tensor([[1.0, 2.0, 1e-5, 1.0]] * 4),
        seconds_BT=torch.tensor([[0, 0, 3, 0]] * 4),
    )
    given = torch.tensor([[5, 6, 7, 8], [5, 6, 3, 9], [5, 6, 4, 9], [5, 0, 7, 8]])
    tally = Tally()
    compare(tally, want, given, ends={8}, tolerance=1e-4, where={"kind": "code"})
    assert (tally.texts, tally.tokens, tally.near_ties) == (4, 4 + 3 + 3 + 2, 3)
    assert [each["near_tie"] for each in tally.listed] == [True, False, False]
    assert tally.to_json()["within_tolerance"] == 1
    assert len(tally.outside) == 2


def test_prompts_are_drawn_by_their_seed(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(save_model(tmp_path / "model"))
    for kind in KINDS:
        first, again, other = (
            read_prompts(tokenizer, kind, count=3, tokens=12, seed=seed) for seed in (0, 0, 1)
        )
        assert first == again != other
        assert kind == "chat" or all(len(each) == 12 for each in first)
