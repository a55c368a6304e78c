"""The mathematics of the methods, against captum, closed forms, identities and the question in plain PyTorch.

Images are dithered: where max pools tie, which of the equals wins depends on rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import captum.attr
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import handler.gradients.explain as saliency_module
from handler.gradients.compiler import compile_and_load
from handler.gradients.explain import Autograd, Differentiable, Explanation, freeze, predict_and_explain
from handler.gradients.methods import (
    GRADIENT,
    METHODS,
    Aggregate,
    Array,
    Baseline,
    GradientXInput,
    IntegratedGradients,
    LossGradient,
    Method,
    Sampled,
    SamplingMethod,
    SmoothGrad,
)
from model.network import MNIST_MEAN
from tests.doubles import CountsRows
from tests.tolerance import FLOAT32_SHARE, FLOAT64_SHARE, relative_difference, require_close

MEAN = np.full((1, 1, 1), MNIST_MEAN, np.float32)
TARGETS = [(3,), (0, 8, 5), (None,), (None, 1), tuple(range(10)), (7,)]

ALL_METHODS = [
    GRADIENT,
    LossGradient(),
    GradientXInput(),
    *(SmoothGrad(samples=6, seed=seed, aggregate=aggregate) for seed, aggregate in enumerate(Aggregate)),
    *(IntegratedGradients(steps=7, baseline=baseline) for baseline in Baseline),
]
BY_CAPTUM = pytest.mark.parametrize("method", ALL_METHODS, ids=str)


def explain(
    network: nn.Module | Differentiable,
    pixels: torch.Tensor,
    targets: Sequence[Sequence[int | None]],
    methods: Sequence[Method],
) -> list[Explanation]:
    """The explanations of a batch in which every row asks."""
    _, explanations = predict_and_explain(network, pixels, targets, methods, MEAN)
    assert None not in explanations
    return [explanation for explanation in explanations if explanation is not None]


def double(network: nn.Module) -> nn.Module:
    """The same network in float64."""
    copy = freeze(type(network)().double())
    copy.load_state_dict(network.state_dict())
    return copy


@pytest.fixture
def dithered(dithered_batch: torch.Tensor) -> torch.Tensor:
    """Six digits of different classes with a little noise: (6, 1, 28, 28)."""
    return dithered_batch[2::9][:6]


@pytest.fixture(scope="module", params=["autograd", "compiled pass"])
def exact(request: pytest.FixtureRequest, network: nn.Module) -> Differentiable:
    """As `differentiable`, in float64, where no two points are so near to each other that rounding decides."""
    if request.param == "autograd":
        return Autograd(double(network))
    return compile_and_load(double(network))


# --- captum


class SameNoise(captum.attr.NoiseTunnel):  # type: ignore[misc]  # captum has no types
    """captum's NoiseTunnel with the noise of a seed, in place of that of torch's global generator."""

    def __init__(self, attribution: object, seed: int) -> None:
        super().__init__(attribution)
        self.seed = seed

    def _add_noise_to_inputs(
        self, sample_count: int, inputs: tuple[torch.Tensor, ...], deviation: float
    ) -> tuple[torch.Tensor, ...]:
        (pixels,) = inputs
        random = np.random.default_rng(self.seed)
        noise = random.standard_normal((sample_count, *pixels.shape[1:]), np.float32) * np.float32(deviation)
        return ((pixels + torch.from_numpy(noise)).requires_grad_(),)


def by_captum(network: nn.Module, pixels: torch.Tensor, target: int, method: Method) -> torch.Tensor:
    """The map (1, C, H, W) of one image by captum, or for the loss by autograd of captum's own kind of forward."""
    pixels = pixels[None].clone().requires_grad_()
    if isinstance(method, SmoothGrad):
        kinds = {Aggregate.MEAN: "smoothgrad", Aggregate.SQUARED: "smoothgrad_sq", Aggregate.VARIANCE: "vargrad"}
        how = {"nt_type": kinds[method.aggregate], "nt_samples": method.samples, "stdevs": method.noise}
        tunnel = SameNoise(captum.attr.Saliency(network), method.seed)
        return torch.as_tensor(tunnel.attribute(pixels, target=target, abs=False, **how))
    if isinstance(method, IntegratedGradients):
        baselines = float(np.float32(MNIST_MEAN)) if method.baseline is Baseline.MEAN else 0.0
        integrated = captum.attr.IntegratedGradients(network, multiply_by_inputs=True)
        return torch.as_tensor(integrated.attribute(pixels, baselines=baselines, target=target, n_steps=method.steps))
    if isinstance(method, GradientXInput):
        return torch.as_tensor(captum.attr.InputXGradient(network).attribute(pixels, target=target))
    if isinstance(method, LossGradient):

        def loss(inputs: torch.Tensor) -> torch.Tensor:
            classes = torch.full((len(inputs),), target)
            return nn.functional.cross_entropy(network(inputs), classes, reduction="none")

        return torch.as_tensor(captum.attr.Saliency(loss).attribute(pixels, abs=False))
    return torch.as_tensor(captum.attr.Saliency(network).attribute(pixels, target=target, abs=False))


