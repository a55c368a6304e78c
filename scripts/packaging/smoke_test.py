"""Load an unpacked archive as a TorchServe worker does, ask it for an explanation, and report.

    python -P smoke_test.py UNPACKED        (with PYTHONPATH=UNPACKED, as TorchServe sets it)

`package.py` runs it in a process that sees nothing of the repo. Prints one line of JSON: the model as the handler describes it,
the digit that it predicts for the archive's own image, what differentiates it, and the largest difference between its logits and
gradient and those of the archive's reference answer, as a share of the largest logit or number of the gradient.
"""

import importlib
import itertools
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from ts.context import Context, RequestProcessor
from ts.model_loader import ModelLoaderFactory

TOLERANCE = 5e-6  # of the largest logit, and of the gradient's largest number: float32 beside float64, written with seven digits


def main() -> int:
    """Compare the archive's answer with its reference answer. Returns the exit code: 1 where they differ."""
    model_dir = Path(sys.argv[1]).resolve()
    manifest = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    service = ModelLoaderFactory.get_model_loader().load(manifest["modelName"], str(model_dir), manifest["handler"], batch_size=1)
    for module in ("handler", manifest["handler"].removesuffix(".py")):
        origin = Path(str(importlib.import_module(module).__file__)).resolve()
        if not origin.is_relative_to(model_dir):
            raise RuntimeError(f"the module {module} came from {origin}, not from the archive")
    handler = service._entry_point.__self__  # the BaseHandler: TorchServe keeps only its bound method
    reference = json.loads((model_dir / "reference.json").read_text())

    context: Context = service.context
    context.request_processor = [RequestProcessor({"explain": "True"})]
    (body,) = handler.handle([{"body": {"data": reference["pixels"], "prepare": "none"}}], context)
    reply = json.loads(body)

    difference = max(
        relative_difference(reply["logits"], reference["logits"]),
        relative_difference([*itertools.chain(*reply["explanation"]["saliency"])], [*itertools.chain(*reference["saliency"])]),
    )
    kept = reply["digit"] == reference["digit"] and reply["model"]["weights_sha256"] == reference["weights_sha256"]
    derivative = type(handler.differentiable).__name__
    print(json.dumps({"model": reply["model"], "digit": reply["digit"], "by": derivative, "difference": difference}))
    if kept and difference <= TOLERANCE:
        return 0
    print(
        f"its answer is not the reference answer: digit {reply['digit']}, off by {difference:.1e} of the largest number",
        file=sys.stderr,
    )
    return 1


def relative_difference(served: Sequence[float], expected: Sequence[float]) -> float:
    """The largest difference, as a share of the largest expected number; infinite where a number is NaN."""
    differences = [abs(one - other) for one, other in zip(served, expected, strict=True)]
    if not any(differences):  # also where all are 0
        return 0.0
    largest = max(abs(number) for number in expected)
    return max(differences) / largest if largest and not any(map(math.isnan, differences)) else math.inf


if __name__ == "__main__":
    sys.exit(main())
