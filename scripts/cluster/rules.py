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

from scripts.cluster.autoscaling_rules import AUTOSCALING_RULES, PROMETHEUS
from scripts.cluster.containers import Problems, probes_of, quantity_of, servers_in, settings_of
from scripts.cluster.exposure_rules import EXPOSURE_RULES, backends_of
from scripts.cluster.manifests import Object, name_of, pods_in
from scripts.cluster.pod_rules import POD_RULES
from scripts.serving import ready
from scripts.serving.child import STOP_TIMEOUT_S

GIVEN = "saliency-serve/given"  # annotation: what the operator makes by hand, such as Secret/digits-tls
SERVING = ["python", "-m", "scripts.serving"]
READY = ["python", "-m", "scripts.serving.ready"]


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
            for asked in backends_of(one):
                service = services.get(asked["name"])
                declared = [] if service is None else service["spec"]["ports"]
                port = asked.get("port", {})
                if not any(port in ({"name": each.get("name")}, {"number": each["port"]}) for each in declared):
                    wanted = port.get("name", port.get("number"))
                    yield f"{name_of(one)}: there is no service {asked['name']} with the port {wanted!r}"


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
        for container, settings in servers_in(pods):
            cluster = settings.cluster
            if cluster is None:
                continue
            needed = cluster.drain_delay_s + cluster.drain_timeout_s + STOP_TIMEOUT_S
            grace = pods.spec.get("terminationGracePeriodSeconds", 30)
            if grace < needed:
                yield f"{container['name']}: expected terminationGracePeriodSeconds of {needed:g} at least, got {grace}"


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
    rules_are_the_committed_ones,
    names_are_unique,
    init_containers_check_the_archive,
    *AUTOSCALING_RULES,
    *EXPOSURE_RULES,
    *POD_RULES,
)
