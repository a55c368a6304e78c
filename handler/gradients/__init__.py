"""One forward, one backward: logits and input gradients, and what other methods than the gradient need beside.

Knows torch and numpy, and nothing of HTTP, images or TorchServe, so that a notebook or a batch job can use it alone:

    from handler.gradients import SmoothGrad, freeze, predict_and_explain

    logits, explanations = predict_and_explain(freeze(network), pixels, targets=[(7,), (), (None, 3)])
"""