def rounding_scale(method: Method, gradient: NDArray[np.floating]) -> float | None:
    """The number of which a map's difference to PyTorch's is a share; None for the map's own largest.

    PyTorch's loss loses a confident prediction's p - 1 to rounding, and with it a share of the score's gradient.
    """
    return float(np.abs(gradient).max()) if isinstance(method, LossGradient) else None


@BY_CAPTUM
def test_maps_equal_captums_in_float64(network: nn.Module, dithered: torch.Tensor, method: Method) -> None:
    """Nothing differs then but the order of operations."""
    reference = double(network)
    pixels = dithered.double()
    gradients = explain(reference, pixels, TARGETS, [GRADIENT] * len(pixels))
    for row, explanation in enumerate(explain(reference, pixels, TARGETS, [method] * len(pixels))):
        for target, saliency, gradient in zip(explanation.classes, explanation.maps, gradients[row].maps, strict=True):
            expected = by_captum(reference, pixels[row], target, method).detach()[0]
            assert np.abs(saliency).max() > 0
            # captum rounds the weights of integrated gradients to float32.
            share = 5e-8 if isinstance(method, IntegratedGradients) else FLOAT64_SHARE
            require_close(saliency, expected, share, row_axes=2, of=rounding_scale(method, gradient))


@BY_CAPTUM
def test_maps_equal_captums_as_they_are_served(
    network: nn.Module, differentiable: Differentiable, dithered: torch.Tensor, method: Method
) -> None:
    """In float32, of a few hundred points one has a max pool that ties but for rounding, where both gradients are right."""
    differences = []
    gradients = explain(differentiable, dithered, TARGETS, [GRADIENT] * len(dithered))
    for row, explanation in enumerate(explain(differentiable, dithered, TARGETS, [method] * len(dithered))):
        for target, saliency, gradient in zip(explanation.classes, explanation.maps, gradients[row].maps, strict=True):
            expected = by_captum(network, dithered[row], target, method).detach()[0]
            differences.append(relative_difference(saliency, expected, row_axes=2, of=rounding_scale(method, gradient)))
    assert np.median(differences) <= FLOAT32_SHARE
    assert max(differences) < 0.05


# --- the loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_loss_gradient_is_the_gradient_that_training_takes(
    network: nn.Module, dithered: torch.Tensor, dtype: torch.dtype
) -> None:
    """For wrong classes and right ones; summed over the batch, as each row has its own loss."""
    model = network if dtype is torch.float32 else double(network)
    y = torch.tensor([3, 0, 5, 1, 9, 7])
    x = dithered.to(dtype).clone().requires_grad_(True)
    criterion = nn.CrossEntropyLoss(reduction="sum")
    loss = criterion(model(x), y)
    loss.backward()
    assert x.grad is not None
    losses, scores = (
        np.concatenate([one.maps for one in explain(model, x.detach(), [(int(k),) for k in y], [method] * len(x))])
        for method in (LossGradient(), GRADIENT)
    )
    share = FLOAT64_SHARE if dtype is torch.float64 else FLOAT32_SHARE
    require_close(losses, x.grad, share, row_axes=3, of=np.abs(scores).max(axis=(1, 2, 3)))


