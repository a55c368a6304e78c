"""The objects of one overlay -> what is wrong among them that no schema sees.

Quantities, names of ports, and everything that is named in one object and defined in another: selectors, ConfigMaps, volumes,
options of programs, metrics. Each rule is a function from all objects to problems; RULES lists them.
"""

import contextlib
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from pathlib import PurePosixPath
from typing import Any

import yaml

from scripts.cluster.containers import Problems, probes_of, quantity_of, settings_of
from scripts.cluster.manifests import Object, name_of, pods_in
from scripts.cluster.pod_rules import POD_RULES
from scripts.paths import SERVE_CONFIG
from scripts.serving import ready
from scripts.serving.child import STOP_TIMEOUT_S

GIVEN = "saliency-serve/given"  # annotation: what the operator makes by hand, such as Secret/digits-tls
IN_FLIGHT_PER_WORKER = (2, 8)  # least and most that an autoscaler may aim at: scripts/results/README.md, "Autoscaling"
SERVING = ["python", "-m", "scripts.serving"]
READY = ["python", "-m", "scripts.serving.ready"]
ROUTES = re.compile(r"/(ping|(predictions|explanations)/\w+|v1/models/\w+:(predict|explain)|v2/models/\w+(/(infer|explain))?)")
PROMETHEUS = SERVE_CONFIG / "prometheus"


def quantities_are_numbers(objects: Sequence[Object]) -> Problems:
    """Each quantity is one, and nothing requests more than its limit."""
    for pods in pods_in(objects):
        for container in pods.containers:
            resources = container.get("resources", {})
            read: dict[tuple[str, str], Decimal] = {}
            for kind in ("requests", "limits"):
                for name, value in resources.get(kind, {}).items():
                    quantity = quantity_of(value)
                    if quantity is None or quantity < 0:
                        yield f"{container['name']}: expected a quantity as {kind} of {name}, got {value!r}"
                    else:
                        read[kind, name] = quantity
            for (kind, name), quantity in read.items():
                limit = read.get(("limits", name), quantity)
                if kind == "requests" and quantity > limit:
                    yield f"{container['name']}: requests more {name} than its limit"
        for volume in pods.spec.get("volumes", ()):
            size = (volume.get("emptyDir") or {}).get("sizeLimit", 0)
            if quantity_of(size) is None:
                yield f"volume {volume['name']}: expected a quantity as sizeLimit, got {size!r}"


def ports_exist(objects: Sequence[Object]) -> Problems:
    """Each port that is named somewhere is declared by a container of the pods in question."""
    all_pods = list(pods_in(objects))
    services = {one["metadata"]["name"]: one for one in objects if one["kind"] == "Service"}
    for pods in all_pods:
        numbers = [port["containerPort"] for container in pods.containers for port in container.get("ports", ())]
        if len(numbers) != len(set(numbers)) or len(numbers) != len(pods.ports):
            yield f"{name_of(pods.owner)}: a port or a port's name is declared twice"
        for container, probe_name, probe in probes_of(pods):
            action = probe.get("httpGet") or probe.get("tcpSocket")
            if action and not pods.has_port(action["port"]):
                yield f"{container}: {probe_name} asks port {action['port']!r}, which no container declares"
    for one in objects:
        if one["kind"] == "Service":
            for port in one["spec"]["ports"]:
                target = port.get("targetPort", port["port"])
                for pods in all_pods:
                    if pods.are_selected(one["spec"].get("selector", {})) and not pods.has_port(target):
                        yield f"{name_of(one)}: targetPort {target!r} is declared by no container"
        elif one["kind"] == "NetworkPolicy":
            for rule in one["spec"].get("ingress", ()):
                for port in rule.get("ports", ()):
                    for pods in all_pods:
                        chosen = pods.are_selected(one["spec"]["podSelector"].get("matchLabels", {}))
                        if chosen and not pods.has_port(port.get("port")):
                            yield f"{name_of(one)}: port {port.get('port')!r} is declared by no container"
        elif one["kind"] == "PodMonitor":
            for endpoint in one["spec"].get("podMetricsEndpoints", ()):
                for pods in all_pods:
                    if endpoint.get("port") not in pods.ports:
                        yield f"{name_of(one)}: port {endpoint.get('port')!r} is declared by no container"
        elif one["kind"] == "Ingress":
            for path in (path for rule in one["spec"].get("rules", ()) for path in rule["http"]["paths"]):
                asked = path["backend"]["service"]
                service = services.get(asked["name"])
                declared = [] if service is None else service["spec"]["ports"]
                key = "name" if "name" in asked["port"] else "number"
                if asked["port"][key] not in [port["name" if key == "name" else "port"] for port in declared]:
                    yield f"{name_of(one)}: there is no service {asked['name']} with the port {asked['port'][key]!r}"


