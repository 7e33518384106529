"""Whether a module's tensors are still those that something was made of."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cflow_fast.changes import Unchanged


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(3, 3, bias=False), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()))


def written_to(module: nn.Sequential) -> None:
    with torch.no_grad():
        module[0].weight.mul_(2)


def other_memory(module: nn.Sequential) -> None:
    module[0].weight.data = module[0].weight.data * 2


def another_parameter(module: nn.Sequential) -> None:
    module[0].weight = nn.Parameter(module[0].weight.detach())


def a_bias_where_none_was(module: nn.Sequential) -> None:
    module[0].bias = nn.Parameter(torch.zeros(3))


def a_buffer_written_to(module: nn.Sequential) -> None:
    module(torch.randn(4, 3))


def another_submodule(module: nn.Sequential) -> None:
    module[1][1] = nn.Tanh()


def one_more_submodule(module: nn.Sequential) -> None:
    module.append(nn.Tanh())


def one_more_parameter(module: nn.Sequential) -> None:
    module[1][1].register_parameter("gain", nn.Parameter(torch.ones(3)))


def moved(module: nn.Sequential) -> None:
    module.double()


CHANGES = [
    written_to,
    other_memory,
    another_parameter,
    a_bias_where_none_was,
    a_buffer_written_to,
    another_submodule,
    one_more_submodule,
    one_more_parameter,
    moved,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_shows_and_stays_visible(change: Callable[[nn.Sequential], None]) -> None:
    module = network()
    unchanged = Unchanged(module)
    change(module)
    assert not unchanged.still(module)
    assert not unchanged.still(module)
    assert Unchanged(module).still(module)


def test_nothing_shows_where_nothing_changed() -> None:
    module = network().eval()
    unchanged = Unchanged(module)
    module(torch.randn(4, 3))
    module.requires_grad_(False)
    assert unchanged.still(module)


def test_another_module_is_not_the_same() -> None:
    module = network()
    assert not Unchanged(module).still(copy.deepcopy(module))


def test_tensors_of_inference_mode_are_held_by_their_memory() -> None:
    with torch.inference_mode():
        module = network()
    unchanged = Unchanged(module)
    assert unchanged.still(module)
    with torch.inference_mode():
        other_memory(module)
    assert not unchanged.still(module)
