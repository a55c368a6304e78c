"""What reaches the pods, and what takes them away -> what is wrong with it that no schema sees.

Network policies, ingresses, the scrapes of Prometheus, disruption budgets, KServe's ways. Each rule is a function from all
objects to problems, as in `rules.py`, which lists them.
"""

import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from handler.limits import MAX_BATCH_SECONDS
from scripts.cluster.autoscaling_rules import JOB, operated_namespace, prometheus_addresses
from scripts.cluster.containers import Problems, servers_in
from scripts.cluster.manifests import Object, Pods, name_of, pods_in
from scripts.paths import SERVE_CONFIG

ROUTES = re.compile(r"/((predictions|explanations)/(\w+)|v1/models/(\w+):(predict|explain)|v2/models/(\w+)(/(infer|explain))?)")
NAMESPACE_NAME = "kubernetes.io/metadata.name"  # the label that Kubernetes itself gives each namespace
LONGEST_INTERVAL_S = 20  # the committed rules ask for rate[1m], which needs two scrapes even where one is lost
NGINX = "nginx.org/"
LOGINS = {"nginx.org/basic-auth-secret", "nginx.org/policies", "nginx.com/jwt-key"}
# Annotations of F5's NGINX Ingress Controller that are of use here. Others may be there, unless they look like one of these.
ANNOTATIONS = (
    *("basic-auth-secret", "basic-auth-realm", "client-max-body-size", "client-body-buffer-size", "redirect-to-https"),
    *("ssl-redirect", "hsts", "hsts-max-age", "hsts-include-subdomains", "hsts-behind-proxy", "lb-method", "keepalive"),
    *("proxy-connect-timeout", "proxy-read-timeout", "proxy-send-timeout", "proxy-buffering", "proxy-buffers"),
    *("proxy-buffer-size", "proxy-hide-headers", "proxy-pass-headers", "proxy-set-headers", "server-tokens", "path-regex"),
    *("limit-req-rate", "limit-req-key", "limit-req-zone-size", "limit-req-delay", "limit-req-no-delay", "limit-req-burst"),
    *("limit-req-dry-run", "limit-req-log-level", "limit-req-reject-code", "limit-req-scale", "max-conns", "max-fails"),
    *("fail-timeout", "policies", "server-snippets", "location-snippets", "use-cluster-ip", "ssl-ciphers"),
)


def seconds_of(text: str) -> float:
    """Read a duration of Prometheus or NGINX, such as 10s or 1m30s; a bare number is of seconds."""
    units = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400, "": 1}
    return sum(float(number) * units[unit] for number, unit in re.findall(r"(\d+)(ms|[smhd]|)", text))


def served_by(pods: Pods) -> Iterator[tuple[str, int, int]]:
    """Name the model of each server in pods, and its ports for inference and metrics."""
    for _, settings in servers_in(pods):
        yield settings.archive.stem, settings.ports.inference, settings.ports.metrics


def policies_let_in_who_asks(objects: Sequence[Object]) -> Problems:
    """Network policies let in requests and Prometheus, each on its port alone, and nothing goes out to everywhere."""
    policies = [one for one in objects if one["kind"] == "NetworkPolicy"]
    for pods in pods_in(objects):
        mine = [one for one in policies if pods.are_selected(one["spec"]["podSelector"].get("matchLabels", {}))]
        if not mine:
            continue
        names = ", ".join(map(name_of, mine))
        limited = {way for one in mine for way in one["spec"].get("policyTypes", ["Ingress"])}
        for way in sorted({"Ingress", "Egress"} - limited):
            yield f"{names}: expected {way} among policyTypes, got {sorted(limited)}"
        let_in: dict[object, list[Mapping[str, Any]]] = {}
        for one in mine:
            for rule in one["spec"].get("ingress", ()):
                if not rule.get("ports"):
                    yield f"{name_of(one)}: expected ports in each rule of ingress, got {rule}"
                for port in rule.get("ports", ()):
                    if port.get("protocol", "TCP") != "TCP":
                        yield f"{name_of(one)}: expected TCP to port {port.get('port')}, got {port['protocol']}"
                    let_in.setdefault(pods.number_of(port.get("port")), []).extend(rule.get("from") or [{}])
            if any(not rule.get("to") and not rule.get("ports") for rule in one["spec"].get("egress", ())):
                yield f"{name_of(one)}: expected places or ports in each rule of egress, got one that lets everything out"
        for _, inference, metrics in served_by(pods):
            yield from (f"{names}: {problem}" for problem in _source_problems(objects, pods, let_in, inference, metrics))


