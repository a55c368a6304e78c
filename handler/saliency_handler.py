"""The TorchServe handler: wiring, and nothing else.

TorchServe calls `initialize` once in a worker and `handle` once a batch. Every decision is taken for one request at a time:
whether it is a prediction or an explanation, of which classes, in which format, and whether it is an error.
"""

import logging
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler

from handler.errors import OVERLOADED, InternalError, Overloaded, ServiceError
from handler.fair_share import FairShare, by_size, may_be_costly
from handler.gradients.compiled import COMPILED_PASS_FILE, load_compiled_pass
from handler.gradients.cuda_graphs import record
from handler.gradients.explain import Explanation, compute_exactly, freeze, predict_and_explain
from handler.images.budget import Stopwatch
from handler.images.decoder_process import DECODER_PROCESS
from handler.images.framing import Framing
from handler.images.preparation import ImageWarning, PreparedImage
from handler.limits import MAX_BATCH_SECONDS, MAX_FORWARD_IMAGES, MAX_GRADIENTS
from handler.preprocess import PreparedRequest, estimate_seconds, preprocess
from handler.protocol.describe import describe_service
from handler.protocol.options import Options
from handler.protocol.reply import REPLY_HEADERS, Reply, Result, fit_batch, render_description, render_error, render_results
from handler.protocol.request import ROUTE_HEADER, Request, is_describe_request, parse_request, read_correlation_id
from handler.runtime.archive import input_shape_of, load_network, mean_pixel_of, read_class_names, verify_files
from handler.runtime.calibration import read_calibration
from handler.runtime.malloc import IdleTrimmer, keep_freed_memory
from handler.runtime.metrics import Meter, Step, TimedPasses, answer_of
from handler.torchserve import adapt_worker, emitter_to_frontend, leave_with_a_lost_gpu

logger = logging.getLogger(__name__)

# TorchServe puts an id of its own into every reply's X-Request-Id, over anything that stands there.
CORRELATION_HEADER = "X-Correlation-Id"
EXPOSED_HEADERS = ", ".join((CORRELATION_HEADER, "X-Request-Id", *REPLY_HEADERS))

# Of one image: logits and probabilities (K,), the maps, and what the scores say against the answer.
Inferred = tuple[NDArray[np.float32], NDArray[np.float64], Explanation | None, tuple[ImageWarning, ...]]


