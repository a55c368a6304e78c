"""Autoscalers -> what is wrong with them that no schema sees: what they scale, by what, how far and how fast.

Each rule is a function from all objects to problems, as in `rules.py`, which lists them.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import yaml

from scripts.cluster.containers import Problems, quantity_of, servers_in
from scripts.cluster.manifests import Object, name_of, pods_in
from scripts.paths import SERVE_CONFIG

IN_FLIGHT_PER_WORKER = (2, 8)  # least and most that an autoscaler may aim at: scripts/results/README.md, "Autoscaling"
JOB = "saliency"  # what Prometheus calls these servers: alerts, dashboard and autoscaling ask for it
PROMETHEUS = SERVE_CONFIG / "prometheus"
OPERATED = "prometheus-operated"  # the service that prometheus-operator makes, on port 9090
LONGEST_PERIOD, LONGEST_WINDOW = 1800, 3600  # seconds, of a HorizontalPodAutoscaler's behaviour


def autoscalers_fit(objects: Sequence[Object]) -> Problems:
    """An autoscaler scales what exists, alone, by a metric of its namespace, at 2 to 8 requests in flight a worker."""
    deployments = {one["metadata"]["name"]: one for one in objects if one["kind"] == "Deployment"}
    adapter = yaml.safe_load((SERVE_CONFIG / "cluster/overlays/autoscale-hpa/prometheus-adapter.yaml").read_text())
    adapted = {rule["name"]["as"]: rule for rule in adapter["rules"]["external"]}
    for one in objects:
        spec, name = one.get("spec", {}), name_of(one)
        if one["kind"] == "ScaledObject":
            least, most = spec.get("minReplicaCount", 0), spec.get("maxReplicaCount", 100)
            queries = [(t["metadata"].get("query", ""), t["metadata"].get("threshold", "")) for t in spec.get("triggers", ())]
            for trigger in spec.get("triggers", ()):
                if trigger["metadata"].get("ignoreNullValues") != "false":
                    yield f'{name}: expected ignoreNullValues: "false"; a lost Prometheus would mean no load'
                if trigger.get("metricType", "AverageValue") != "AverageValue":
                    yield f"{name}: expected metricType AverageValue, as the threshold is one pod's"
            if "fallback" not in spec:
                yield f"{name}: expected a fallback for a lost Prometheus"
        elif one["kind"] == "HorizontalPodAutoscaler":
            least, most = spec.get("minReplicas", 1), spec["maxReplicas"]
            queries = []
            for metric in (metric["external"] for metric in spec.get("metrics", ()) if "external" in metric):
                rule = adapted.get(metric["metric"]["name"])
                if rule is None:
                    yield f"{name}: no rule of prometheus-adapter.yaml makes the metric {metric['metric']['name']}"
                    continue
                namespace = one["metadata"].get("namespace")
                queries.append((f'{rule["seriesQuery"]}{{namespace="{namespace}"}}', metric["target"].get("averageValue", "")))
        elif one["kind"] == "InferenceService":
            predictor = spec["predictor"]
            least, most = predictor.get("minReplicas", 1), predictor.get("maxReplicas", 1)
            external = [metric["external"] for metric in predictor.get("autoScaling", {}).get("metrics", ())]
            queries = [(metric["metric"].get("query", ""), metric["target"].get("value", "")) for metric in external]
            for query, _ in queries:
                if not query.startswith("last_over_time("):
                    yield f"{name}: expected last_over_time in its query; KServe lets KEDA take a lost value as zero"
        else:
            continue
        if not 2 <= least < most:
            yield f"{name}: expected at least two pods, and more at most; got {least} to {most}"
        target = spec.get("scaleTargetRef", {}).get("name")
        if one["kind"] != "InferenceService":
            yield from (f"{name}: {problem}" for problem in _target_problems(one, deployments))
            if "replicas" in deployments.get(target, {"spec": {}})["spec"]:
                yield f"{name}: Deployment/{target} has replicas of its own, which every apply would set again"
        if not queries:
            yield f"{name}: scales by nothing"
        workers = _worker_counts(objects)
        for query, threshold in queries:
            yield from _query_problems(name, query, one["metadata"].get("namespace"))
            quantity = quantity_of(threshold)
            for count in workers:
                least_in_flight, most_in_flight = (number * count for number in IN_FLIGHT_PER_WORKER)
                if quantity is None or not least_in_flight <= quantity <= most_in_flight:
                    expected = f"{least_in_flight} to {most_in_flight} requests in flight for {count} workers"
                    yield f"{name}: expected {expected}, got {threshold!r}"


def _worker_counts(objects: Sequence[Object]) -> set[int]:
    all_settings = [settings for pods in pods_in(objects) for _, settings in servers_in(pods)]
    return {int(settings.model_config["minWorkers"]) for settings in all_settings if "minWorkers" in settings.model_config}


def recorded(file: str) -> set[str]:
    """List the values that a committed file of rules records."""
    groups = yaml.safe_load((PROMETHEUS / file).read_text())["groups"]
    return {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}


def known_metrics() -> set[str]:
    """List the metrics that servers export, and the values that the committed rules record."""
    declared = yaml.safe_load((SERVE_CONFIG / "metrics.yaml").read_text())
    names = {one["name"] for section in declared.values() for kind in section.values() for one in kind}
    return names | recorded("alerts.yml") | recorded("autoscaling.yml")


def _query_problems(name: str, query: str, namespace: str | None) -> Problems:
    used = set(re.findall(r"\b(?:saliency[_:]|ts_|Requests)[\w:]+", query))
    for metric in sorted(used - known_metrics()):
        yield f"{name}: nothing exports or records {metric}"
    if not used:
        yield f"{name}: its query names no metric of this service: {query!r}"
    elif not used & recorded("autoscaling.yml"):
        yield f"{name}: expected {', '.join(sorted(recorded('autoscaling.yml')))} in its query, got {', '.join(sorted(used))}"
    if any(query.count(left) != query.count(right) for left, right in ("{}", "()", "[]")) or query.count('"') % 2:
        yield f"{name}: expected as many closing as opening braces in its query, got {query!r}"
    for job in re.findall(r'\bjob\s*=\s*"([^"]*)"', query):
        if job != JOB:
            yield f'{name}: expected job="{JOB}" in its query, got job="{job}"'
    if f'namespace="{namespace}"' not in query:
        yield f'{name}: expected namespace="{namespace}" in its query, got {query!r}'


def _target_problems(one: Object, deployments: Mapping[str, Object]) -> Problems:
    """Say what is wrong with what is scaled. KEDA knows a Deployment without its kind, a HorizontalPodAutoscaler does not."""
    ref = one["spec"].get("scaleTargetRef", {})
    default = ("apps/v1", "Deployment") if one["kind"] == "ScaledObject" else (None, None)
    got = (ref.get("apiVersion", default[0]), ref.get("kind", default[1]))
    if ref.get("name") not in deployments:
        yield f"there is no Deployment/{ref.get('name')}"
    if got != ("apps/v1", "Deployment"):
        yield f"expected apps/v1 Deployment as scaleTargetRef, got {got[0]} {got[1]}"


def autoscalers_ask_their_metric(objects: Sequence[Object]) -> Problems:
    """A HorizontalPodAutoscaler's metric is of the type that it says, of one pod, and of all pods of the service."""
    for one in objects:
        if one["kind"] != "HorizontalPodAutoscaler":
            continue
        for metric in one["spec"].get("metrics", ()):
            field = metric["type"][:1].lower() + metric["type"][1:]
            if set(metric) != {"type", field}:
                yield f"{name_of(one)}: expected the field of metric type {metric['type']}, got {sorted(set(metric) - {'type'})}"
                continue
            target = metric[field].get("target", {})
            if field == "external" and (target.get("type") != "AverageValue" or set(target) != {"type", "averageValue"}):
                yield f"{name_of(one)}: expected AverageValue and averageValue as target, which is one pod's; got {target}"
            chosen = metric[field].get("metric", {}).get("selector", {})
            right = {"job": JOB, "namespace": one["metadata"].get("namespace")}
            if "matchExpressions" in chosen or not chosen.get("matchLabels", {}).items() <= right.items():
                yield f"{name_of(one)}: expected no labels but {right} to choose the metric by, got {chosen}"


