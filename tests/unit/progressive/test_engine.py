"""Requests of many kinds at once, each as the model alone would answer it."""

import errno
import shutil
from pathlib import Path
from queue import Queue
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from lib.errors import InputError, PlacementError
from lib.progressive.bounds import Kind, Metric, QualityBound, RequestError
from lib.progressive.calibration import KEYS, Calibration
from lib.progressive.decisions import Grant, Preemption
from lib.progressive.engine import Engine, QueueFull
from lib.progressive.generation import Event, Finish, GenerationRequest, Outcome, Sampling
from lib.progressive.kv.originals import Originals
from lib.progressive.ladder import make_ladder
from lib.progressive.scheduler import Scheduler
from lib.progressive.served import ServedModel
from tests.answers import Answer
from tests.tiny_models import served_llama

EXACT = QualityBound(metric=Metric.EXACT)


def llama(**options: Any) -> LlamaForCausalLM:
    return served_llama(**{"max_position_embeddings": 600, "initializer_range": 0.2, **options})


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


@pytest.fixture(scope="module")
def alone() -> LlamaForCausalLM:
    """The same model, which no engine has."""
    return llama()


def prompt(tokens: int, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(50, (tokens,), generator=generator).tolist()


def greedy(model: Any, ids: list[int], new: int) -> list[int]:
    with torch.no_grad():
        made = model.generate(
            torch.tensor([ids]), max_new_tokens=new, do_sample=False, eos_token_id=None
        )
    return made[0, len(ids) :].tolist()


def serve(model: Any, *requests: GenerationRequest, **options: Any) -> list[tuple[Answer, Outcome]]:
    options = {"kv_budget": 2**24, **options}
    with Engine(model, **options) as engine:
        answers = [Answer() for _ in requests]
        for request, answer in zip(requests, answers, strict=True):
            engine.submit(request, answer)
        return [(answer, answer.outcome()) for answer in answers]


def test_requests_of_all_lengths_together_are_answered_as_alone(model: Any, alone: Any) -> None:
    requests = [
        GenerationRequest(prompt=prompt(tokens, tokens), max_new_tokens=new, bound=bound)
        for tokens, new in ((1, 5), (70, 40), (131, 3), (200, 90), (520, 20))
        for bound in (None, EXACT)
    ]
    for request, (answer, outcome) in zip(requests, serve(model, *requests), strict=True):
        assert answer.ids == greedy(alone, list(request.prompt), request.max_new_tokens)
        assert outcome.finish is Finish.LENGTH
        assert (outcome.prompt_tokens, outcome.new_tokens) == (
            len(request.prompt),
            request.max_new_tokens,
        )
        assert outcome.quality.kind is (Kind.VERIFIED if request.bound else Kind.FULL)


def test_a_long_prompt_alone_takes_several_steps(model: Any, alone: Any) -> None:
    request = GenerationRequest(prompt=prompt(580), max_new_tokens=4)
    ((answer, _),) = serve(model, request)
    assert answer.ids == greedy(alone, list(request.prompt), 4)


def test_sampled_texts_depend_on_the_seed_alone(model: Any) -> None:
    def ask(bound: QualityBound | None, seed: int) -> GenerationRequest:
        sampling = Sampling(temperature=0.8, top_p=0.9, seed=seed)
        return GenerationRequest(
            prompt=prompt(150), max_new_tokens=24, sampling=sampling, bound=bound
        )

    together = serve(model, ask(None, 1), ask(EXACT, 1), ask(None, 2))
    by_itself = serve(model, ask(EXACT, 1))
    texts = [answer.ids for answer, _ in (*together, *by_itself)]
    assert texts[0] == texts[1] == texts[3] != texts[2]


@pytest.mark.parametrize("epsilon", [0.0, 0.003, 0.05, 10.0])
def test_no_verified_answer_is_above_its_bound(model: Any, alone: Any, epsilon: float) -> None:
    bound = QualityBound(epsilon=epsilon)
    requests = [
        GenerationRequest(prompt=prompt(300, seed), max_new_tokens=40, bound=bound)
        for seed in range(4)
    ]
    for request, (answer, outcome) in zip(requests, serve(model, *requests), strict=True):
        assert 0 <= outcome.quality.bound <= epsilon
        assert outcome.new_tokens == len(answer.ids) == 40
        if epsilon == 0:
            assert answer.ids == greedy(alone, list(request.prompt), 40)
        if epsilon == 10:
            assert outcome.rejected_tokens == 0 and outcome.quality.escalations == 0
        # Log-probabilities are those of the full model.
        ids = torch.tensor([[*request.prompt, *answer.ids]])
        with torch.no_grad():
            logprobs = alone(ids).logits[0, len(request.prompt) - 1 : -1].log_softmax(-1)
        expected = logprobs.gather(1, torch.tensor(answer.ids)[:, None])[:, 0]
        said = torch.tensor([token.logprob for token in answer.tokens])
        torch.testing.assert_close(said, expected, atol=1e-4, rtol=1e-4)


def test_a_text_ends_at_its_stop_tokens(model: Any, alone: Any) -> None:
    text = greedy(alone, prompt(90), 30)
    stop = text[17]
    for bound in (None, EXACT):
        request = GenerationRequest(
            prompt=prompt(90), max_new_tokens=30, stop_ids=frozenset([stop]), bound=bound
        )
        ((answer, outcome),) = serve(model, request)
        assert answer.ids == text[: text.index(stop)]
        assert outcome.finish is Finish.STOP


def test_a_constraint_allows_what_may_come_next(model: Any) -> None:
    def allow(new: Any) -> torch.Tensor:
        mask = torch.zeros(50, dtype=torch.bool)
        mask[len(new) % 7] = True
        return mask

    for bound in (None, EXACT):
        request = GenerationRequest(
            prompt=prompt(80), max_new_tokens=20, bound=bound, sampling=Sampling(constraint=allow)
        )
        ((answer, _),) = serve(model, request)
        assert answer.ids == [place % 7 for place in range(20)]


def test_alternatives_come_with_their_probabilities(model: Any) -> None:
    request = GenerationRequest(prompt=prompt(10), max_new_tokens=3, top_logprobs=4)
    ((answer, _),) = serve(model, request)
    for token in answer.tokens:
        assert [id for id, _ in token.top][0] == token.id and len(token.top) == 4
        assert token.top[0][1] == token.logprob >= token.top[3][1]


def test_a_cancelled_request_frees_its_memory_and_others_go_on(model: Any, alone: Any) -> None:
    with Engine(model, kv_budget=2**24) as engine:
        start = engine.stats().kv_bytes
        kept, gone = Answer(), Answer()
        number = engine.submit(
            GenerationRequest(prompt=prompt(80, 1), max_new_tokens=400, bound=EXACT), gone
        )
        engine.submit(GenerationRequest(prompt=prompt(80, 2), max_new_tokens=60), kept)
        assert gone.first.wait(60)
        engine.cancel(number)
        assert gone.outcome().finish is Finish.CANCELLED
        assert kept.outcome().finish is Finish.LENGTH
        assert kept.ids == greedy(alone, prompt(80, 2), 60)
        assert gone.ids == greedy(alone, prompt(80, 1), len(gone.ids))
        assert engine.drain(10)
        assert engine.stats().running == 0
        assert engine.stats().kv_bytes == start == engine.fixed_bytes


def test_after_the_last_answer_no_memory_is_held(model: Any) -> None:
    with Engine(model, kv_budget=2**24) as engine:
        for seed, bound in enumerate((None, EXACT, QualityBound(epsilon=0.001))):
            answer = Answer()
            request = GenerationRequest(prompt=prompt(200, seed), max_new_tokens=9, bound=bound)
            engine.submit(request, answer)
            answer.outcome()
            assert engine.stats().kv_bytes == engine.fixed_bytes  # before it is told
        assert engine.stats().most_kv_bytes > engine.fixed_bytes


def test_a_measurement_is_no_request_that_was_answered(model: Any) -> None:
    found: Queue[Any] = Queue()
    with Engine(model, kv_budget=2**24) as engine:
        request = GenerationRequest(prompt=prompt(300), max_new_tokens=9)
        engine.measure(request, found.put, tier=1)
        measured = found.get(timeout=60)
        assert engine.drain(10)
        stats = engine.stats()
    assert len(measured.divergences) == 9
    assert stats.finished == 1 and stats.tiers == {engine.ladder.names[1]: 1}
    assert stats.kv_bytes == engine.fixed_bytes


def test_what_cant_be_answered_is_refused_at_once(model: Any) -> None:
    with Engine(model, kv_budget=2**24, max_queue=1) as engine:
        for request, code in (
            (GenerationRequest(prompt=[], max_new_tokens=1), None),
            (GenerationRequest(prompt=[50], max_new_tokens=1), None),
            (GenerationRequest(prompt=[1], max_new_tokens=0), None),
            (GenerationRequest(prompt=[1], max_new_tokens=600), "context_length_exceeded"),
            (
                GenerationRequest(
                    prompt=[1], max_new_tokens=1, bound=QualityBound(epsilon=1, delta=0.05)
                ),
                "calibration_missing",
            ),
        ):
            with pytest.raises(RequestError) as refused:
                engine.submit(request, Answer())
            assert refused.value.code == code
        with pytest.raises(QueueFull):
            for _ in range(50):
                engine.submit(GenerationRequest(prompt=prompt(99), max_new_tokens=9), Answer())


def test_a_deadline_ends_a_request(model: Any) -> None:
    request = GenerationRequest(prompt=prompt(9), max_new_tokens=590, deadline=0.0)
    ((answer, outcome),) = serve(model, request)
    assert outcome.finish is Finish.DEADLINE and not answer.ids


@pytest.mark.parametrize(("what", "done"), [("write", "written"), ("read", "read")])
def test_a_disk_that_fails_fails_the_request_alone(
    model: Any, alone: Any, what: str, done: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(Originals, f"_{what}")
    calls: list[Originals] = []

    def failing(self: Originals, view: memoryview, offset: int) -> None:
        calls.append(self)
        if self is calls[0]:
            raise OSError(errno.ENOSPC if what == "write" else errno.EIO, "it fails")
        real(self, view, offset)

    monkeypatch.setattr(Originals, f"_{what}", failing)
    requests = [
        GenerationRequest(prompt=prompt(300, seed), max_new_tokens=10, bound=bound)
        for seed, bound in enumerate((EXACT, EXACT, None))
    ]
    with Engine(model, kv_budget=2**24) as engine:
        answers = [Answer() for _ in requests]
        for request, answer in zip(requests, answers, strict=True):
            engine.submit(request, answer)
        errors = []
        for request, answer in zip(requests, answers, strict=True):
            try:
                assert answer.outcome().finish is Finish.LENGTH
                assert answer.ids == greedy(alone, list(request.prompt), 10)
            except PlacementError as error:
                errors.append(str(error))
        assert errors == [f"originals of layer 0 can't be {done} (it fails)"]
        assert engine.stats().failed == 1


def test_damaged_originals_are_noticed(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Originals._read

    def damaged(self: Originals, view: memoryview, offset: int) -> None:
        real(self, view, offset)
        view[7] ^= 1

    monkeypatch.setattr(Originals, "_read", damaged)
    with pytest.raises(PlacementError, match="page 0 of layer 0 isn't what was written"):
        serve(model, GenerationRequest(prompt=prompt(300), max_new_tokens=10, bound=EXACT))


def test_memory_stays_within_a_small_budget_and_all_are_answered(model: Any, alone: Any) -> None:
    requests = [
        GenerationRequest(
            prompt=prompt(100 + 40 * seed, seed),
            max_new_tokens=30,
            bound=(EXACT, None, QualityBound(epsilon=0.001))[seed % 3],
        )
        for seed in range(9)
    ]
    with Engine(model, kv_budget=10 * 2**17) as engine:
        answers = [Answer() for _ in requests]
        for request, answer in zip(requests, answers, strict=True):
            engine.submit(request, answer)
        outcomes = [answer.outcome() for answer in answers]
        stats = engine.stats()
        assert stats.most_kv_bytes <= stats.kv_budget and stats.most_running < len(requests)
        for request, answer, outcome in zip(requests, answers, outcomes, strict=True):
            assert outcome.finish is Finish.LENGTH
            if request.bound != QualityBound(epsilon=0.001):
                assert answer.ids == greedy(alone, list(request.prompt), 30)
            if request.bound is not None and len(request.prompt) > 200:
                full = engine.shape.token_bytes * (len(request.prompt) + 29)
                assert outcome.quality.kv_bytes < full


def test_the_model_is_given_back_as_it_was(model: Any) -> None:
    before = model.config._attn_implementation
    with Engine(model, kv_budget=2**24):
        assert model.config._attn_implementation != before
        with pytest.raises(InputError, match="the model is being served"):
            model(torch.tensor([[1]]))
    assert model.config._attn_implementation == before
    model(torch.tensor([[1]]))


def test_a_budget_without_room_is_refused(model: Any) -> None:
    before = model.config._attn_implementation
    with pytest.raises(InputError, match="a budget of 1000 bytes for"):
        Engine(model, kv_budget=1000)
    assert model.config._attn_implementation == before


def test_an_answer_is_measured_at_every_tier(model: Any, alone: Any) -> None:
    request = GenerationRequest(prompt=prompt(300, 5), max_new_tokens=20)
    found: Queue[Any] = Queue()
    with Engine(model, kv_budget=2**24) as engine:
        names = engine.ladder.names
        for tier in range(len(names)):
            engine.measure(request, found.put, tier=tier)
        measured = {each.tier: each for each in (found.get(timeout=60) for _ in names)}
    means = [measured[tier].mean for tier in range(len(names))]
    assert means == sorted(means, reverse=True) and means[0] > 1e-4
    assert means[-1] < 1e-6 < means[-2]  # the full model's own logits, in other shapes
    for each in measured.values():
        assert len(each.divergences) == 20 and each.prompt_tokens == 300
        assert each.divergences[0] < 1e-6  # of the first token, which the prompt's pass chose
    errors = [sum(sum(pair) for pair in measured[tier].errors) for tier in range(len(names))]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0


def test_what_begins_alike_is_computed_once_and_only_from_originals(model: Any, alone: Any) -> None:
    shared = prompt(220, 7)
    bounds = (EXACT, None, EXACT, QualityBound(epsilon=0.01), EXACT)
    with Engine(model, kv_budget=2**24) as engine:
        for seed, bound in enumerate(bounds):
            ids = [*shared, *prompt(60, seed)]
            answer = Answer()
            engine.submit(GenerationRequest(prompt=ids, max_new_tokens=70, bound=bound), answer)
            outcome = answer.outcome()
            # Pages of 64 tokens behind 4, as far as the earlier text has them, and one is left.
            assert outcome.cached_tokens == (196 if seed else 0)
            if bound in (None, EXACT):
                assert answer.ids == greedy(alone, ids, 70)
        # A conversation goes on: what was answered is known, too.
        ids = [*ids, *answer.ids, *prompt(20, 9)]
        following = Answer()
        engine.submit(GenerationRequest(prompt=ids, max_new_tokens=20, bound=EXACT), following)
        assert following.outcome().cached_tokens >= 260
        assert following.ids == greedy(alone, ids, 20)
    with Engine(model, kv_budget=2**24, prefix_bytes=0) as engine:
        for _ in range(2):
            answer = Answer()
            engine.submit(GenerationRequest(prompt=ids, max_new_tokens=2, bound=EXACT), answer)
            assert answer.outcome().cached_tokens == 0


def test_a_beginning_that_is_damaged_is_computed_again(
    model: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Originals._read

    def read(self: Originals, view: memoryview, offset: int) -> None:
        real(self, view, offset)
        view[0] ^= 255

    with Engine(model, kv_budget=2**24) as engine:
        for _ in range(2):
            answer = Answer()
            engine.submit(GenerationRequest(prompt=prompt(280), max_new_tokens=5), answer)
            assert answer.outcome().cached_tokens == 0
            assert answer.ids == greedy(alone, prompt(280), 5)
            monkeypatch.setattr(Originals, "_read", read)


def test_what_steps_down_is_checked_again(
    model: Any, alone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.progressive.active._FEW", 2.0)  # every window asks for the next tier
    real, done = Scheduler.preemptions, []

    def preemptions(self: Scheduler) -> list[Preemption]:
        for account in self._running.values():
            if account.tier == self.ladder.full and not done:
                done.append(account.id)
                self._give(Grant(account.id, 0, account.room))
                return [Preemption(account.id, 0)]
        return real(self)

    monkeypatch.setattr(Scheduler, "preemptions", preemptions)
    request = GenerationRequest(prompt=prompt(300), max_new_tokens=200, bound=EXACT)
    ((answer, outcome),) = serve(model, request, ladder="K3V2")
    assert done and outcome.quality.escalations > 1
    assert answer.ids == greedy(alone, prompt(300), 200)


@pytest.mark.filterwarnings("ignore:a request's callback raised")
def test_a_callback_that_raises_is_its_callers_affair(model: Any, alone: Any) -> None:
    def bad(event: Event) -> None:
        raise KeyError("mine")

    good = Answer()
    with Engine(model, kv_budget=2**24) as engine:
        engine.submit(GenerationRequest(prompt=prompt(20), max_new_tokens=9), bad)
        engine.submit(GenerationRequest(prompt=prompt(30), max_new_tokens=9), good)
        good.outcome()
        assert engine.is_alive
    assert good.ids == greedy(alone, prompt(30), 9)


def test_a_folder_that_vanishes_fails_what_needs_it(model: Any, tmp_path: Path) -> None:
    folder = tmp_path / "spill"
    with Engine(model, kv_budget=2**24, folder=folder) as engine:
        shutil.rmtree(folder)
        for bound in (None, EXACT, None):
            answer = Answer()
            engine.submit(
                GenerationRequest(prompt=prompt(200), max_new_tokens=3, bound=bound), answer
            )
            if bound is None:
                assert answer.outcome().finish is Finish.LENGTH
                continue
            with pytest.raises(PlacementError, match="can't be made in"):
                answer.outcome()
        assert engine.is_alive


def test_whoever_measures_is_told_whatever_happens(model: Any) -> None:
    found: Queue[Any] = Queue()
    with Engine(model, kv_budget=2**24) as engine:
        for _ in range(3):
            engine.measure(
                GenerationRequest(prompt=prompt(300), max_new_tokens=250), found.put, tier=0
            )
    assert all(isinstance(found.get(timeout=9), PlacementError) for _ in range(3))


def test_enough_is_a_whole_answer(model: Any) -> None:
    answer = Answer()
    with Engine(model, kv_budget=2**24) as engine:
        number = engine.submit(GenerationRequest(prompt=prompt(200), max_new_tokens=350), answer)
        assert answer.first.wait(60)
        engine.stop(number)
        assert answer.outcome().finish is Finish.STOP
        assert engine.stats().finished == 1


def test_only_a_calibrations_own_tiers_are_served(model: Any) -> None:
    served = ServedModel(model)
    served.close()
    ladder = make_ladder(served.shape)
    calibration = Calibration(
        keys=dict.fromkeys(KEYS, "1"),
        ladder=ladder.restrict("K4V4"),
        information=((1.0, 1.0),) * 2,
        scores=(1.0,) * 59,
        tokens=(200,) * 59,
    )
    with pytest.raises(InputError, match="tier K3V2 isn't as the calibration has measured it"):
        Engine(model, kv_budget=2**24, ladder=ladder, calibration=calibration)


def test_beginnings_have_only_so_many_files_open(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lib.progressive.kv.prefixes._MOST_FILES", 2)
    cached = []
    with Engine(model, kv_budget=2**24) as engine:
        for seed in (1, 2, 3, 3, 1):
            answer = Answer()
            engine.submit(GenerationRequest(prompt=prompt(280, seed), max_new_tokens=2), answer)
            cached.append(answer.outcome().cached_tokens)
    assert cached == [0, 0, 0, 196, 0]