def test_loss_gradient_of_a_confident_prediction_does_not_vanish() -> None:
    """In float32 p - 1 is 0 here, and so is PyTorch's gradient. In float64 p - 1 would have seven digits."""
    linear = nn.Linear(4, 3)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[40.0, 0, 0, 0], [0, 20, 0, 0], [0, 0, 18, 0]]))
        linear.bias.zero_()
    model = freeze(nn.Sequential(nn.Flatten(), linear))
    pixels = torch.ones(1, 1, 2, 2)
    (explanation,) = explain(model, pixels, [(0,)], [LossGradient()])
    others = np.exp([20.0 - 40, 18.0 - 40])
    probabilities = others / (1 + others.sum())
    expected = np.array([-40 * probabilities.sum(), 20 * probabilities[0], 18 * probabilities[1], 0])
    np.testing.assert_allclose(explanation.maps.ravel(), expected, rtol=1e-6)
    x = pixels.clone().requires_grad_(True)
    nn.functional.cross_entropy(model(x), torch.tensor([0])).backward()
    assert x.grad is not None
    assert x.grad[0, 0, 0, 0] == 0


# --- closed forms and identities


def linear_network() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A linear network of 3x4 pixels and 5 classes; its weight rows as maps (5, 1, 3, 4); four images."""
    linear = nn.Linear(12, 5)
    pixels = torch.rand(4, 1, 3, 4)
    return freeze(nn.Sequential(nn.Flatten(), linear)), linear.weight.detach().reshape(5, 1, 3, 4), pixels


@pytest.mark.parametrize("target", range(5))
def test_methods_of_a_linear_network_have_closed_forms(target: int) -> None:
    network, rows, pixels = linear_network()
    weights, x = rows[target].numpy(), pixels.numpy()
    probabilities = network(pixels).softmax(1)
    probabilities[:, target] -= 1
    expected: dict[Method, NDArray[np.floating]] = {
        GRADIENT: np.stack([weights] * 4),
        LossGradient(): torch.einsum("nk,kchw->nchw", probabilities, rows).numpy(),
        GradientXInput(): weights * x,
        SmoothGrad(samples=5): np.stack([weights] * 4),
        SmoothGrad(samples=5, aggregate=Aggregate.SQUARED): np.stack([weights**2] * 4),
        SmoothGrad(samples=5, aggregate=Aggregate.VARIANCE): np.zeros_like(x),
        IntegratedGradients(steps=3): weights * x,
        IntegratedGradients(steps=1, baseline=Baseline.MEAN): weights * (x - MEAN),
    }
    for method, maps in expected.items():
        found = explain(network, pixels, [(target,)] * 4, [method] * 4)
        is_variance = isinstance(method, SmoothGrad) and method.aggregate is Aggregate.VARIANCE  # what is left of squares
        largest = (weights**2).max() if is_variance else None
        difference = relative_difference(np.stack([one.maps[0] for one in found]), maps, row_axes=3, of=largest)
        assert difference <= FLOAT32_SHARE, method
        for explanation, row in zip(found, maps, strict=True):
            assert (explanation.convergence_deltas is None) == (not method.has_convergence_delta)
            if explanation.convergence_deltas is not None:
                require_close(explanation.convergence_deltas, [0], of=np.abs(row).sum())


def test_integrated_gradients_of_a_cubic_score_are_exact_from_two_steps() -> None:
    """The Gauss-Legendre rule of n points is exact for polynomials of degree 2n - 1; the gradient of a cube has degree 2."""

    class SumOfCubes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([(x**3).flatten(1).sum(1), x.flatten(1).sum(1)], dim=1)

    pixels = torch.rand(3, 1, 3, 4, dtype=torch.float64)
    for baseline, start in ((Baseline.ZERO, 0.0), (Baseline.MEAN, float(MEAN.item()))):
        one, two, many = explain(SumOfCubes(), pixels, [(0,)] * 3, [IntegratedGradients(n, baseline) for n in (1, 2, 50)])
        for row, explanation in ((1, two), (2, many)):
            expected = pixels[row] ** 3 - start**3
            require_close(explanation.maps[0], expected, FLOAT64_SHARE, row_axes=3)
            assert explanation.convergence_deltas is not None
            require_close(explanation.convergence_deltas, [0], FLOAT64_SHARE, of=expected.abs().sum())
        assert one.convergence_deltas is not None
        assert abs(one.convergence_deltas[0]) > 1e-3


def test_smoothgrad_without_noise_is_the_gradient(exact: Differentiable, dithered: torch.Tensor) -> None:
    pixels = dithered.double()
    plain = explain(exact, pixels, TARGETS, [GRADIENT] * 6)
    powers = {Aggregate.MEAN: 1, Aggregate.SQUARED: 2}
    for aggregate in Aggregate:
        smooth = explain(exact, pixels, TARGETS, [SmoothGrad(samples=3, noise=0, aggregate=aggregate)] * 6)
        for one, other in zip(smooth, plain, strict=True):
            assert one.classes == other.classes
            expected = other.maps ** powers[aggregate] if aggregate in powers else np.zeros_like(other.maps)
            largest = None if aggregate in powers else (other.maps**2).max(axis=(2, 3))  # a variance is what is left of squares
            require_close(one.maps, expected, FLOAT64_SHARE, row_axes=2, of=largest)


def test_mean_square_is_square_of_mean_and_variance(exact: Differentiable, dithered: torch.Tensor) -> None:
    pixels = dithered.double()
    mean, squared, variance = (
        np.concatenate([one.maps for one in explain(exact, pixels, TARGETS, [SmoothGrad(10, 0.2, 3, how)] * 6)])
        for how in Aggregate
    )
    assert variance.max() > 1e-2
    require_close(squared, mean**2 + variance, FLOAT64_SHARE, row_axes=2)


def test_noise_has_the_deviation_that_was_asked_for() -> None:
    pixels = np.full((1, 28, 28), 0.5, np.float32)
    noise = SmoothGrad(samples=200, noise=0.3, seed=1).points(pixels, None) - pixels
    assert noise.dtype == np.float32
    assert abs(noise.std() - 0.3) < 0.002  # of 156,800 numbers
    assert abs(noise.mean()) < 0.004
    assert noise.min() < -1, "not clipped"


@pytest.mark.parametrize("baseline", Baseline)
def test_integrated_gradients_add_up_to_the_difference_of_scores(
    network: nn.Module, differentiable: Differentiable, dithered: torch.Tensor, baseline: Baseline
) -> None:
    start = torch.full((1, 1, 28, 28), MNIST_MEAN if baseline is Baseline.MEAN else 0.0)
    scores, scores_at_start = network(dithered).double().numpy(), network(start).double().numpy()
    largest = np.abs(scores).max(axis=1) + np.abs(scores_at_start).max()  # what a gap is the rest of
    sizes = []
    for steps in (5, 300):
        found = explain(differentiable, dithered, TARGETS, [IntegratedGradients(steps, baseline)] * 6)
        for row, explanation in enumerate(found):
            assert explanation.convergence_deltas is not None
            sums = explanation.maps.sum(axis=(1, 2, 3), dtype=np.float64)
            expected = sums - (scores[row] - scores_at_start[0])[list(explanation.classes)]
            require_close(explanation.convergence_deltas, expected, of=largest[row])
        sizes.append(
            np.abs(np.concatenate([one.convergence_deltas for one in found if one.convergence_deltas is not None])).mean()
        )
    assert sizes[1] < 0.02 < sizes[0]


# --- batches


def assert_same(one: Explanation, other: Explanation) -> None:
    assert one.classes == other.classes
    require_close(one.maps, other.maps, FLOAT64_SHARE, row_axes=2)
    assert (one.convergence_deltas is None) == (other.convergence_deltas is None)
    if one.convergence_deltas is not None and other.convergence_deltas is not None:
        require_close(
            one.convergence_deltas, other.convergence_deltas, FLOAT64_SHARE, of=np.abs(other.maps).sum(axis=(1, 2, 3)).max()
        )


@pytest.mark.parametrize("max_points", [5, 1000])
def test_explanation_of_a_row_does_not_depend_on_its_batch_whatever_the_methods(
    exact: Differentiable, dithered: torch.Tensor, monkeypatch: pytest.MonkeyPatch, max_points: int
) -> None:
    """Nor on how many points are differentiated at once: five split a row's own, and put two rows together."""
    pixels = dithered.double().repeat(4, 1, 1, 1)
    methods = [[*ALL_METHODS, SmoothGrad(samples=2)][row % (len(ALL_METHODS) + 1)] for row in range(len(pixels))]
    targets = [((), *TARGETS)[row % 7] for row in range(len(pixels))]
    alone = [
        predict_and_explain(exact, pixels[row : row + 1], [targets[row]], [methods[row]], MEAN) for row in range(len(pixels))
    ]
    monkeypatch.setattr(saliency_module, "MAX_POINTS", max_points)
    logits, together = predict_and_explain(exact, pixels, targets, methods, MEAN)
    require_close(logits, np.concatenate([own_logits for own_logits, _ in alone]), FLOAT64_SHARE)
    for row, (found, (_, (expected,))) in enumerate(zip(together, alone, strict=True)):
        assert (found is None) == (expected is None) == (not targets[row])
        if found is not None and expected is not None:
            assert_same(found, expected)


