# Copyright 2026 The clmae authors. Licensed under the Apache License, Version 2.0.
"""LARS against its paper's formula, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from clmae.evaluation.finetuning.lars import LARS


def parameter(values: list) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_two_steps_by_hand():
    # w = (3, 4): |w| = 5; g = (0, 2): |g| = 2; eta = 0.1, lr = 0.5, m = 0.9, no decay.
    # lambda = 0.1 * 5 / 2 = 0.25; v = (0, 0.5); w = (3, 4 - 0.25) = (3, 3.75).
    weight = parameter([[3.0, 4.0]])
    optimizer = LARS([weight], lr=0.5, momentum=0.9, trust_coefficient=0.1)
    weight.grad = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), torch.tensor([[3.0, 3.75]], dtype=torch.float64))
    # Then g = (1, 0): |g| = 1; lambda = 0.1 * sqrt(3^2 + 3.75^2); v = (lambda, 0.9 * 0.5).
    weight.grad = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    optimizer.step()
    local_rate = 0.1 * math.sqrt(3.0**2 + 3.75**2)
    expected = torch.tensor([[3.0 - 0.5 * local_rate, 3.75 - 0.5 * 0.45]], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected)


def test_weight_decay_is_in_the_local_rate_and_in_the_update():
    # lambda = 0.1 * 5 / (2 + 0.2 * 5) = 1/6; update = lambda * (0 + 0.6, 2 + 0.8).
    weight = parameter([[3.0, 4.0]])
    weight.grad = torch.tensor([[0.0, 2.0]], dtype=torch.float64)
    LARS([weight], lr=1.0, weight_decay=0.2, trust_coefficient=0.1).step()
    expected = torch.tensor([[3.0 - 0.6 / 6, 4.0 - 2.8 / 6]], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected)


def test_one_dimension_is_neither_adapted_nor_decayed():
    bias, reference = parameter([3.0, 4.0]), parameter([3.0, 4.0])
    lars = LARS([bias], lr=0.5, momentum=0.9, weight_decay=0.2, trust_coefficient=0.1)
    sgd = torch.optim.SGD([reference], lr=0.5, momentum=0.9)
    for gradient in ([0.0, 2.0], [1.0, -1.0], [0.5, 0.0]):
        bias.grad = reference.grad = torch.tensor(gradient, dtype=torch.float64)
        lars.step()
        sgd.step()
    torch.testing.assert_close(bias.detach(), reference.detach())


@pytest.mark.parametrize(("values", "gradient"), [([[0.0, 0.0]], [[1.0, -2.0]]), ([[1.0, 2.0]], [[0.0, 0.0]])])
def test_zero_weight_or_gradient_leaves_the_rate_alone(values, gradient):
    weight = parameter(values)
    weight.grad = torch.tensor(gradient, dtype=torch.float64)
    expected = weight.detach() - 0.5 * weight.grad
    LARS([weight], lr=0.5).step()
    torch.testing.assert_close(weight.detach(), expected)


def test_no_gradient_no_update_and_the_closure_is_evaluated_with_gradients():
    used, unused = parameter([[1.0]]), parameter([[1.0]])
    optimizer = LARS([used, unused], lr=1.0)

    def closure():
        loss = used.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    assert used.item() < 1.0
    assert unused.item() == 1.0
    assert unused not in optimizer.state


def test_state_is_saved_and_restored():
    def run(break_after: int | None) -> torch.Tensor:
        weight = parameter([[3.0, 4.0]])
        optimizer = LARS([weight], lr=0.5)
        for step in range(4):
            if step == break_after:
                state, optimizer = optimizer.state_dict(), LARS([weight], lr=0.1)
                optimizer.load_state_dict(state)
            weight.grad = torch.tensor([[1.0, step]], dtype=torch.float64)
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(run(2), run(None), rtol=0, atol=0)
