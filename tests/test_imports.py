"""Who may import whom, read from the code itself."""

import ast
from pathlib import Path

import pytest

from scripts.package import ROOT

HANDLER_IMPORTS = {  # module -> the handler modules that it may import
    "__init__": set[str](),
    "errors": set[str](),
    "kserve": {"errors"},
    "methods": set[str](),
    "request": {"errors", "kserve", "drawing", "methods"},
    "decode": {"errors"},
    "arrays": {"errors", "decode", "kserve"},
    "canonical": {"errors"},
    "drawing": {"errors"},
    "reply": {"errors", "request", "kserve", "drawing"},
    "describe": {"decode", "drawing", "kserve", "methods", "request", "prepare"},
    "saliency": {"methods"},
    "one_pass": {"archive", "saliency"},
    "cuda_graphs": {"one_pass", "saliency"},
    "archive": set[str](),
    "prepare": {"errors", "kserve", "request", "decode", "arrays", "canonical"},
    "metrics": {"errors", "methods", "prepare", "reply", "saliency"},
    "worker_socket": set[str](),
    "memory": set[str](),
    "digit_handler": {
        *("errors", "request", "prepare", "reply", "describe", "saliency", "one_pass", "archive", "metrics", "worker_socket"),
        *("memory", "cuda_graphs"),
    },
}
OUTSIDE = {  # package -> the only handler modules that may import it
    "ts": {"digit_handler"},
    "PIL": {"decode", "drawing"},
    "torch": {"saliency", "one_pass", "cuda_graphs", "archive", "metrics", "digit_handler"},
    "orjson": {"reply"},
}
HANDLER_FILES = sorted((ROOT / "handler").glob("*.py"))


def imports_of(file: Path) -> set[str]:
    """Every module that a file imports anywhere in it, with all its parts: `from a.b import c` gives a.b.c and a.b."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return found


def test_every_handler_module_has_its_rule() -> None:
    assert {file.stem for file in HANDLER_FILES} == HANDLER_IMPORTS.keys()


@pytest.mark.parametrize("file", HANDLER_FILES, ids=lambda file: file.stem)
def test_handler_module_imports_only_what_it_may(file: Path) -> None:
    imported = imports_of(file)
    siblings = {name.split(".")[1] for name in imported if name.startswith("handler.")}
    assert siblings <= HANDLER_IMPORTS[file.stem]
    packages = {name.partition(".")[0] for name in imported}
    assert not packages & {"model", "scripts", "tests"}
    for package, allowed in OUTSIDE.items():
        assert package not in packages or file.stem in allowed


@pytest.mark.parametrize("file", sorted((ROOT / "model").glob("*.py")), ids=lambda file: file.stem)
def test_model_knows_nothing_of_the_service(file: Path) -> None:
    assert not {name.partition(".")[0] for name in imports_of(file)} & {"handler", "scripts", "tests", "ts", "PIL", "requests"}


@pytest.mark.parametrize("file", sorted((ROOT / "scripts").glob("*.py")), ids=lambda file: file.stem)
def test_scripts_do_not_lean_on_tests(file: Path) -> None:
    assert not {name.partition(".")[0] for name in imports_of(file)} & {"tests"}
