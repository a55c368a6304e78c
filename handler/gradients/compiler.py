"""A network -> the Python source of its compiled pass: scores forwards, input gradients backwards, without autograd.

Forward and backward are traced from the network itself, as PyTorch differentiates it, into one graph of ATen operators. The graph
is made cheaper by rules that hold for every network, a function each; cut into what depends on the parameters alone, on the
pixels, and on the cotangents; and written as three plain functions. `scripts.packaging` puts them into the archive as
compiled_pass.py; a worker checks them against autograd before it uses them (`compiled`).
"""

import copy
import functools
import operator
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from handler.gradients.compiled import COMPILED_PASS_FILE, CompiledPass, load_compiled_pass, to_channels_last
from handler.gradients.explain import freeze

TRACED_ROWS = 97  # in the batch of the trace: no size in a sane network, so that where it stands first it is the batch's
MAX_FEW_CHANNELS = 4  # of an input: convolutions are slow where they take or give so few
ROWS = "row_count"  # what stands in its place in the source
aten = torch.ops.aten
RESHAPES = (aten.view.default, aten._unsafe_view.default, aten.reshape.default)

Shape = tuple[int, int, int]  # channels, height, width

HEADER = '''"""The compiled pass of {name}, traced from it by handler.gradients.compiler with torch {torch_version}.

`state` holds the network's parameters and buffers in the order of its state_dict.
"""

import torch

'''


def compile_pass(network: nn.Module, input_shape: Shape) -> str:
    """Write the source of a network's compiled pass.

    Args:
        network: takes float (N, C, H, W), returns (N, K) logits.
        input_shape: C, H, W.
    Returns:
        Python source of `fold(state) -> constants`, `forward(constants, pixels) -> (logits, saved)` and
        `backward(constants, saved, cotangents) -> gradients`, where cotangents (N, K) is by how much each logit counts, and
        gradients (N, C, H, W) is the derivative of the weighted sum of each row's logits by its pixels. Each of `saved` has the
        rows of the batch as its first axis.
    Raises:
        ValueError: the network's trace holds something that is no operator.
    """
    graph = _trace(freeze(network), input_shape)
    return HEADER.format(name=type(network).__name__, torch_version=torch.__version__) + _write(graph)


