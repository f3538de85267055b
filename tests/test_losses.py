from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from duo.losses import Preference, duo_loss, ipo_loss, kto_loss, prior_loss, squared_error

errors = st.lists(st.tuples(*[st.floats(0, 4)] * 4), min_size=1, max_size=5)


def loss_of(rows: list[tuple[float, ...]], **options: float) -> Preference:
    unsafe, safe, reference_unsafe, reference_safe = torch.tensor(rows, dtype=torch.float64).unbind(1)
    return duo_loss(
        policy_unsafe=unsafe,
        policy_safe=safe,
        reference_unsafe=reference_unsafe,
        reference_safe=reference_safe,
        beta=options.get("beta", 3.0),
        positive_penalty=options.get("positive_penalty", 0.0),
    )


def test_squared_error_is_the_mean_over_all_but_the_first_axis() -> None:
    prediction = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 2.0]]])
    assert squared_error(prediction, torch.zeros(2, 2, 2)).tolist() == [7.5, 1.0]


def test_half_precision_is_summed_in_single() -> None:
    prediction = torch.full((1, 4096), 300.0, dtype=torch.float16)  # 300² overflows float16
    assert squared_error(prediction, torch.zeros_like(prediction)).tolist() == [90000.0]


def test_hand_worked_values() -> None:
    # Unsafe error 1.0 → 1.5 (rise 0.5), safe 1.0 → 0.8 (rise −0.2): margin 0.7, β 2: −log σ(1.4).
    told = loss_of([(1.5, 0.8, 1.0, 1.0)], beta=2.0)
    assert told.loss.item() == pytest.approx(math.log(1 + math.exp(-1.4)))
    assert told.margin.item() == pytest.approx(0.7)
    assert told.accuracy.item() == 1.0
    # Both rise by 0.5 and 0.25: margin 0.25; the penalty k = 3 takes 0.75 off, so −log σ(2·(−0.5)).
    told = loss_of([(1.5, 1.25, 1.0, 1.0)], beta=2.0, positive_penalty=3.0)
    assert told.loss.item() == pytest.approx(math.log(1 + math.exp(1.0)))
    assert told.margin.item() == pytest.approx(0.25)
    # A safe error that falls is not penalised.
    assert (
        loss_of([(1.5, 0.8, 1.0, 1.0)], beta=2.0, positive_penalty=3.0).loss
        == loss_of([(1.5, 0.8, 1.0, 1.0)], beta=2.0).loss
    )
    # Accuracy counts rows.
    assert loss_of([(1.5, 1, 1, 1), (0.5, 1, 1, 1), (2.0, 1, 1, 1), (1, 1, 1, 1)]).accuracy.item() == 0.5


@given(rows=errors, beta=st.floats(0.1, 20), k=st.floats(0, 10))
def test_equals_a_reference_written_from_the_probabilities(
    rows: list[tuple[float, ...]], beta: float, k: float
) -> None:
    """Bradley–Terry: p(safe beats unsafe) = e^r⁺ / (e^r⁺ + e^r⁻), with implicit rewards r = −β·(error's rise)."""
    total = 0.0
    for unsafe, safe, reference_unsafe, reference_safe in rows:
        reward_safe = -beta * ((safe - reference_safe) + k * max(0.0, safe - reference_safe))
        reward_unsafe = -beta * (unsafe - reference_unsafe)
        top = max(reward_safe, reward_unsafe)
        log_sum = top + math.log(math.exp(reward_safe - top) + math.exp(reward_unsafe - top))
        total += log_sum - reward_safe
    expected = total / len(rows)
    assert loss_of(rows, beta=beta, positive_penalty=k).loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(rows=errors, beta=st.floats(0.1, 20))
def test_a_policy_that_is_the_reference_costs_log_two(rows: list[tuple[float, ...]], beta: float) -> None:
    same = [(unsafe, safe, unsafe, safe) for unsafe, safe, _, _ in rows]
    told = loss_of(same, beta=beta, positive_penalty=5.0)
    assert told.loss.item() == pytest.approx(math.log(2))
    assert told.accuracy.item() == told.margin.item() == 0


@given(row=st.tuples(*[st.floats(0, 2)] * 4))
def test_swapping_the_pair_negates_the_argument(row: tuple[float, ...]) -> None:
    unsafe, safe, reference_unsafe, reference_safe = row
    forward = loss_of([row], beta=1.0)
    swapped = loss_of([(safe, unsafe, reference_safe, reference_unsafe)], beta=1.0)
    assert swapped.margin.item() == -forward.margin.item()
    # σ(x) + σ(−x) = 1
    assert math.exp(-forward.loss.item()) + math.exp(-swapped.loss.item()) == pytest.approx(1)


