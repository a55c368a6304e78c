"""Check the Kubernetes manifests: render each overlay, hold it against schemas and rules.

    python -m scripts.cluster.check

Exit code 0 where all is well, 1 and a line for each problem where not. Needs no cluster and no network.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml

from scripts.cluster.manifests import OVERLAYS, Object, RenderError, list_overlays, name_of, render
from scripts.cluster.rules import RULES, prometheus_groups
from scripts.cluster.schemas import schema_problems
from scripts.command_line import HelpFormatter

PROMETHEUS_RULE = OVERLAYS / "monitoring" / "rules" / "prometheus-rule.yaml"


def problems_of(objects: Sequence[Object]) -> Iterator[str]:
    """Hold objects against their schemas; where these find nothing, against the rules."""
    found = [f"{name_of(one)}: {problem}" for one in objects for problem in schema_problems(one)]
    yield from found
    if not found:  # a rule reads objects whose fields have the right types
        for rule in RULES:
            yield from (f"{problem} [{rule.__name__}]" for problem in rule(objects))


def prometheus_rule() -> str:
    """Write the PrometheusRule that holds the committed rules of Prometheus."""
    content = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "digits"},
        "spec": {"groups": prometheus_groups()},
    }
    return (
        "# Generated from serve_config/prometheus by: python -m scripts.cluster.check --write\n"
        f"{yaml.safe_dump(content, sort_keys=False, width=130)}"
    )


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m scripts.cluster.check",
        description="Render kustomize overlays and hold them against schemas and rules: all that are committed, or those named.",
        epilog="examples:\n  %(prog)s\n  %(prog)s my-cluster/production",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("overlays", nargs="*", type=Path, metavar="FOLDER", help="folders with a kustomization.yaml")
    parser.add_argument("--write", action="store_true", help="write the PrometheusRule anew from serve_config/prometheus first")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check. Returns the exit code: 1 where a problem was found."""
    arguments = build_parser().parse_args(argv)
    if arguments.write:
        PROMETHEUS_RULE.write_text(prometheus_rule())
    found = 0
    for folder in arguments.overlays or list_overlays():
        try:
            objects = render(folder)
            problems = list(problems_of(objects))
        except RenderError as error:
            objects, problems = [], [str(error)]
        print(f"{folder.name}: {len(objects)} objects, {len(problems)} problems")
        for problem in problems:
            print(f"  {problem}")
        found += len(problems)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
