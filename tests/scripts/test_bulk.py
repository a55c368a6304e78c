import importlib.util
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

from handler.errors import ClientError
from handler.preprocess import preprocess
from handler.protocol.options import OPTIONS
from handler.protocol.request import parse_request
from scripts.bulk.command import OF_A_REPLY, build_parser, choose_batch_size, main
from scripts.bulk.errors import ImageProblem
from scripts.bulk.explainer_process import join_batch, split_batch
from scripts.bulk.mean_maps import main as draw_mean_maps
from scripts.bulk.mean_maps import mean_maps
from scripts.bulk.sources import IMAGES_SCHEMA, list_images, read_images
from scripts.packaging.package import build_archive, read_archive, write_archive
from scripts.paths import MODEL_CONFIG, ROOT, SAMPLE_FILES
from tests.hostile import SEEDS
from tests.servers import wait_for

ONE_PROCESS = ("--processes", "1")
KILLS, HANGS = b"this kills", b"this hangs"  # at the end of an image file
TRAP = f"""

import os, signal, time
_answer = SaliencyHandler.results_of
def _answer_or_die(self, rows, headers):
    for row in rows:
        if row["data"][-10:] == {KILLS!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        if row["data"][-10:] == {HANGS!r}:
            time.sleep(1000)
    return _answer(self, rows, headers)
SaliencyHandler.results_of = _answer_or_die
"""