def test_descent_raises_the_unsafe_error_and_lowers_the_safe_one() -> None:
    unsafe, safe, one = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True), torch.ones(2)
    duo_loss(policy_unsafe=unsafe, policy_safe=safe, reference_unsafe=one, reference_safe=one, beta=2.0).loss.backward()
    assert unsafe.grad is not None
    assert safe.grad is not None
    assert unsafe.grad.tolist() == [-0.5, -0.5]  # −β·σ(0)/n
    assert safe.grad.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("k", [0.0, 4.0])
def test_gradients_against_finite_differences(k: float) -> None:
    generator = torch.Generator().manual_seed(0)
    draws = [torch.rand(3, 2, 2, dtype=torch.float64, generator=generator) for _ in range(6)]
    policy = [draw.requires_grad_() for draw in draws[:3]]

    def loss(unsafe: Tensor, safe: Tensor, prior: Tensor) -> Tensor:
        told = duo_loss(
            policy_unsafe=squared_error(unsafe, torch.zeros_like(unsafe)),
            policy_safe=squared_error(safe, torch.zeros_like(safe)),
            reference_unsafe=squared_error(draws[3], torch.zeros_like(unsafe)),
            reference_safe=squared_error(draws[4], torch.zeros_like(safe)),
            beta=2.0,
            positive_penalty=k,
        )
        return told.loss + 3.0 * prior_loss(prior, draws[5])

    assert torch.autograd.gradcheck(loss, policy)


def test_large_arguments_stay_finite() -> None:
    assert loss_of([(0.0, 4.0, 4.0, 0.0)], beta=5000.0).loss.item() == pytest.approx(40000.0)
    assert loss_of([(4.0, 0.0, 0.0, 4.0)], beta=5000.0).loss.item() == 0.0


def test_prior_loss_is_a_mean_over_everything() -> None:
    assert prior_loss(torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.zeros(2, 2)).item() == 2.5


def test_errors_are_scaled_before_they_are_squared() -> None:
    # Errors 1 and 3 have the mean square 5; at σ = 0.5 the clean image is wrong by half of that, so a quarter of 5.
    prediction, target = torch.tensor([[1.0, 3.0], [1.0, 3.0]]), torch.zeros(2, 2)
    assert squared_error(prediction, target, scale=torch.tensor([0.5, 1.0])).tolist() == [1.25, 5.0]
    assert prior_loss(prediction, target, scale=torch.tensor([0.5, 1.0])).item() == 3.125
    # The published prior of SD3: λ = 5e6 at σ = 0.003/1.002 weighs as much as 44.8 at σ = 1.
    late = prior_loss(prediction, target, scale=torch.full((2,), 0.003 / 1.002))
    assert 5e6 * late.item() == pytest.approx(44.82 * 5, rel=1e-3)


def test_a_regression_on_the_margin_by_hand() -> None:
    # Margins 0.7 and 0.25 (as above); 1/(2β) = 0.25 for β 2: (0.45² + 0²)/2.
    unsafe, safe = torch.tensor([1.5, 1.5]), torch.tensor([0.8, 1.25])
    told = ipo_loss(
        policy_unsafe=unsafe, policy_safe=safe, reference_unsafe=torch.ones(2), reference_safe=torch.ones(2), beta=2.0
    )
    assert told.loss.item() == pytest.approx(0.45**2 / 2, rel=1e-5)
    assert told.margin.item() == pytest.approx(0.475)
    assert told.accuracy.item() == 1.0


def test_each_image_by_itself_by_hand() -> None:
    # Rewards: safe 0.2 and −0.25, unsafe −0.5 and 0.9; their mean is 0.0875, the point z. β 2.
    unsafe, safe = torch.tensor([1.5, 0.1], requires_grad=True), torch.tensor([0.8, 1.25], requires_grad=True)
    told = kto_loss(
        policy_unsafe=unsafe, policy_safe=safe, reference_unsafe=torch.ones(2), reference_safe=torch.ones(2), beta=2.0
    )

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    z = 0.0875
    by_hand = [sigmoid(2 * (z - r)) for r in (0.2, -0.25)], [sigmoid(2 * (r - z)) for r in (-0.5, 0.9)]
    assert told.loss.item() == pytest.approx(sum(sum(side) for side in by_hand) / 2, rel=1e-5)
    assert told.accuracy.item() == 0.5
    # Nothing flows through the reference point: each gradient is that of its own image alone.
    told.loss.backward()
    slope = by_hand[0][0] * (1 - by_hand[0][0])
    assert safe.grad is not None
    assert safe.grad[0].item() == pytest.approx(2 * slope / 2, rel=1e-4)


def test_a_batch_of_falling_rewards_has_its_point_at_0() -> None:
    ones = torch.ones(1)
    told = kto_loss(policy_unsafe=2 * ones, policy_safe=3 * ones, reference_unsafe=ones, reference_safe=ones, beta=1.0)
    assert told.loss.item() == pytest.approx(1 / (1 + math.exp(-2)) + 1 / (1 + math.exp(1)), rel=1e-5)