def test_same_seed_is_the_same_map_and_another_is_another(exact: Differentiable, dithered: torch.Tensor) -> None:
    row = dithered[1:2].double().repeat(4, 1, 1, 1)
    methods = [SmoothGrad(samples=4, seed=seed) for seed in (5, 6, 5, 2**32 - 1)]
    first, second, third, fourth = explain(exact, row, [(None,)] * 4, methods)
    assert_same(first, third)
    for other in (second, fourth):
        assert np.abs(first.maps - other.maps).max() > 1e-2


def test_methods_at_the_image_share_one_forward_and_one_backward() -> None:
    counter = CountsRows()
    pixels = torch.tensor([[1.0, 2.0], [3.0, 5.0], [8.0, 9.0], [4.0, 6.0]]).reshape(4, 1, 1, 2)
    _, explanations = predict_and_explain(
        counter, pixels, [(0,), (), (1,), (1, 0)], [GRADIENT, GRADIENT, GradientXInput(), LossGradient()]
    )
    assert counter.paid == [4, 3, 1]  # one forward; first targets of three rows; second target of one
    plain, nothing, times_input, loss = explanations
    assert nothing is None
    assert plain is not None
    assert times_input is not None
    assert loss is not None
    np.testing.assert_array_equal(plain.maps.ravel(), [1, 1])
    np.testing.assert_array_equal(times_input.maps.ravel(), [8, -9])
    np.testing.assert_array_equal(times_input.gradients.ravel(), [1, -1])
    share = 1 / (1 + np.exp(10 - -2.0))  # of class 1, whose logit is -2
    np.testing.assert_allclose(loss.maps.reshape(2, 2), [[0, 2 * (1 - share)], [0, -2 * share]], rtol=1e-5)