def compile_and_load(network: nn.Module) -> CompiledPass:
    """Derive the compiled pass of a network that says its INPUT_SHAPE, and load it as a worker does.

    Args:
        network: frozen; on any device and of any float type, which are the pass's too.
    Raises:
        ValueError: a worker would not use it here.
    """
    shape = cast(Shape, network.INPUT_SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / COMPILED_PASS_FILE
        file.write_text(compile_pass(copy.deepcopy(network).cpu().float(), shape))
        compiled_pass = load_compiled_pass(file, network, shape)
    if not isinstance(compiled_pass, CompiledPass):
        raise ValueError("a worker would not use the compiled pass here: it fails or differs from autograd; the log says why")
    return compiled_pass


def _trace(network: nn.Module, input_shape: Shape) -> fx.Graph:
    """Trace scores and gradients into one graph; its inputs are state, pixels, cotangents."""
    names = list(network.state_dict())
    state = [to_channels_last(tensor.detach()) for tensor in network.state_dict().values()]
    pixels = to_channels_last(torch.rand(TRACED_ROWS, *input_shape))

    def score(state: list[torch.Tensor], pixels: torch.Tensor) -> Any:  # noqa: ANN401  # torch says so
        return torch.func.functional_call(network, dict(zip(names, state, strict=True)), (pixels,))

    scoring = make_fx(score)(state, pixels)
    scoring.graph.eliminate_dead_code()
    _scale_kernels(scoring.graph)
    _pool_before_relu(scoring.graph)
    _flatten_with_channels_last(scoring.graph)
    scoring.graph.eliminate_dead_code()
    scoring.recompile()

    def differentiate(
        state: list[torch.Tensor], pixels: torch.Tensor, cotangents: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = pixels.detach().requires_grad_()
        logits = scoring(state, pixels)
        (gradients,) = torch.autograd.grad(logits, pixels, cotangents)
        return logits, gradients

    graph = make_fx(differentiate)(state, pixels, torch.rand_like(score(state, pixels))).graph
    for node, name in zip(graph.find_nodes(op="placeholder"), [*names, "pixels", "cotangents"], strict=True):
        node._rename(name.replace(".", "_"))
    _drop_aliases(graph)
    _multiply_for_few_channels(graph)
    graph.eliminate_dead_code()
    _gather_instead_of_scatter(graph)
    _unpool(graph)
    _leave_layouts_open(graph)
    graph.eliminate_dead_code()
    return graph


# --- rules for the scores, before they are differentiated; autograd makes the gradients accordingly


def _scale_kernels(graph: fx.Graph) -> None:
    """convolve(x / s, kernel) -> convolve(x, kernel / s), for a number s: the kernel is divided once, when it is loaded."""
    by_pixels = _by_pixels(graph)
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        scaled, kernel = cast(Sequence[Any], node.args[:2])
        if scaled.target not in (aten.div.Tensor, aten.mul.Tensor) or kernel in by_pixels:
            continue
        unscaled, number = scaled.args
        if isinstance(number, fx.Node) and number not in by_pixels and number.meta["val"].dim() == 0:
            with graph.inserting_before(node):
                scaled_kernel = graph.call_function(scaled.target, (kernel, number))
            node.args = (unscaled, scaled_kernel, *node.args[2:])


def _pool_before_relu(graph: fx.Graph) -> None:
    """max_pool(relu(x)) -> relu(max_pool(x)): the same numbers and gradients, and less for ReLU to do."""
    for relu in graph.find_nodes(op="call_function", target=aten.relu.default):
        users = list(relu.users)
        if len(users) != 1 or users[0].target is not aten.max_pool2d_with_indices.default:
            continue
        (pool,) = users
        pool.replace_input_with(relu, relu.args[0])
        (pooled,) = pool.users  # the values; the indices have no user before there is a backward
        with graph.inserting_after(pooled):
            moved = graph.call_function(aten.relu.default, (pooled,))
        moved.meta = pooled.meta
        pooled.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)
        graph.erase_node(relu)


def _flatten_with_channels_last(graph: fx.Graph) -> None:
    """flatten(x) @ weight -> x as it lies in memory @ weight with its rows in that order."""
    by_pixels = _by_pixels(graph)
    for product in [node for node in graph.nodes if node.target in (aten.addmm.default, aten.mm.default)]:
        *bias, flat, weight = cast(Sequence[Any], product.args)
        if flat.target not in RESHAPES or weight in by_pixels:
            continue
        image = flat.args[0].args[0] if flat.args[0].target is aten.clone.default else flat.args[0]
        shape = image.meta["val"].shape
        if len(shape) == 4 and flat.meta["val"].shape == (TRACED_ROWS, shape[1:].numel()):
            _replace(product, functools.partial(_multiply_flat, shape=shape[1:]), image, weight, *bias)


def _multiply_flat(image: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    columns = weight.t().reshape(-1, *shape).permute(0, 2, 3, 1).flatten(1).t()  # (height * width * channels, K)
    flat = image.permute(0, 2, 3, 1).flatten(1)  # (N, height * width * channels), a view
    return torch.addmm(bias[0], flat, columns) if bias else flat @ columns


# --- rules for scores and gradients


def _drop_aliases(graph: fx.Graph) -> None:
    """Forget what only autograd needs."""
    for alias in [node for node in graph.nodes if node.target in (aten.alias.default, aten.detach.default)]:
        alias.replace_all_uses_with(alias.args[0])
        graph.erase_node(alias)


def _multiply_for_few_channels(graph: fx.Graph) -> None:
    """A convolution of few channels of stride 1 is a product of matrices, and so is the gradient by its input."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        pixels, kernel, bias, *how = cast(Sequence[Any], node.args)
        if _has_few_channels(kernel, *how):
            multiply = functools.partial(_convolve_by_product, padding=how[1], dilation=how[2])
            _replace(node, multiply, pixels, kernel, *([] if bias is None else [bias]))
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        gradient, _, kernel, _, *how, _ = cast(Sequence[Any], node.args)
        if _has_few_channels(kernel, *how):
            multiply = functools.partial(_convolve_back_by_product, padding=how[1], dilation=how[2])
            for user in [user for user in node.users if user.args[1] == 0]:
                _replace(user, multiply, gradient, kernel)


def _has_few_channels(kernel: fx.Node, stride: Sequence[int], *how: Any) -> bool:  # noqa: ANN401  # of many types
    _, _, transposed, _, groups = how
    shape = kernel.meta["val"].shape
    return not transposed and groups == 1 and set(stride) == {1} and len(shape) == 4 and shape[1] <= MAX_FEW_CHANNELS


def _convolve_by_product(
    pixels: torch.Tensor, kernel: torch.Tensor, *bias: torch.Tensor, padding: Sequence[int], dilation: Sequence[int]
) -> torch.Tensor:
    """Each row of the right matrix is the image, shifted: long runs of memory, which are copied fast."""
    kernel_count, _, *size = kernel.shape
    padded = torch.constant_pad_nd(pixels, (padding[1], padding[1], padding[0], padding[0]))
    height, width = (length - (taps - 1) * step for length, taps, step in zip(padded.shape[2:], size, dilation, strict=True))
    shifted = padded.unfold(2, height, dilation[0]).unfold(3, width, dilation[1])  # (N, C, *size, height, width), a view
    windows = shifted.reshape(len(pixels), -1, height * width).transpose(1, 2)  # (N, height * width, C * taps)
    columns = kernel.reshape(kernel_count, -1).t().contiguous().unsqueeze(0).expand(len(pixels), -1, -1)
    product = torch.baddbmm(bias[0].reshape(1, 1, -1), windows, columns) if bias else torch.bmm(windows, columns)
    return product.reshape(len(pixels), height, width, kernel_count).permute(0, 3, 1, 2)  # channels last


def _convolve_back_by_product(
    gradient: torch.Tensor, kernel: torch.Tensor, *, padding: Sequence[int], dilation: Sequence[int]
) -> torch.Tensor:
    """What each tap of the kernel adds to the pixels, for all taps at once; then the sum over the taps, each shifted."""
    kernel_count, channels, *size = kernel.shape
    top, left = ((taps - 1) * step - pad for taps, step, pad in zip(size, dilation, padding, strict=True))
    padded = torch.constant_pad_nd(gradient, (left, left, top, top)) if top or left else gradient
    rows = kernel.flip(2, 3).reshape(kernel_count, -1).t().contiguous().unsqueeze(0).expand(len(gradient), -1, -1)
    by_tap = torch.bmm(rows, padded.reshape(len(gradient), kernel_count, -1))  # (N, C * taps, height * width)
    by_tap = by_tap.reshape(len(gradient), channels, *size, *padded.shape[2:])
    height, width = (length - (taps - 1) * step for length, taps, step in zip(padded.shape[2:], size, dilation, strict=True))
    *batch, row_stride, column_stride, down, right = by_tap.stride()
    shifted = by_tap.as_strided(  # tap (i, j) counts for pixel (y, x) where it stands at (y + i * dilation, x + j * dilation)
        (len(gradient), channels, *size, height, width),
        (*batch, row_stride + dilation[0] * down, column_stride + dilation[1] * right, down, right),
    )
    return shifted.reshape(len(gradient), channels, -1, height * width).sum(2).reshape(len(gradient), channels, height, width)


def _gather_instead_of_scatter(graph: fx.Graph) -> None:
    """The gradient by the input of a convolution of stride 1 is a convolution by its kernel turned round, and faster as one."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        gradient, _, kernel, _, stride, padding, dilation, transposed, _, groups, _ = cast(Sequence[Any], node.args)
        size = kernel.meta["val"].shape[2:]
        remaining = [length - 1 - pad for length, pad in zip(size, padding, strict=True)]
        if transposed or groups != 1 or set(stride) != {1} or set(dilation) != {1} or min(remaining) < 0:
            continue
        by_input = [user for user in node.users if user.args[1] == 0]
        with graph.inserting_before(node):
            turned = graph.call_function(aten.flip.default, (kernel, list(range(2, 2 + len(size)))))
            turned = graph.call_function(aten.transpose.int, (turned, 0, 1))
            convolved = graph.call_function(
                aten.convolution.default, (gradient, turned, None, stride, remaining, dilation, False, [0] * len(size), 1)
            )
        for user in by_input:
            user.replace_all_uses_with(convolved)


def _unpool(graph: fx.Graph) -> None:
    """Where no two windows of a max pool overlap, its gradient is put where the maxima were: the pool's input is not needed."""
    for node in graph.find_nodes(op="call_function", target=aten.max_pool2d_with_indices_backward.default):
        gradient, pooled, size, stride, _, dilation, _, indices = cast(Sequence[Any], node.args)
        if set(dilation) != {1} or any(step < length for step, length in zip(stride or size, size, strict=True)):
            continue
        with graph.inserting_before(node):
            unpooled = graph.call_function(aten.max_unpool2d.default, (gradient, indices, list(pooled.meta["val"].shape[2:])))
        node.replace_all_uses_with(unpooled)


def _leave_layouts_open(graph: fx.Graph) -> None:
    """Where the trace had a view or a copy, another device's layout may need the other: reshape takes what it needs."""
    for node in [node for node in graph.nodes if node.target in RESHAPES]:
        copied = node.args[0].target is aten.clone.default
        node.args = (node.args[0].args[0] if copied else node.args[0], *node.args[1:])
        node.target = aten.reshape.default


# --- what the rules have in common


def _by_pixels(graph: fx.Graph) -> set[fx.Node]:
    """What depends on the pixels, in the graph of the scores."""
    *_, pixels = graph.find_nodes(op="placeholder")
    return _descendants([pixels], list(graph.nodes))


def _replace(node: fx.Node, function: Callable[..., torch.Tensor], *inputs: fx.Node) -> None:
    """Put the operators of a function of tensors in the place of a node."""
    values = [given.meta["val"] for given in inputs]
    traced = make_fx(function)(*(torch.empty_strided(value.shape, value.stride()) for value in values)).graph
    with node.graph.inserting_before(node):
        result = node.graph.graph_copy(traced, dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True)))
    node.replace_all_uses_with(cast(fx.Node, result))


