"""Requests of the recall tasks: what they ask for stands in them."""

import random

import pytest

from scripts.experiments.progressive.workload import (
    ANSWER,
    CONTEXT,
    END,
    FIRST,
    KINDS,
    PAD,
    PHASES,
    QUERY,
    Phase,
    batches,
    make_requests,
    training_document,
)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "continue"])
@pytest.mark.parametrize("difficulty", [0.0, 0.5, 1.0])
def test_answers_stand_in_the_document(kind: str, difficulty: float) -> None:
    for item in make_requests(kind, difficulty, 4, 0):
        assert 200 <= len(item.prompt) <= 900
        assert 8 <= len(item.answer) <= 64
        body = item.prompt[: item.prompt.index(QUERY)]
        asked = item.prompt[len(body) + 1 : -1]
        names = [tuple(asked[place : place + 2]) for place in range(0, len(asked), 2)]
        assert item.prompt[-1] == ANSWER
        size = (len(item.answer) - 1) // len(names)
        for number, name in enumerate(names):
            part = item.answer[number * size : (number + 1) * size]
            places = [at for at in range(len(body)) if tuple(body[at : at + 2]) == name]
            assert len(places) == 1
            assert body[places[0] : places[0] + size] == part
        assert item.answer[-1] == END


def test_requests_are_those_of_their_seed() -> None:
    assert make_requests("text", 0.5, 3, 7) == make_requests("text", 0.5, 3, 7)
    assert make_requests("text", 0.5, 3, 7) != make_requests("text", 0.5, 3, 8)


@pytest.mark.parametrize("phase", PHASES)
def test_training_fits_the_context_and_learns_what_follows(phase: object) -> None:
    ids_BT, places_BT, targets_BT = next(batches(phase, random.Random(0)))  # type: ignore[arg-type]
    assert int(places_BT.max()) < CONTEXT
    learnt = targets_BT[:, :-1] >= 0
    assert bool((targets_BT[:, :-1][learnt] == ids_BT[:, 1:][learnt]).all())
    assert bool(((places_BT[:, 1:] > places_BT[:, :-1]) | (ids_BT[:, 1:] == PAD)).all())
    leaping = (places_BT[:, 1:] - places_BT[:, :-1] > 1) & (ids_BT[:, 1:] != PAD)
    leapt = set(ids_BT[:, 1:][leaping].tolist())
    assert leapt <= {*FIRST, QUERY}


@pytest.mark.parametrize("phase", PHASES)
def test_documents_of_training_leave_room_to_leap(phase: Phase) -> None:
    draw = random.Random(1)
    assert max(len(training_document(phase, draw)[0]) for _ in range(400)) < CONTEXT - 1