class SaliencyHandler(BaseHandler):  # type: ignore[misc]  # ts has no types
    """Answers which class an image is of and, where a request asks for it, which pixels decided."""

    def initialize(self, context: Context) -> None:
        """Load what the archive carries onto this worker's device, and run it once.

        Raises:
            ArchiveError: a file of the archive is missing, damaged or does not match the others.
            ValueError: a setting of the framing is wrong.
        """
        settings = (context.model_yaml_config or {}).get("handler", {})
        properties = context.system_properties
        model_dir = Path(properties["model_dir"])
        manifest = context.manifest["model"]
        sums = verify_files(model_dir)

        compute_exactly()  # importing BaseHandler allows TF32 on newer GPUs; exact gradients are the product
        keep_freed_memory()
        adapt_worker(context, log_batches=bool(settings.get("log_batches")))
        if "torch_threads" in settings:
            torch.set_num_threads(int(settings["torch_threads"]))
            # numpy's BLAS has threads of its own, which after each product spin for a while on cores that others could use.
            threadpool_limits(int(settings["torch_threads"]), user_api="blas")
        gpu = properties.get("gpu_id")
        self.device = torch.device(f"cuda:{gpu}" if gpu is not None and torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        network = load_network(model_dir / manifest["modelFile"], model_dir / manifest["serializedFile"])
        self.model = freeze(network).to(self.device)
        self.input_shape = input_shape_of(network)
        self.class_count = cast(int, network.CLASS_COUNT)
        self.class_names = read_class_names(model_dir, self.class_count)
        self.mean_pixel = mean_pixel_of(network, self.input_shape[0])
        self.framing = Framing.from_settings(settings.get("framing"))
        self.calibration = read_calibration(model_dir)
        self.model_description = {
            "name": context.model_name,
            "version": manifest["modelVersion"],
            "weights_sha256": sums[manifest["serializedFile"]],
        }
        self.differentiable = load_compiled_pass(model_dir / COMPILED_PASS_FILE, self.model, self.input_shape)
        if self.device.type == "cuda" and settings.get("cuda_graphs", True):
            self.differentiable = record(self.differentiable, self.model, self.input_shape)
        DECODER_PROCESS.start()
        self.manifest = context.manifest
        self.meter = Meter(self.class_count, emitter_to_frontend(context))
        self.trimmer = IdleTrimmer()
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
        self.meter.start()
        self.deadline = time.monotonic() + MAX_BATCH_SECONDS
        headers = [context.get_all_request_header(index) for index in range(len(data))]
        outcomes = self._preprocess(data, headers)
        self.meter.lap(Step.DECODE)
        inferred = self._infer([outcome for outcome in outcomes if isinstance(outcome, PreparedRequest)])
        replies = fit_batch(
            [
                self._render(outcome, list(islice(inferred, len(outcome.images))))
                if isinstance(outcome, PreparedRequest)
                else outcome
                for outcome in outcomes
            ]
        )
        self.meter.lap(Step.ENCODE)
        answers = [
            answer_of(
                outcome if isinstance(outcome, PreparedRequest) else None,
                reply,
                explain_route=row_headers.get(ROUTE_HEADER) == "True",
            )
            for outcome, reply, row_headers in zip(outcomes, replies, headers, strict=True)
        ]
        self.meter.finish(answers)
        for index, reply in enumerate(replies):
            context.set_response_status(reply.status, reply.reason_phrase, index)
            context.set_response_content_type(index, reply.content_type)
            for name, value in reply.headers.items():
                context.set_response_header(index, name, value)
            if any(name.lower() == "origin" for name in headers[index]):  # a script in a browser, which may read no others
                context.set_response_header(index, "Access-Control-Expose-Headers", EXPOSED_HEADERS)
            correlation_id = read_correlation_id(headers[index])
            if correlation_id is not None:
                context.set_response_header(index, CORRELATION_HEADER, correlation_id)
                logger.info(
                    "correlation_id=%s request_id=%s kind=%s method=%s status=%d error=%s",
                    *(correlation_id, context.get_request_id(index), answers[index].kind, answers[index].method),
                    *(reply.status, reply.error),
                )
        self.trimmer.note_work()
        return [reply.body for reply in replies]

    def results_of(self, rows: Sequence[object], headers: Sequence[dict[str, object]]) -> list[list[Result] | ServiceError]:
        """Answer one batch without writing replies, for a program that holds this handler in its own process.

        Args:
            rows: one a request, as TorchServe hands them to `handle`.
            headers: of these requests.
        Returns:
            for each request the results of its images, or the error that its client would get, in the same order.
        """
        self.meter.start()
        self.deadline = time.monotonic() + MAX_BATCH_SECONDS
        outcomes = [self._prepare(row, row_headers) for row, row_headers in zip(rows, headers, strict=True)]
        inferred = self._infer([outcome for outcome in outcomes if isinstance(outcome, PreparedRequest)])
        return [
            _results(outcome, list(islice(inferred, len(outcome.images)))) if isinstance(outcome, PreparedRequest) else outcome
            for outcome in outcomes
        ]

    def _preprocess(self, rows: Sequence[object], headers: Sequence[dict[str, object]]) -> list[PreparedRequest | Reply]:
        """Read a batch's requests as far as the network's pixels, or write the replies that need no network.

        Those who ask for little come first, so that what is refused for want of time is what takes the most of it.
        """
        share = FairShare()
        read = {index: self._read(rows[index], headers[index], share) for index in by_size(rows)}
        costs = {
            index: estimate_seconds(one, *self.input_shape[1:]) if isinstance(one, Request) and len(rows) > 1 else 0.0
            for index, one in read.items()
        }
        outcomes: dict[int, PreparedRequest | Reply] = {}
        for index in sorted(read, key=costs.__getitem__):
            one = read[index]
            if isinstance(one, Request):
                prepared = self._prepare_images(one, share, costs[index])
                outcomes[index] = prepared if isinstance(prepared, PreparedRequest) else render_error(prepared)
            else:
                outcomes[index] = one
        return [outcomes[index] for index in range(len(rows))]

    def _read(self, row: object, headers: dict[str, object], share: FairShare) -> Request | Reply:
        """Read one request, or write the reply that needs no images. An error is this row's alone, whatever it is."""
        stopwatch = Stopwatch()
        try:
            if is_describe_request(row, headers):
                return render_description(self._describe())
            self._require_time()
            if share.is_spent and may_be_costly(row, headers):
                raise Overloaded(OVERLOADED)
            return parse_request(row, headers, self.class_count)
        except Exception as error:  # noqa: BLE001  # a defect must not cost the row's neighbours their answers
            return render_error(_service_error(error))
        finally:
            share.count(stopwatch.seconds())

    def _prepare_images(self, request: Request, share: FairShare, seconds: float) -> PreparedRequest | ServiceError:
        """Decode and prepare a request's images, which will take about so long. An error is this request's alone."""
        try:
            share.admit(seconds)
            _, height, width = self.input_shape
            return preprocess(request, height, width, has_mean=self.mean_pixel is not None, framing=self.framing)
        except Exception as error:  # noqa: BLE001  # a defect must not cost the row's neighbours their answers
            return _service_error(error)

    def _prepare(self, row: object, headers: dict[str, object]) -> PreparedRequest | ServiceError:
        """Read one request as far as the network's pixels, whatever it shares a batch with. An error is this row's alone."""
        try:
            self._require_time()
            request = parse_request(row, headers, self.class_count)
        except Exception as error:  # noqa: BLE001  # a defect must not cost the row's neighbours their answers
            return _service_error(error)
        return self._prepare_images(request, FairShare(), 0.0)

    def _describe(self) -> dict[str, Any]:
        _, height, width = self.input_shape
        return describe_service(self.model_description, height, width, self.class_names)

    def _require_time(self) -> None:
        """Refuse what is left of a batch that has taken too long."""
        if time.monotonic() > self.deadline:
            raise Overloaded(OVERLOADED)

    def _infer(self, requests: Sequence[PreparedRequest]) -> Iterator[Inferred | ServiceError]:
        """Run the network for all images that can be answered: once, unless they are too many, or too much work, for that."""
        passes = TimedPasses(self.differentiable, self.meter, self.device)
        for part in _split([pair for one in requests for pair in zip(one.images, one.options, strict=True)]):
            self.meter.lap(Step.ENCODE)  # of what was computed before
            try:
                self._require_time()
                pixels = np.stack([image.pixels for image, _ in part])[:, None]  # (N, 1, H, W)
                targets = [options.target.classes if options.explain else () for _, options in part]
                methods = [options.method for _, options in part]
                logits, explanations = predict_and_explain(
                    passes, torch.from_numpy(pixels).to(self.device), targets, methods, self.mean_pixel
                )
                self.meter.see(logits)
                self.meter.lap(Step.MAP)
                yield from zip(
                    logits, self.calibration.probabilities(logits), explanations, self.calibration.warnings(logits), strict=True
                )
            except ServiceError as error:
                yield from [error] * len(part)
            except Exception as error:  # noqa: BLE001  # answered in this API's own form
                failure = _internal_error(error)
                leave_with_a_lost_gpu(self.device)
                yield from [failure] * len(part)

    def _render(self, prepared: PreparedRequest, inferred: Sequence[Inferred | ServiceError]) -> Reply:
        """Write the reply to one request. An error is this row's alone, whatever it is."""
        try:
            self._require_time()
            results = _results(prepared, inferred)
            if isinstance(results, ServiceError):
                raise results
            request = prepared.request
            return render_results(
                results, request.reply_format, self.model_description, listed=prepared.listed, infer=request.infer
            )
        except Exception as error:  # noqa: BLE001  # a defect must not cost the row's neighbours their answers
            return _render_exception(error, as_text=prepared.request.infer is not None)


def _results(prepared: PreparedRequest, inferred: Sequence[Inferred | ServiceError]) -> list[Result] | ServiceError:
    """Put together what is known of one request's images."""
    try:
        return [_result(*one) for one in zip(prepared.images, prepared.options, inferred, strict=True)]
    except Exception as error:  # noqa: BLE001  # a defect must not cost the row's neighbours their answers
        return _service_error(error)


def _result(image: PreparedImage, options: Options, inferred: Inferred | ServiceError) -> Result:
    """Put together what is known of one image, its maps without their axis of channels and in the pixels that were asked for."""
    if isinstance(inferred, ServiceError):
        raise inferred
    logits, probabilities, explanation, warnings = inferred
    if explanation is not None:
        maps = explanation.maps.squeeze(1)  # (T, H, W)
        if image.sent is not None:
            maps = options.method.finish(image.pull_back(explanation.gradients.squeeze(1)), image.sent)
        explanation = replace(explanation, maps=maps)
    return Result(options, image, logits, probabilities, explanation, image.warnings + warnings)


def _split(pairs: Sequence[tuple[PreparedImage, Options]]) -> Iterator[list[tuple[PreparedImage, Options]]]:
    """Split a batch into parts of at most MAX_FORWARD_IMAGES images, and no more gradients than one request may ask for."""
    part: list[tuple[PreparedImage, Options]] = []
    gradient_count = 0
    for image, options in pairs:
        gradient_count += options.gradient_count
        if len(part) == MAX_FORWARD_IMAGES or (part and gradient_count > MAX_GRADIENTS):
            yield part
            part, gradient_count = [], options.gradient_count
        part.append((image, options))
    if part:
        yield part


def _render_exception(error: Exception, *, as_text: bool = False) -> Reply:
    """Write the reply to an error."""
    shown = _service_error(error)
    shown.as_text = shown.as_text or as_text
    return render_error(shown)


def _service_error(error: Exception) -> ServiceError:
    """Give an error as a client gets to know it: its own mistake, too little memory, or that there is a defect here."""
    if isinstance(error, MemoryError):  # it may do later, beside less
        return Overloaded(OVERLOADED)
    return error if isinstance(error, ServiceError) else _internal_error(error)


def _internal_error(error: Exception) -> InternalError:
    """Log where a defect lies, without its message, which may hold a client's data."""
    logger.error("%s\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
    return InternalError("the service failed on this request; its log says where")
