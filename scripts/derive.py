"""A network -> the Python source of its one pass: scores forwards, input gradients backwards, without autograd.

    python -m scripts.derive

Forward and backward are traced from the network itself, as PyTorch differentiates it, into one graph of ATen operators. The graph
is made cheaper by four rules that hold for every network, cut into what depends on the parameters alone, on the pixels, and on
the cotangents, and written as three plain functions. `scripts.package` puts them into the archive as one_pass.py; a worker
checks them against autograd before it uses them (`handler/one_pass.py`).
"""

import argparse
import copy
import operator
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from handler.archive import build_network
from handler.one_pass import ONE_PASS_FILE, OnePass, load_one_pass, to_channels_last
from handler.saliency import freeze

ROOT = Path(__file__).resolve().parent.parent
TRACED_ROWS = 97  # in the batch of the trace: no size in a sane network, so that where it stands first it is the batch's
MAX_FEW_CHANNELS = 4  # of an input: convolutions are slow where they give so few
ROWS = "row_count"  # what stands in its place in the source
aten = torch.ops.aten

Shape = tuple[int, int, int]  # channels, height, width

HEADER = '''"""The one pass of {name}, traced from it and written by scripts/derive.py with torch {torch_version}.

`state` holds the network's parameters and buffers in the order of its state_dict.
"""

import torch

'''


