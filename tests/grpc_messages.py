"""The messages of TorchServe's gRPC services, with the fields that the tests use, and requests made of them."""

from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

INFERENCE = "/org.pytorch.serve.grpc.inference.InferenceAPIsService"
OPEN_INFERENCE = "/org.pytorch.serve.grpc.openinference.GRPCInferenceService"
MANAGEMENT = "/org.pytorch.serve.grpc.management.ManagementAPIsService"


def _declare_messages() -> dict[str, Any]:
    """The messages of TorchServe's gRPC services, with the fields that are used here."""
    kinds = descriptor_pb2.FieldDescriptorProto
    pool = descriptor_pool.DescriptorPool()
    names = []

    def declare(package: str, messages: Mapping[str, Sequence[tuple[str, int, str]]]) -> None:
        """Declare messages, each before those that hold it. A field's type may be "repeated", and a message's name."""
        file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package, syntax="proto3")
        for name, fields in messages.items():
            message = file.message_type.add(name=name)
            names.append(f"{package}.{name}")
            for field, number, kind in fields:
                label = kinds.LABEL_REPEATED if kind.startswith("repeated ") else kinds.LABEL_OPTIONAL
                kind = kind.removeprefix("repeated ")
                if kind in messages:
                    own = {"type": kinds.TYPE_MESSAGE, "type_name": f".{package}.{kind}"}
                else:
                    own = {"type": getattr(kinds, f"TYPE_{kind.upper()}")}
                message.field.add(name=field, number=number, label=label, **own)
        pool.Add(file)

    declare(
        "org.pytorch.serve.grpc.inference",
        {
            "Entry": [("key", 1, "string"), ("value", 2, "bytes")],  # on the wire a map is a list of these
            "PredictionsRequest": [
                *[("model_name", 1, "string"), ("model_version", 2, "string")],
                *[("input", 3, "repeated Entry"), ("sequence_id", 4, "string")],
            ],
            "PredictionResponse": [("prediction", 1, "bytes")],
        },
    )
    declare(
        "org.pytorch.serve.grpc.openinference",
        {
            "Contents": [
                *[("bool_contents", 1, "repeated bool"), ("int_contents", 2, "repeated int32")],
                *[("int64_contents", 3, "repeated int64"), ("uint_contents", 4, "repeated uint32")],
                *[("fp32_contents", 6, "repeated float"), ("fp64_contents", 7, "repeated double")],
                ("bytes_contents", 8, "repeated bytes"),
            ],
            "Tensor": [
                ("name", 1, "string"),
                ("datatype", 2, "string"),
                ("shape", 3, "repeated int64"),
                ("contents", 5, "Contents"),
            ],
            "ModelInferRequest": [
                *[("model_name", 1, "string"), ("id", 3, "string")],
                *[("inputs", 5, "repeated Tensor"), ("raw_input_contents", 7, "repeated bytes")],
            ],
            "ModelInferResponse": [
                *[("model_name", 1, "string"), ("model_version", 2, "string"), ("id", 3, "string")],
                ("outputs", 5, "repeated Tensor"),
            ],
        },
    )
    declare(
        "org.pytorch.serve.grpc.management",
        {
            "DescribeModelRequest": [("model_name", 1, "string"), ("customized", 3, "bool")],
            "ManagementResponse": [("msg", 1, "string")],
        },
    )
    return {name.rpartition(".")[2]: message_factory.GetMessageClass(pool.FindMessageTypeByName(name)) for name in names}


MESSAGES = _declare_messages()


def asking(fields: Mapping[str, bytes], **more: str) -> Any:
    """A PredictionsRequest."""
    entries = [MESSAGES["Entry"](key=key, value=value) for key, value in fields.items()]
    return MESSAGES["PredictionsRequest"](**{"model_name": "digits", "input": entries, **more})


def inferring(
    datatype: str, shape: Sequence[int], name: str = "input-0", request_id: str = "7", **contents: Sequence[Any]
) -> Any:
    """A ModelInferRequest of one tensor."""
    tensor = MESSAGES["Tensor"](name=name, datatype=datatype, shape=shape, contents=MESSAGES["Contents"](**contents))
    return MESSAGES["ModelInferRequest"](model_name="digits", id=request_id, inputs=[tensor])
