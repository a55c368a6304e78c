"""Each rule about pods finds a manifest that is wrong in one way, and leaves alone what may be chosen."""

import pytest

from scripts.cluster.pod_rules import POD_RULES
from tests.manifests import CONTAINER, POD, problems_with, setting

RIGHTS = CONTAINER + "securityContext|"
STARTUP, READINESS, LIVENESS = (CONTAINER + f"{name}Probe|" for name in ("startup", "readiness", "liveness"))
REQUESTS, LIMITS = CONTAINER + "resources|requests|", CONTAINER + "resources|limits|"
TMP, SPREAD, ROLLING = POD + "volumes|0", POD + "topologySpreadConstraints", "spec|strategy|rollingUpdate|"
IMAGE = "localhost/saliency-serve"

# The rule, and for each case the overlay, the path of what is changed in its Deployment, its value (None removes it), and what
# must be said.
WRONG: dict[str, list[tuple[str, str, object, str]]] = {
    "containers_can_do_little": [
        ("cpu", POD + "securityContext|runAsUser", 0, "expected runAsNonRoot and runAsUser 1000"),
        ("cpu", RIGHTS + "runAsUser", 0, "expected runAsNonRoot and runAsUser 1000"),
        ("cpu", RIGHTS + "runAsNonRoot", False, "expected runAsNonRoot and runAsUser 1000"),
        ("cpu", POD + "securityContext|seccompProfile", None, "expected the seccomp profile"),
        ("cpu", RIGHTS + "seccompProfile", {"type": "Unconfined"}, "expected the seccomp profile"),
        ("cpu", POD + "securityContext|supplementalGroups", [0], "expected groups other than root's"),
        ("cpu", POD + "securityContext|sysctls", [{"name": "kernel.msgmax", "value": "1"}], "expected no sysctls"),
        ("cpu", POD + "automountServiceAccountToken", None, "expected automountServiceAccountToken"),
        ("cpu", POD + "hostNetwork", True, "expected no hostNetwork"),
        ("cpu", POD + "hostPID", True, "expected no hostPID"),
        ("cpu", TMP, {"name": "tmp", "hostPath": {"path": "/tmp"}}, "as tmp, got hostPath"),
        ("cpu", RIGHTS + "capabilities|drop", [], "all capabilities dropped"),
        ("cpu", RIGHTS + "capabilities|add", ["SYS_ADMIN"], "no capabilities"),
        ("cpu", RIGHTS + "privileged", True, "expected no privileged container"),
        ("cpu", RIGHTS + "procMount", "Unmasked", "no procMount"),
        ("cpu", RIGHTS + "readOnlyRootFilesystem", False, "a read-only root file system"),
        ("cpu", CONTAINER + "ports|0|hostPort", 8080, "expected no hostPort"),
    ],
    "images_are_named": [
        ("cpu", CONTAINER + "image", IMAGE, "expected an image with a tag"),
        ("cpu", CONTAINER + "image", f"{IMAGE}:latest", "a tag other than latest"),
        ("cpu", CONTAINER + "image", "localhost/Saliency Serve:cpu", "expected the name of an image"),
        ("cpu", CONTAINER + "image", f"{IMAGE}@sha256:abc", "expected the name of an image"),
        ("cpu", CONTAINER + "image", f"{IMAGE}:1.0-cuda", "expected an image for --device=cpu"),
        ("gpu", CONTAINER + "image", f"{IMAGE}:cpu", "expected an image for --device=gpu"),
    ],
    "servers_are_the_image_s": [
        ("cpu", CONTAINER + "command", ["bash"], "the image's own entry point and folder, got ['bash']"),
        ("cpu", CONTAINER + "workingDir", "/srv", "the image's own entry point and folder"),
        ("cpu", CONTAINER + "env", [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}], "A is set 2 times"),
        ("cpu", CONTAINER + "args|2", "--drain-delay=0", "expected --drain-delay of 5 at least, got 0"),
    ],
    "gpus_are_asked_for": [
        ("gpu", LIMITS + "nvidia.com/gpu", None, "expected a limit of nvidia.com/gpu"),
        ("gpu", LIMITS + "nvidia.com/gpu", 0, "expected a limit of nvidia.com/gpu"),
        ("gpu", LIMITS + "nvidia.com/gpu", "500m", "expected a whole number of nvidia.com/gpu"),
        ("gpu", REQUESTS + "nvidia.com/gpu", 2, "expected a whole number of nvidia.com/gpu, as limit and as request"),
        ("cpu", LIMITS + "nvidia.com/gpu", 1, "expected no nvidia.com/gpu for --device=cpu"),
        ("gpu", POD + "tolerations", None, "expected a toleration of nvidia.com/gpu"),
        ("gpu", POD + "tolerations|0|key", "nvidia.com/gpus", "expected a toleration of nvidia.com/gpu"),
        ("gpu", POD + "tolerations|0|effect", "NoExecute", "expected a toleration of nvidia.com/gpu"),
        ("gpu", POD + "tolerations|0|operator", "Equal", "expected a toleration of nvidia.com/gpu"),
    ],
    "servers_have_room": [
        ("cpu", LIMITS + "memory", None, "expected a limit of memory"),
        ("cpu", REQUESTS + "cpu", None, "expected a request of cpu"),
        ("cpu", REQUESTS + "cpu", "2m", "expected a request of cpu of 1.0 at least for 2 workers, got 2m"),
        ("cpu", REQUESTS + "cpu", "2Gi", "expected a request of cpu"),
        ("cpu", CONTAINER + "args|0", "--workers=16", "expected a request of cpu of 8.0 at least for 16 workers"),
        ("cpu", CONTAINER + "args|0", "--workers=0", "expected one worker at least"),
        ("cpu", REQUESTS + "memory", "100m", "expected a request of memory"),
        ("cpu", CONTAINER + "resources|requests", None, "expected a request of memory"),
        ("cpu", CONTAINER + "volumeMounts|0|mountPath", "/var/tmp", "expected an emptyDir at /tmp"),
        ("cpu", CONTAINER + "volumeMounts|0|readOnly", True, "expected an emptyDir at /tmp"),
        ("cpu", TMP + "|emptyDir|medium", "Memory", "expected /tmp on a disk"),
        ("cpu", TMP + "|emptyDir|sizeLimit", None, "expected a sizeLimit of 2Gi at least"),
        ("cpu", TMP + "|emptyDir|sizeLimit", "2m", "expected a sizeLimit of 2Gi at least"),
        ("cpu", LIMITS + "ephemeral-storage", "1500Mi", "expected a limit of ephemeral-storage"),
    ],
    "probes_suit_the_server": [
        ("cpu", READINESS + "httpGet", {"path": "/ping", "port": "http"}, "one handler of readinessProbe, got exec, httpGet"),
        ("cpu", STARTUP + "successThreshold", 2, "expected successThreshold 1 of startupProbe"),
        ("cpu", STARTUP + "failureThreshold", 3, "a startupProbe that waits for 120 s at least, got 15"),
        ("cpu", "spec|progressDeadlineSeconds", 100, "expected progressDeadlineSeconds over 180, got 100"),
        ("cpu", "spec|minReadySeconds", 900, "expected progressDeadlineSeconds over 180"),
        ("cpu", READINESS + "periodSeconds", 600, "a readinessProbe that notices within 60 s, got 1200"),
        ("cpu", READINESS + "initialDelaySeconds", 3600, "a readinessProbe that notices within 60 s"),
        ("cpu", READINESS + "exec|command|7", "--archive", "expected --log-dir in its readinessProbe"),
        ("cpu", LIVENESS + "failureThreshold", 1, "a livenessProbe that waits for 60 s"),
        ("cpu", LIVENESS + "timeoutSeconds", None, "and 5 for each answer"),
        ("cpu", LIVENESS + "httpGet|port", "metrics", "a livenessProbe by HTTP at port 8080"),
        ("cpu", LIVENESS + "httpGet|scheme", "HTTPS", "a livenessProbe by HTTP at port 8080"),
    ],
    "rollouts_keep_pods": [
        ("cpu", "spec|strategy", {"type": "Recreate"}, "expected RollingUpdate, got Recreate"),
        ("cpu", ROLLING + "maxUnavailable", "100%", "a rollout may take all 2 pods away at once"),
        ("cpu", ROLLING + "maxUnavailable", 2, "a rollout may take all 2 pods away at once"),
        ("cpu", ROLLING + "maxUnavailable", "one", "expected numbers or percentages"),
        ("cpu", ROLLING + "maxSurge", 0, "can neither add a pod nor take one away"),
        ("cpu", ROLLING + "maxSurge", "0%", "can neither add a pod nor take one away"),
        ("cpu", SPREAD, None, "expected pods spread over nodes"),
        ("cpu", SPREAD + "|0|maxSkew", 0, "expected a maxSkew of 1 at least"),
        ("cpu", SPREAD + "|0|topologyKey", "kubernetes.io/hostname", "each topologyKey once"),
    ],
    "values_are_known": [
        ("cpu", CONTAINER + "imagePullPolicy", "Sometimes", "as imagePullPolicy, got Sometimes"),
        ("cpu", POD + "restartPolicy", "Never", "as restartPolicy, got Never"),
        ("cpu", SPREAD + "|0|whenUnsatisfiable", "Never", "as whenUnsatisfiable, got Never"),
        ("cpu", "spec|strategy|type", "Rolling", "as type, got Rolling"),
        ("gpu", POD + "tolerations|0|operator", "In", "as operator, got In"),
        ("cpu", CONTAINER + "ports|0|protocol", "HTTP", "as protocol, got HTTP"),
    ],
    "names_are_valid": [
        ("cpu", "metadata|name", "Digits", "expected a name of small letters"),
        ("cpu", "metadata|namespace", "digit", "expected the namespace digits, got digit"),
        ("cpu", "metadata|labels|app.kubernetes.io/name", "digits!", "expected a label's value"),
        ("cpu", CONTAINER + "name", "Digits_1", "letters, digits and hyphens of containers"),
    ],
}
CHOICES = [
    ("cpu", POD + "nodeSelector", {"pool": "fast"}),
    ("cpu", POD + "imagePullSecrets", [{"name": "pull"}]),
    ("cpu", RIGHTS + "capabilities|add", ["NET_BIND_SERVICE"]),
    ("cpu", CONTAINER + "imagePullPolicy", "Always"),
    ("cpu", CONTAINER + "image", "registry.example.com:5000/team/saliency-serve:1.2.3-cpu@sha256:" + "0" * 64),
    ("cpu", "spec|replicas", 9),
    ("cpu", ROLLING + "maxUnavailable", "50%"),
    ("cpu", REQUESTS + "cpu", "1500m"),
    ("cpu", TMP + "|emptyDir|sizeLimit", "3Gi"),
    ("gpu", REQUESTS + "nvidia.com/gpu", 1),
    ("gpu", POD + "tolerations|0", {"operator": "Exists"}),
]


