"""The methods through a real TorchServe: all in one batch, in every protocol and format, and their refusals.

Numbers are compared with those of the same functions in this process, from the same weights, in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import requests
import torch
from PIL import Image
from torch import nn

from handler.gradients.explain import Explanation, freeze, predict_and_explain
from handler.gradients.methods import (
    GRADIENT,
    Aggregate,
    Baseline,
    GradientXInput,
    IntegratedGradients,
    LossGradient,
    Method,
    SmoothGrad,
)
from model.network import MNIST_MEAN
from scripts.serving.launcher import TorchServe
from tests.client import (
    BATCH_SIZE,
    TIMEOUT_S,
    Arguments,
    Sample,
    ask,
    ask_at_once,
    base64_of,
    check_error,
    check_prediction,
    explain,
    predict,
)
from tests.tolerance import FLOAT32_SHARE, require_close

MEAN = np.full((1, 1, 1), MNIST_MEAN, np.float32)
LOSS_SHARE = 1e-4  # of a loss gradient's largest number: what rounds a logit of 41 is the relative error of a small probability
GAP_SHARE = 1e-3  # of the largest logit; one of the points may have another gradient, where a max pool ties but for rounding
METHODS: list[Method] = [
    GRADIENT,
    LossGradient(),
    GradientXInput(),
    SmoothGrad(samples=10, noise=0.1, seed=7),
    SmoothGrad(samples=12, seed=8, aggregate=Aggregate.VARIANCE),
    IntegratedGradients(steps=20),
    IntegratedGradients(baseline=Baseline.MEAN),
]
BY_METHOD = pytest.mark.parametrize("method", METHODS, ids=str)


@dataclass(frozen=True)
class Reference:
    """The committed network in float64."""

    network: nn.Module

    def explain(self, sample: Sample, target: int | None, method: Method) -> Explanation:
        """Explain one class of one image."""
        pixels = torch.from_numpy(sample.levels.astype(np.float32) / np.float32(255)).double()[None, None]
        _, (explanation,) = predict_and_explain(self.network, pixels, [(target,)], [method], MEAN)
        assert explanation is not None
        return explanation

    def assert_map(self, saliency: object, sample: Sample, target: int | None, method: Method) -> None:
        """Compare a map (28, 28).

        Of the points that a method takes, a few have max pools that tie but for float32's rounding, which changes their share of
        the map in some pixels.
        """
        expected = self.explain(sample, target, method).maps[0, 0]
        differences = np.abs(np.asarray(saliency) - expected)
        largest = np.abs(expected).max()
        assert differences.shape == (28, 28)
        if isinstance(method, LossGradient):  # of a confident prediction, far below the scores' gradients, which it is made of
            assert differences.max() <= LOSS_SHARE * largest
            largest = np.abs(self.explain(sample, target, GRADIENT).maps).max()
        assert np.quantile(differences, 0.75) <= FLOAT32_SHARE * largest
        assert differences.max() <= (FLOAT32_SHARE if method.gradient_count == 1 else 0.25) * largest


@pytest.fixture(scope="module")
def reference(network: nn.Module) -> Reference:
    copy = freeze(type(network)().double())
    copy.load_state_dict(network.state_dict())
    return Reference(copy)


def options_of(method: Method) -> dict[str, Any]:
    """Options that a client sends for a method."""
    return {"method": method.name, **method.values}


def headers_of(method: Method) -> dict[str, str]:
    return {f"X-Saliency-{name}": str(value) for name, value in options_of(method).items()}


def check_explanation_by(
    explanation: dict[str, Any], sample: Sample, target: int | None, method: Method, reference: Reference
) -> None:
    assert explanation["method"] == method.name
    assert explanation.get("parameters", {}) == method.values
    assert explanation["output"] == ("cross_entropy" if isinstance(method, LossGradient) else "logit")
    assert explanation["target"] == (sample.predicted if target is None else target)
    reference.assert_map(explanation["saliency"], sample, target, method)
    assert ("completeness_gap" in explanation) == isinstance(method, IntegratedGradients)


# --- one batch


def test_all_methods_and_predictions_share_a_batch(
    server: TorchServe,
    samples: list[Sample],
    reference: Reference,
    batch_count: Callable[[], int],
    worker_pids: Callable[[], list[int]],
) -> None:
    """Ask for seven methods and a prediction at once, each of another image and class, until they share a batch."""
    workers = worker_pids()
    assert len(METHODS) == BATCH_SIZE - 1
    targets = [None, 3, 9, None, 0, None, 5]
    for _ in range(10):
        batches_before = batch_count()
        batch: list[Arguments] = [predict(data=samples[-1].png)]
        for method, sample, target in zip(METHODS, samples, targets, strict=False):
            fields = {"data": base64_of(sample), "target": "predicted" if target is None else target, **options_of(method)}
            batch.append(explain(json=fields))
        prediction, *replies = ask_at_once(server, batch)
        assert "explanation" not in check_prediction(prediction, samples[-1])
        for method, sample, target, reply in zip(METHODS, samples, targets, replies, strict=False):
            check_explanation_by(check_prediction(reply, sample)["explanation"], sample, target, method, reference)
        if batch_count() == batches_before + 1:
            break
    else:
        pytest.fail("the eight requests never shared one batch")
    assert worker_pids() == workers


@BY_METHOD
def test_method_and_parameters_as_headers_and_as_form(
    server: TorchServe, samples: list[Sample], reference: Reference, method: Method
) -> None:
    for arguments in (
        explain(data=samples[0].png, headers=headers_of(method)),
        explain(files={"data": samples[0].png}, data=options_of(method)),
    ):
        explanation = check_prediction(ask(server, arguments), samples[0])["explanation"]
        check_explanation_by(explanation, samples[0], None, method, reference)


def test_gap_is_by_how_much_the_map_misses_the_difference_of_scores(
    server: TorchServe, samples: list[Sample], reference: Reference
) -> None:
    """Computed from the numbers of the reply itself, for several targets."""
    targets = [2, samples[0].predicted]
    for baseline, level in ((Baseline.ZERO, 0.0), (Baseline.MEAN, MNIST_MEAN)):
        options = options_of(IntegratedGradients(15, baseline))
        content = check_prediction(
            ask(server, explain(json={"data": base64_of(samples[0]), "target": targets, **options})), samples[0]
        )
        start = reference.network(torch.full((1, 1, 28, 28), level, dtype=torch.float64))[0].numpy()
        differences = (np.array(content["logits"]) - start)[targets]
        sums = np.array(content["explanation"]["saliency"]).sum(axis=(1, 2))
        assert content["explanation"]["target"] == targets
        largest = np.abs(content["logits"]).max() + np.abs(start).max()  # what a gap is the rest of
        require_close(content["explanation"]["completeness_gap"], sums - differences, of=largest)


def test_same_seed_gives_the_same_map(server: TorchServe, samples: list[Sample]) -> None:
    def saliency(seed: int) -> Any:
        fields = {"data": base64_of(samples[2]), "method": "smoothgrad", "samples": 5, "seed": seed}
        return np.array(ask(server, explain(json=fields)).json()["explanation"]["saliency"])

    first = saliency(1)
    require_close(saliency(1), first, row_axes=2)
    assert np.abs(saliency(2) - first).max() > 1e-2


# --- protocols and formats


def test_instances_have_methods_of_their_own(server: TorchServe, samples: list[Sample], reference: Reference) -> None:
    plans = [(samples[row], [None, 4][row % 2], method) for row, method in enumerate(METHODS)]
    instances: list[dict[str, Any]] = [
        {"data": base64_of(sample), "target": "predicted" if target is None else target, "explain": True, **options_of(method)}
        for sample, target, method in plans
    ]
    instances.append({"data": base64_of(samples[0])})
    reply = requests.post(f"{server.address}/v1/models/digits:predict", json={"instances": instances}, timeout=TIMEOUT_S).json()
    *explanations, nothing = reply["explanations"]
    assert nothing is None
    for explanation, (sample, target, method) in zip(explanations, plans, strict=True):
        check_explanation_by(explanation, sample, target, method, reference)


@BY_METHOD
def test_tensors_say_method_parameters_and_gap(
    server: TorchServe, samples: list[Sample], reference: Reference, method: Method
) -> None:
    tensor = {"name": "x", "shape": [2], "datatype": "BYTES", "data": [base64_of(sample) for sample in samples[:2]]}
    body = {"inputs": [tensor], "parameters": {"target": 6, **options_of(method)}}
    reply = requests.post(f"{server.address}/v2/models/digits/explain", json=body, timeout=TIMEOUT_S).json()
    assert options_of(method).items() <= reply["parameters"].items()
    outputs = {output["name"]: np.array(output["data"]).reshape(output["shape"]) for output in reply["outputs"]}
    for saliency, sample in zip(outputs["saliency"], samples[:2], strict=True):
        reference.assert_map(saliency, sample, 6, method)
    assert ("completeness_gap" in outputs) == isinstance(method, IntegratedGradients)
    if "completeness_gap" in outputs:
        expected = np.array([reference.explain(sample, 6, method).convergence_deltas for sample in samples[:2]])
        largest = [np.abs(sample.logits).max() for sample in samples[:2]]
        require_close(outputs["completeness_gap"].reshape(expected.shape), expected, GAP_SHARE, of=largest)


@BY_METHOD
def test_npy_and_png_replies_name_the_method(
    server: TorchServe, samples: list[Sample], reference: Reference, method: Method
) -> None:
    npy, png = (
        ask(server, explain(data=samples[1].png, headers=headers_of(method) | {"Accept": accept, "X-Saliency-Size": "56"}))
        for accept in ("application/x-npy", "image/png")
    )
    array = np.load(BytesIO(npy.content))
    assert array.dtype == np.float32
    reference.assert_map(array, samples[1], None, method)
    with Image.open(BytesIO(png.content)) as drawn:
        assert drawn.size == (56, 56)
        assert len(drawn.convert("RGB").getcolors(56 * 56) or []) > 50
    for reply in (npy, png):
        assert reply.headers["X-Saliency-Method"] == method.name
        require_close([float(reply.headers["X-Saliency-Max"])], [array.max()], of=np.abs(array).max())
        assert ("X-Saliency-Completeness-Gap" in reply.headers) == isinstance(method, IntegratedGradients)
    if isinstance(method, IntegratedGradients):
        gaps = reference.explain(samples[1], None, method).convergence_deltas
        assert gaps is not None
        largest = np.abs(samples[1].logits).max()
        require_close([float(npy.headers["X-Saliency-Completeness-Gap"])], gaps, GAP_SHARE, of=largest)


def test_npy_of_several_methods_names_each(server: TorchServe, samples: list[Sample], reference: Reference) -> None:
    methods = [LossGradient(), IntegratedGradients(steps=3), GRADIENT]
    instances = [{"data": base64_of(samples[row]), "target": [1, 2], **options_of(method)} for row, method in enumerate(methods)]
    reply = requests.post(
        f"{server.address}/v1/models/digits:explain",
        json={"instances": instances},
        headers={"Accept": "application/x-npy"},
        timeout=TIMEOUT_S,
    )
    array = np.load(BytesIO(reply.content))
    assert array.shape == (3, 2, 28, 28)
    for row, method in enumerate(methods):
        for column, target in enumerate((1, 2)):
            reference.assert_map(array[row, column], samples[row], target, method)
    assert reply.headers["X-Saliency-Method"] == "loss_gradient;integrated_gradients;gradient"
    before, gaps, after = reply.headers["X-Saliency-Completeness-Gap"].split(";")
    assert (before, len(gaps.split(",")), after) == ("", 2, "")


def test_maps_in_the_pixels_of_the_clients_image(server: TorchServe, samples: list[Sample]) -> None:
    """The image is enlarged and inverted, so that it has to be prepared. Other tests check the gradient there."""
    content = BytesIO()
    sent = Image.fromarray(255 - samples[3].levels).resize((84, 84), Image.Resampling.BICUBIC)
    sent.save(content, format="PNG")

    def saliency(**options: object) -> Any:
        fields = {key: str(value) for key, value in options.items()}
        reply = ask(server, explain(files={"data": content.getvalue()}, data={"space": "image", "target": "3", **fields}))
        explanation = reply.json()["explanation"]
        assert explanation["shape"] == [84, 84]
        assert "held_fixed" in explanation
        return np.array(explanation["saliency"])

    gradient = saliency(method="gradient")
    assert np.abs(gradient).max() > 1e-2
    require_close(saliency(method="gradient_x_input"), gradient * (np.asarray(sent) / 255), row_axes=2)
    # One sample: flat paper ties in the pools, where a batch of two may round to another winner.
    require_close(saliency(method="smoothgrad", noise=0, samples=1), gradient, row_axes=2)
    loss = saliency(method="loss_gradient")
    assert loss.ravel() @ gradient.ravel() < 0


# --- errors


@pytest.mark.parametrize(
    ("options", "status", "kind", "message"),
    [
        ({"method": "lime"}, 400, "InvalidOption", "expected one of gradient, loss_gradient, gradient_x_input, smoothgrad"),
        (
            {"samples": 5},
            400,
            "InvalidOption",
            "expected 'method' smoothgrad with 'samples', got gradient, which takes no parameters",
        ),
        ({"method": "smoothgrad", "steps": 5}, 400, "InvalidOption", "which takes samples, noise, seed, aggregate"),
        ({"method": "smoothgrad", "samples": 501}, 400, "InvalidOption", "expected an integer from 1 to 500"),
        ({"method": "integrated_gradients", "baseline": "blur"}, 400, "InvalidOption", "expected one of zero, mean"),
        (
            {"method": "integrated_gradients", "space": "image"},
            400,
            "InvalidOption",
            "have no meaning in the pixels of the image",
        ),
        (
            {"method": "smoothgrad", "samples": 410, "target": "all"},
            413,
            "RequestTooLarge",
            "got 1 images whose maps take 4,100",
        ),
    ],
    ids=str,
)
def test_mistake_is_refused_with_what_is_accepted(
    server: TorchServe, samples: list[Sample], options: dict[str, Any], status: int, kind: str, message: str
) -> None:
    reply = ask(server, explain(json={"data": base64_of(samples[0]), **options}))
    check_error(reply, status, kind)
    assert message in reply.json()["error"]["message"]


def test_bad_parameters_of_instances_are_named_by_index(server: TorchServe, samples: list[Sample]) -> None:
    instances = [base64_of(samples[0]), {"data": base64_of(samples[0]), "steps": 3}, {"data": base64_of(samples[0]), "noise": 2}]
    reply = requests.post(f"{server.address}/v1/models/digits:explain", json={"instances": instances}, timeout=TIMEOUT_S)
    assert reply.status_code == 400
    assert reply.json()["error"]["indices"] == [1, 2]


def test_largest_work_that_is_accepted_is_done(
    server: TorchServe, samples: list[Sample], worker_pids: Callable[[], list[int]]
) -> None:
    workers = worker_pids()
    fields = {"data": base64_of(samples[0]), "method": "smoothgrad", "samples": 409, "target": "all", "encoding": "base64"}
    replies = ask_at_once(server, [explain(json=fields)] * 3)
    for reply in replies:
        explanation = check_prediction(reply, samples[0])["explanation"]
        assert explanation["shape"] == [10, 28, 28]
    assert worker_pids() == workers
