"""Load an unpacked archive as a TorchServe worker does, ask it for an explanation, and report.

    python -P smoke_test.py UNPACKED        (with PYTHONPATH=UNPACKED, as TorchServe sets it)

`package.py` runs it in a process that sees nothing of the repo. Prints one line of JSON: the model as the handler describes it,
the digit that it predicts for the archive's own image, what differentiates it, and the largest difference between its logits and
gradient and those of the archive's reference answer.
"""

import importlib
import itertools
import json
import sys
from pathlib import Path

from ts.context import Context, RequestProcessor
from ts.model_loader import ModelLoaderFactory

TOLERANCE = 5e-5  # in logits, and in logit per unit of intensity: float32 beside float64, rounded


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

    served = [*reply["logits"], *itertools.chain(*reply["explanation"]["saliency"])]
    expected = [*reference["logits"], *itertools.chain(*reference["saliency"])]
    difference = max(abs(one - other) for one, other in zip(served, expected, strict=True))
    kept = reply["digit"] == reference["digit"] and reply["model"]["weights_sha256"] == reference["weights_sha256"]
    derivative = type(handler.differentiable).__name__
    print(json.dumps({"model": reply["model"], "digit": reply["digit"], "by": derivative, "difference": difference}))
    return int(not kept or difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
