"""Measurements of maps against closed forms and other implementations, and reports from known numbers."""

import hashlib
import json
import re
from pathlib import Path

import captum.attr
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import spearmanr
from torch import nn

from handler.gradients.explain import freeze
from model.network import DigitNetwork
from scripts.paths import ROOT, SAMPLE_FILES, WEIGHTS_FILE
from scripts.research.evaluate import GATES, evaluate, main, measure_orders
from scripts.research.evaluation_report import Estimate, Gate, Report, Table, judge, render_html, render_json, render_text
from scripts.research.faithfulness import (
    choose_layers,
    compare_directions,
    correlate_ranks,
    count_inversions_to_flip,
    differentiate_loss,
    dither,
    gradient,
    predict,
    randomise,
    rank_pixels,
    share_differing_pixels,
    share_tied_windows,
    trace_probabilities,
)
from tests.conftest import label_of, write_mnist

WEIGHTS = WEIGHTS_FILE


def ranked(maps: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return rank_pixels(maps, torch.Generator().manual_seed(seed))


class FirstAgainstZero(nn.Module):
    """Two classes: the scores are a weighted sum of the pixels and 0, so a probability is the sigmoid of the sum."""

    def __init__(self, weights: torch.Tensor, bias: float = 0.0) -> None:
        super().__init__()
        self.weights, self.bias = weights, bias

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        score = (pixels * self.weights).flatten(1).sum(dim=1) + self.bias
        return torch.stack([score, torch.zeros_like(score)], dim=1)


# --- orders of pixels


def test_largest_number_has_the_first_rank() -> None:
    maps = torch.tensor([[[0.5, -3.0], [2.0, 0.0]]])
    assert ranked(maps).tolist() == [[1, 3, 0, 2]]


def test_equal_numbers_are_ranked_at_random_and_repeatably() -> None:
    """Each of 4 equal pixels comes first in a quarter of 4,000 maps, within 5 standard deviations (27)."""
    flat = torch.zeros(4000, 2, 2)
    ranks = ranked(flat, seed=1)
    assert torch.equal(ranks.sort(dim=1).values, torch.arange(4).expand(4000, 4))
    assert all(abs(int((ranks[:, k] == 0).sum()) - 1000) < 137 for k in range(4))
    assert torch.equal(ranks, ranked(flat, seed=1))
    assert not torch.equal(ranks, ranked(flat, seed=2))


def test_curves_of_a_linear_network_are_those_computed_by_hand() -> None:
    """Weights 4, 2, -1, 1 on white pixels: the scores left after deleting the largest first are 6, 2, 0, -1, 0."""
    weights = torch.tensor([[[4.0, 2.0], [-1.0, 1.0]]])
    network, pixels, targets = FirstAgainstZero(weights), torch.ones(1, 1, 2, 2), torch.tensor([0])
    ranks = ranked(gradient(network, pixels, targets))
    deleted = trace_probabilities(network, pixels, ranks, targets, insert=False, step=1)
    inserted = trace_probabilities(network, pixels, ranks, targets, insert=True, step=1)
    np.testing.assert_allclose(deleted, [1 / (1 + np.exp(-np.array([6.0, 2, 0, -1, 0])))], rtol=1e-6)
    np.testing.assert_allclose(inserted, [1 / (1 + np.exp(-np.array([0.0, 4, 6, 7, 6])))], rtol=1e-6)


def test_last_step_takes_the_pixels_that_are_left() -> None:
    network, pixels, targets = FirstAgainstZero(torch.ones(1, 1, 5)), torch.ones(3, 1, 1, 5), torch.zeros(3, dtype=torch.int64)
    traced = trace_probabilities(network, pixels, ranked(torch.zeros(3, 1, 5)), targets, insert=False, step=2)
    np.testing.assert_allclose(traced, [1 / (1 + np.exp(-np.array([5.0, 3, 1, 0])))] * 3, rtol=1e-6)


def test_no_order_deletes_a_linear_score_faster_than_the_gradient_of_binary_pixels() -> None:
    """There the gradient is the perfect oracle: what a pixel's deletion costs. The random order is the expectation's."""
    random = torch.Generator().manual_seed(0)
    weights = torch.rand(1, 6, 6, generator=random) - 0.3
    network, pixels = FirstAgainstZero(weights), torch.ones(400, 1, 6, 6)
    targets = torch.zeros(400, dtype=torch.int64)
    maps = gradient(network, pixels, targets)
    best = trace_probabilities(network, pixels, ranked(maps), targets, insert=False, step=1)
    at_random = trace_probabilities(network, pixels, ranked(torch.zeros_like(maps)), targets, insert=False, step=1)
    worst = trace_probabilities(network, pixels, ranked(-maps), targets, insert=False, step=1)
    assert (best <= at_random + 1e-6).all()
    assert (at_random <= worst + 1e-6).all()
    scores = np.log(at_random / (1 - at_random))  # (400, 37): linear, so its mean falls on a straight line
    expected = float(weights.sum()) * (1 - np.arange(37) / 36)
    deviations = scores.std(axis=0) / np.sqrt(400)
    assert (np.abs(scores.mean(axis=0) - expected) <= 5 * deviations + 1e-4).all()


def test_deletion_is_what_captums_ablation_says(network: nn.Module, digit_batch: torch.Tensor) -> None:
    """captum ablates the same pixels to zero and gives the difference of the probability."""
    pixels = digit_batch[::5]
    targets = predict(network, pixels).argmax(dim=1)
    ranks = ranked(gradient(network, pixels, targets))
    traced = trace_probabilities(network, pixels, ranks, targets, insert=False)
    ablation = captum.attr.FeatureAblation(lambda some: network(some).softmax(dim=1))
    for step in (1, 5, 14, 27):
        deleted = (ranks < 28 * step).long().reshape(pixels.shape)
        differences = ablation.attribute(pixels, target=targets, feature_mask=deleted)  # of each pixel's group
        lost = (differences * deleted).flatten(1).amax(dim=1) + (differences * deleted).flatten(1).amin(dim=1)
        np.testing.assert_allclose(traced[:, 0] - traced[:, step], lost.numpy(), atol=1e-5)


def test_inversions_are_counted_until_the_class_changes() -> None:
    """White pixels with weights 5, 1, 1, 1 and the bias -3.5 score 4.5: the first inversion takes 5 of it, the others 1 each."""
    weights = torch.tensor([[[5.0, 1.0], [1.0, 1.0]]])
    pixels = torch.ones(1, 1, 2, 2)
    network = FirstAgainstZero(weights, bias=-3.5)
    assert count_inversions_to_flip(network, pixels, ranked(weights)).tolist() == [1]
    assert count_inversions_to_flip(network, pixels, ranked(-weights)).tolist() == [4]
    assert count_inversions_to_flip(FirstAgainstZero(weights, bias=1), pixels, ranked(weights)).tolist() == [4]  # never


def test_inversions_equal_one_by_one_counting(network: nn.Module, digit_batch: torch.Tensor) -> None:
    pixels = digit_batch[::6]
    predicted = predict(network, pixels).argmax(dim=1)
    ranks = ranked(gradient(network, pixels, predicted).abs())
    counted = []
    for image, places, digit in zip(pixels, ranks, predicted, strict=True):
        for count in range(1, 785):
            inverted = torch.where(places.reshape(image.shape) < count, 1 - image, image)
            if int(network(inverted[None]).argmax()) != digit:
                break
        counted.append(count)
    assert count_inversions_to_flip(network, pixels, ranks).tolist() == counted


def test_controls_stand_beside_every_method(network: nn.Module, digit_batch: torch.Tensor) -> None:
    pixels = digit_batch[::8]
    maps = gradient(network, pixels, predict(network, pixels).argmax(dim=1))
    table, curves = measure_orders(network, pixels, {"one": maps, "other": -maps}, seed=0)
    orders = ["one", "one, absolute", "other", "other, absolute", "intensity (control)", "random (control)"]
    assert list(table.rows) == list(curves["deletion"]) == list(curves["insertion"]) == orders
    value = {name: row[0].value for name, row in table.rows.items()}
    assert value["one"] < value["random (control)"] < value["other"]
    for name, (deletion, insertion, *_) in table.rows.items():
        assert deletion.value == pytest.approx(np.mean([point.value for point in curves["deletion"][name]]))
        assert insertion.value == pytest.approx(np.mean([point.value for point in curves["insertion"][name]]))
        assert curves["deletion"][name][0].value == pytest.approx(curves["insertion"][name][-1].value, abs=1e-6)  # the image


# --- likeness


def test_rank_correlation_is_scipys_also_with_ties() -> None:
    random = np.random.default_rng(0)
    maps = torch.from_numpy(random.normal(size=(30, 5, 7)).round(1))
    others = torch.from_numpy((random.normal(size=(30, 5, 7)) + maps.numpy()).round(0))
    expected = [spearmanr(one.flatten(), other.flatten()).statistic for one, other in zip(maps, others, strict=True)]
    np.testing.assert_allclose(correlate_ranks(maps, others), expected, atol=1e-12)
    assert np.ptp(expected) > 0.1


@pytest.mark.parametrize("compare", [correlate_ranks, compare_directions])
def test_likeness_of_known_maps(compare: type) -> None:
    ramp = torch.arange(-4.0, 5.0).reshape(1, 3, 3)
    assert compare(ramp, 3 * ramp).tolist() == pytest.approx([1])
    assert compare(ramp, -ramp).tolist() == pytest.approx([-1])
    assert compare(ramp, torch.zeros(1, 3, 3)).tolist() == [0]


def test_randomised_layers_are_new_and_the_others_are_not(network: nn.Module) -> None:
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    state = torch.random.get_rng_state()
    changed = randomise(network, ("conv2", "lin"), seed=0)
    differing = {name for name, tensor in changed.state_dict().items() if not torch.equal(tensor, before[name])}
    assert differing == {"conv2.weight", "conv2.bias", "lin.weight", "lin.bias"}
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(parameter.requires_grad for parameter in changed.parameters())
    again, other = randomise(network, ("lin",), seed=0), randomise(network, ("lin",), seed=1)
    assert torch.equal(randomise(network, ("lin",), seed=0).get_parameter("lin.weight"), again.get_parameter("lin.weight"))
    assert not torch.equal(again.get_parameter("lin.weight"), other.get_parameter("lin.weight"))


def test_layers_are_randomised_from_the_last_and_each_alone() -> None:
    assert choose_layers(DigitNetwork()) == {
        "conv2 and later": ("conv2", "lin"),
        "all layers": ("conv1", "conv2", "lin"),
        "conv1 alone": ("conv1",),
        "conv2 alone": ("conv2",),
        "lin alone": ("lin",),
    }


# --- what a map does not say


def test_windows_tie_on_a_flat_image_and_hardly_under_noise() -> None:
    """Inside a flat image every window of a channel that answers holds four equal numbers; at its edge not."""
    exact = DigitNetwork().double()
    nn.init.ones_(exact.get_parameter("conv1.weight"))
    nn.init.ones_(exact.get_parameter("conv1.bias"))
    flat = torch.full((2, 1, 28, 28), 0.5, dtype=torch.float64)
    with torch.no_grad():
        inputs = exact.conv1((flat - exact.mean) / exact.std)[0, 0].numpy()  # (30, 30)
    windows = [np.sort(inputs[y : y + 2, x : x + 2].ravel()) for y in range(0, 30, 2) for x in range(0, 30, 2)]
    tied = np.mean([window[-1] == window[-2] for window in windows])
    assert share_tied_windows(exact, flat).tolist() == [tied] * 2
    assert tied > 0.8
    assert (share_tied_windows(exact, dither(flat, 0)) < 0.02).all()


def test_gradient_differs_from_central_differences_only_at_kinks() -> None:
    """|x| summed: the gradient of torch at the kink is 0 and so is the central difference; relu's is 0, and 1/2."""

    class Rectified(nn.Module):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return pixels.relu().flatten(1).sum(dim=1, keepdim=True)

    pixels = torch.tensor([[[[0.0, 0.0], [1.0, -1.0]]], [[[0.5, 2.0], [1.0, -1.0]]]], dtype=torch.float64)
    assert share_differing_pixels(Rectified(), pixels, torch.tensor([0, 0])).tolist() == [0.5, 0]


def test_loss_gradient_is_the_sum_of_score_gradients(network: nn.Module, digit_batch: torch.Tensor) -> None:
    """grad CE = sum over k of (p_k - y_k) grad S_k."""
    exact = freeze(DigitNetwork().double())
    exact.load_state_dict(network.state_dict())
    pixels = dither(digit_batch[:4].double(), 0)
    targets = torch.tensor([0, 3, 1, 9])
    weights = predict(exact, pixels) - nn.functional.one_hot(targets, 10)
    jacobian = torch.stack([gradient(exact, pixels, torch.full((4,), k)) for k in range(10)], dim=1)  # (4, 10, 28, 28)
    expected = (weights[:, :, None, None] * jacobian).sum(dim=1)
    torch.testing.assert_close(differentiate_loss(exact, pixels, targets), expected, rtol=1e-9, atol=1e-12)


# --- intervals, gates, reports


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    """200 samples of 50 from a skewed distribution of mean 1: 95 % would be 190; percentile intervals fall a little short."""
    random = np.random.default_rng(0)
    estimates = [Estimate.of(random.exponential(1.0, 50), random) for _ in range(200)]
    covered = sum(estimate.low <= 1 <= estimate.high for estimate in estimates)
    assert 175 <= covered <= 198
    assert all(estimate.low < estimate.value < estimate.high for estimate in estimates)


def test_interval_is_as_wide_as_theory_says() -> None:
    """Of a mean: 1.96 standard errors to each side. Of a median of a normal distribution: sqrt(pi / 2) times as wide."""
    values = np.random.default_rng(1).normal(5, 2, 2000)
    mean, median = (Estimate.of(values, np.random.default_rng(0), statistic=statistic) for statistic in ("mean", "median"))
    half = 1.96 * values.std() / np.sqrt(2000)
    assert mean.low == pytest.approx(mean.value - half, abs=0.15 * half)
    assert mean.high == pytest.approx(mean.value + half, abs=0.15 * half)
    assert (median.high - median.low) / (mean.high - mean.low) == pytest.approx(np.sqrt(np.pi / 2), rel=0.25)
    assert (mean.value, median.value) == (values.mean(), np.median(values))


def test_equal_values_have_an_interval_of_no_width() -> None:
    assert Estimate.of(np.full(5, 0.25), np.random.default_rng(0)) == Estimate(0.25, 0.25, 0.25, 5, "mean")


def table_of(value: float) -> Table:
    estimate = Estimate(value, value - 1, value + 1, 7, "mean")
    return Table("order", "Title <&>", "A note.", ("other", "deletion"), {"gradient": (Estimate(9, 8, 10, 7, "mean"), estimate)})


@pytest.mark.parametrize(
    ("lowest", "highest", "value", "passed"),
    [
        (None, 0.15, 0.15, True),
        (None, 0.15, 0.1501, False),
        (0.93, None, 0.93, True),
        (0.93, None, 0.9299, False),
        (-0.1, 0.1, 0.0, True),
        (-0.1, 0.1, -0.11, False),
        (-0.1, 0.1, 0.11, False),
    ],
)
def test_gate_passes_by_its_value(lowest: float | None, highest: float | None, value: float, passed: bool) -> None:
    gate = Gate("a gate", "order", "gradient", "deletion", lowest, highest)
    (verdict,) = judge([gate], [table_of(value)])
    assert verdict.passed is passed
    assert verdict.estimate.value == value
    assert str(verdict).startswith("pass" if passed else "FAIL")


@pytest.fixture
def report() -> Report:
    tables = (table_of(0.25),)
    gates = (Gate("much", "order", "gradient", "deletion", highest=0.15), Gate("some", "order", "gradient", "other", lowest=1))
    points = tuple(Estimate(value, value / 2, value, 7, "mean") for value in (1.0, 0.5, 0.25))
    curves = {"deletion": {"gradient": points}, "insertion": {"gradient": points[::-1]}}
    return Report({"weights": "abc", "images": 7}, judge(gates, tables), tables, curves)


def test_text_shows_gates_and_tables(report: Report) -> None:
    text = render_text(report)
    assert "FAIL  much: 0.25 [-0.75, 1.25]; accepted: at most 0.15" in text
    assert "pass  some: 9 [8, 10]; accepted: at least 1" in text
    assert "|          | other     | deletion           |" in text
    assert "| gradient | 9 [8, 10] | 0.25 [-0.75, 1.25] |" in text
    assert not report.passed


def test_json_holds_every_number(report: Report) -> None:
    content = json.loads(render_json(report))
    assert content["settings"] == {"weights": "abc", "images": 7}
    assert [verdict["passed"] for verdict in content["verdicts"]] == [False, True]
    expected = {"value": 0.25, "low": -0.75, "high": 1.25, "count": 7, "statistic": "mean"}
    assert content["tables"][0]["rows"]["gradient"][1] == expected
    assert [point["value"] for point in content["curves"]["insertion"]["gradient"]] == [0.25, 0.5, 1.0]


def test_page_needs_nothing_from_elsewhere_and_is_the_same_every_time(report: Report) -> None:
    page = render_html(report, b"\x89PNG")
    assert page == render_html(report, b"\x89PNG")
    assert "Title &lt;&amp;&gt;" in page
    assert "Title <" not in page
    assert 'src="data:image/png;base64,iVBORw=="' in page
    assert not re.search(r"""(?:src|href)=["'](?!data:|#)|<script|@import|url\((?!#)""", page)
    assert page.count("<svg") == 1
    for words in ("probability of the predicted class", "insertion", 'class="FAIL">FAIL  much: 0.25'):
        assert words in page


# --- all of it


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory, digit_pixels: NDArray[np.float32]) -> Path:
    """The test digits as MNIST's four files; three of them are labelled wrong, so that they count as misread."""
    root: Path = tmp_path_factory.mktemp("data")
    images = np.rint(digit_pixels * 255).astype(np.uint8)
    labels = np.array([label_of(file) for file in SAMPLE_FILES], dtype=np.uint8)
    labels[:3] += 1
    for name in ("train", "t10k"):
        write_mnist(root, name, images, labels)
    return root