def selectors_choose_pods(objects: Sequence[Object]) -> Problems:
    """Whatever chooses pods by labels chooses some; a Deployment chooses its own."""
    all_pods = list(pods_in(objects))
    for one in objects:
        spec = one.get("spec") or {}
        selector = {
            "Deployment": lambda spec: spec["selector"].get("matchLabels", {}),
            "Service": lambda spec: spec.get("selector", {}),
            "PodDisruptionBudget": lambda spec: spec["selector"].get("matchLabels", {}),
            "NetworkPolicy": lambda spec: spec["podSelector"].get("matchLabels", {}),
            "PodMonitor": lambda spec: spec["selector"].get("matchLabels", {}),
        }.get(one["kind"])
        if selector is None:
            continue
        labels = selector(spec)
        candidates = [pods for pods in all_pods if one["kind"] != "Deployment" or pods.owner is one]
        if not labels:
            yield f"{name_of(one)}: chooses no pods by label, or all of them"
        elif candidates and not any(pods.are_selected(labels) for pods in candidates):
            yield f"{name_of(one)}: no pod has the labels {labels}"
    for pods in all_pods:
        for spread in pods.spec.get("topologySpreadConstraints", ()):
            labels = spread["labelSelector"].get("matchLabels", {})
            if not pods.are_selected(labels):
                yield f"{name_of(pods.owner)}: spreads over {spread['topologyKey']} by labels that its pods do not have: {labels}"


def references_exist(objects: Sequence[Object]) -> Problems:
    """Each ConfigMap, Secret and claim that is named is made here, or given by the operator; each mount has its volume."""
    made = {name_of(one) for one in objects}
    for one in objects:
        given = one["metadata"].get("annotations", {}).get(GIVEN, "")
        made |= {name.strip() for name in given.split(",")}
    for pods in pods_in(objects):
        owner = name_of(pods.owner)
        known = made | {name.strip() for name in pods.annotations.get(GIVEN, "").split(",")}
        volumes = {volume["name"]: volume for volume in pods.spec.get("volumes", ())}
        mounted = {mount["name"] for container in pods.containers for mount in container.get("volumeMounts", ())}
        for name in sorted(mounted - volumes.keys()):
            yield f"{owner}: mounts {name}, which is no volume"
        for name in sorted(volumes.keys() - mounted):
            yield f"{owner}: volume {name} is mounted nowhere"
        for name in _named(pods.spec):
            if name not in known:
                yield f"{owner}: {name} is neither made here nor given (annotation {GIVEN})"
    for one in objects:
        if one["kind"] == "Ingress":
            secrets = [tls.get("secretName") for tls in one["spec"].get("tls", ())]
            secrets.append(one["metadata"].get("annotations", {}).get("nginx.org/basic-auth-secret"))
            for name in secrets:
                if name is not None and f"Secret/{name}" not in made:
                    yield f"{name_of(one)}: Secret/{name} is neither made here nor given (annotation {GIVEN})"
            hosts = {host for tls in one["spec"].get("tls", ()) for host in tls.get("hosts", ())}
            for rule in one["spec"].get("rules", ()):
                if rule.get("host") not in hosts:
                    yield f"{name_of(one)}: host {rule.get('host')} has no TLS"


