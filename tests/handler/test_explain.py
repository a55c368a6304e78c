"""The mathematics of the maps, against closed forms, finite differences and other implementations."""

from collections.abc import Sequence

import captum.attr
import numpy as np
import pytest
import torch
from torch import nn

from handler.gradients.explain import Differentiable, Explanation, freeze, predict_and_explain
from scripts.paths import SAMPLE_FILES, WEIGHTS_FILE
from tests.conftest import label_of
from tests.doubles import CountsRows
from tests.oracle import Oracle
from tests.tolerance import require_close

DIFFERENCE_SHARE = 2e-6  # of a map's largest value; float64's rounding of logits, over steps of 1e-8

Targets = Sequence[Sequence[int | None]]


def maps_of(network: nn.Module | Differentiable, pixels: torch.Tensor, targets: Targets) -> list[torch.Tensor]:
    """The maps (T, C, H, W) of a batch in which every row asks."""
    _, explanations = predict_and_explain(network, pixels, targets)
    return [torch.from_numpy(explanation.maps) for explanation in explanations if explanation is not None]


def test_saliency_of_a_linear_network_is_its_weight_row() -> None:
    linear = nn.Linear(12, 5)
    pixels = torch.rand(5, 1, 3, 4)
    maps = maps_of(freeze(nn.Sequential(nn.Flatten(), linear)), pixels, [(k,) for k in range(5)])
    for k in range(5):
        torch.testing.assert_close(maps[k], linear.weight[k].detach().reshape(1, 1, 3, 4), rtol=0, atol=0)


def test_saliency_of_a_quadratic_score_is_linear_in_the_pixels() -> None:
    class SumOfSquares(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x.square().flatten(1).sum(1), -3 * x.flatten(1).sum(1)], dim=1)

    pixels = torch.rand(2, 1, 3, 4)
    squares, sums = maps_of(SumOfSquares(), pixels, [(0,), (1,)])
    require_close(squares[0], 2 * pixels[0], row_axes=2)
    require_close(sums[0], torch.full((1, 3, 4), -3.0), row_axes=2)


@pytest.mark.parametrize("file_index", range(0, len(SAMPLE_FILES), 7), ids=lambda i: SAMPLE_FILES[i].stem)
def test_finite_differences_agree_at_every_pixel(network: nn.Module, digit_batch: torch.Tensor, file_index: int) -> None:
    """Dithered, because ties in the max pools are kinks, where central differences and any gradient differ."""
    double = freeze(type(network)().double())
    double.load_state_dict(network.state_dict())
    random = torch.Generator().manual_seed(file_index)
    digit = digit_batch[file_index].double()
    pixels = (digit + 0.05 * torch.rand(digit.shape, generator=random, dtype=torch.float64)).clamp(0, 1)[None]
    ((saliency,),) = maps_of(double, pixels, [(None,)])

    eps = 1e-8
    steps = eps * torch.eye(28 * 28, dtype=torch.float64).reshape(-1, 1, 28, 28)
    with torch.no_grad():
        target = int(double(pixels).argmax())
        differences = (double(pixels + steps) - double(pixels - steps))[:, target] / (2 * eps)
    assert differences.abs().max() > 0.1
    require_close(saliency.flatten(), differences, DIFFERENCE_SHARE)


def test_gradcheck_passes_on_the_network(network: nn.Module) -> None:
    double = freeze(type(network)().double())
    double.load_state_dict(network.state_dict())
    random = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 1, 28, 28, generator=random, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(double, (pixels,), eps=1e-8, atol=1e-5)


def test_maps_equal_captums_saliency(network: nn.Module, differentiable: Differentiable, dithered_batch: torch.Tensor) -> None:
    """Dithered: where pools tie, the winner depends on rounding."""
    targets = [(file_index * 3) % 10 for file_index in range(len(dithered_batch))]
    maps = torch.cat(maps_of(differentiable, dithered_batch, [(target,) for target in targets]))
    expected = captum.attr.Saliency(network).attribute(dithered_batch.clone().requires_grad_(), target=targets, abs=False)
    require_close(maps, expected, row_axes=2)


@pytest.mark.parametrize("file_index", range(0, len(SAMPLE_FILES), 11), ids=lambda i: SAMPLE_FILES[i].stem)
def test_logits_and_jacobian_equal_the_numpy_oracle(
    differentiable: Differentiable, dithered_batch: torch.Tensor, file_index: int
) -> None:
    """On a dithered digit: where pools tie, which of the equals wins depends on rounding."""
    pixels = dithered_batch[file_index]
    logits, (explanation,) = predict_and_explain(differentiable, pixels[None], [range(10)])
    expected_logits, expected_jacobian = Oracle(WEIGHTS_FILE).explain(pixels[0].double().numpy())
    require_close(logits[0], expected_logits)
    assert explanation is not None
    require_close(explanation.maps[:, 0], expected_jacobian, row_axes=2)


