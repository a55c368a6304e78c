"""TorchServe's own MNIST example: its stock explanation, captum's integrated gradients in 15 steps.

As published in pytorch/serve, examples/image_classifier/mnist, without the normalisation, which is inside this network. For a raw
body the stock handler explains class 0. It reads only the first request's target of a batch, so that with targets only batches of
1 are right.
"""

import torch
from torchvision import transforms
from ts.context import Context
from ts.torch_handler.image_classifier import ImageClassifier


class StockDigitClassifier(ImageClassifier):
    """Answers the digit as a bare number, and an explanation as a bare map (1, 28, 28)."""

    image_processing = transforms.Compose([transforms.ToTensor()])

    def initialize(self, context: Context) -> None:
        """Load the network. Threads are as many as published, one a core, unless the configuration says `torch_threads`."""
        settings = context.model_yaml_config.get("handler", {})
        if "torch_threads" in settings:
            torch.set_num_threads(settings["torch_threads"])
        super().initialize(context)

    def postprocess(self, data: torch.Tensor) -> list[int]:
        """Logits (N, 10) -> one digit a request."""
        return data.argmax(1).tolist()
