"""Packed weights: the same products, taken back afterwards, and made anew when the weights have changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from memdec.decoding import packing
from memdec.decoding.packing import packed_linears


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether packing pays is for the machine to say; here small weights are packed, too, and always."""
    monkeypatch.setattr(packing, "LEAST_WEIGHTS", 1)
    monkeypatch.setattr(packing, "pays", lambda weight: True)


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(x)
    return result


@pytest.mark.parametrize("rows", [1, 5, packing.MOST_ROWS, packing.MOST_ROWS + 1])
@pytest.mark.parametrize("bias", [True, False])
def test_the_products_agree(rows: int, bias: bool) -> None:
    model = nn.Sequential(nn.Linear(40, 70, bias=bias), nn.Linear(70, 33))
    x = torch.randn(1, rows, 40)
    before = outputs(model, x)
    with packed_linears(model):
        assert all("forward" in part.__dict__ for part in model)
        torch.testing.assert_close(outputs(model, x), before)
        assert outputs(model, x[0, 0]).shape == (33,)
        torch.testing.assert_close(outputs(model, x.expand(2, -1, -1)), before.expand(2, -1, -1))
    assert not any("forward" in part.__dict__ for part in model)
    assert torch.equal(outputs(model, x), before)


def test_changed_weights_are_packed_again() -> None:
    model = nn.Linear(40, 70)
    x = torch.randn(3, 40)
    changes: list[Any] = [
        lambda: None,
        lambda: nn.init.ones_(model.weight),
        lambda: model.weight.data.mul_(0.5),  # passes by the version counter
        lambda: setattr(model, "weight", nn.Parameter(torch.randn(70, 40))),
    ]
    for change in changes:
        change()
        wanted = outputs(model, x)
        with packed_linears(model):
            torch.testing.assert_close(outputs(model, x), wanted)


def test_what_is_not_a_plain_linear_map_is_left_alone() -> None:
    class Special(nn.Linear):
        pass

    replaced = nn.Linear(40, 70)
    replaced.forward = lambda x: x  # type: ignore[method-assign]  # as accelerate's hooks do
    model = nn.Sequential(Special(40, 70), replaced, nn.Linear(70, 70).double())
    with packed_linears(model):
        assert outputs(replaced, torch.ones(1)) == 1
        assert "forward" not in model[0].__dict__ and "forward" not in model[2].__dict__
    assert "forward" in replaced.__dict__


def test_an_error_inside_takes_the_packing_back() -> None:
    model = nn.Linear(40, 70)
    with pytest.raises(KeyError), packed_linears(model):
        raise KeyError
    assert "forward" not in model.__dict__


def test_a_trial_decides_once_and_the_switch_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether packing pays is what the trial says; one that cannot run is a no, and MEMDEC_PACK=0 asks none."""
    monkeypatch.undo()
    asked = []

    def trial(weight: torch.Tensor) -> bool:
        asked.append(weight.dtype)
        if weight.dtype == torch.bfloat16:
            raise RuntimeError("no such product")
        return True

    monkeypatch.setattr(packing, "_PAYS", {})
    monkeypatch.setattr(packing, "_trial", trial)
    monkeypatch.setenv("MEMDEC_PACK", "0")
    assert not packing.pays(torch.zeros(4, 4)) and not asked
    monkeypatch.delenv("MEMDEC_PACK")
    for _ in range(2):
        assert packing.pays(torch.zeros(4, 4))
        assert not packing.pays(torch.zeros(4, 4, dtype=torch.bfloat16))
    assert asked == [torch.float32, torch.bfloat16]


def test_the_trial_runs_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes what packing gains as the verdict: a gain that nothing reaches is a no, one that anything does a yes."""
    monkeypatch.undo()
    for gain, pays in ((0.0, False), (1e9, True)):
        monkeypatch.setattr(packing, "GAIN", gain)
        assert packing._trial(torch.ones(512, 64)) is pays
