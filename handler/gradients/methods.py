"""How a saliency map is made: one table of methods, and the mathematics of each.

A method says where the network is differentiated, what of it, and what becomes of the gradients; `saliency` does the
differentiating, for all rows of a batch together. A method is a frozen dataclass whose fields are its parameters. Options, their
documentation and the reply follow from the table, so that another method is another class in METHODS. Knows numpy alone.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import ClassVar, cast

import numpy as np
from numpy.typing import NDArray

from handler.limits import MAX_INTEGRATION_STEPS, MAX_SAMPLES, MAX_SEED

Array = NDArray[np.floating]
Value = int | float | StrEnum  # of a parameter


LOGIT = "logit"
CROSS_ENTROPY = "cross_entropy"


class Aggregate(StrEnum):
    """What becomes of the gradients of noisy images."""

    MEAN = "mean"
    SQUARED = "squared"
    VARIANCE = "variance"


class Baseline(StrEnum):
    """Where the path of integrated gradients starts."""

    ZERO = "zero"
    MEAN = "mean"


def softmax(logits: Array) -> NDArray[np.float64]:
    """Probabilities of logits, computed in float64: (..., K) -> (..., K)."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return np.asarray(exponentials / exponentials.sum(axis=-1, keepdims=True))


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a method, as an option.

    Attributes:
        default: also says the type: an integer, a number, or one of an enumeration.
        description: for people.
        lowest, highest: of numbers.
    """

    default: Value
    description: str
    lowest: float = 0
    highest: float = 0


def _described(description: str, lowest: float = 0, highest: float = 0) -> dict[str, str | float]:
    """The metadata of a field that is a parameter."""
    return {"description": description, "lowest": lowest, "highest": highest}


@dataclass(frozen=True, slots=True)
class Sampled:
    """One image, and what the network says at the points that a method asked for.

    Attributes:
        pixels: (C, H, W), the image.
        scores: (T,), its scores of the classes explained.
        points: (S, C, H, W).
        point_scores: (S, T).
        gradients: (S, T, C, H, W), of the scores by the pixels, at the points; (S, 0, C, H, W) where the method needs none.
    """

    pixels: Array
    scores: Array
    points: Array
    point_scores: Array
    gradients: Array


@dataclass(frozen=True, slots=True)
class Method:
    """How a map is made. This one differentiates the score at the image itself."""

    name: ClassVar[str]
    description: ClassVar[str]
    output: ClassVar[str] = LOGIT  # what is differentiated
    has_convergence_delta: ClassVar[bool] = False

    @property
    def unit(self) -> str:
        """The unit of the map's numbers."""
        return "logit per unit of intensity"

    @classmethod
    def parameters(cls) -> dict[str, Parameter]:
        """What a request may choose, by name."""
        return {one.name: Parameter(cast(Value, one.default), **one.metadata) for one in fields(cls)}

    @property
    def values(self) -> dict[str, Value]:
        """What the request chose, by name."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    @property
    def gradient_count(self) -> int:
        """How many gradients a map takes: its cost."""
        return 1

    @property
    def has_image_space(self) -> bool:
        """Whether its maps have a meaning in the pixels of the image as it was sent."""
        return True

    @property
    def needs_mean(self) -> bool:
        """Whether it works only where the network says the mean of its pixels."""
        return False

    def weigh(self, logits: Array, target: int) -> Array | None:
        """By how much each logit counts in what is differentiated: (K,) -> (K,); None for the target's alone."""
        return None

    def finish(self, gradients: Array, pixels: Array) -> Array:
        """Make maps of gradients (T, ...) by pixels (...), the network's or a client's: (T, ...)."""
        return gradients


class Gradient(Method):
    """The derivative of the score (Simonyan et al., arXiv 1312.6034, section 3)."""

    __slots__ = ()
    name = "gradient"
    description = "derivative of the target's logit by each pixel"


class LossGradient(Method):
    """The derivative of the cross entropy between the network's probabilities and the target."""

    __slots__ = ()
    name = "loss_gradient"
    description = "derivative of the cross entropy to the target by each pixel"
    output = CROSS_ENTROPY

    @property
    def unit(self) -> str:
        """As `Method`."""
        return "nat per unit of intensity"

    def weigh(self, logits: Array, target: int) -> Array:
        """Weigh as grad CE = sum_k (p_k - y_k) grad S_k does.

        In float64, and p_c - 1 as what the others have together: for a confident prediction the difference would be lost.
        """
        weights = softmax(logits)
        weights[target] = 0
        weights[target] = -weights.sum()
        return np.asarray(weights)


class GradientXInput(Method):
    """The derivative times the pixel (Shrikumar et al., arXiv 1605.01713)."""

    __slots__ = ()
    name = "gradient_x_input"
    description = "the gradient times the pixel's own intensity"

    @property
    def unit(self) -> str:
        """As `Method`."""
        return "logit"

    def finish(self, gradients: Array, pixels: Array) -> Array:
        """As `Method`."""
        return gradients * pixels


class SamplingMethod(Method):
    """A method that looks at other points than the image: the network is scored there and, unless it says no, differentiated."""

    __slots__ = ()
    needs_gradients: ClassVar[bool] = True  # False of a method that scores alone, such as occlusion

    def points(self, pixels: Array, mean: Array | None) -> Array:
        """Choose the points: (C, H, W) -> (gradient_count, C, H, W), of the same type.

        `mean` is the network's mean pixel, of any shape that fits; it is there where the method needs it.
        """
        raise NotImplementedError

    def combine(self, sampled: Sampled) -> tuple[Array, Array | None]:
        """Make maps (T, C, H, W) of what the network says there; and their convergence deltas (T,), where it has them."""
        raise NotImplementedError