# --- the source


def _write(graph: fx.Graph) -> str:
    """Cut a graph into three functions and write them."""
    *state, pixels, cotangents = graph.find_nodes(op="placeholder")
    calls = [node for node in graph.nodes if node.op == "call_function"]
    others = [node.op for node in graph.nodes if node.op not in ("placeholder", "call_function", "output")]
    if others:
        raise ValueError(f"the trace holds {others[0]}, which is no operator")
    logits, gradients = cast(tuple[fx.Node, fx.Node], graph.output_node().args[0])

    repeated = [node for node in calls if any(_is_of_batch(argument) for argument in node.args)]  # for each row: no constants
    by_pixels, by_cotangents = _descendants([pixels, *repeated], calls), _descendants([cotangents], calls)
    backward = [node for node in calls if node in by_cotangents]
    forward = [node for node in calls if node in by_pixels - by_cotangents]
    fold = [node for node in calls if node not in by_pixels | by_cotangents]
    constants = _used([*state, *fold], by=[*forward, *backward])
    saved = _used([pixels, *forward], by=backward)
    return "\n\n".join(
        [
            _write_function("fold", {"state": state}, None, fold, constants, _list(constants)),
            _write_function(
                "forward", {"constants": constants}, "pixels", forward, [logits, *saved], f"{logits}, {_list(saved)}"
            ),
            _write_function(
                "backward", {"constants": constants, "saved": saved}, "cotangents", backward, [gradients], str(gradients)
            ),
        ]
    )


