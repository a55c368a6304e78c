"""What makes pods -> what is wrong with them that no schema sees: rights, images, devices, room, probes, rollouts, and values.

Each rule is a function from all objects to problems, as in `rules.py`, which lists them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from scripts.cluster.containers import Problems, probes_of, quantity_of, servers_in, settings_of
from scripts.cluster.manifests import Object, Pods, name_of, pods_in
from scripts.serving.settings import Settings

USER = 1000  # the image's
GPU = "nvidia.com/gpu"
HOSTNAME = "kubernetes.io/hostname"
SERVING = ["python", "-m", "scripts.serving"]

# Of the pod security standard "restricted": what volumes may be, and what capabilities may be added.
VOLUMES = {"name", "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
CAPABILITIES = {"NET_BIND_SERVICE"}
SECCOMP = {"RuntimeDefault", "Localhost"}
SHARED_WITH_THE_HOST = ("hostNetwork", "hostPID", "hostIPC")

IMAGE = re.compile(
    r"(?:[a-z0-9.-]+(?::\d+)?/)?[a-z0-9]+(?:[._/-]+[a-z0-9]+)*(?::(?P<tag>\w[\w.-]{0,127}))?(?P<digest>@sha256:[0-9a-f]{64})?"
)
LABEL_NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")  # RFC 1123
OBJECT_NAME = re.compile(r"[a-z0-9]([-.a-z0-9]{0,251}[a-z0-9])?")
LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-\w.]{0,61}[A-Za-z0-9])?)?")

# Smallest room for a server, from measurements: two workers hold 1.0 GB idle. One with less is slow, or killed at its start.
CORES_PER_WORKER = Decimal("0.5")
MOST_CORES = 1024  # of any machine: more is bytes by mistake
MEMORY = 512 * 1024**2
MEMORY_PER_WORKER = 128 * 1024**2
TMP = 2 * 1024**3  # logs that have rotated, a body or two, and the unpacked archive

# Seconds.
START = 120  # a cold disk, CUDA, several workers on one core
NOTICE = 60  # in which a pod without right answers leaves the Service
HANG = 60  # of a busy frontend, which must not be restarted
PING_TIMEOUT = 5
DRAIN = 5  # for load balancers to notice that a pod goes
PROGRESS = 600  # Kubernetes' default

# Values of core objects, by their key. Those that Kubernetes knows and that do not suit a Deployment are left out.
CHOICES: Mapping[str, set[str]] = {
    "imagePullPolicy": {"Always", "IfNotPresent", "Never"},
    "restartPolicy": {"Always"},
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet", "Default"},
    "whenUnsatisfiable": {"DoNotSchedule", "ScheduleAnyway"},
    "effect": {"NoSchedule", "PreferNoSchedule", "NoExecute"},
    "scheme": {"HTTP", "HTTPS"},
    "protocol": {"TCP", "UDP", "SCTP"},
    "pathType": {"Exact", "Prefix", "ImplementationSpecific"},
    "sessionAffinity": {"None", "ClientIP"},
    "externalTrafficPolicy": {"Cluster", "Local"},
    "internalTrafficPolicy": {"Cluster", "Local"},
    "ipFamilyPolicy": {"SingleStack", "PreferDualStack", "RequireDualStack"},
    "unhealthyPodEvictionPolicy": {"IfHealthyBudget", "AlwaysAllow"},
    "terminationMessagePolicy": {"File", "FallbackToLogsOnError"},
    "nodeTaintsPolicy": {"Honor", "Ignore"},
    "nodeAffinityPolicy": {"Honor", "Ignore"},
    "medium": {"", "Memory"},
}
CHOICES_BY_PARENT: Mapping[tuple[str, str], set[str]] = {
    ("strategy", "type"): {"RollingUpdate", "Recreate"},
    ("tolerations", "operator"): {"Exists", "Equal"},
    ("seccompProfile", "type"): {"RuntimeDefault", "Localhost", "Unconfined"},
}
SERVICE_TYPES = {"ClusterIP", "NodePort", "LoadBalancer", "ExternalName"}


# --- rights


def containers_can_do_little(objects: Sequence[Object]) -> Problems:
    """Pods meet the pod security standard "restricted", as the image's user, and their namespace demands it."""
    for one in objects:
        if one["kind"] == "Namespace":
            level = one["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce")
            if level != "restricted":
                yield f"{name_of(one)}: expected pod-security.kubernetes.io/enforce restricted, got {level}"
    for pods in pods_in(objects):
        owner, pod = name_of(pods.owner), pods.spec.get("securityContext", {})
        for field in SHARED_WITH_THE_HOST:
            if pods.spec.get(field):
                yield f"{owner}: expected no {field}"
        if pods.spec.get("automountServiceAccountToken") is not False:
            yield f"{owner}: expected automountServiceAccountToken: false; the server needs no access to Kubernetes"
        if pod.get("sysctls"):
            yield f"{owner}: expected no sysctls"
        if 0 in (pod.get("runAsGroup"), pod.get("fsGroup"), *pod.get("supplementalGroups", ())):
            yield f"{owner}: expected groups other than root's"
        for volume in pods.spec.get("volumes", ()):
            for kind in volume.keys() - VOLUMES:
                yield f"{owner}: expected a volume of the pod's own as {volume['name']}, got {kind}"
        for container in pods.containers:
            yield from (f"{container['name']}: {problem}" for problem in _rights(container, pod))