def autoscalers_can_act(objects: Sequence[Object]) -> Problems:
    """An autoscaler may add pods, in steps above 0; without Prometheus it has as many as it may have."""
    for one in objects:
        spec, name = one.get("spec", {}), name_of(one)
        if one["kind"] == "ScaledObject":
            behavior = spec.get("advanced", {}).get("horizontalPodAutoscalerConfig", {}).get("behavior", {})
            least, most = spec.get("minReplicaCount", 0), spec.get("maxReplicaCount", 100)
            replicas = spec.get("fallback", {}).get("replicas", least)
            if not least <= replicas <= most:
                yield f"{name}: expected {least} to {most} replicas as fallback, got {replicas}"
        elif one["kind"] == "HorizontalPodAutoscaler":
            behavior = spec.get("behavior", {})
        else:
            continue
        if behavior.get("scaleUp", {}).get("selectPolicy") == "Disabled":
            yield f"{name}: expected Max or Min as selectPolicy of scaleUp, got Disabled, which never adds a pod"
        for way, rules in behavior.items():
            window = rules.get("stabilizationWindowSeconds", 0)
            if not 0 <= window <= LONGEST_WINDOW:
                yield f"{name}: expected 0 to {LONGEST_WINDOW} as stabilizationWindowSeconds of {way}, got {window}"
            for policy in rules.get("policies", ()):
                if policy["value"] <= 0 or not 0 < policy["periodSeconds"] <= LONGEST_PERIOD:
                    yield f"{name}: expected a value above 0 and 1 to {LONGEST_PERIOD} periodSeconds of {way}, got {policy}"