def _named(spec: Mapping[str, Any]) -> Iterator[str]:
    """Name the ConfigMaps, Secrets and claims of a PodSpec."""
    for volume in spec.get("volumes", ()):
        if "configMap" in volume:
            yield f"ConfigMap/{volume['configMap']['name']}"
        if "secret" in volume:
            yield f"Secret/{volume['secret']['secretName']}"
        if "persistentVolumeClaim" in volume:
            yield f"PersistentVolumeClaim/{volume['persistentVolumeClaim']['claimName']}"
    for container in [*spec.get("initContainers", ()), *spec.get("containers", ())]:
        for source in container.get("envFrom", ()):
            for key, kind in (("configMapRef", "ConfigMap"), ("secretRef", "Secret")):
                if key in source:
                    yield f"{kind}/{source[key]['name']}"
        for variable in container.get("env", ()):
            for key, kind in (("configMapKeyRef", "ConfigMap"), ("secretKeyRef", "Secret")):
                if key in variable.get("valueFrom", {}):
                    yield f"{kind}/{variable['valueFrom'][key]['name']}"


def config_keys_exist(objects: Sequence[Object]) -> Problems:
    """A file that a command names below a mounted ConfigMap is a key of it."""
    configs = {one["metadata"]["name"]: one for one in objects if one["kind"] == "ConfigMap"}
    for pods in pods_in(objects):
        volumes = {
            volume["name"]: configs.get(volume["configMap"]["name"])
            for volume in pods.spec.get("volumes", ())
            if "configMap" in volume
        }
        for container in pods.containers:
            words = " ".join([*container.get("command", ()), *container.get("args", ())])
            for mount in container.get("volumeMounts", ()):
                config = volumes.get(mount["name"])
                for key in re.findall(rf"{re.escape(mount['mountPath'])}/([\w.-]+)", words):
                    if config is not None and key not in config.get("data", {}):
                        yield f"{container['name']}: {mount['mountPath']}/{key} is no key of {name_of(config)}"


def commands_are_understood(objects: Sequence[Object]) -> Problems:
    """Options of server and probe are those of the programs; both mean the same archive, port and folder of logs."""
    for pods in pods_in(objects):
        for container in pods.spec.get("containers", ()):
            name = container["name"]
            settings, problem = settings_of(container.get("args", ()))
            if settings is None:
                yield f"{name}: the server refuses its options: {problem}"
                continue
            if settings.ports.inference not in pods.ports.values() or settings.ports.metrics not in pods.ports.values():
                yield f"{name}: serves on {settings.ports.inference} and {settings.ports.metrics}, which are not both declared"
            commands = [
                (probe_name, probe["exec"]["command"])
                for container_name, probe_name, probe in probes_of(pods)
                if container_name == name and "exec" in probe
            ]
            for probe_name, command in commands:
                if command[:3] != READY:
                    yield f"{name}: expected {' '.join(READY)} as {probe_name}, got {command}"
                    continue
                with contextlib.redirect_stderr(io.StringIO()) as said:
                    try:
                        asked = ready.build_parser().parse_args(command[3:])
                    except SystemExit:
                        yield f"{name}: {probe_name} is refused: {said.getvalue().strip().splitlines()[-1]}"
                        continue
                if asked.archive.name != settings.archive.name or asked.archive.is_absolute() != _is_elsewhere(container):
                    yield f"{name}: {probe_name} compares with {asked.archive}, and {settings.archive} is served"
                if not asked.address.endswith(f":{settings.ports.inference}"):
                    yield f"{name}: {probe_name} asks {asked.address}, and port {settings.ports.inference} is served"
                if asked.log_dir is not None and str(asked.log_dir) != str(settings.log_dir):
                    yield f"{name}: {probe_name} looks into {asked.log_dir}, and logs are in {settings.log_dir}"