@pytest.mark.parametrize("method", [SmoothGrad(samples=7), IntegratedGradients(steps=6)], ids=str)
def test_cost_of_a_sampled_map_is_what_the_method_says(method: Method) -> None:
    counter = CountsRows()
    predict_and_explain(counter, torch.rand(2, 1, 1, 2), [(0, 1), ()], [method, method])
    forward, *passes = counter.paid
    assert forward == 2
    assert passes == [method.gradient_count] * 3 == [7] * 3  # one forward, two targets


def test_method_that_needs_the_mean_is_refused_without_it(network: nn.Module, dithered: torch.Tensor) -> None:
    method = IntegratedGradients(baseline=Baseline.MEAN)
    with pytest.raises(ValueError, match="needs the network's mean pixel; there is none"):
        predict_and_explain(network, dithered[:1], [(None,)], [method])
    predict_and_explain(network, dithered[:1], [()], [method])  # a prediction needs none


def test_rows_and_methods_must_be_as_many(network: nn.Module, dithered: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="expected one target and one method for each of 2 rows"):
        predict_and_explain(network, dithered[:2], [(1,), (1,)], [GRADIENT])


def test_constant_image_has_finite_maps(differentiable: Differentiable) -> None:
    for value in (0.0, 1.0, MNIST_MEAN):
        pixels = torch.full((len(ALL_METHODS), 1, 28, 28), value)
        for method, explanation in zip(
            ALL_METHODS, explain(differentiable, pixels, [(None,)] * len(ALL_METHODS), ALL_METHODS), strict=True
        ):
            assert np.isfinite(explanation.maps).all(), (value, method)