@dataclass(frozen=True, slots=True)
class SmoothGrad(SamplingMethod):
    """Gradients of noisy copies of the image, together (Smilkov et al., arXiv 1706.03825; Adebayo et al., arXiv 1810.03292).

    The noise is `numpy.random.default_rng(seed).standard_normal((samples, C, H, W), numpy.float32) * noise`, added without
    clipping: the same for every image of a seed, whatever shares its batch.
    """

    name: ClassVar[str] = "smoothgrad"
    description: ClassVar[str] = "mean, mean square or variance of the gradients of noisy copies of the image"
    samples: int = field(default=25, metadata=_described("noisy copies of the image", 1, MAX_SAMPLES))
    noise: float = field(default=0.15, metadata=_described("standard deviation of the noise, in units of intensity", 0, 1))
    seed: int = field(default=0, metadata=_described("seed of the noise: the same one gives the same map", 0, MAX_SEED))
    aggregate: Aggregate = field(default=Aggregate.MEAN, metadata=_described("what becomes of the gradients"))

    @property
    def unit(self) -> str:
        """As `Method`."""
        return "logit per unit of intensity" if self.aggregate is Aggregate.MEAN else "(logit per unit of intensity)^2"

    @property
    def gradient_count(self) -> int:
        """As `Method`."""
        return self.samples

    @property
    def has_image_space(self) -> bool:
        """As `Method`. Squares do not go back through the preparation as derivatives do."""
        return self.aggregate is Aggregate.MEAN

    def points(self, pixels: Array, mean: Array | None) -> Array:
        """As `SamplingMethod`."""
        noise = np.random.default_rng(self.seed).standard_normal((self.samples, *pixels.shape), np.float32)
        return pixels + (noise * np.float32(self.noise)).astype(pixels.dtype)

    def combine(self, sampled: Sampled) -> tuple[Array, None]:
        """As `SamplingMethod`. The variance is that of the samples themselves, divided by their number."""
        gradients = sampled.gradients
        if self.aggregate is Aggregate.MEAN:
            return gradients.mean(axis=0), None
        return (np.square(gradients).mean(axis=0) if self.aggregate is Aggregate.SQUARED else gradients.var(axis=0)), None


@dataclass(frozen=True, slots=True)
class IntegratedGradients(SamplingMethod):
    """Gradients on the way from a baseline, times the way (Sundararajan et al., arXiv 1703.01365).

    Summed by the Gauss-Legendre rule. The map adds up to S(image) - S(baseline) but for the convergence delta
    (`completeness_gap` in the API), by which the sum over so many steps misses the integral.
    """

    name: ClassVar[str] = "integrated_gradients"
    description: ClassVar[str] = "share of each pixel in the score's difference to a baseline image"
    has_convergence_delta: ClassVar[bool] = True
    steps: int = field(
        default=50, metadata=_described("points on the way from the baseline to the image", 1, MAX_INTEGRATION_STEPS)
    )
    baseline: Baseline = field(
        default=Baseline.ZERO, metadata=_described("where the way starts: at zeros, or at the training set's mean intensity")
    )

    @property
    def unit(self) -> str:
        """As `Method`."""
        return "logit"

    @property
    def gradient_count(self) -> int:
        """As `Method`. The baseline is scored too."""
        return self.steps + 1

    @property
    def has_image_space(self) -> bool:
        """As `Method`. No image of the client's is the baseline: what preparation cleaned away stands between them."""
        return False

    @property
    def needs_mean(self) -> bool:
        """As `Method`."""
        return self.baseline is Baseline.MEAN

    def points(self, pixels: Array, mean: Array | None) -> Array:
        """As `SamplingMethod`. The last point is the baseline itself."""
        start = np.zeros_like(pixels)
        if self.needs_mean:
            assert mean is not None
            start += mean.astype(pixels.dtype)
        shares, _ = _gauss_legendre(self.steps)
        points = start + shares[:, None, None, None] * (pixels - start)  # (steps, C, H, W)
        return np.concatenate([points.astype(pixels.dtype), start[None]])

    def combine(self, sampled: Sampled) -> tuple[Array, Array]:
        """As `SamplingMethod`."""
        _, weights = _gauss_legendre(self.steps)
        gradients = np.tensordot(weights, sampled.gradients[:-1], axes=1)  # (T, C, H, W)
        maps = (gradients * (sampled.pixels - sampled.points[-1])).astype(sampled.gradients.dtype)
        differences = sampled.scores.astype(np.float64) - sampled.point_scores[-1]
        return maps, maps.sum(axis=(1, 2, 3), dtype=np.float64) - differences


@functools.lru_cache(maxsize=16)
def _gauss_legendre(steps: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Points in (0, 1) and their weights, whose sum is 1: two of (steps,)."""
    places, weights = np.polynomial.legendre.leggauss(steps)
    return (1 + places) / 2, weights / 2


METHODS: Mapping[str, type[Method]] = {
    method.name: method for method in (Gradient, LossGradient, GradientXInput, SmoothGrad, IntegratedGradients)
}
PARAMETERS: Mapping[str, Parameter] = {
    name: parameter for method in METHODS.values() for name, parameter in method.parameters().items()
}
GRADIENT = Gradient()