def _rights(container: Mapping[str, Any], pod: Mapping[str, Any]) -> Problems:
    own = container.get("securityContext", {})
    rights = {**pod, **own}
    capabilities = own.get("capabilities", {})
    if rights.get("runAsNonRoot") is not True or rights.get("runAsUser") != USER:
        yield f"expected runAsNonRoot and runAsUser {USER}"
    if rights.get("seccompProfile", {}).get("type") not in SECCOMP:
        yield "expected the seccomp profile RuntimeDefault"
    if own.get("allowPrivilegeEscalation") is not False or "ALL" not in capabilities.get("drop", ()):
        yield "expected allowPrivilegeEscalation: false and all capabilities dropped"
    if own.get("privileged") or own.get("procMount", "Default") != "Default" or set(capabilities.get("add", ())) - CAPABILITIES:
        yield "expected no privileged container, no procMount and no capabilities"
    if own.get("readOnlyRootFilesystem") is not True:
        yield "expected a read-only root file system"
    if any(port.get("hostPort") for port in container.get("ports", ())):
        yield "expected no hostPort; a Service brings requests"


# --- what runs


def images_are_named(objects: Sequence[Object]) -> Problems:
    """An image is named by a tag that stays or a digest, and is built for the device that is asked for."""
    for pods in pods_in(objects):
        for container in pods.containers:
            name, image = container["name"], str(container.get("image"))
            found = IMAGE.fullmatch(image)
            if found is None:
                yield f"{name}: expected the name of an image, got {image!r}"
                continue
            tag = found["tag"] or ""
            if found["digest"] is None and tag in ("", "latest"):
                yield f"{name}: expected an image with a tag other than latest, or a digest, got {image}"
            settings = settings_of(container.get("args", ()))[0]
            wrong = {"gpu": "cpu", "cpu": "cuda"}.get(settings.device if settings else "")
            if wrong in tag.split("-"):
                yield f"{name}: expected an image for --device={settings.device if settings else ''}, got {image}"


def servers_are_the_image_s(objects: Sequence[Object]) -> Problems:
    """A container runs its image's own entry point, where it lies; a stop leaves load balancers the time to notice."""
    for pods in pods_in(objects):
        for container in pods.spec.get("containers", ()):
            command = container.get("command", SERVING)
            if command[: len(SERVING)] != SERVING or "workingDir" in container:
                yield f"{container['name']}: expected the image's own entry point and folder, got {command}"
            for name, count in Counter(one["name"] for one in container.get("env", ())).items():
                if count > 1:
                    yield f"{container['name']}: {name} is set {count} times"
        for container, settings in servers_in(pods):
            if settings.cluster and settings.cluster.drain_delay_s < DRAIN:
                yield f"{container['name']}: expected --drain-delay of {DRAIN} at least, got {settings.cluster.drain_delay_s:g}"


