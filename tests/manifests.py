"""Rendered overlays, and what the checks say of one that was changed in one place."""

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

from scripts.cluster.check import problems_of
from scripts.cluster.manifests import OVERLAYS, render

Objects = list[dict[str, Any]]
Change = Callable[[dict[str, Any]], None]


POD = "spec|template|spec|"
CONTAINER = POD + "containers|0|"


@cache
def rendered(overlay: str) -> Objects:
    return [dict(one) for one in render(OVERLAYS / overlay)]


def one_of(objects: Objects, kind: str) -> dict[str, Any]:
    (found,) = [one for one in objects if one["kind"] == kind]
    return found


def container_of(one: dict[str, Any]) -> dict[str, Any]:
    spec = one["spec"]["predictor"] if one["kind"] == "InferenceService" else one["spec"]["template"]["spec"]
    container: dict[str, Any] = spec["containers"][0]
    return container


def pod_of(one: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = one["spec"]["template"]["spec"]
    return spec


def setting(path: str, value: object) -> Change:
    """Make a change that puts a value at a path, such as spec.ports.0.port; None removes what is there."""

    def change(one: dict[str, Any]) -> None:
        *parents, last = path.split("|")
        at: Any = one
        for key in parents:
            at = at[int(key) if isinstance(at, list) else key]
        if value is None:
            del at[int(last) if isinstance(at, list) else last]
        else:
            at[int(last) if isinstance(at, list) else last] = value

    return change


def problems_with(overlay: str, kind: str, change: Change) -> list[str]:
    """Say what is wrong with an overlay, the one object of a kind in which was changed."""
    wrong = copy.deepcopy(rendered(overlay))
    change(one_of(wrong, kind))
    return list(problems_of(wrong))