@pytest.mark.parametrize(
    ("rule", "overlay", "path", "value", "message"),
    [(rule, *case) for rule, cases in WRONG.items() for case in cases],
    ids=[f"{rule}: {path} {value}" for rule, cases in WRONG.items() for _, path, value, _ in cases],
)
def test_rule_finds_what_is_wrong(rule: str, overlay: str, path: str, value: object, message: str) -> None:
    found = problems_with(overlay, "Deployment", setting(path, value))
    assert any(message in problem and problem.endswith(f"[{rule}]") for problem in found), found


def test_every_rule_is_tested() -> None:
    assert {rule.__name__ for rule in POD_RULES} == WRONG.keys()


@pytest.mark.parametrize(("overlay", "path", "value"), CHOICES, ids=[f"{path} {value}" for _, path, value in CHOICES])
def test_what_may_be_chosen_is_left_alone(overlay: str, path: str, value: object) -> None:
    assert problems_with(overlay, "Deployment", setting(path, value)) == []


@pytest.mark.parametrize("level", ["privileged", None])
def test_namespace_demands_the_restricted_standard(level: str | None) -> None:
    found = problems_with("cpu", "Namespace", setting("metadata|labels|pod-security.kubernetes.io/enforce", level))
    assert any("expected pod-security.kubernetes.io/enforce restricted" in problem for problem in found)


def test_type_of_a_service_is_one_that_there_is() -> None:
    assert problems_with("cpu", "Service", setting("spec|type", "NodePort")) == []
    assert any("as type, got Node" in problem for problem in problems_with("cpu", "Service", setting("spec|type", "Node")))