def gpus_are_asked_for(objects: Sequence[Object]) -> Problems:
    """A server on a GPU gets one, on nodes that are kept for those who do; any other gets none."""
    for pods in pods_in(objects):
        for container in pods.spec.get("containers", ()):
            name, resources = container["name"], container.get("resources", {})
            settings = settings_of(container.get("args", ()))[0]
            device = settings.device if settings else ""
            given = resources.get("limits", {}).get(GPU, 0)
            limit, request = quantity_of(given), quantity_of(resources.get("requests", {}).get(GPU, given))
            if limit is None or limit % 1 or limit < 0 or request != limit:
                yield f"{name}: expected a whole number of {GPU}, as limit and as request"
            elif device == "gpu" and not limit:
                yield f"{name}: expected a limit of {GPU} for --device=gpu"
            elif device == "cpu" and limit:
                yield f"{name}: expected no {GPU} for --device=cpu, got {limit}"
            if device == "gpu" and not any(map(_tolerates_gpus, pods.spec.get("tolerations", ()))):
                yield f"{name_of(pods.owner)}: expected a toleration of {GPU}, with which nodes with GPUs are tainted"


def _tolerates_gpus(toleration: Mapping[str, Any]) -> bool:
    exists = toleration.get("operator", "Equal") == "Exists" or "value" in toleration
    return exists and toleration.get("key", GPU) == GPU and toleration.get("effect", "NoSchedule") == "NoSchedule"


# --- room


def servers_have_room(objects: Sequence[Object]) -> Problems:
    """Requests of cores and memory suit the workers, /tmp holds what is written there, and all has bounds."""
    for pods in pods_in(objects):
        volumes = {volume["name"]: volume for volume in pods.spec.get("volumes", ())}
        for container in pods.containers:
            if "memory" not in container.get("resources", {}).get("limits", {}):
                yield f"{container['name']}: expected a limit of memory"
        for container, settings in servers_in(pods):
            yield from (f"{container['name']}: {problem}" for problem in _room(container, settings))
        for container in pods.spec.get("containers", ()):
            yield from (f"{container['name']}: {problem}" for problem in _tmp(container, volumes))


def _room(container: Mapping[str, Any], settings: Settings) -> Problems:
    requests = container.get("resources", {}).get("requests", {})
    workers = settings.model_config.get("minWorkers", 1)
    if workers < 1:
        yield f"expected one worker at least, got {workers}"
    bounds = {
        "cpu": (CORES_PER_WORKER * workers, Decimal(MOST_CORES)),
        "memory": (Decimal(MEMORY + MEMORY_PER_WORKER * workers), Decimal("inf")),
    }
    for name, (least, most) in bounds.items():
        quantity = quantity_of(requests.get(name))
        if quantity is None or not least <= quantity <= most:
            yield f"expected a request of {name} of {least} at least for {workers} workers, got {requests.get(name)}"


def _tmp(container: Mapping[str, Any], volumes: Mapping[str, Mapping[str, Any]]) -> Problems:
    mounts = {mount["mountPath"]: mount for mount in container.get("volumeMounts", ())}
    mount = mounts.get("/tmp", {})  # noqa: S108  # the pod's own
    folder = volumes.get(mount.get("name", ""), {}).get("emptyDir")
    if folder is None or mount.get("readOnly"):
        yield "expected an emptyDir at /tmp, the one folder that the server writes to"
        return
    if folder.get("medium") == "Memory":
        yield "expected /tmp on a disk: logs in memory count as the server's own"
    size = quantity_of(folder.get("sizeLimit"))
    limit = quantity_of(container.get("resources", {}).get("limits", {}).get("ephemeral-storage"))
    if size is None or size < TMP:
        yield f"expected a sizeLimit of {TMP // 1024**3}Gi at least for /tmp, got {folder.get('sizeLimit')}"
    elif limit is None or limit < size:
        yield "expected a limit of ephemeral-storage, not below the sizeLimit of /tmp"