def derive_one_pass(network: nn.Module, input_shape: Shape) -> str:
    """Write the source of a network's one pass.

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


def derive_and_load(network: nn.Module) -> OnePass:
    """Derive the one pass of a network that says its INPUT_SHAPE, and load it as a worker does.

    Args:
        network: frozen; on any device and of any float type, which are the pass's too.
    Raises:
        ValueError: a worker would not use it here.
    """
    shape = cast(Shape, network.INPUT_SHAPE)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ONE_PASS_FILE
        file.write_text(derive_one_pass(copy.deepcopy(network).cpu().float(), shape))
        one_pass = load_one_pass(file, network, shape)
    if not isinstance(one_pass, OnePass):
        raise ValueError("a worker would not use the one pass here: it fails or differs from autograd; the log says why")
    return one_pass


def _trace(network: nn.Module, input_shape: Shape) -> fx.Graph:
    """Trace scores and gradients into one graph; its inputs are state, pixels, cotangents."""
    names = list(network.state_dict())
    state = [to_channels_last(tensor.detach()) for tensor in network.state_dict().values()]
    pixels = to_channels_last(torch.rand(TRACED_ROWS, *input_shape))

    def score(state: list[torch.Tensor], pixels: torch.Tensor) -> Any:  # noqa: ANN401  # torch says so
        return torch.func.functional_call(network, dict(zip(names, state, strict=True)), (pixels,))

    scoring = make_fx(score)(state, pixels)
    scoring.graph.eliminate_dead_code()
    _pool_before_relu(scoring.graph)
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
    graph.eliminate_dead_code()
    return graph


# --- the rules


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
        pooled.replace_all_uses_with(moved, delete_user_cb=lambda user, moved=moved: user is not moved)
        graph.erase_node(relu)


def _drop_aliases(graph: fx.Graph) -> None:
    """Forget what only autograd needs."""
    for alias in [node for node in graph.nodes if node.target in (aten.alias.default, aten.detach.default)]:
        alias.replace_all_uses_with(alias.args[0])
        graph.erase_node(alias)


def _multiply_for_few_channels(graph: fx.Graph) -> None:
    """The gradient by the input of a convolution of few channels is a product of matrices, whose columns are then added up."""
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        gradient, pixels, kernel, _, stride, padding, dilation, transposed, _, groups, _ = cast(Sequence[Any], node.args)
        if transposed or groups != 1 or kernel.meta["val"].dim() != 4 or kernel.meta["val"].shape[1] > MAX_FEW_CHANNELS:
            continue
        kernel_count, _, *size = list(kernel.meta["val"].shape)
        with graph.inserting_before(node):
            rows = graph.call_function(aten.reshape.default, (kernel, (kernel_count, -1)))
            columns = graph.call_function(aten.t.default, (rows,))  # (channels * height * width of the kernel, kernels)
            last = graph.call_function(aten.permute.default, (gradient, (0, 2, 3, 1)))  # a view, with channels last
            flat = graph.call_function(aten.reshape.default, (last, (TRACED_ROWS, -1, kernel_count)))
            product = graph.call_function(aten.matmul.default, (columns, graph.call_function(aten.transpose.int, (flat, 1, 2))))
            added = graph.call_function(
                aten.col2im.default, (product, list(pixels.meta["val"].shape[2:]), size, dilation, padding, stride)
            )
        for user in [user for user in node.users if user.args[1] == 0]:
            user.replace_all_uses_with(added)


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


# --- the source


def _write(graph: fx.Graph) -> str:
    """Cut a graph into three functions and write them."""
    *state, pixels, cotangents = graph.find_nodes(op="placeholder")
    calls = [node for node in graph.nodes if node.op == "call_function"]
    others = [node.op for node in graph.nodes if node.op not in ("placeholder", "call_function", "output")]
    if others:
        raise ValueError(f"the trace holds {others[0]}, which is no operator")
    logits, gradients = cast(tuple[fx.Node, fx.Node], graph.output_node().args[0])

    by_pixels, by_cotangents = _descendants(pixels, calls), _descendants(cotangents, calls)
    backward = [node for node in calls if node in by_cotangents]
    forward = [node for node in calls if node in by_pixels - by_cotangents]
    fold = [node for node in calls if node not in by_pixels | by_cotangents]
    constants = _used([*state, *fold], by=[*forward, *backward])
    saved = _used([pixels, *forward], by=backward)
    return "\n\n".join(
        [
            _write_function("fold(state)", {"state": state}, fold, _tuple(constants)),
            _write_function("forward(constants, pixels)", {"constants": constants}, forward, f"{logits}, {_tuple(saved)}"),
            _write_function(
                "backward(constants, saved, cotangents)", {"constants": constants, "saved": saved}, backward, str(gradients)
            ),
        ]
    )


def _descendants(ancestor: fx.Node, calls: Sequence[fx.Node]) -> set[fx.Node]:
    """What depends on a node, itself among it."""
    found = {ancestor}
    for node in calls:  # in the order in which they are computed
        if found.intersection(node.all_input_nodes):
            found.add(node)
    return found


def _used(nodes: Sequence[fx.Node], *, by: Sequence[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if set(by).intersection(node.users)]


def _write_function(signature: str, unpacked: Mapping[str, Sequence[fx.Node]], calls: Sequence[fx.Node], result: str) -> str:
    lines = [f"def {signature}:"]
    for name, nodes in unpacked.items():
        lines.append(f"    {_tuple(nodes)} = {name}")
    written = [f"    {node} = {_write_call(node)}" for node in calls]
    if any(ROWS in line for line in written):
        lines.append(f"    {ROWS} = len({signature.rstrip(')').split(', ')[-1]})")
    lines += written
    lines.append(f"    return {result}")
    return "\n".join(lines) + "\n"


def _tuple(nodes: Sequence[fx.Node]) -> str:
    return "(" + "".join(f"{node}, " for node in nodes).rstrip() + ")"


def _write_call(node: fx.Node) -> str:
    arguments = [_write_argument(argument) for argument in node.args]
    if node.target is operator.getitem:
        return f"{arguments[0]}[{arguments[1]}]"
    arguments += [f"{name}={_write_argument(argument)}" for name, argument in node.kwargs.items()]
    return f"{_operator_name(node.target)}({', '.join(arguments)})"


def _write_argument(argument: object) -> str:
    if isinstance(argument, (list, tuple)):
        members = [_write_argument(member) for member in argument]
        if members and members[0] == str(TRACED_ROWS):
            members[0] = ROWS
        return f"({', '.join(members)}{',' * (len(members) == 1)})"
    return str(argument) if isinstance(argument, fx.Node) else repr(argument)


def _operator_name(overload: Any) -> str:  # noqa: ANN401  # torch.ops has no types
    """Name an operator by PyTorch's binding of it, where there is one: calling that takes a third of the time."""
    name = overload.overloadpacket.__name__
    for namespace, path in ((torch, "torch"), (torch._C._nn, "torch._C._nn"), (torch.Tensor, "torch.Tensor")):
        if hasattr(namespace, name):
            return f"{path}.{name}"
    return f"torch.ops.{overload}"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.derive",
        description="Print the source of a network's one pass, as scripts.package puts it into the archive.",
        epilog="example: %(prog)s --model-file model/network.py > build/one_pass.py",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model-file", type=Path, default=ROOT / "model" / "network.py", help="defines the network")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Print the source. Returns the exit code."""
    network = build_network(build_parser().parse_args(argv).model_file)
    print(derive_one_pass(network, cast(Shape, network.INPUT_SHAPE)), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
