"""The layout of a command's `--help`."""

import argparse
from pathlib import Path

from scripts.paths import ROOT


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Show defaults, project files by their path in the project, and examples unbroken, so that they can be copied."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if action.help is None or default == [] or any(default is absent for absent in (None, False, argparse.SUPPRESS)):
            return action.help
        if isinstance(default, Path) and default.is_relative_to(ROOT):
            default = default.relative_to(ROOT)
        return f"{action.help} (default: {str(default).replace('%', '%%')})"