def _descendants(ancestors: Sequence[fx.Node], calls: Sequence[fx.Node]) -> set[fx.Node]:
    """What depends on any of some nodes, these among it."""
    found = set(ancestors)
    for node in calls:  # in the order in which they are computed
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def _used(nodes: Sequence[fx.Node], *, by: Sequence[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if set(by).intersection(node.users)]


def _write_function(
    name: str,
    unpacked: Mapping[str, Sequence[fx.Node]],
    batch: str | None,
    calls: Sequence[fx.Node],
    kept: Sequence[fx.Node],
    result: str,
) -> str:
    """Write a function that makes some calls, in which each tensor that is not kept is freed after its last use."""
    parameters = [f"{given}: list[torch.Tensor]" for given in unpacked] + ([f"{batch}: torch.Tensor"] if batch else [])
    lines = [f"def {name}({', '.join(parameters)}):"]
    lines += [f"    ({', '.join(map(str, nodes))},) = {given}" for given, nodes in unpacked.items() if nodes]
    written = []
    for place, node in enumerate(calls):
        written.append(f"    {node} = {_write_call(node)}")
        later = {*kept, *(given for call in calls[place + 1 :] for given in call.all_input_nodes)}
        done = [given for given in node.all_input_nodes if given in calls and given not in later]
        if done:  # the next one that is as large then takes its memory, which caches still hold
            written.append(f"    del {', '.join(map(str, done))}")
    if any(ROWS in line for line in written):
        lines.append(f"    {ROWS} = len({batch})")
    lines += written
    lines.append(f"    return {result}")
    return "\n".join(lines) + "\n"


def _list(nodes: Sequence[fx.Node]) -> str:
    return f"[{', '.join(str(node) for node in nodes)}]"


def _write_call(node: fx.Node) -> str:
    """Write a call by PyTorch's binding of the operator, where there is one: that takes a third of the time."""
    arguments = [_write_argument(argument) for argument in node.args]
    if node.target is operator.getitem:
        return f"{arguments[0]}[{arguments[1]}]"
    arguments += [f"{name}={_write_argument(argument)}" for name, argument in node.kwargs.items()]
    packet = cast(Any, node.target).overloadpacket
    name = packet.__name__
    for namespace, path in ((torch, "torch"), (torch._C._nn, "torch._C._nn")):
        if hasattr(namespace, name):
            return f"{path}.{name}({', '.join(arguments)})"
    if hasattr(torch.Tensor, name):
        return f"{arguments[0]}.{name}({', '.join(arguments[1:])})"
    return f"torch.ops.{node.target}({', '.join(arguments)})"


def _is_of_batch(argument: object) -> bool:
    """Whether an argument is a shape whose first axis is the batch's rows."""
    return isinstance(argument, (list, tuple)) and tuple(argument[:1]) == (TRACED_ROWS,)


def _write_argument(argument: object) -> str:
    if isinstance(argument, (list, tuple)):
        members = [_write_argument(member) for member in argument]
        if _is_of_batch(argument):
            members[0] = ROWS
        return f"({', '.join(members)}{',' * (len(members) == 1)})"
    return str(argument) if isinstance(argument, fx.Node) else repr(argument)