# --- time


def probes_suit_the_server(objects: Sequence[Object]) -> Problems:
    """Probes wait for a slow start, notice wrong answers soon and a drain at once, and leave a busy server alone."""
    for pods in pods_in(objects):
        for container, name, probe in probes_of(pods):
            handlers = probe.keys() & {"exec", "httpGet", "tcpSocket", "grpc"}
            if len(handlers) != 1:
                yield f"{container}: expected one handler of {name}, got {', '.join(sorted(handlers)) or 'none'}"
            least = probe.get("successThreshold", 1)
            if least != 1:
                yield f"{container}: expected successThreshold 1 of {name}, got {least}"
            window = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
            delay = probe.get("initialDelaySeconds", 0)
            if name == "startupProbe":
                if delay + window < START:
                    yield f"{container}: expected a {name} that waits for {START} s at least, got {delay + window}"
                progress = _progress_deadline(pods.owner)
                if progress is not None and progress <= delay + window:
                    yield f"{name_of(pods.owner)}: expected progressDeadlineSeconds over {delay + window}, got {progress}"
            elif name == "readinessProbe":
                if delay + window > NOTICE:
                    yield f"{container}: expected a {name} that notices within {NOTICE} s, got {delay + window}"
                command = probe.get("exec", {}).get("command", ())
                if not any(word.split("=")[0] == "--log-dir" for word in command):
                    yield f"{container}: expected --log-dir in its {name}, by which it sees that the server drains"
            elif window < HANG or probe.get("timeoutSeconds", 1) < PING_TIMEOUT:
                waits = f"{HANG} s, and {PING_TIMEOUT} for each answer"
                yield f"{container}: expected a {name} that waits for {waits}: a busy server is slow"
        yield from _pings(pods)


def _progress_deadline(owner: Object) -> int | None:
    if owner["kind"] != "Deployment":
        return None
    given: int = owner["spec"].get("progressDeadlineSeconds", PROGRESS)
    return given - int(owner["spec"].get("minReadySeconds", 0))


def _pings(pods: Pods) -> Problems:
    """A ping goes to the port of inference, in the clear."""
    for container, settings in servers_in(pods):
        ping = container.get("livenessProbe", {}).get("httpGet")
        if ping is None:
            continue
        port = pods.number_of(ping.get("port"))
        scheme = "HTTP" if settings.hardening is None else "HTTPS"
        if port != settings.ports.inference or ping.get("scheme", "HTTP") != scheme:
            yield f"{container['name']}: expected a livenessProbe by {scheme} at port {settings.ports.inference}, got {ping}"


def rollouts_keep_pods(objects: Sequence[Object]) -> Problems:
    """A rollout, and a node that fails, leave pods that answer."""
    for one in objects:
        if one["kind"] != "Deployment":
            continue
        strategy, replicas = one["spec"].get("strategy", {}), one["spec"].get("replicas", 2)
        rolling = strategy.get("rollingUpdate", {})
        if strategy.get("type", "RollingUpdate") != "RollingUpdate":
            yield f"{name_of(one)}: expected RollingUpdate, got {strategy['type']}, which leaves no pod for a while"
        gone, more = (
            _share(rolling.get(name, "25%"), replicas, up=up) for name, up in (("maxUnavailable", False), ("maxSurge", True))
        )
        if gone is None or more is None:
            yield f"{name_of(one)}: expected numbers or percentages as maxUnavailable and maxSurge, got {rolling}"
        elif gone >= max(replicas, 1):
            yield f"{name_of(one)}: a rollout may take all {replicas} pods away at once"
        elif not gone and not more:
            yield f"{name_of(one)}: a rollout can neither add a pod nor take one away"
    for pods in pods_in(objects):
        constraints = pods.spec.get("topologySpreadConstraints", ())
        pairs = Counter((one.get("topologyKey"), one.get("whenUnsatisfiable")) for one in constraints)
        if any(one.get("maxSkew", 0) < 1 for one in constraints) or any(count > 1 for count in pairs.values()):
            yield f"{name_of(pods.owner)}: expected a maxSkew of 1 at least, and each topologyKey once"
        anti = pods.spec.get("affinity", {}).get("podAntiAffinity")
        if not anti and all(one.get("topologyKey") != HOSTNAME for one in constraints):
            yield f"{name_of(pods.owner)}: expected pods spread over nodes ({HOSTNAME})"