@pytest.mark.long
def test_evaluation_reports_and_repeats_by_its_seed(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scripts.research.evaluate.DIFFERENCE_IMAGES", 2)
    found = {}
    for name, seed in (("one", "5"), ("two", "5"), ("other", "6")):
        arguments = ["--data-dir", str(data_dir), "--weights", str(WEIGHTS), "--images", "4", "--seed", seed]
        code = main([*arguments, "--output-dir", str(tmp_path / name)])
        found[name] = (tmp_path / name / "report.json").read_text()
        content = json.loads(found[name])
        assert code == int(not all(verdict["passed"] for verdict in content["verdicts"]))
    assert found["one"] == found["two"]
    assert found["one"] != found["other"]
    assert [verdict["gate"]["name"] for verdict in content["verdicts"]] == [gate.name for gate in GATES]
    assert [table["name"] for table in content["tables"]] == [
        *("order", "randomisation", "targets", "repeats", "limits", "misread order", "misread targets"),
    ]
    assert content["settings"]["images"] == 4
    assert content["settings"]["misread"].endswith(" of 50")
    rows = {table["name"]: table["rows"] for table in content["tables"]}
    assert rows["misread order"]["gradient"][0]["count"] >= 3
    assert "data:image/png;base64," in (tmp_path / "one" / "report.html").read_text()
    assert "## The most salient pixels first" in capsys.readouterr().out


COMMITTED_RUN = ROOT / "scripts" / "results" / "evaluation.md"


def test_committed_run_passes_all_gates() -> None:
    verdicts = re.findall(r"(?m)^(pass|FAIL)  (.*?): ", COMMITTED_RUN.read_text())
    assert verdicts == [("pass", gate.name) for gate in GATES]


def test_committed_run_is_of_the_committed_weights() -> None:
    text = COMMITTED_RUN.read_text()
    assert f"weights {hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:12]}, images 1000," in text
    values = dict(re.findall(r"(?m)^(?:pass|FAIL)  (.*?): (\S+)", text))
    assert list(values) == [gate.name for gate in GATES]
    for page in (ROOT / "README.md", ROOT / "scripts" / "research" / "README.md"):
        assert f"**{values[GATES[0].name]}**" in page.read_text()
        assert f"**{values[GATES[1].name]}**" in page.read_text()


def test_random_weights_fail_the_gates(digit_batch: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that has learned nothing: its maps are no better than chance at deletion."""
    monkeypatch.setattr("scripts.research.evaluate.DIFFERENCE_IMAGES", 2)
    torch.manual_seed(0)
    network = DigitNetwork()
    freeze(network)
    report = evaluate(network, digit_batch[:4], digit_batch[:0], seed=0, settings={})
    assert not report.passed
    assert [table.name for table in report.tables] == ["order", "randomisation", "targets", "repeats", "limits"]


def test_evaluation_says_what_it_lacks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--weights", str(tmp_path / "none.safetensors"), "--data-dir", str(tmp_path)]) == 2
    assert "error: the weights none.safetensors are missing or unreadable" in capsys.readouterr().err


def test_one_image_is_too_few_for_an_interval(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["--images", "1"])
    assert "expected 2 or more, as an interval needs them; got 1" in capsys.readouterr().err