@pytest.fixture(scope="module")
def trapped_archive(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive whose process dies of some images and hangs at others, as a decoder with a defect does."""
    entries = read_archive(archive)
    entries["saliency_handler.py"] += TRAP.encode()
    settings = yaml.safe_load(entries[MODEL_CONFIG.name]) | {"responseTimeout": 4}
    entries[MODEL_CONFIG.name] = yaml.safe_dump(settings).encode()
    output = tmp_path_factory.mktemp("trapped") / "digits.mar"
    write_archive(output, entries)
    return output


def explain(images: Sequence[str | Path], archive: Path, output: Path, *more: str) -> int:
    return main([*map(str, images), "--archive", str(archive), "--output", str(output), *ONE_PROCESS, *more])


def table_of(output: Path) -> pa.Table:
    """All rows, which are there once each and in order."""
    table = pa.concat_tables([pq.read_table(file) for file in sorted(output.glob("part-*.parquet"))])
    assert table["index"].to_pylist() == list(range(table.num_rows))
    return table


def errors_of(table: pa.Table) -> dict[str, str]:
    """The type of each error, by the image's name."""
    return {
        Path(row["path"]).name: row["error"]["type"]
        for row in table.select(["path", "error"]).to_pylist()
        if row["error"] is not None
    }


def error_of(content: bytes) -> dict[str, Any] | None:
    """The error of the service itself for an image file, and of this command for a file of several images."""
    try:
        prepared = preprocess(parse_request({"data": content}, {}, 10), 28, 28)
    except ClientError as error:
        return {"code": error.status, "type": type(error).__name__, "message": error.message}
    count = len(prepared.images)
    message = f"expected one image in a file, got an array of {count}"
    return None if count == 1 else {"code": 400, "type": "WrongShape", "message": message}


def copy_samples(folder: Path, count: int) -> Path:
    folder.mkdir()
    for index in range(count):
        shutil.copy(SAMPLE_FILES[index % len(SAMPLE_FILES)], folder / f"{index:04d}.png")
    return folder


# --- rows


def test_three_hundred_files_of_which_five_are_bad(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_samples(tmp_path / "images", 295)
    good = SAMPLE_FILES[0].read_bytes()
    blank = BytesIO()
    Image.new("L", (100, 100), 255).save(blank, format="PNG")
    bad = {
        "0001b.png": (b"no image", "UnreadableImage"),
        "0100b.png": (good[:-60], "UnreadableImage"),
        "0100c.png": (b"", "EmptyRequest"),
        "0200b.png": (blank.getvalue(), "BlankImage"),
        "9999.npy": (b"\x93NUMPY broken", "UnreadableArray"),
    }
    for name, (content, _) in bad.items():
        (folder / name).write_bytes(content)
    assert explain([folder], archive, tmp_path / "out", "--processes", "2", "--shard-size", "64") == 0
    table = table_of(tmp_path / "out")
    assert table.num_rows == 300
    assert table["path"].to_pylist() == sorted(str(file) for file in folder.iterdir())
    assert errors_of(table) == {name: kind for name, (_, kind) in bad.items()}
    assert table["class"].null_count == table["saliency"].null_count == table["warnings"].null_count == 5
    answered = table.filter(pa.compute.is_valid(table["class"]))
    digits = [int(SAMPLE_FILES[int(Path(path).stem) % len(SAMPLE_FILES)].stem[0]) for path in answered["path"].to_pylist()]
    assert answered["class"].to_pylist() == digits
    assert answered["label"].to_pylist() == [str(digit) for digit in digits]
    assert "300 images in 5 files, 295 answered, 5 errors (UnreadableImage 2," in capsys.readouterr().out


def test_maps_are_tensors_of_one_shape_and_files_name_their_weights(archive: Path, tmp_path: Path) -> None:
    assert explain(SAMPLE_FILES[:3], archive, tmp_path / "out", "--target", "all", "--method", "integrated_gradients") == 0
    file = tmp_path / "out" / "part-00000.parquet"
    table = pq.read_table(file)
    assert table.schema.field("saliency").type == pa.fixed_shape_tensor(pa.float32(), [10, 28, 28])
    maps = table["saliency"].combine_chunks().to_numpy_ndarray()
    assert maps.shape == (3, 10, 28, 28)
    logits = np.array(table["logits"].to_pylist())
    assert np.all(np.abs(maps.sum(axis=(2, 3)) - logits).mean() < 30)  # maps of logits, not of something else
    assert table["target"].to_pylist() == [list(range(10))] * 3
    assert np.array(table["completeness_gap"].to_pylist()).shape == (3, 10)
    job = json.loads(pq.read_metadata(file).metadata[b"saliency_serve"])["job"]
    assert job["options"] == {"target": "all", "method": "integrated_gradients"}
    sums = read_archive(archive)["SHA256SUMS"].decode()
    assert f"{job['model']['weights_sha256']}  weights.safetensors" in sums


def test_maps_in_the_image_s_own_pixels_keep_their_own_shape(archive: Path, tmp_path: Path) -> None:
    for side in (56, 100):
        Image.open(SAMPLE_FILES[0]).resize((side, side)).save(tmp_path / f"{side}.png")
    images = [tmp_path / "100.png", tmp_path / "56.png"]
    assert explain(images, archive, tmp_path / "out", "--space", "image") == 0
    rows = table_of(tmp_path / "out").to_pylist()
    assert [row["saliency_shape"] for row in rows] == [[100, 100], [56, 56]]
    assert [len(row["saliency"]) for row in rows] == [10_000, 3136]


def test_a_prediction_has_no_maps(archive: Path, tmp_path: Path) -> None:
    assert explain(SAMPLE_FILES[:2], archive, tmp_path / "out", "--explain", "false") == 0
    assert not {"saliency", "target"} & set(table_of(tmp_path / "out").schema.names)


def test_hostile_files_get_the_error_that_the_service_gives(archive: Path, tmp_path: Path) -> None:
    contents = list(dict.fromkeys(seed[1:] for seed in SEEDS))
    generator = random.Random(1)
    spoiled = [bytes(byte ^ (generator.random() < 0.01) * 85 for byte in content) for content in contents]
    folder = tmp_path / "images"
    folder.mkdir()
    for index, content in enumerate([*contents, *spoiled]):
        (folder / f"{index:04d}").write_bytes(content)
    assert explain([folder], archive, tmp_path / "out") == 0
    rows = table_of(tmp_path / "out").select(["class", "error"]).to_pylist()
    for row, content in zip(rows, [*contents, *spoiled], strict=True):
        assert row["error"] == error_of(content)
        assert (row["class"] is None) == (row["error"] is not None)


def test_another_archive_is_explained_by_its_own_network(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    source = (
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n    INPUT_SHAPE = (1, 8, 6)\n    CLASS_COUNT = 3\n\n"
        "    def __init__(self):\n        super().__init__()\n        self.lin = nn.Linear(48, 3)\n\n"
        "    def forward(self, x):\n        return self.lin(x.flatten(1))\n"
    )
    (tmp_path / "net.py").write_text(source)
    weights = {"lin.weight": torch.randn(3, 48, generator=torch.Generator().manual_seed(0)), "lin.bias": torch.zeros(3)}
    save_file(weights, tmp_path / "net.safetensors")
    output = tmp_path / "shapes.mar"
    build_archive(output, model_file=tmp_path / "net.py", weights_file=tmp_path / "net.safetensors", model_config=MODEL_CONFIG)
    entries = read_archive(output)
    entries["index_to_name.json"] = json.dumps({"0": "round", "1": ["n1", "square"]}).encode()
    write_archive(output, entries)
    levels = np.random.default_rng(0).integers(0, 256, (8, 6), dtype=np.uint8)
    Image.fromarray(levels).save(tmp_path / "one.png")
    assert explain([tmp_path / "one.png"], output, tmp_path / "out", "--prepare", "none", "--target", "1") == 0
    table = table_of(tmp_path / "out")
    np.testing.assert_allclose(
        table["saliency"].combine_chunks().to_numpy_ndarray()[0], weights["lin.weight"][1].reshape(8, 6).numpy(), rtol=1e-6
    )
    assert table["label"].to_pylist()[0] in ("round", "square", "2")
    assert len(table["probabilities"].to_pylist()[0]) == 3


# --- sources


def tar_of(file: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(file, "w") as opened:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            opened.addfile(info, BytesIO(content))
    return file


def names_of(images: pa.Table) -> list[str]:
    return [(row["member"] or row["file"]).decode("utf-8", "backslashreplace").rpartition("/")[2] for row in images.to_pylist()]


def test_tar_shards_give_the_images_of_their_samples(tmp_path: Path) -> None:
    contents = [file.read_bytes() for file in SAMPLE_FILES[:3]]
    members = {
        "a.png": contents[0],
        "a.cls": b"0",
        "a.json": b"{}",
        "folder/b.seg.png": contents[1],
        "c.bin": b"x",  # of a sample without an image: not passed over
        "d.PNG": contents[2],
    }
    shard = tar_of(tmp_path / "shard-000.tar", members)
    images, notes = list_images([str(shard)])
    assert [row["member"] for row in images.to_pylist()] == [b"a.png", b"folder/b.seg.png", b"c.bin", b"d.PNG"]
    assert list(read_images(images)) == [contents[0], contents[1], b"x", contents[2]]
    assert notes == ["members of tar files beside an image of the same sample, and left out: 2"]


@pytest.mark.parametrize("spoil", [lambda b: b[:1300], lambda b: b[:1024] + b"\xff" * 512 + b[1536:], lambda b: b"no tar"])
def test_a_damaged_tar_gives_what_is_whole_and_a_row_that_says_so(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    shard = tar_of(tmp_path / "shard.tar", {"a.png": b"1" * 512, "b.png": b"2" * 512})
    shard.write_bytes(spoil(shard.read_bytes()))
    images, _ = list_images([str(shard)])
    assert images["problem"].to_pylist()[-1].startswith("expected a whole tar file, got one that is damaged after")
    assert list(read_images(images))[:-1] == [b"1" * 512][: images.num_rows - 1]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_tar_file_that_shrinks_after_it_was_listed_is_no_shorter_image(tmp_path: Path, scheme: str) -> None:
    shard = tar_of(tmp_path / "shard.tar", {"a.png": b"1" * 512, "b.png": b"2" * 512, "c.png": b""})
    images, _ = list_images([f"{scheme}{shard}"])
    shard.write_bytes(shard.read_bytes()[:1700])  # in the middle of the second
    less = ImageProblem("UnreadableFile", "expected a whole tar file, got less")
    assert list(read_images(images)) == [b"1" * 512, less, b""]


def test_links_in_a_tar_file_get_a_row_that_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"1")
    os.link(folder / "a.png", folder / "b.png")
    (folder / "c.png").symlink_to("a.png")
    with tarfile.open(tmp_path / "shard.tar", "w") as opened:
        opened.add(folder, "images")
    images, _ = list_images([str(tmp_path / "shard.tar")])
    assert names_of(images) == ["a.png", "b.png", "c.png"]
    content, *problems = read_images(images)
    message = "expected a plain file in a tar file, got a link, a sparse file, or the like"
    assert [content, *problems] == [b"1", *[ImageProblem("UnreadableFile", message)] * 2]


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"Z"], ids=["file", "unknown"])
@pytest.mark.parametrize("size", ["-5", "-1024", "9" * 23])
def test_a_tar_file_whose_members_have_no_possible_size_is_damaged(tmp_path: Path, size: str, kind: bytes) -> None:
    spoiled = tarfile.TarInfo("b.png")
    spoiled.type, spoiled.pax_headers = kind, {"size": size}
    whole = tar_of(tmp_path / "shard.tar", {"a.png": b"1" * 512}).read_bytes()[:1024]
    (tmp_path / "shard.tar").write_bytes(whole + spoiled.tobuf(tarfile.PAX_FORMAT) + bytes(10_240))
    images, _ = list_images([str(tmp_path / "shard.tar")])
    content, problem = read_images(images)
    assert content == b"1" * 512
    assert isinstance(problem, ImageProblem)
    assert f"damaged after 1 members: a member of {int(size):,} bytes" in problem.message


@pytest.mark.parametrize("kind", ["binary", "dictionary", "Hugging Face"])
def test_parquet_rows_are_read_in_order(tmp_path: Path, kind: str) -> None:
    contents: list[Any] = [b"%d" % index for index in range(100)]
    contents[7] = None
    column = pa.array(contents, pa.binary())
    if kind == "dictionary":  # as writers keep values that repeat
        column = column.dictionary_encode()
    if kind == "Hugging Face":
        paths = pa.array([f"{index}.png" for index in range(100)])
        column = pa.StructArray.from_arrays([column, paths], ["bytes", "path"])
    file = tmp_path / "images.parquet"
    pq.write_table(pa.table({"image": column, "label": pa.array(range(100))}), file, row_group_size=30)
    images, _ = list_images([str(file)])
    read = list(read_images(images.slice(25, 50)))
    assert read == contents[25:75]
    assert list(read_images(images.slice(0, 10)))[7].type == "EmptyRequest"  # type: ignore[union-attr]


def test_a_parquet_file_with_several_columns_of_bytes_asks_which(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "images.parquet"
    content = SAMPLE_FILES[0].read_bytes()
    pq.write_table(pa.table({"left": pa.array([content]), "right": pa.array([b"x"])}), file)
    assert explain([file], archive, tmp_path / "out") == 1
    assert "name one with --column: it has left, right" in capsys.readouterr().err
    assert explain([file], archive, tmp_path / "out", "--column", "left") == 0
    (row,) = table_of(tmp_path / "out").select(["path", "class"]).to_pylist()
    assert row == {"path": f"{file}#0", "class": 0}


def test_a_table_about_the_images_is_a_row_that_says_so(tmp_path: Path) -> None:
    folder = copy_samples(tmp_path / "images", 1)
    pq.write_table(pa.table({"file_name": ["0000.png"], "label": [0]}), folder / "metadata.parquet")
    _, problem = read_images(list_images([str(folder)])[0])
    message = "expected a column of binary values in a Parquet file, got file_name, label"
    assert problem == ImageProblem("UnreadableFile", message)


@pytest.mark.parametrize("listed", [(0, 100), (30, 40)], ids=["all", "a shard behind its end"])
def test_a_parquet_file_that_loses_rows_after_it_was_listed_keeps_each_row_s_place(
    tmp_path: Path, listed: tuple[int, int]
) -> None:
    file = tmp_path / "images.parquet"
    pq.write_table(pa.table({"image": [b"%d" % index for index in range(100)]}), file, row_group_size=20)
    images = list_images([str(file)])[0].slice(*listed)
    pq.write_table(pa.table({"image": [b"%d" % index for index in range(10)]}), file)
    read = list(read_images(images))
    left = [b"%d" % index for index in range(10)] if listed[0] == 0 else []
    message = "expected a Parquet file that can be read: fewer rows than when it was listed"
    assert read == left + [ImageProblem("UnreadableFile", message)] * (listed[1] - len(left))


def test_a_parquet_file_whose_names_are_no_text_is_a_row_that_says_so(tmp_path: Path) -> None:
    file = tmp_path / "images.parquet"
    pq.write_table(pa.table({"image": [b"1"], "label": [1]}), file, store_schema=False)
    file.write_bytes(file.read_bytes().replace(b"label", b"l\xffbel"))
    (problem,) = read_images(list_images([str(file)])[0])
    assert isinstance(problem, ImageProblem)
    assert problem.message.startswith("expected a Parquet file that can be read: ")


def test_folders_are_read_once_whatever_links_there_are(tmp_path: Path) -> None:
    folder = copy_samples(tmp_path / "images", 2)
    (folder / "loop").symlink_to(folder)
    (folder / "self").symlink_to(folder / "self")
    (folder / "gone").symlink_to(folder / "nowhere")
    (folder / "linked.png").symlink_to(folder / "0000.png")
    os.mkfifo(folder / "pipe")
    images, notes = list_images([str(folder), str(folder / "0000.png"), str(folder / "*.png")])
    assert names_of(images) == ["0000.png", "0001.png", "gone", "linked.png", "pipe", "self"]
    assert notes == [
        "named more than once, and counted once: 4 of the files",
        "links to folders that are read anyway, and not followed: 1",
    ]
    problems = [one.type for one in read_images(images) if not isinstance(one, bytes)]
    assert problems == ["UnreadableFile"] * 3


@pytest.mark.timeout(30)
def test_a_pattern_meets_each_folder_once_and_no_output(tmp_path: Path) -> None:
    folder = copy_samples(tmp_path / "images", 1)
    (folder / "one").symlink_to(".")
    (folder / "two").symlink_to(".")
    copy_samples(folder / "out", 1)
    images, notes = list_images([f"{folder}/**/*.png"], output=folder / "out")
    assert images["file"].to_pylist() == [os.fsencode(folder / "0000.png")]
    assert notes == [f"what {folder}/**/*.png matches in the output folder is left out"]


def test_an_output_folder_may_have_a_colon_and_its_name_is_text(
    archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "2026-11-27T06:30"
    assert explain(SAMPLE_FILES[:1], archive, output) == 0
    assert table_of(output).num_rows == 1
    assert explain(SAMPLE_FILES[:1], archive, Path(f"{tmp_path}/\udcff")) == 1
    assert "expected an --output whose name is UTF-8" in capsys.readouterr().err


def test_names_that_are_no_text_keep_their_bytes(archive: Path, tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/seven\xff.png"
    shutil.copy(SAMPLE_FILES[36], os.fsdecode(name))
    shutil.copy(SAMPLE_FILES[0], tmp_path / "new\nline é.png")
    assert explain([tmp_path], archive, tmp_path.with_name("out of names")) == 0
    rows = table_of(tmp_path.with_name("out of names")).select(["path", "path_bytes", "class"]).to_pylist()
    assert rows == [
        {"path": f"{tmp_path}/new\nline é.png", "path_bytes": None, "class": 0},
        {"path": f"{tmp_path}/seven\\xff.png", "path_bytes": name, "class": 7},
    ]


def test_a_file_over_the_service_s_limit_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large.png").open("wb") as opened:
        opened.truncate(33 * 1024 * 1024)
    images, _ = list_images([str(tmp_path)])
    (problem,) = read_images(images)
    assert not isinstance(problem, bytes)
    assert (problem.type, problem.code) == ("RequestTooLarge", 413)


def test_urls_are_read_and_written_by_fsspec(archive: Path, tmp_path: Path) -> None:
    folder = copy_samples(tmp_path / "images", 3)
    tar_of(folder / "shard.tar", {"a.png": SAMPLE_FILES[7].read_bytes(), "b.png": b""})
    output = folder / "out"  # among the images
    command = [f"file://{folder}", "--archive", str(archive), "--output", f"file://{output}", *ONE_PROCESS]
    assert main(command) == 0
    table = table_of(output)
    assert table["class"].to_pylist() == [0, 0, 0, int(SAMPLE_FILES[7].stem[0]), None]
    assert table["path"].to_pylist()[-2:] == [f"file://{folder}/shard.tar/{name}.png" for name in "ab"]
    assert table["error"].to_pylist()[-1]["type"] == "EmptyRequest"
    assert main(command) == 0  # goes on with it, and has nothing to do
    assert main([*command, "--target", "1"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "error: there is no 'nowhere'"),
        (["no*thing"], "error: nothing matches 'no*thing'"),
        (["empty"], "empty holds no images\nerror: there are no images in empty"),
        (["nosuch://bucket"], "error: cannot open nosuch://bucket: Protocol not known: nosuch"),
        (["one.png", "--target", "10"], "error: expected a class from 0 to 9"),
        (["one.png", "--method", "magic"], "error: expected one of gradient,"),
        (["one.png", "--samples", "7"], "error: expected 'method' smoothgrad with 'samples'"),
        (["one.png", "--method", "smoothgrad", "--samples", "500", "--target", "all"], "error: expected maps of at most"),
        (["one.png", "--archive", "one.png"], "error: the archive one.png cannot be read"),
        (["one.png", "--archive", "none.mar"], "error: there is no archive none.mar"),
        (["one.png", "--output", "one.png/out"], "error: cannot write the output to"),
        (["one.png", "--output", "."], "error: expected an empty output folder, or one with a job that was begun"),
        (["one.png", "--ray", "127.0.0.1:1"], "error: no Ray cluster answers at '127.0.0.1:1'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_begin_says_why(
    arguments: list[str],
    message: str,
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    shutil.copy(SAMPLE_FILES[0], "one.png")
    assert main(["--archive", str(archive), "--output", "out", *ONE_PROCESS, *arguments]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("out/part-*"))
    assert not (tmp_path / "_job").exists()


def test_help_lists_every_option_of_an_image() -> None:
    text = build_parser().format_help()
    for name in OPTIONS:
        assert (f"--{name.replace('_', '-')} VALUE" in text) == (name not in OF_A_REPLY)


def test_without_pyarrow_the_command_says_what_to_install(tmp_path: Path) -> None:
    assert importlib.util.find_spec("pyarrow") is not None
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as util\nfind = util.find_spec\n"
        "util.find_spec = lambda name, *more: None if name == 'pyarrow' else find(name, *more)\n"
    )
    finished = subprocess.run(
        [sys.executable, "-m", "scripts.bulk", "--help"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 1
    assert "scripts.bulk needs pyarrow, which is not installed" in finished.stderr


# --- faults


def test_images_that_kill_or_hang_the_process_get_the_error_and_all_others_an_answer(
    trapped_archive: Path, tmp_path: Path
) -> None:
    folder = copy_samples(tmp_path / "images", 80)
    content = SAMPLE_FILES[0].read_bytes()
    for name, trap in (("0000k.png", KILLS), ("0040k.png", KILLS), ("0041k.png", KILLS), ("0060h.png", HANGS)):
        (folder / name).write_bytes(content + trap)
    assert explain([folder], trapped_archive, tmp_path / "out") == 0
    table = table_of(tmp_path / "out")
    assert errors_of(table) == {
        "0000k.png": "ProcessDied",
        "0040k.png": "ProcessDied",
        "0041k.png": "ProcessDied",
        "0060h.png": "ProcessTimeout",
    }
    messages = [error["message"] for error in table["error"].to_pylist() if error is not None]
    assert messages[0] == "expected an answer, got a process that ended by SIGKILL (perhaps out of memory)"
    assert messages[3] == "expected an answer within 4 s, got none: the process was ended"
    for row in table.select(["path", "class"]).to_pylist():
        if row["class"] is not None:
            assert row["class"] == int(SAMPLE_FILES[int(Path(row["path"]).stem) % len(SAMPLE_FILES)].stem[0])


def test_a_process_that_something_else_kills_costs_no_image_its_answer(archive: Path, tmp_path: Path) -> None:
    folder = copy_samples(tmp_path / "images", 2000)
    job = start_job([folder], archive, tmp_path / "out", "--shard-size", "500", *ONE_PROCESS)
    for _ in range(3):
        wait_for(lambda: children_of(job.pid) or job.poll() is not None, "process")
        for child in children_of(job.pid):
            os.kill(child, signal.SIGKILL)
        time.sleep(3)
    assert job.wait(timeout=240) == 0
    table = table_of(tmp_path / "out")
    assert (table.num_rows, table["error"].null_count) == (2000, 2000)


def start_job(images: Sequence[Path], archive: Path, output: Path, *more: str) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "scripts.bulk", *map(str, images), "--archive", str(archive), "--output", str(output), *more]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def children_of(pid: int) -> list[int]:
    file = Path(f"/proc/{pid}/task/{pid}/children")
    threads = Path(f"/proc/{pid}/task")
    if not file.exists():
        return []
    return [int(child) for thread in threads.iterdir() for child in (thread / "children").read_text().split()]


def wait_for_files(output: Path, count: int) -> None:
    wait_for(lambda: len(list(output.glob("part-*"))) >= count, "file")


def test_a_job_that_is_killed_at_any_moment_loses_nothing_and_does_nothing_twice(archive: Path, tmp_path: Path) -> None:
    count = 3000
    folder = copy_samples(tmp_path / "images", count)
    tar_of(folder / "shard.tar", {f"{index}.png": SAMPLE_FILES[index % 50].read_bytes() for index in range(500)})
    output = tmp_path / "out"
    more = ("--shard-size", "100", "--processes", "2")
    generator = random.Random(18)
    kept: dict[str, int] = {}
    for _ in range(5):
        job = start_job([folder], archive, output, *more)
        wait_for_files(output, len(kept) + 1)
        time.sleep(generator.uniform(0, 0.7))
        job.kill()
        job.wait()
        for name, modified in kept.items():  # what was whole is not done again
            assert (output / name).stat().st_mtime_ns == modified
        kept = {file.name: file.stat().st_mtime_ns for file in output.glob("part-*")}
        for file in output.glob("part-*"):
            pq.read_table(file).validate(full=True)
    assert main([str(folder), "--archive", str(archive), "--output", str(output), "--processes", "2", "--shard-size", "100"]) == 0
    table = table_of(output)
    assert table.num_rows == count + 500
    assert len(set(table["path"].to_pylist())) == count + 500
    assert table["error"].null_count == count + 500
    assert sorted(one.name for one in (output / "_job").iterdir()) == ["images.arrow", "job.json", "lock"]


def test_a_job_that_is_stopped_says_how_to_go_on(archive: Path, tmp_path: Path) -> None:
    folder = copy_samples(tmp_path / "images", 3000)
    output = tmp_path / "out"
    job = subprocess.Popen(
        [sys.executable, "-m", "scripts.bulk", folder, "--archive", archive, "--output", output, "--shard-size", "100"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: list(output.glob("part-*")), "file")
    children = children_of(job.pid)
    job.terminate()
    _, printed = job.communicate(timeout=30)
    assert job.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM; the same command goes on with the job" in printed
    assert "Traceback" not in printed
    assert children
    wait_for(lambda: not any(Path(f"/proc/{child}").exists() for child in children), "end of the processes")
    assert sorted(one.name for one in (output / "_job").iterdir()) == ["images.arrow", "job.json", "lock"]


def test_another_job_in_the_same_folder_is_refused(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_samples(tmp_path / "images", 3)
    output = tmp_path / "out"
    assert explain([folder], archive, output, "--target", "3") == 0
    assert explain([folder], archive, output) == 1
    assert "holds a job with another options: expected target 3, got none" in capsys.readouterr().err
    other = tmp_path / "other.mar"
    entries = read_archive(archive)
    entries["more.txt"] = b"more"
    write_archive(other, entries)
    assert explain([folder], other, output, "--target", "3") == 1
    assert "holds a job with another archive sha256" in capsys.readouterr().err
    (folder / "new.png").write_bytes(b"")
    (folder / "0001.png").unlink()
    assert explain([folder], archive, output, "--target", "3") == 1
    assert "holds a job for other images (" in (printed := capsys.readouterr().err)
    assert f"{folder}/new.png is new" in printed
    assert f"{folder}/0001.png is gone" in printed


def test_an_output_folder_among_the_images_is_left_out(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_samples(tmp_path / "images", 3)
    for _ in range(2):
        assert explain([folder], archive, folder / "out") == 0
        assert f"the output folder {folder}/out is left out" in capsys.readouterr().err
    assert table_of(folder / "out").num_rows == 3


def test_a_file_that_is_damaged_later_is_made_again(archive: Path, tmp_path: Path) -> None:
    folder = copy_samples(tmp_path / "images", 3)
    assert explain([folder], archive, tmp_path / "out") == 0
    (tmp_path / "out" / "part-00000.parquet").write_bytes(b"PAR1 damaged")
    assert explain([folder], archive, tmp_path / "out") == 0
    assert table_of(tmp_path / "out").num_rows == 3


def test_two_jobs_do_not_share_a_folder(archive: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = copy_samples(tmp_path / "images", 3000)
    job = start_job([folder], archive, tmp_path / "out")
    try:
        wait_for((tmp_path / "out" / "_job" / "job.json").exists, "job")
        assert explain([folder], archive, tmp_path / "out") == 1
        assert "another job writes to" in capsys.readouterr().err
    finally:
        job.kill()
        job.wait()


def test_a_disk_without_room_ends_the_job_in_a_sentence(archive: Path, tmp_path: Path) -> None:
    """A limit on a file's size stands for the disk's: the write fails alike."""
    folder = copy_samples(tmp_path / "images", 300)
    finished = subprocess.run(
        [sys.executable, "-m", "scripts.bulk", folder, "--archive", archive, "--output", tmp_path / "out", *ONE_PROCESS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert finished.returncode == 1, finished.stderr
    assert "File too large" in finished.stderr
    assert "what is done stays, the same command goes on with it" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert not list((tmp_path / "out").glob("part-*"))
    assert sorted(one.name for one in (tmp_path / "out" / "_job").iterdir()) == ["images.arrow", "job.json", "lock"]


# --- parts


@pytest.mark.parametrize(
    ("device", "archive_size", "options", "expected"),
    [
        ("cpu", 32, {}, 64),
        ("cuda", 16, {"target": "all"}, 256),
        ("cpu", 500, {}, 500),  # the archive's own are larger
        ("cpu", 32, {"space": "image"}, 32),  # whose maps are as large as the images
        ("cuda", 16, {"space": "canonical"}, 256),
    ],
)
def test_batches_are_larger_than_a_server_s(device: str, archive_size: int, options: dict[str, str], expected: int) -> None:
    assert choose_batch_size(device, archive_size, options) == expected


def test_a_batch_is_taken_apart_as_it_was_put_together() -> None:
    for contents in ([], [b""], [b"a", b"", b"bcd" * 1000]):
        assert split_batch(join_batch(contents, 7)) == (contents, 7)


def test_a_table_of_images_keeps_its_schema(tmp_path: Path) -> None:
    images, _ = list_images([str(SAMPLE_FILES[0])])
    assert images.schema == IMAGES_SCHEMA


def test_the_mean_maps_of_an_output_are_drawn(archive: Path, tmp_path: Path) -> None:
    assert explain(SAMPLE_FILES[:10], archive, tmp_path / "out") == 0
    means = mean_maps(tmp_path / "out")
    table = table_of(tmp_path / "out")
    maps = table["saliency"].combine_chunks().to_numpy_ndarray()
    assert sorted(means) == sorted(set(table["class"].to_pylist())) == [0, 1]
    np.testing.assert_allclose(means[1], maps[5:].mean(axis=0), rtol=1e-5, atol=1e-7)
    drawing = tmp_path / "means.png"
    assert draw_mean_maps([str(tmp_path / "out"), "--output", str(drawing)]) == 0
    with Image.open(drawing) as image:
        assert image.size[0] > 2 * 96
    assert draw_mean_maps([str(tmp_path / "nothing"), "--output", str(drawing)]) == 1
