"""Rows of `scripts.bulk` beside the replies of a real server with the same archive."""

import shutil
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from scripts.bulk.command import main
from scripts.paths import SAMPLE_FILES, SAMPLE_IMAGE
from scripts.serving.launcher import TorchServe
from tests.client import ask, explain, predict
from tests.hostile import png_header


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as the network knows them, digits that have to be preprocessed, and bad files."""
    folder = tmp_path_factory.mktemp("images")
    for file in SAMPLE_FILES[::5]:
        shutil.copy(file, folder / file.name)
        with Image.open(file) as image:
            large = Image.eval(image.resize((120, 120)), lambda level: 255 - level)
            large.convert("RGB").save(folder / f"{file.stem} large.jpg")
    shutil.copy(SAMPLE_IMAGE.with_suffix(".npy"), folder)
    good = SAMPLE_IMAGE.read_bytes()
    blank = BytesIO()
    Image.new("L", (60, 60), 255).save(blank, format="PNG")
    bad = (b"", b"no image", good[:-60], good[:20], blank.getvalue(), png_header(65_000, 65_000), b'{"data": "x", "target": 3}')
    for index, content in enumerate(bad):
        (folder / f"bad {index}").write_bytes(content)
    return folder


CASES: list[dict[str, str]] = [
    {},
    {"method": "smoothgrad", "samples": "5", "target": "all"},
    {"method": "integrated_gradients", "steps": "10", "target": "3", "prepare": "none"},
    {"space": "image", "method": "gradient_x_input", "target": "3,predicted"},
    {"explain": "false"},
]


@pytest.mark.parametrize("options", CASES, ids=lambda options: " ".join(options) or "defaults")
def test_rows_equal_the_server_s_replies(
    server: TorchServe, archive: Path, images: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    """Image by image, as a batch of another size rounds otherwise."""
    given = [f"--{name}={value}" for name, value in options.items()]
    where = ["--archive", str(archive), "--output", str(tmp_path / "out"), "--processes", "1", "--batch-size", "1"]
    assert main([str(images), *where, *given]) == 0
    table = pa.concat_tables([pq.read_table(file) for file in sorted((tmp_path / "out").glob("*.parquet"))])
    rows = table.to_pylist()
    assert [row["path"] for row in rows] == sorted(str(file) for file in images.iterdir())
    for row in rows:
        request = predict if options.get("explain") == "false" else explain
        files = {"data": Path(row["path"]).read_bytes()}
        require_equal(row, ask(server, request(files=files, data=options)).json(), table.schema)


def require_equal(row: dict[str, Any], reply: dict[str, Any], schema: pa.Schema) -> None:
    assert row["error"] == reply.get("error"), row["path"]
    if row["error"] is not None:
        assert all(value is None for name, value in row.items() if name not in ("index", "path", "error"))
        return
    assert row["class"] == reply["digit"]
    assert row["probabilities"] == reply["probabilities"]
    assert np.array_equal(np.float32(row["logits"]), np.float32(reply["logits"]))
    assert row["warnings"] == reply.get("warnings", [])
    explanation = reply.get("explanation")
    assert ("saliency" in row) == (explanation is not None)
    if explanation is None:
        return
    assert row["target"] == np.atleast_1d(explanation["target"]).tolist()
    assert np.array_equal(np.float32(row["saliency"]).ravel(), np.float32(explanation["saliency"]).ravel())
    shape = row["saliency_shape"] if "saliency_shape" in row else schema.field("saliency").type.shape
    assert shape == explanation["shape"]
    if "completeness_gap" in explanation:
        assert row["completeness_gap"] == np.atleast_1d(explanation["completeness_gap"]).tolist()