def _is_elsewhere(container: Mapping[str, Any]) -> bool:
    """Tell whether a container serves another archive than its image's, by a full path."""
    return any(word.startswith("--archive=/") for word in container.get("args", ()))


def probes_ask_for_right_answers(objects: Sequence[Object]) -> Problems:
    """A pod gets requests only once its answers are right, and is restarted only when its frontend is gone."""
    for pods in pods_in(objects):
        for container in pods.spec.get("containers", ()):
            name = container["name"]
            for probe_name in ("startupProbe", "readinessProbe"):
                if container.get(probe_name, {}).get("exec", {}).get("command", [])[:3] != READY:
                    yield f"{name}: expected a {probe_name} that asks for a right answer ({' '.join(READY)})"
            liveness = container.get("livenessProbe", {})
            path = liveness.get("httpGet", {}).get("path")
            if path != "/ping":
                yield f"{name}: expected GET /ping as livenessProbe, got {path or liveness}; a busy server must not be restarted"
        for container, probe_name, probe in probes_of(pods):
            command = probe.get("exec", {}).get("command", [])
            if "--timeout" in command and float(command[command.index("--timeout") + 1]) >= probe.get("timeoutSeconds", 1):
                yield f"{container}: {probe_name} gives up after timeoutSeconds, before its command says why (--timeout)"


def stop_has_time(objects: Sequence[Object]) -> Problems:
    """The grace period covers the drain, the requests in flight and TorchServe's end."""
    for pods in pods_in(objects):
        for container in pods.spec.get("containers", ()):
            settings, _ = settings_of(container.get("args", ()))
            cluster = settings.cluster if settings else None
            if cluster is None:
                continue
            needed = cluster.drain_delay_s + cluster.drain_timeout_s + STOP_TIMEOUT_S
            grace = pods.spec.get("terminationGracePeriodSeconds", 30)
            if grace < needed:
                yield f"{container['name']}: expected terminationGracePeriodSeconds of {needed:g} at least, got {grace}"


def disruptions_are_possible(objects: Sequence[Object]) -> Problems:
    """A node can be drained, and that leaves a pod."""
    for one in objects:
        if one["kind"] == "PodDisruptionBudget" and one["spec"].get("maxUnavailable") in (0, "0", "0%"):
            yield f"{name_of(one)}: no pod may ever be moved"
        if one["kind"] == "Deployment" and one["spec"].get("replicas", 2) < 2:
            yield f"{name_of(one)}: expected two replicas at least"
        if one["kind"] == "Deployment":
            rolling = one["spec"].get("strategy", {}).get("rollingUpdate", {})
            if rolling.get("maxUnavailable") == 0 and rolling.get("maxSurge") == 0:
                yield f"{name_of(one)}: a rollout can neither add a pod nor take one away"


def routes_exist(objects: Sequence[Object]) -> Problems:
    """An ingress passes routes of the API on, and bodies as large as the server takes."""
    properties = (SERVE_CONFIG / "config-hardened.properties").read_text()
    (most,) = re.findall(r"(?m)^max_request_size=(\d+)$", properties)
    for one in objects:
        if one["kind"] != "Ingress":
            continue
        for path in (path for rule in one["spec"].get("rules", ()) for path in rule["http"]["paths"]):
            if not ROUTES.fullmatch(path["path"]):
                yield f"{name_of(one)}: {path['path']} is no route of the API"
        size = one["metadata"].get("annotations", {}).get("nginx.org/client-max-body-size", "1m")
        found = re.fullmatch(r"(\d+)([km]?)", size, re.IGNORECASE)
        if found is None or int(found[1]) * {"": 1, "k": 1024, "m": 1024**2}[found[2].lower()] != int(most):
            yield f"{name_of(one)}: expected max_request_size ({most} bytes) as client-max-body-size, got {size}"


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
            if target not in deployments:
                yield f"{name}: there is no Deployment/{target}"
            elif "replicas" in deployments[target]["spec"]:
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
    found = set()
    for pods in pods_in(objects):
        for container in pods.spec.get("containers", ()):
            settings, _ = settings_of(container.get("args", ()))
            if settings is not None and "minWorkers" in settings.model_config:
                found.add(int(settings.model_config["minWorkers"]))
    return found