def _source_problems(
    objects: Sequence[Object], pods: Pods, let_in: Mapping[object, Sequence[Mapping[str, Any]]], inference: int, metrics: int
) -> Problems:
    """Compare whom policies let in with who asks."""
    kinds = {one["kind"] for one in objects}
    asked = {
        pods.number_of(port.get("targetPort", port["port"]))
        for one in objects
        if one["kind"] == "Service" and pods.are_selected(one["spec"].get("selector", {}))
        for port in one["spec"]["ports"]
    }
    if pods.owner["kind"] == "InferenceService":
        asked.add(inference)
    if "PodMonitor" in kinds:
        asked.add(metrics)
    for port in sorted(asked - let_in.keys(), key=str):
        yield f"expected a rule that lets requests in to port {port}, got {sorted(let_in, key=str)}"
    closed = {metrics: "Prometheus"} | ({inference: "the ingress"} if "Ingress" in kinds else {})
    for port, who in closed.items():
        for source in let_in.get(port, ()):
            selector = source.get("namespaceSelector")
            everyone = source == {} or source == {"namespaceSelector": {}} or source.get("ipBlock", {}).get("cidr") == "0.0.0.0/0"
            if everyone:
                yield f"expected the namespace of {who} to port {port}, got everyone"
            elif "name" in ((selector or {}).get("matchLabels") or {}):
                yield f"expected {NAMESPACE_NAME} as a namespace's label to port {port}, got name, which Kubernetes does not give"
    spaces = [_namespace_of(source, pods) for source in let_in.get(metrics, ())]
    for _, address in prometheus_addresses(objects):
        namespace = operated_namespace(address)
        if namespace and spaces and not {namespace, None} & set(spaces):
            yield f"expected the namespace {namespace}, where Prometheus is asked, to port {metrics}; got {spaces}"


def _namespace_of(source: Mapping[str, Any], pods: Pods) -> str | None:
    """Name the namespace of a source; None where it is chosen in another way than by name."""
    if "ipBlock" in source or source == {}:
        return None
    if "namespaceSelector" not in source:
        own: str | None = pods.owner["metadata"].get("namespace")
        return own
    named: str | None = source["namespaceSelector"].get("matchLabels", {}).get(NAMESPACE_NAME)
    return named


def services_go_to_the_server(objects: Sequence[Object]) -> Problems:
    """Services pass requests on to the port for inference, by TCP."""
    for pods in pods_in(objects):
        services = [one for one in objects if one["kind"] == "Service" and pods.are_selected(one["spec"].get("selector", {}))]
        ports = [port for one in services for port in one["spec"]["ports"]]
        targets = [pods.number_of(port.get("targetPort", port["port"])) for port in ports]
        names = ", ".join(map(name_of, services))
        for _, inference, _ in served_by(pods) if services else ():
            if inference not in targets:
                yield f"{names}: expected a targetPort of {inference}, got {targets}"
        for port in ports:
            if port.get("protocol", "TCP") != "TCP" or not 0 < port["port"] < 65536:
                yield f"{names}: expected TCP and a port of 1 to 65535, got {port}"


