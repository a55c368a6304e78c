"""TorchServe's own MNIST example with the vanilla gradient: captum's `Saliency` in place of integrated gradients.

See `stock_handler`. An archive holds one handler module, so this one repeats what the two share.
"""

from typing import Any

import torch
from captum.attr import Saliency
from torchvision import transforms
from ts.context import Context
from ts.torch_handler.image_classifier import ImageClassifier


class SaliencyDigitClassifier(ImageClassifier):
    """Answers a digit as a bare number, and an explanation as a bare map (1, 28, 28)."""

    image_processing = transforms.Compose([transforms.ToTensor()])

    def initialize(self, context: Context) -> None:
        """Load the network; one thread a worker and no TF32, as in the service that it is compared with."""
        torch.set_num_threads(1)
        torch.backends.cudnn.allow_tf32 = False  # TorchServe's base handler allows it
        super().initialize(context)
        self.saliency = Saliency(self.model)

    def get_insights(self, tensor_data: torch.Tensor, _: object, target: int = 0) -> list[Any]:
        """Pixels (N, 1, 28, 28) -> their signed gradients of the target's logit, as nested lists."""
        gradients: torch.Tensor = self.saliency.attribute(tensor_data, target=target, abs=False)
        return gradients.tolist()

    def postprocess(self, data: torch.Tensor) -> list[int]:
        """Logits (N, 10) -> one digit a request."""
        return data.argmax(1).tolist()