def known_metrics() -> set[str]:
    """List the metrics that servers export, and the values that the committed rules record."""
    declared = yaml.safe_load((SERVE_CONFIG / "metrics.yaml").read_text())
    names = {one["name"] for section in declared.values() for kind in section.values() for one in kind}
    for file in ("alerts.yml", "autoscaling.yml"):
        for group in yaml.safe_load((PROMETHEUS / file).read_text())["groups"]:
            names |= {rule["record"] for rule in group["rules"] if "record" in rule}
    return names


def _query_problems(name: str, query: str, namespace: str | None) -> Problems:
    used = set(re.findall(r"\b(?:saliency[_:]|ts_|Requests)[\w:]+", query))
    for metric in sorted(used - known_metrics()):
        yield f"{name}: nothing exports or records {metric}"
    if not used:
        yield f"{name}: its query names no metric of this service: {query!r}"
    if f'namespace="{namespace}"' not in query:
        yield f'{name}: expected namespace="{namespace}" in its query, got {query!r}'


def rules_are_the_committed_ones(objects: Sequence[Object]) -> Problems:
    """A PrometheusRule holds serve_config/prometheus, word for word."""
    for one in objects:
        if one["kind"] == "PrometheusRule" and one["spec"]["groups"] != prometheus_groups():
            yield f"{name_of(one)}: is not what serve_config/prometheus says: python -m scripts.cluster.check --write"


def prometheus_groups() -> list[dict[str, Any]]:
    """Read the groups of the committed rules, in the order of files."""
    return [
        group for file in ("alerts.yml", "autoscaling.yml") for group in yaml.safe_load((PROMETHEUS / file).read_text())["groups"]
    ]


def names_are_unique(objects: Sequence[Object]) -> Problems:
    """No two objects have the same kind, name and namespace; all are in one namespace."""
    seen: set[tuple[str, str | None]] = set()
    for one in objects:
        key = (name_of(one), one["metadata"].get("namespace"))
        if key in seen:
            yield f"{key[0]}: is there twice"
        seen.add(key)
    namespaces = {one["metadata"].get("namespace") for one in objects if one["kind"] != "Namespace"}
    if len(namespaces) > 1:
        yield f"expected one namespace, got {sorted(map(str, namespaces))}"


def init_containers_check_the_archive(objects: Sequence[Object]) -> Problems:
    """An archive from a volume is compared with its SHA-256 twice: before the server starts, and by the server."""
    for pods in pods_in(objects):
        for container in pods.spec.get("containers", ()):
            archive = next((PurePosixPath(w[10:]) for w in container.get("args", ()) if w.startswith("--archive=/")), None)
            if archive is None:
                continue
            checks = [
                one
                for one in pods.spec.get("initContainers", ())
                if one.get("command", [])[:2] == ["sha256sum", "--check"] and one.get("workingDir") == str(archive.parent)
            ]
            if not checks:
                yield f"{container['name']}: expected an init container with sha256sum --check in {archive.parent}"
            if not any(word.startswith("--archive-sha256=") for word in container["args"]):
                yield f"{container['name']}: expected --archive-sha256 beside --archive"


RULES: tuple[Callable[[Sequence[Object]], Problems], ...] = (
    quantities_are_numbers,
    ports_exist,
    selectors_choose_pods,
    references_exist,
    config_keys_exist,
    commands_are_understood,
    probes_ask_for_right_answers,
    stop_has_time,
    disruptions_are_possible,
    routes_exist,
    autoscalers_fit,
    rules_are_the_committed_ones,
    names_are_unique,
    init_containers_check_the_archive,
    *POD_RULES,
)
