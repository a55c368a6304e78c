"""The help of every command that packages, serves or researches."""

import argparse
import importlib
import re
import shlex

import pytest

from scripts.command_line import HelpFormatter
from scripts.paths import BUILD, ROOT

COMMANDS = {
    "scripts.packaging": "scripts.packaging.package",
    "scripts.packaging.compile": "scripts.packaging.compile",
    "scripts.serving": "scripts.serving.launcher",
    "scripts.serving.ready": "scripts.serving.ready",
    "scripts.serving.explain": "scripts.serving.explain",
    "scripts.research.accuracy": "scripts.research.accuracy",
    "scripts.research.class_images": "scripts.research.class_images",
    "scripts.research.evaluate": "scripts.research.evaluate",
    "scripts.research.localise": "scripts.research.localise",
}


@pytest.fixture(params=COMMANDS)
def command(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture
def parser(command: str) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = importlib.import_module(COMMANDS[command]).build_parser()
    return made


def test_examples_stand_on_one_line_and_are_accepted(command: str, parser: argparse.ArgumentParser) -> None:
    _, _, examples = parser.format_help().rpartition("example")
    lines = re.findall(rf"(?m)^  python -m {re.escape(command)} (.*)$", examples)
    assert lines
    for line in lines:
        parser.parse_args(shlex.split(line.partition(" > ")[0]))


def test_every_option_is_explained_and_no_machine_is_named(parser: argparse.ArgumentParser) -> None:
    text = parser.format_help()
    assert all(action.help for action in parser._actions)
    assert str(ROOT) not in text
    assert "None" not in text


def test_defaults_are_shown_where_there_are_some() -> None:
    parser = argparse.ArgumentParser(formatter_class=HelpFormatter)
    parser.add_argument("--file", default=BUILD / "a", help="a file")
    parser.add_argument("--count", default=0, help="a count")
    parser.add_argument("--share", default="5%", help="a share")
    parser.add_argument("--none", help="nothing")
    parser.add_argument("--switch", action="store_true", help="a switch")
    shown = re.findall(r"(?m)  ([a-z][a-z ]+(?: \(default: .*\))?)$", parser.format_help().partition("and exit\n")[2])
    assert shown == ["a file (default: build/a)", "a count (default: 0)", "a share (default: 5%)", "nothing", "a switch"]
