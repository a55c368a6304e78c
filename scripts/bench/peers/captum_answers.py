"""PNG bytes -> the digit and its captum saliency as JSON: the part that `fastapi_app` and `mosec_app` share.

captum returns attributions alone, so the logits take a forward of their own before it. orjson writes numpy arrays directly.
"""

from collections.abc import Sequence
from io import BytesIO

import numpy as np
import orjson
import safetensors.torch
import torch
from captum.attr import Saliency
from PIL import Image

from model.network import DigitNetwork
from scripts.paths import WEIGHTS_FILE


class CaptumAnswers:
    """The committed network behind captum: on one thread, or on a GPU where one is visible, without TF32."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        torch.backends.cudnn.allow_tf32 = False
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.network = DigitNetwork()
        self.network.load_state_dict(safetensors.torch.load_file(WEIGHTS_FILE))
        self.network.eval().requires_grad_(False).to(self.device)
        self.saliency = Saliency(self.network)

    def answer(self, images: Sequence[bytes], *, explain: bool) -> list[bytes]:
        """Answer a batch.

        Args:
            images: PNG files, grey, 28x28.
            explain: add the signed gradient of the predicted class's logit, nested 28x28, to each.
        Returns:
            one JSON text an image.
        """
        levels = np.stack([np.asarray(Image.open(BytesIO(image))) for image in images])  # (N, 28, 28)
        pixels = torch.from_numpy(levels).to(self.device)[:, None].float() / 255  # (N, 1, 28, 28)
        with torch.no_grad():
            logits = self.network(pixels)  # (N, 10)
        digits = logits.argmax(dim=1)  # (N,)
        columns = {"digit": digits, "probabilities": logits.softmax(dim=1), "logits": logits}
        if explain:
            columns["explanation"] = self.saliency.attribute(pixels.requires_grad_(), target=digits, abs=False)[:, 0].detach()
        arrays = {name: column.cpu().numpy() for name, column in columns.items()}
        return [
            orjson.dumps({name: array[row] for name, array in arrays.items()}, option=orjson.OPT_SERIALIZE_NUMPY)
            for row in range(len(images))
        ]
