"""The guide: every method by itself, those that pay together, and what to run."""

from __future__ import annotations

from typing import Any

import pytest
from compress_cases import tokenizer
from search_cases import TASK, layers_of, losing, model, set_clock

from qbert import QBertError
from qbert.compress import Guide, Size, guide
from qbert.compress.guide import UNMEASURED
from qbert.compress.ladders import LADDERS


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    set_clock(monkeypatch)


def advice(**wanted: Any) -> Guide:
    return guide(model(), **{"tasks": [TASK], "tokenizer": tokenizer(), "batch": 2, "seq": 16, **wanted})


def test_each_method_is_measured_alone_and_what_pays_together(monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, lambda small: 0.4 * (4 - layers_of(small)))
    found = advice(max_drop=0.5, goal="size")
    methods = {each.method: each for each in found.methods}
    assert set(methods) == set(LADDERS)
    assert methods["layers"].best == "layers 3"
    assert [row.kept for row in methods["layers"].rows] == [True, False]
    assert "loses 0.80 points" in methods["layers"].rows[1].why
    assert all(row.fields["quantize"] == found.base["quantize"] for row in methods["layers"].rows)
    assert found.together is not None
    assert found.together.fields["layers"] == 3
    assert found.recipe is not None
    assert found.recipe.layers == 3
    assert found.verdict().startswith("take quantize")
    shown = found.table()
    assert shown.row_count == 2 + sum(len(each.rows) for each in found.methods) + len(UNMEASURED)
    assert Guide.model_validate_json(found.model_dump_json()) == found


def test_what_pays_alone_may_lose_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer less costs nothing, and so do narrower ones; both at once cost ten points."""

    def points(small: Any) -> float:
        narrow = Size.of(small).macs < 0.99 * layers_of(small) / 4 * Size.of(model()).macs
        return 10.0 if narrow and layers_of(small) < 4 else 0.0

    losing(monkeypatch, points)
    found = advice(goal="size")
    assert found.together is not None
    assert not found.together.kept
    assert "loses 10.00 points" in found.together.why
    assert found.found is not None
    assert found.found.drop == 0
    assert not {"layers", "prune"} <= set(found.found.fields)


def test_nothing_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    losing(monkeypatch, lambda small: 5.0)
    found = advice()
    assert found.recipe is None
    assert found.base == {}
    assert found.verdict() == "nothing pays: keep the model as it is"


def test_bad_input_is_said() -> None:
    for wanted, said in (
        ({"goal": "speed"}, "goal 'speed'"),
        ({"max_drop": 100}, "max_drop is 100"),
        ({"tasks": []}, "nothing"),
    ):
        with pytest.raises(QBertError, match=said):
            advice(**wanted)