def prometheus_addresses(objects: Sequence[Object]) -> Iterator[tuple[Object, str]]:
    """Find where autoscalers ask Prometheus: the autoscaler and the address."""
    for one in objects:
        found: list[Mapping[str, Any]] = []
        if one["kind"] == "ScaledObject":
            found = [trigger["metadata"] for trigger in one["spec"].get("triggers", ()) if trigger["type"] == "prometheus"]
        elif one["kind"] == "InferenceService":
            metrics = one["spec"]["predictor"].get("autoScaling", {}).get("metrics", ())
            found = [metric["external"]["metric"] for metric in metrics if "external" in metric]
        yield from ((one, source.get("serverAddress", "")) for source in found)


def operated_namespace(address: str) -> str | None:
    """Name the namespace of the Prometheus that prometheus-operator made at an address; None for another one."""
    service, _, rest = (urlsplit(address).hostname or "").partition(".")
    return rest.partition(".")[0] if service == OPERATED else None


def prometheus_is_found(objects: Sequence[Object]) -> Problems:
    """An autoscaler asks Prometheus by a name that holds in every namespace, and prometheus-operator's on its port."""
    for one, address in prometheus_addresses(objects):
        try:
            url = urlsplit(address)
            port = url.port
        except ValueError:
            yield f"{name_of(one)}: expected the URL of Prometheus, got {address}"
            continue
        if url.scheme not in {"http", "https"} or "." not in (url.hostname or ""):
            yield f"{name_of(one)}: expected http://SERVICE.NAMESPACE:PORT, as KEDA has its own namespace; got {address}"
        elif operated_namespace(address) and port != 9090:
            yield f"{name_of(one)}: expected port 9090 of {OPERATED}, got {address}"


AUTOSCALING_RULES: tuple[Callable[[Sequence[Object]], Problems], ...] = (
    autoscalers_fit,
    autoscalers_ask_their_metric,
    autoscalers_can_act,
    prometheus_is_found,
)
