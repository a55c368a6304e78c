"""A Kubernetes object -> what its schema says against it.

Kubernetes' own kinds by kubernetes-validate, which holds the published schemas. For KServe, KEDA and prometheus-operator the
schemas in `schemas/` are ours: the fields that these manifests use, each with its type, and no others, so that a misspelled field
is an error. Knows nothing of other objects: `rules.py` does.
"""

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import yaml

from scripts.cluster.manifests import Object

SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES_VERSIONS = ("1.27", "1.37")  # the oldest that these manifests are meant for, and the newest that is known
PREDICTOR_FIELDS = frozenset({"minReplicas", "maxReplicas", "autoScaling", "labels", "annotations"})  # the others are a PodSpec's


@cache
def read_schema(kind: str) -> dict[str, Any] | None:
    """Read our schema of a kind; None where there is none."""
    file = SCHEMAS / f"{kind}.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else None


def schema_problems(one: Object) -> Iterator[str]:
    """Say what is wrong with an object by itself."""
    schema = read_schema(one["kind"])
    if schema is None:
        yield from _kubernetes_problems(one)
        return
    problems = jsonschema.Draft202012Validator(schema).iter_errors(json.loads(json.dumps(one)))
    for problem in sorted(problems, key=lambda error: list(map(str, error.absolute_path))):
        yield f"{problem.json_path.removeprefix('$.')}: {problem.message}"
    if one["kind"] == "InferenceService":
        predictor = one.get("spec", {}).get("predictor", {})
        spec = {key: value for key, value in predictor.items() if key not in PREDICTOR_FIELDS}
        yield from _kubernetes_problems({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "predictor"}, "spec": spec})


def _kubernetes_problems(one: Object) -> Iterator[str]:
    for version in KUBERNETES_VERSIONS:
        try:
            kubernetes_validate.validate(dict(one), version, strict=True)
        except kubernetes_validate.ValidationError as error:
            yield f"{'.'.join(map(str, error.absolute_path))}: {error.message} (Kubernetes {version})"
        except kubernetes_validate.SchemaNotFoundError as error:
            yield f"{error.message}: neither Kubernetes nor scripts/cluster/schemas has it"
