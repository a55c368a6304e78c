"""Load an unpacked archive as a TorchServe worker does, ask it for an explanation, and report.

    python -P prove_archive.py UNPACKED        (with PYTHONPATH=UNPACKED, as TorchServe sets it)

Run by `package.py` in a process that sees nothing of the repo. Prints one line of JSON: the model as the handler describes it,
the digit that it reads in a ramp of grey, by what it is differentiated, and the largest difference between the served gradient
and PyTorch's own.
"""

import importlib
import json
import sys
from pathlib import Path

import torch
from ts.context import Context, RequestProcessor
from ts.model_loader import ModelLoaderFactory

TOLERANCE = 1e-5  # in logit per unit of intensity


def main() -> int:
    """Returns the exit code: 1 where the served gradient is not PyTorch's."""
    model_dir = Path(sys.argv[1]).resolve()
    manifest = json.loads((model_dir / "MAR-INF" / "MANIFEST.json").read_text())["model"]
    service = ModelLoaderFactory.get_model_loader().load(manifest["modelName"], str(model_dir), manifest["handler"], batch_size=1)
    for module in ("handler", manifest["handler"].removesuffix(".py")):
        origin = Path(str(importlib.import_module(module).__file__)).resolve()
        if not origin.is_relative_to(model_dir):
            raise RuntimeError(f"the module {module} came from {origin}, not from the archive")
    handler = service._entry_point.__self__  # the BaseHandler: TorchServe keeps only its bound method
    height, width = handler.input_shape[1:]

    context: Context = service.context
    context.request_processor = [RequestProcessor({"explain": "True"})]
    ramp = [[(x + y) / (height + width) for x in range(width)] for y in range(height)]  # no two neighbours tie in the pools
    (body,) = handler.handle([{"body": {"data": ramp}}], context)
    reply = json.loads(body)

    pixels = torch.tensor(ramp).reshape(1, 1, height, width).requires_grad_()
    score = handler.model.cpu()(pixels)[0, reply["digit"]]
    (gradient,) = torch.autograd.grad(score, pixels)
    difference = float((gradient.squeeze() - torch.tensor(reply["explanation"]["saliency"])).abs().max())
    derivative = type(handler.differentiable).__name__
    print(json.dumps({"model": reply["model"], "digit": reply["digit"], "by": derivative, "gradient_difference": difference}))
    return int(difference > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
