"""The TorchServe handler: wiring, and nothing else.

TorchServe calls `initialize` once in a worker and `handle` once a batch. Every decision is taken for one request at a time:
whether it is a prediction or an explanation, of which classes, in which format, and whether it is an error.
"""

import logging
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler

from handler.archive import load_network, verify_files
from handler.canonical import Preparation, prepare, prepare_nothing, prepare_scaling
from handler.decode import Picture, decode_image, decode_numbers
from handler.errors import InternalError, ServiceError
from handler.reply import Maps, Reply, Result, render_error, render_result
from handler.request import Prepare, Request, parse_request
from handler.saliency import Explanation, freeze, predict_and_explain

logger = logging.getLogger(__name__)

Prepared = tuple[Request, NDArray[np.float32], dict[str, Any]]  # request, canonical pixels, preparation for the reply
Inferred = tuple[torch.Tensor, Explanation | None]  # (K,) logits, maps


class DigitHandler(BaseHandler):  # type: ignore[misc]  # ts has no types
    """Answers which class a picture is of and, where a request asks for it, which pixels said so."""

    def initialize(self, context: Context) -> None:
        """Load what the archive carries onto this worker's device, and run it once.

        Raises:
            ArchiveError: a file of the archive is missing, damaged or does not match the others.
        """
        settings = (context.model_yaml_config or {}).get("handler", {})
        properties = context.system_properties
        model_dir = Path(properties["model_dir"])
        manifest = context.manifest["model"]
        sums = verify_files(model_dir)

        # Importing BaseHandler allows TF32 on newer GPUs; exact gradients are the product.
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        if "torch_threads" in settings:
            torch.set_num_threads(int(settings["torch_threads"]))
        gpu = properties.get("gpu_id")
        self.device = torch.device(f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu")
        network = load_network(model_dir / manifest["modelFile"], model_dir / manifest["serializedFile"])
        self.model = freeze(network).to(self.device)
        self.input_shape = cast(tuple[int, int, int], network.INPUT_SHAPE)  # channels, height, width
        self.class_count = cast(int, network.CLASS_COUNT)
        self.model_description = {
            "name": context.model_name,
            "version": manifest["modelVersion"],
            "weights_sha256": sums[manifest["serializedFile"]],
        }
        predict_and_explain(self.model, torch.zeros(1, *self.input_shape, device=self.device), targets=[(None,)])
        self.manifest = context.manifest
        self.initialized = True
        logger.info("serving %s on %s", self.model_description, self.device)

    def handle(self, data: list[Any], context: Context) -> list[bytes]:
        """Answer one batch.

        Args:
            data: one row a request, as TorchServe hands it over.
            context: the requests' headers, and where replies' status and headers go.
        Returns:
            one body a request, in the same order.
        """
        headers = [context.get_all_request_header(index) for index in range(len(data))]
        prepared = [self._prepare(row, row_headers) for row, row_headers in zip(data, headers, strict=True)]
        answerable = [outcome for outcome in prepared if not isinstance(outcome, ServiceError)]
        inferred = iter(self._infer(answerable))
        replies = [
            render_error(outcome) if isinstance(outcome, ServiceError) else self._render(outcome, next(inferred))
            for outcome in prepared
        ]
        for index, reply in enumerate(replies):
            context.set_response_status(reply.status, reply.reason_phrase, index)
            context.set_response_content_type(index, reply.content_type)
            for name, value in reply.headers.items():
                context.set_response_header(index, name, value)
        return [reply.body for reply in replies]

    def _prepare(self, row: object, headers: dict[str, object]) -> Prepared | ServiceError:
        """Read one request as far as its canonical pixels. An error is this row's alone, whatever it is."""
        try:
            request = parse_request(row, headers, self.class_count)
            _, height, width = self.input_shape
            if isinstance(request.picture, bytes):
                picture = decode_image(request.picture)
            else:
                picture = decode_numbers(request.picture, height, width)
            preparation = self._choose_preparation(picture, request.options.prepare)
        except ServiceError as error:
            return error
        except Exception as error:  # noqa: BLE001  # a defect must not cost the row's neighbours their answers
            return _internal_error(error)
        return request, preparation.pixels, _describe(picture, preparation)

    def _choose_preparation(self, picture: Picture, wanted: Prepare | None) -> Preparation:
        """Numbers count as canonical unless the request says how to prepare them; images are prepared unless it says not to."""
        _, height, width = self.input_shape
        if picture.is_canonical and wanted is None:
            return prepare_nothing(picture.grey)
        if wanted is Prepare.NONE:
            return prepare_scaling(picture.grey, height, width)
        return prepare(picture.grey, height, width)

    def _infer(self, prepared: list[Prepared]) -> Sequence[Inferred | InternalError]:
        """Run the network once for all rows that can be answered."""
        if not prepared:
            return []
        try:
            batch = torch.from_numpy(np.stack([pixels for _, pixels, _ in prepared])[:, None]).to(self.device)  # (N, 1, H, W)
            targets = [request.options.target.classes if request.options.explain else () for request, _, _ in prepared]
            logits, explanations = predict_and_explain(self.model, batch, targets)
        except Exception as error:  # noqa: BLE001  # answered in this API's own form
            return [_internal_error(error)] * len(prepared)
        return list(zip(logits.cpu(), explanations, strict=True))

    def _render(self, prepared: Prepared, inferred: Inferred | InternalError) -> Reply:
        if isinstance(inferred, InternalError):
            return render_error(inferred)
        request, pixels, preparation = prepared
        logits, explanation = inferred
        maps = None
        if explanation is not None:
            maps = Maps(explanation.classes, explanation.maps.squeeze(1).cpu().numpy())  # (T, H, W)
        result = Result(logits.numpy(), maps, preparation, pixels)
        try:
            return render_result(result, request.options, request.reply_format, self.model_description)
        except ServiceError as error:
            return render_error(error)
        except Exception as error:  # noqa: BLE001  # a defect must not cost the row's neighbours their answers
            return render_error(_internal_error(error))


def _describe(picture: Picture, preparation: Preparation) -> dict[str, Any]:
    """What the reply says of the preparation."""
    description: dict[str, Any] = {"source": picture.source, "steps": list(preparation.steps), "inverted": preparation.inverted}
    if preparation.ink_box is not None:
        description["ink_box"] = list(preparation.ink_box)  # left, top, right, bottom in the client's pixels
        description["threshold"] = preparation.threshold
    return description


def _internal_error(error: Exception) -> InternalError:
    """Log where a defect lies, without its message, which may hold a client's data."""
    logger.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return InternalError("the service failed on this request; its log says where")