def test_explanation_of_a_row_does_not_depend_on_its_batch(differentiable: Differentiable, dithered_batch: torch.Tensor) -> None:
    """Dithered: where pools tie, a batch of another size may round to another winner."""
    kinds: Targets = [(), (None,), (3,), tuple(range(10)), (None, 3), (7, 7), ()]
    targets = [kinds[row % len(kinds)] for row in range(len(dithered_batch))]
    logits, explanations = predict_and_explain(differentiable, dithered_batch, targets)
    for row, wanted in enumerate(targets):
        logits_alone, (alone,) = predict_and_explain(differentiable, dithered_batch[row : row + 1], [wanted])
        require_close(logits[row : row + 1], logits_alone)
        together = explanations[row]
        if alone is None or together is None:
            assert alone is together
            assert not wanted
        else:
            assert together.classes == alone.classes
            require_close(together.maps, alone.maps, row_axes=2)


def test_logits_of_a_digit_on_flat_ground_do_not_depend_on_its_batch(
    differentiable: Differentiable, digit_batch: torch.Tensor
) -> None:
    """Pools tie there, which changes no logit."""
    logits, _ = predict_and_explain(differentiable, digit_batch, [(None,)] * len(digit_batch))
    alone = [predict_and_explain(differentiable, row[None], [(None,)])[0] for row in digit_batch]
    require_close(logits, np.concatenate(alone))


def test_several_targets_are_the_single_ones_in_order(network: nn.Module, dithered_batch: torch.Tensor) -> None:
    rows = dithered_batch[:1].repeat(10, 1, 1, 1)
    singles = torch.cat(maps_of(network, rows, [(k,) for k in range(10)]))
    (several,) = maps_of(network, dithered_batch[:1], [(9, 0, 4)])
    require_close(several, singles[[9, 0, 4]], row_axes=2)


def test_predicted_target_is_the_highest_score(network: nn.Module, digit_batch: torch.Tensor) -> None:
    logits, explanations = predict_and_explain(network, digit_batch, [(None,)] * len(digit_batch))
    assert [explanation.classes for explanation in explanations if explanation] == [
        (predicted,) for predicted in logits.argmax(1).tolist()
    ]
    assert logits.argmax(1).tolist() == [label_of(file) for file in SAMPLE_FILES]


def test_nothing_shared_changes(network: nn.Module, differentiable: Differentiable, digit_batch: torch.Tensor) -> None:
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    pixels = digit_batch.clone()
    predict_and_explain(differentiable, pixels, [(None,)] * len(pixels))
    assert not pixels.requires_grad
    assert pixels.grad is None
    torch.testing.assert_close(pixels, digit_batch, rtol=0, atol=0)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())
    torch.testing.assert_close(dict(network.state_dict()), state, rtol=0, atol=0)


@pytest.mark.parametrize(("asking", "graph"), [([], False), ([2], True)], ids=["nobody asks", "one row asks"])
def test_there_is_one_forward_and_a_graph_only_where_a_row_asks(
    network: nn.Module, digit_batch: torch.Tensor, asking: list[int], graph: bool
) -> None:
    forwards = []
    handle = network.register_forward_hook(
        lambda _module, inputs, output: forwards.append((inputs[0].shape, output.requires_grad))
    )
    try:
        predict_and_explain(network, digit_batch[:4], [(None,) if row in asking else () for row in range(4)])
    finally:
        handle.remove()
    assert forwards == [((4, 1, 28, 28), graph)]


def test_only_rows_that_ask_are_paid_for() -> None:
    counter = CountsRows()
    pixels = torch.tensor([[1.0, 2.0], [3.0, 5.0], [8.0, 9.0], [4.0, 6.0]]).reshape(4, 1, 1, 2)
    logits, explanations = predict_and_explain(counter, pixels, [(), (1,), (), (0, 1)])
    assert counter.paid == [4, 2, 1]  # one forward; first targets of two rows; second target of one
    np.testing.assert_array_equal(logits, [[3, -1], [8, -2], [17, -1], [10, -2]])
    assert [explanation and explanation.classes for explanation in explanations] == [None, (1,), None, (0, 1)]
    one, two = (explanation for explanation in explanations if isinstance(explanation, Explanation))
    np.testing.assert_array_equal(one.maps.reshape(-1, 2), [[1, -1]])
    np.testing.assert_array_equal(two.maps.reshape(-1, 2), [[1, 1], [1, -1]])


@pytest.mark.parametrize("target", [-1, 10])
def test_target_that_is_no_class_is_refused(network: nn.Module, digit_batch: torch.Tensor, target: int) -> None:
    with pytest.raises(IndexError, match=rf"expected a class from 0 to 9, got {target}"):
        predict_and_explain(network, digit_batch[:1], [(target,)])


def test_rows_and_targets_must_be_as_many(network: nn.Module, digit_batch: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected one target and one method for each of 2 rows, got 1 targets"):
        predict_and_explain(network, digit_batch[:2], [(1,)])


@pytest.mark.parametrize("targets", [(), (None,)], ids=["predict", "explain"])
def test_a_score_that_is_not_finite_is_no_answer(differentiable: Differentiable, targets: tuple[None, ...]) -> None:
    """A NaN pixel gives NaN scores and yet finite, plausible gradients."""
    pixels = torch.zeros(1, 1, 28, 28)
    pixels[0, 0, 3, 3] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        predict_and_explain(differentiable, pixels, [targets])