def _share(value: object, of: int, *, up: bool) -> int | None:
    """Read a number of pods or a percentage, which Kubernetes rounds down or up."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value >= 0 else None
    found = re.fullmatch(r"(\d+)%", str(value))
    if found is None:
        return None
    return -(-of * int(found[1]) // 100) if up else of * int(found[1]) // 100


# --- values


def values_are_known(objects: Sequence[Object]) -> Problems:
    """Values of core objects are among those that Kubernetes takes there."""
    for one in objects:
        if one["kind"] == "Service" and one["spec"].get("type", "ClusterIP") not in SERVICE_TYPES:
            yield f"{name_of(one)}: expected one of {', '.join(sorted(SERVICE_TYPES))} as type, got {one['spec']['type']}"
        for parent, key, value in _values({name: part for name, part in one.items() if name not in ("metadata", "data")}):
            choices = CHOICES_BY_PARENT.get((parent, key), CHOICES.get(key))
            if choices is not None and value not in choices:
                yield f"{name_of(one)}: expected one of {', '.join(sorted(choices))} as {key}, got {value}"


def _values(value: object, parent: str = "", key: str = "") -> Iterator[tuple[str, str, object]]:
    """Find all single values, with their key and the key around it."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _values(part, key, str(name))
    elif isinstance(value, list):
        for part in value:
            yield from _values(part, parent, key)
    else:
        yield parent, key, value


def names_are_valid(objects: Sequence[Object]) -> Problems:
    """Names and labels have the characters that Kubernetes takes, and a namespace that is among the objects is theirs."""
    made = {one["metadata"]["name"] for one in objects if one["kind"] == "Namespace"}
    for one in objects:
        metadata = one["metadata"]
        if not OBJECT_NAME.fullmatch(metadata["name"]):
            yield f"{name_of(one)}: expected a name of small letters, digits, hyphens and dots"
        if made and one["kind"] != "Namespace" and metadata.get("namespace") not in made:
            yield f"{name_of(one)}: expected the namespace {', '.join(made)}, got {metadata.get('namespace')}"
        yield from (f"{name_of(one)}: {problem}" for problem in _labels(metadata.get("labels", {})))
    for pods in pods_in(objects):
        owner = name_of(pods.owner)
        yield from (f"{owner}: {problem}" for problem in _labels(pods.labels))
        for what in ("containers", "volumes"):
            names = [part["name"] for part in pods.spec.get(what, ())]
            if len(set(names)) < len(names) or not all(map(LABEL_NAME.fullmatch, names)):
                yield f"{owner}: expected different names of small letters, digits and hyphens of {what}, got {names}"


def _labels(labels: Mapping[str, object]) -> Problems:
    for key, value in labels.items():
        if not isinstance(value, str) or not LABEL_VALUE.fullmatch(value):
            yield f"expected a label's value of up to 63 letters, digits, hyphens, underscores and dots as {key}, got {value!r}"


POD_RULES: tuple[Callable[[Sequence[Object]], Problems], ...] = (
    containers_can_do_little,
    images_are_named,
    servers_are_the_image_s,
    gpus_are_asked_for,
    servers_have_room,
    probes_suit_the_server,
    rollouts_keep_pods,
    values_are_known,
    names_are_valid,
)
