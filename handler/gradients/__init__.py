"""One forward, one backward: logits and saliency maps (attributions by input gradients), for each row of a batch by itself.

A library by itself: it knows torch and numpy, and nothing of HTTP, images or TorchServe. A notebook or a batch job uses it so:

    from handler.gradients import SmoothGrad, freeze, predict_and_explain

    network = freeze(network)  # any classifier whose rows are independent in eval mode
    logits, explanations = predict_and_explain(network, pixels, targets=[(7,), (), (None, 3)])
    explanations[0].maps  # (1, C, H, W): derivative of logit 7 by each pixel of row 0; row 1 asked for none
    smooth = predict_and_explain(network, pixels[:1], targets=[(None,)], methods=[SmoothGrad(samples=50)])

`methods` holds what a map can be; `compiled` runs a network's forward and vector-Jacobian product without autograd, as `compiler`
wrote them; `cuda_graphs` records them on a GPU.
"""

from handler.gradients.explain import Autograd, Differentiable, Explanation, freeze, predict_and_explain
from handler.gradients.methods import (
    METHODS,
    Gradient,
    GradientXInput,
    IntegratedGradients,
    LossGradient,
    Method,
    SamplingMethod,
    SmoothGrad,
    softmax,
)

__all__ = [
    "METHODS",
    "Autograd",
    "Differentiable",
    "Explanation",
    "Gradient",
    "GradientXInput",
    "IntegratedGradients",
    "LossGradient",
    "Method",
    "SamplingMethod",
    "SmoothGrad",
    "freeze",
    "predict_and_explain",
    "softmax",
]