def scrapes_find_the_metrics(objects: Sequence[Object]) -> Problems:
    """A PodMonitor asks for what the committed rules need: the metrics, often enough, under their job's name."""
    for one in objects:
        for endpoint in one["spec"].get("podMetricsEndpoints", ()) if one["kind"] == "PodMonitor" else ():
            name = name_of(one)
            for pods in pods_in(objects):
                for _, _, metrics in served_by(pods):
                    if pods.number_of(endpoint.get("port")) != metrics:
                        yield f"{name}: expected the port of the metrics, {metrics}; got {endpoint.get('port')}"
            path, scheme = endpoint.get("path", "/metrics"), endpoint.get("scheme", "http")
            if (path, scheme.lower()) != ("/metrics", "http"):
                yield f"{name}: expected /metrics by http, got {path} by {scheme}"
            interval = seconds_of(endpoint.get("interval", "30s"))  # prometheus-operator's default
            if not 0 < interval <= LONGEST_INTERVAL_S:
                yield f"{name}: expected an interval of up to {LONGEST_INTERVAL_S} s, for rate[1m]; got {interval:g}"
            timeout = seconds_of(endpoint.get("scrapeTimeout", "1s"))
            if timeout > interval:
                yield f"{name}: expected a scrapeTimeout of up to {interval:g} s, the interval; got {timeout:g} s"
            named = [
                rule.get("replacement")
                for rule in endpoint.get("relabelings", ())
                if rule.get("targetLabel") == "job" and rule.get("action", "replace").lower() == "replace"
            ]
            if named[-1:] != [JOB]:
                yield f"{name}: expected a relabeling of job to {JOB}, got {named}"


def least_pods(objects: Sequence[Object]) -> int:
    """Count the pods that there are at least: an autoscaler's fewest, else a Deployment's replicas."""
    fields = {"ScaledObject": ("minReplicaCount", 0), "HorizontalPodAutoscaler": ("minReplicas", 1)}
    for one in objects:
        if one["kind"] in fields:
            return int(one["spec"].get(*fields[one["kind"]]))
    counts = [
        pods.spec.get("minReplicas", 1) if pods.owner["kind"] == "InferenceService" else pods.owner["spec"].get("replicas", 2)
        for pods in pods_in(objects)
    ]
    return int(min(counts, default=2))


def disruptions_are_possible(objects: Sequence[Object]) -> Problems:
    """A node can be drained, and that leaves a pod."""
    for one in objects:
        if one["kind"] == "PodDisruptionBudget":
            given = {key: one["spec"][key] for key in ("minAvailable", "maxUnavailable") if one["spec"].get(key) is not None}
            if len(given) != 1:
                yield f"{name_of(one)}: expected one of minAvailable and maxUnavailable, got {given}"
                continue
            ((key, value),) = given.items()
            pods, text = least_pods(objects), str(value)
            if not re.fullmatch(r"\d+%?", text):
                yield f"{name_of(one)}: expected a number or a percentage as {key}, got {value!r}"
                continue
            count = math.ceil(int(text[:-1]) * pods / 100) if text.endswith("%") else int(text)
            may_go = count if key == "maxUnavailable" else pods - count
            if may_go < 1:
                yield f"{name_of(one)}: no pod may ever be moved: {key} of {value}, and {pods} pods at least"
            elif may_go >= pods > 1:
                yield f"{name_of(one)}: all pods may go at once: {key} of {value}, and {pods} pods at least"
        if one["kind"] == "Deployment" and one["spec"].get("replicas", 2) < 2:
            yield f"{name_of(one)}: expected two replicas at least"


def paths_of(ingress: Object) -> Iterator[Mapping[str, Any]]:
    """Find the paths of all rules of an Ingress."""
    for rule in ingress["spec"].get("rules", ()):
        yield from rule.get("http", {}).get("paths", ())


def backends_of(ingress: Object) -> Iterator[Mapping[str, Any]]:
    """Find the services that an Ingress passes requests on to."""
    yield from (path["backend"]["service"] for path in paths_of(ingress) if "service" in path["backend"])


def routes_exist(objects: Sequence[Object]) -> Problems:
    """An ingress passes routes of the API on, of the model that is served, and bodies as large as the server takes."""
    properties = (SERVE_CONFIG / "config-hardened.properties").read_text()
    (most,) = re.findall(r"(?m)^max_request_size=(\d+)$", properties)
    models = {model for pods in pods_in(objects) for model, _, _ in served_by(pods)}
    for one in objects:
        if one["kind"] != "Ingress":
            continue
        if "defaultBackend" in one["spec"]:
            yield f"{name_of(one)}: expected no defaultBackend, which takes every host and path"
        for path in paths_of(one):
            found = ROUTES.fullmatch(path.get("path", ""))
            if found is None:
                yield f"{name_of(one)}: {path.get('path')} is no route of the API for users"
            elif models and (found[3] or found[4] or found[6]) not in models:
                yield f"{name_of(one)}: expected {', '.join(sorted(models))} as model, got {path['path']}"
            if "service" not in path["backend"]:
                yield f"{name_of(one)}: expected a service behind {path.get('path')}, got {path['backend']}"
        size = one["metadata"].get("annotations", {}).get("nginx.org/client-max-body-size", "1m")
        found = re.fullmatch(r"(\d+)([km]?)", size, re.IGNORECASE)
        if found is None or int(found[1]) * {"": 1, "k": 1024, "m": 1024**2}[found[2].lower()] != int(most):
            yield f"{name_of(one)}: expected max_request_size ({most} bytes) as client-max-body-size, got {size}"


