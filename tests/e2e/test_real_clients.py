"""The clients that people use with the Open Inference Protocol, with their defaults, against a real TorchServe.

Both send and ask for tensors by the protocol's binary extension unless told otherwise. They run in an environment of their own
(`make build/clients/.installed`), since they want other versions of what the tests use.
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts.paths import BUILD, SAMPLE_FILES
from scripts.serving.launcher import TorchServe
from tests.conftest import label_of

PYTHON = BUILD / "clients" / "bin" / "python"
FILES = SAMPLE_FILES[::17]

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON.exists(), reason="the clients are not installed: make build/clients/.installed"),
]

TRITON = """
import json, sys
import numpy as np
import tritonclient.http as triton
from PIL import Image

address, *files = sys.argv[1:]
client = triton.InferenceServerClient(address.removeprefix("http://"))
levels = np.stack([np.asarray(Image.open(file)) for file in files])
numbers = triton.InferInput("image", list(levels.shape), "UINT8")
numbers.set_data_from_numpy(levels)
reply = client.infer("digits", [numbers])
found = {"numbers": reply.as_numpy("digit").tolist(), "probabilities": reply.as_numpy("probabilities").shape}

texts = triton.InferInput("image", [len(files)], "BYTES")
texts.set_data_from_numpy(np.array([open(file, "rb").read() for file in files], dtype=object))
found["files"] = client.infer("digits", [texts], request_id="42").as_numpy("digit").tolist()

outputs = [triton.InferRequestedOutput("saliency"), triton.InferRequestedOutput("target", binary_data=False)]
asked = {"explain": True, "target": 3}
reply = client.infer("digits", [numbers], outputs=outputs, parameters=asked, priority=1, timeout=10_000_000)
found["target"] = reply.as_numpy("target").tolist()
found["saliency"] = reply.as_numpy("saliency").astype(float).tolist()

try:
    client.infer("digits", [numbers], parameters={"target": 10})
except triton.InferenceServerException as error:
    found["error"] = [error.status(), error.message()]
print(json.dumps(found))
"""

KSERVE = """
import asyncio, json, sys
import numpy as np
from kserve import InferenceRESTClient, InferInput, InferRequest, RESTConfig
from PIL import Image


async def ask(address, files):
    levels = np.stack([np.asarray(Image.open(file)) for file in files])
    client = InferenceRESTClient(RESTConfig(protocol="v2", retries=1))
    numbers = InferInput("image", list(levels.shape), "UINT8")
    numbers.set_data_from_numpy(levels)
    reply = await client.infer(address, InferRequest("digits", [numbers]), model_name="digits")
    outputs = {output.name: output.as_numpy() for output in reply.outputs}
    found = {"numbers": outputs["digit"].tolist(), "probabilities": outputs["probabilities"].shape}
    client = InferenceRESTClient(RESTConfig(protocol="v1", retries=1))
    reply = await client.infer(address, {"instances": levels.tolist()}, model_name="digits")
    return found | {"v1": [prediction["digit"] for prediction in reply["predictions"]]}


address, *files = sys.argv[1:]
print(json.dumps(asyncio.run(ask(address, files))))
"""


def run(program: str, server: TorchServe) -> dict[str, Any]:
    finished = subprocess.run(
        [PYTHON, "-c", program, server.address, *map(str, FILES)], capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 0, finished.stderr
    found: dict[str, Any] = json.loads(finished.stdout.splitlines()[-1])
    return found


def labels(files: list[Path]) -> list[int]:
    return [label_of(file) for file in files]


def test_tritonclient_gets_its_answers_with_its_defaults(server: TorchServe) -> None:
    found = run(TRITON, server)
    assert found["numbers"] == found["files"] == labels(FILES)
    assert found["probabilities"] == [len(FILES), 10]
    assert found["target"] == [3] * len(FILES)
    saliency = np.array(found["saliency"])
    assert saliency.shape == (len(FILES), 28, 28)
    assert np.abs(saliency).max() > 0.1
    status, message = found["error"]
    assert status == "400"
    assert message.startswith("expected a class from 0 to 9")


def test_kserves_own_client_gets_its_answers_with_its_defaults(server: TorchServe) -> None:
    found = run(KSERVE, server)
    assert found["numbers"] == found["v1"] == labels(FILES)
    assert found["probabilities"] == [len(FILES), 10]
