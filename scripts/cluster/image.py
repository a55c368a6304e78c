"""Build the container image with docker, podman or buildah, whichever is there.

    python -m scripts.cluster.image

The Dockerfile says what is in it. This program finds a builder and gives the image its version and revision.
"""

import argparse
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

from scripts.command_line import HelpFormatter
from scripts.paths import ROOT

BUILDERS = {"docker": ["docker", "build"], "podman": ["podman", "build"], "buildah": ["buildah", "bud"]}  # in this order
NAME = "localhost/saliency-serve"


def build_command(builder: str, tag: str, arguments: dict[str, str], options: Sequence[str] = ()) -> list[str]:
    """Write the command that builds the image.

    Args:
        builder: a key of BUILDERS.
        tag: the image's name and tag.
        arguments: values for the Dockerfile's ARGs.
        options: more options of the builder.
    """
    given = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
    return [*BUILDERS[builder], "--tag", tag, *given, *options, str(ROOT)]


def find_builder() -> str | None:
    """Find the first builder that is installed; None where there is none."""
    return next((name for name in BUILDERS if shutil.which(name)), None)


def read_version() -> str:
    """Read the project's version."""
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version


def read_revision() -> str:
    """Ask git for the commit, with -dirty where files differ from it; "unknown" outside of a repository."""
    described = subprocess.run(
        ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return described.stdout.strip() if described.returncode == 0 else "unknown"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.cluster.image",
        description="Build the container image with docker, podman or buildah.",
        epilog="examples:\n  %(prog)s\n  %(prog)s --device cuda --tag registry.example.com/saliency-serve:cuda\n"
        "  %(prog)s --torch-links ~/wheels -- --network host",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="of the workers")
    parser.add_argument("--tag", metavar="NAME:TAG", help=f"the image's name; default: {NAME}:DEVICE")
    parser.add_argument("--builder", choices=BUILDERS, help="default: the first of them that is installed")
    parser.add_argument("--base", metavar="IMAGE", help="Debian 12, slim; default: as in the Dockerfile")
    parser.add_argument(
        "--torch-links",
        metavar="URL",
        help="where torch's CPU build is linked from, a page or (not with docker) a folder; default: PyTorch's own index",
    )
    parser.add_argument(
        "--ca-bundle", type=Path, metavar="FILE", help="certificates that pip trusts while it builds, PEM; not with docker"
    )
    parser.add_argument("options", nargs="*", metavar="OPTION", help="more options of the builder, after --")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Build. Returns the exit code: the builder's, or 1 where there is none."""
    arguments = build_parser().parse_args(argv)
    builder = arguments.builder or find_builder()
    if builder is None:
        print(f"error: there is none of {', '.join(BUILDERS)}; on Debian: apt-get install buildah", file=sys.stderr)
        return 1
    given = {"DEVICE": arguments.device, "VERSION": read_version(), "REVISION": read_revision()}
    options = list(arguments.options)
    if arguments.base:
        given["BASE"] = arguments.base
    if arguments.torch_links:
        given["TORCH_LINKS"] = arguments.torch_links
        folder = Path(arguments.torch_links)
        if folder.is_dir():
            given["TORCH_LINKS"] = "/wheels"
            options += ["--volume", f"{folder.resolve()}:/wheels:ro"]
    if arguments.ca_bundle:
        given["CA_BUNDLE"] = "/ca-bundle.pem"
        options += ["--volume", f"{arguments.ca_bundle.resolve()}:/ca-bundle.pem:ro"]
    tag = arguments.tag or f"{NAME}:{arguments.device}"
    command = build_command(builder, tag, given, options)
    print(f"building {tag} with {builder} ...", file=sys.stderr)
    finished = subprocess.run(command, check=False)
    if finished.returncode == 0:
        print(tag)
    return finished.returncode


if __name__ == "__main__":
    sys.exit(main())