def test_table_names_each_method_once() -> None:
    assert {type(method) for method in ALL_METHODS} == set(METHODS.values())
    assert all(name == method.name for name, method in METHODS.items())
    assert all(method().values == {name: one.default for name, one in method.parameters().items()} for method in METHODS.values())


# --- a method that only scores


@dataclass(frozen=True, slots=True)
class Occlusion(SamplingMethod):
    """What covering each quarter of the image with zeros costs the score (after Zeiler and Fergus, arXiv 1311.2901)."""

    name: ClassVar[str] = "occlusion"
    description: ClassVar[str] = "what covering a part of the image costs the score"
    needs_gradients: ClassVar[bool] = False

    @property
    def gradient_count(self) -> int:
        return 4

    def points(self, pixels: Array, mean: Array | None) -> Array:
        points = np.repeat(pixels[None], 4, axis=0)
        for point, (y, x) in zip(points, QUARTERS, strict=True):
            point[:, y, x] = 0
        return points

    def combine(self, sampled: Sampled) -> tuple[Array, None]:
        assert sampled.gradients.shape[:2] == (4, 0)
        maps = np.empty((len(sampled.scores), *sampled.pixels.shape), sampled.pixels.dtype)
        for (y, x), scores in zip(QUARTERS, sampled.point_scores, strict=True):
            maps[..., y, x] = (sampled.scores - scores)[:, None, None, None]
        return maps, None


QUARTERS = [(y, x) for y in (slice(0, 14), slice(14, 28)) for x in (slice(0, 14), slice(14, 28))]


class CountsPullBacks(Autograd):
    """Counts what is differentiated."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__(network)
        self.count = 0

    def pull_back(self, saved: Any, cotangents: torch.Tensor) -> torch.Tensor:
        self.count += 1
        return super().pull_back(saved, cotangents)


def test_method_that_only_scores_is_never_differentiated(network: nn.Module, digit_batch: torch.Tensor) -> None:
    pixels = digit_batch[:3]
    passes = CountsPullBacks(network)
    logits, explanations = predict_and_explain(passes, pixels, [(None,), (2, 5), ()], methods=[Occlusion()] * 3)
    assert passes.count == 0
    assert explanations[2] is None
    for row, classes in ((0, [int(logits[0].argmax())]), (1, [2, 5])):
        explanation = explanations[row]
        assert explanation is not None
        assert list(explanation.classes) == classes
        for y, x in QUARTERS:
            covered = pixels[row : row + 1].clone()
            covered[..., y, x] = 0
            drop = (network(pixels[row : row + 1]) - network(covered))[0, classes].detach().numpy()
            expected = np.broadcast_to(drop[:, None, None], (len(classes), 14, 14))
            largest = 2 * np.abs(logits).max()  # a drop is what is left of two logits
            require_close(explanation.maps[:, 0, y, x], expected, row_axes=2, of=largest)


def test_methods_that_score_and_methods_that_differentiate_share_a_group(network: nn.Module, digit_batch: torch.Tensor) -> None:
    pixels = digit_batch[:2]
    methods = [Occlusion(), SmoothGrad(samples=3)]
    _, together = predict_and_explain(network, pixels, [(1,), (1,)], methods=methods)
    for row, method in enumerate(methods):
        _, (alone,) = predict_and_explain(network, pixels[row : row + 1], [(1,)], methods=[method])
        one = together[row]
        assert one is not None
        assert alone is not None
        require_close(one.maps, alone.maps, 1e-5, row_axes=2)