def ingresses_are_guarded(objects: Sequence[Object]) -> Problems:
    """An ingress has a class, TLS and users, and says so in words that NGINX's controller knows."""
    for one in objects:
        if one["kind"] != "Ingress":
            continue
        name, annotations = name_of(one), one["metadata"].get("annotations", {})
        options = {key.removeprefix(NGINX): value for key, value in annotations.items() if key.startswith(NGINX)}
        chosen = one["spec"].get("ingressClassName")
        if chosen is None or (options and "nginx" not in chosen):
            yield f"{name}: expected a class of NGINX's controller as ingressClassName, got {chosen}"
        secrets = {tls.get("secretName") for tls in one["spec"].get("tls", ())}
        if None in secrets:
            yield f"{name}: expected a secretName in each part of tls"
        if not annotations.keys() & LOGINS:
            yield f"{name}: expected users: one of the annotations {', '.join(sorted(LOGINS))}"
        if options.get("basic-auth-secret") in secrets - {None}:
            yield f"{name}: expected passwords as basic-auth-secret, got {options['basic-auth-secret']}, which is TLS's"
        for option in sorted(options.keys() - set(ANNOTATIONS)):
            for meant in difflib.get_close_matches(option, ANNOTATIONS, 1, 0.85):
                yield f"{name}: expected {NGINX}{meant}, got {NGINX}{option}"
        timeout = options.get("proxy-read-timeout", "60s")
        if seconds_of(timeout) < MAX_BATCH_SECONDS:
            yield f"{name}: expected proxy-read-timeout of {MAX_BATCH_SECONDS} s at least, got {timeout}"
        rate = options.get("limit-req-rate")
        if any(option.startswith("limit-req-") for option in options) and not re.fullmatch(r"\d+r/[sm]", str(rate)):
            yield f"{name}: expected a rate such as 100r/s as limit-req-rate, got {rate}"
        key = options.get("limit-req-key", "${binary_remote_addr}")
        if not re.search(r"\$\{\w+\}", key):
            yield f"{name}: expected a variable such as ${{binary_remote_addr}} as limit-req-key, got {key}"


def kserve_runs_deployments(objects: Sequence[Object]) -> Problems:
    """An InferenceService is a Deployment that KEDA scales, under its model's name."""
    for pods in pods_in(objects):
        one = pods.owner
        if one["kind"] != "InferenceService":
            continue
        annotations = one["metadata"].get("annotations", {})
        mode = annotations.get("serving.kserve.io/deploymentMode")
        if mode not in {"Standard", "RawDeployment"}:
            yield f"{name_of(one)}: expected serving.kserve.io/deploymentMode Standard, got {mode}"
        scaler = annotations.get("serving.kserve.io/autoscalerClass")
        if "autoScaling" in pods.spec and scaler != "keda":
            yield f"{name_of(one)}: expected serving.kserve.io/autoscalerClass keda for its autoScaling, got {scaler}"
        models = {model for model, _, _ in served_by(pods)}
        if models and one["metadata"]["name"] not in models:
            yield f"{name_of(one)}: expected the model's name, {', '.join(models)}, as KServe's clients ask for it"


EXPOSURE_RULES: tuple[Callable[[Sequence[Object]], Problems], ...] = (
    policies_let_in_who_asks,
    services_go_to_the_server,
    scrapes_find_the_metrics,
    disruptions_are_possible,
    routes_exist,
    ingresses_are_guarded,
    kserve_runs_deployments,
)
