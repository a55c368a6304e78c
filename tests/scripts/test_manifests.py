"""The Kubernetes manifests are right, and each check finds a manifest that is wrong in one way."""

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from scripts.cluster import check
from scripts.cluster.autoscaling_rules import AUTOSCALING_RULES, known_metrics
from scripts.cluster.check import PROMETHEUS_RULE, problems_of, prometheus_rule
from scripts.cluster.containers import quantity_of
from scripts.cluster.exposure_rules import EXPOSURE_RULES
from scripts.cluster.manifests import CLUSTER, RenderError, list_overlays, render
from scripts.cluster.pod_rules import POD_RULES
from scripts.cluster.rules import RULES
from scripts.cluster.schemas import SCHEMAS, schema_problems
from scripts.paths import ROOT
from tests.manifests import CONTAINER, POD, Change, container_of, one_of, pod_of, problems_with, rendered, setting


@pytest.mark.parametrize("overlay", list_overlays(), ids=lambda folder: folder.name)
def test_committed_overlays_are_right(overlay: Path) -> None:
    objects = render(overlay)
    assert len(objects) >= 2
    assert list(problems_of(objects)) == []


def test_all_that_was_asked_for_is_there() -> None:
    assert {folder.name for folder in list_overlays()} >= {
        *("cpu", "gpu", "autoscale", "autoscale-hpa", "monitoring", "kserve", "hardened")
    }
    gpu = container_of(one_of(rendered("gpu"), "Deployment"))
    assert gpu["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "--workers=4" in gpu["args"]
    assert one_of(rendered("hardened"), "Ingress")["spec"]["tls"]
    (source,) = one_of(rendered("hardened"), "NetworkPolicy")["spec"]["ingress"][0]["from"]
    assert source["namespaceSelector"]["matchLabels"] == {"kubernetes.io/metadata.name": "nginx-ingress"}


def test_prometheus_rule_is_what_is_committed_for_prometheus() -> None:
    assert PROMETHEUS_RULE.read_text() == prometheus_rule()


# --- wrong manifests: the overlay, the kind, what is changed, and what must be said


TRIGGER = "spec|triggers|0|"
PREDICTOR = "spec|predictor|"
WRONG_BY_SCHEMA = [
    ("cpu", "Deployment", setting("spec|replicas", "two"), "spec.replicas: 'two' is not "),
    ("cpu", "Deployment", setting("spec|replica", 2), "'replica' was unexpected"),
    ("cpu", "Deployment", setting("apiVersion", "apps/v1beta1"), "Couldn't find schema"),
    ("cpu", "Service", setting("spec|ports|0|protocols", "TCP"), "'protocols' was unexpected"),
    ("cpu", "PodDisruptionBudget", setting("spec|maxUnavalable", 1), "'maxUnavalable' was unexpected"),
    ("cpu", "NetworkPolicy", setting("spec|policyTypes", "Ingress"), "'Ingress' is not "),
    ("hardened", "Ingress", setting("spec|rules|0|http|paths|0|pathType", None), "'pathType' is a required property"),
    ("autoscale-hpa", "HorizontalPodAutoscaler", setting("spec|maxReplicas", None), "'maxReplicas' is a required property"),
    ("autoscale", "ScaledObject", setting("spec|minReplicas", 2), "'minReplicas' was unexpected"),
    ("autoscale", "ScaledObject", setting(TRIGGER + "metadata|threshold", 16), "16 is not of type 'string'"),
    ("autoscale", "ScaledObject", setting(TRIGGER + "metadata|ignoreNullValues", False), "False is not one of"),
    ("autoscale", "ScaledObject", setting(TRIGGER + "metadata|query", None), "'query' is a required property"),
    ("autoscale", "ScaledObject", setting("spec|fallback|behavior", "current"), "'current' is not one of"),
    ("autoscale", "ScaledObject", setting("apiVersion", "keda.k8s.io/v1alpha1"), "'keda.sh/v1alpha1' was expected"),
    ("monitoring", "PodMonitor", setting("spec|podMetricsEndpoints|0|interval", "10"), "'10' does not match"),
    ("monitoring", "PodMonitor", setting("spec|endpoints", []), "'endpoints' was unexpected"),
    ("monitoring", "PodMonitor", setting("spec|selector", None), "'selector' is a required property"),
    ("monitoring", "PrometheusRule", setting("spec|groups|0|rules|0|expr", None), "'expr' is a required property"),
    ("monitoring", "PrometheusRule", setting("spec|groups|0|rules|0|alert", "A"), "is valid under each of"),
    ("monitoring", "PrometheusRule", setting("spec|groups|0|rules|0|record", "a-b"), "'a-b' does not match"),
    ("kserve", "InferenceService", setting("spec|explainer", {}), "'explainer' was unexpected"),
    ("kserve", "InferenceService", setting(PREDICTOR + "containers|0|name", "digits"), "does not contain items matching"),
    ("kserve", "InferenceService", setting(PREDICTOR + "minReplica", 2), "'minReplica' was unexpected"),
    ("kserve", "InferenceService", setting(PREDICTOR + "containers|0|readinesProbe", {}), "'readinesProbe' was unexpected"),
    (
        *("kserve", "InferenceService"),
        *(
            setting(PREDICTOR + "autoScaling|metrics|0|external|target", {"type": "AverageValue", "averageValue": "16"}),
            "'value' is a",
        ),
    ),
    (
        *("kserve", "InferenceService"),
        *(setting("metadata|annotations|serving.kserve.io/deploymentMode", "Raw"), "'Raw' is not one of"),
    ),
]
WRONG_BY_RULE = {
    "quantities_are_numbers": [
        ("cpu", "Deployment", setting(CONTAINER + "resources|requests|cpu", "two"), "expected a quantity as requests of cpu"),
        ("cpu", "Deployment", setting(CONTAINER + "resources|limits|memory", "3GB"), "expected a quantity as limits of memory"),
        ("cpu", "Deployment", setting(CONTAINER + "resources|requests|memory", "4Gi"), "requests more memory than its limit"),
        ("cpu", "Deployment", setting(POD + "volumes|0|emptyDir|sizeLimit", "2 Gi"), "expected a quantity as sizeLimit"),
        ("kserve", "InferenceService", setting(PREDICTOR + "containers|0|resources|requests|cpu", "2 cores"), "'2 cores'"),
    ],
    "ports_exist": [
        ("cpu", "Service", setting("spec|ports|0|targetPort", "web"), "targetPort 'web' is declared by no container"),
        ("cpu", "Deployment", setting(CONTAINER + "livenessProbe|httpGet|port", "web"), "livenessProbe asks port 'web'"),
        ("cpu", "Deployment", setting(CONTAINER + "ports|1|name", "http"), "is declared twice"),
        ("cpu", "NetworkPolicy", setting("spec|ingress|1|ports|0|port", "prometheus"), "port 'prometheus' is declared by no"),
        (
            "autoscale",
            "PodMonitor",
            setting("spec|podMetricsEndpoints|0|port", "http-metrics"),
            "'http-metrics' is declared by no",
        ),
        (
            *("hardened", "Ingress"),
            *(
                setting("spec|rules|0|http|paths|0|backend|service|port", {"name": "web"}),
                "no service digits with the port 'web'",
            ),
        ),
        (
            *("hardened", "Ingress"),
            *(setting("spec|rules|0|http|paths|0|backend|service|name", "digit"), "there is no service digit with"),
        ),
    ],
    "selectors_choose_pods": [
        ("cpu", "Service", setting("spec|selector|app.kubernetes.io/name", "digit"), "Service/digits: no pod has the labels"),
        ("cpu", "PodDisruptionBudget", setting("spec|selector", {"matchLabels": {"app": "x"}}), "no pod has the labels"),
        ("cpu", "NetworkPolicy", setting("spec|podSelector", {}), "chooses no pods by label, or all of them"),
        ("cpu", "Deployment", setting("spec|template|metadata|labels", {"app": "digits"}), "Deployment/digits: no pod has"),
        (
            *("cpu", "Deployment"),
            *(setting(POD + "topologySpreadConstraints|0|labelSelector|matchLabels", {"app": "x"}), "by labels that its pods"),
        ),
        ("autoscale", "PodMonitor", setting("spec|selector|matchLabels", {"app": "x"}), "PodMonitor/digits: no pod has"),
    ],
    "references_exist": [
        ("cpu", "Deployment", setting(POD + "volumes|0|name", "temp"), "mounts tmp, which is no volume"),
        ("cpu", "Deployment", setting(POD + "volumes|0", {"name": "tmp", "configMap": {"name": "x"}}), "ConfigMap/x is neither"),
        ("cpu", "Deployment", setting(CONTAINER + "envFrom", [{"secretRef": {"name": "x"}}]), "Secret/x is neither"),
        (
            *("cpu", "Deployment"),
            setting(CONTAINER + "env", [{"name": "A", "valueFrom": {"configMapKeyRef": {"name": "x", "key": "a"}}}]),
            "ConfigMap/x is neither",
        ),
        ("hardened", "Ingress", setting("metadata|annotations|saliency-serve/given", "Secret/digits-tls"), "Secret/digits-users"),
        ("hardened", "Ingress", setting("spec|tls|0|secretName", "other"), "Secret/other is neither"),
        ("hardened", "Ingress", setting("spec|tls|0|hosts|0", "a.example.com"), "host digits.example.com has no TLS"),
    ],
    "commands_are_understood": [
        ("cpu", "Deployment", setting(CONTAINER + "args|0", "--worker-count=2"), "unrecognized arguments: --worker-count=2"),
        ("cpu", "Deployment", setting(CONTAINER + "args|1", "--device=tpu"), "invalid choice: 'tpu'"),
        ("cpu", "Deployment", setting(CONTAINER + "args|0", "--inference-port=9000"), "which are not both declared"),
        ("cpu", "Deployment", setting(CONTAINER + "args|0", "--key-dir=keys"), "--key-dir needs --hardened"),
        ("cpu", "Deployment", setting(CONTAINER + "readinessProbe|exec|command|3", "--archives"), "readinessProbe is refused: "),
        (
            "cpu",
            "Deployment",
            setting(CONTAINER + "readinessProbe|exec|command|4", "build/mnist.mar"),
            "compares with build/mnist",
        ),
        ("cpu", "Deployment", setting(CONTAINER + "readinessProbe|exec|command|8", "/logs"), "looks into /logs, and logs are in"),
        ("gpu", "Deployment", setting(CONTAINER + "args|0", "--workers=four"), "invalid int value: 'four'"),
    ],
    "probes_ask_for_right_answers": [
        ("cpu", "Deployment", setting(CONTAINER + "readinessProbe", None), "expected a readinessProbe that asks for a right"),
        (
            *("cpu", "Deployment"),
            setting(CONTAINER + "readinessProbe", {"httpGet": {"path": "/ping", "port": "http"}}),
            "expected a readinessProbe that asks for a right answer",
        ),
        ("cpu", "Deployment", setting(CONTAINER + "livenessProbe|httpGet|path", "/health"), "expected GET /ping"),
        ("cpu", "Deployment", setting(CONTAINER + "readinessProbe|timeoutSeconds", 5), "gives up after timeoutSeconds"),
        ("kserve", "InferenceService", setting(PREDICTOR + "containers|0|startupProbe", None), "expected a startupProbe"),
    ],
    "stop_has_time": [
        ("cpu", "Deployment", setting(POD + "terminationGracePeriodSeconds", 30), "expected terminationGracePeriodSeconds of 55"),
        ("cpu", "Deployment", setting(POD + "terminationGracePeriodSeconds", None), "of 55 at least, got 30"),
        ("cpu", "Deployment", setting(CONTAINER + "args|2", "--drain-delay=60"), "of 105 at least, got 60"),
    ],
    "disruptions_are_possible": [
        ("cpu", "PodDisruptionBudget", setting("spec|maxUnavailable", 0), "no pod may ever be moved"),
        ("cpu", "Deployment", setting("spec|replicas", 1), "expected two replicas at least"),
    ],
    "routes_exist": [
        ("hardened", "Ingress", setting("spec|rules|0|http|paths|0|path", "/predict"), "/predict is no route of the API"),
        (
            *("hardened", "Ingress"),
            *(setting("metadata|annotations|nginx.org/client-max-body-size", None), "expected max_request_size (33554432 bytes)"),
        ),
    ],
    "autoscalers_fit": [
        ("autoscale", "ScaledObject", setting("spec|scaleTargetRef|name", "digit"), "there is no Deployment/digit"),
        ("autoscale", "Deployment", setting("spec|replicas", 2), "has replicas of its own"),
        (
            "autoscale",
            "ScaledObject",
            setting(TRIGGER + "metadata|ignoreNullValues", None),
            "a lost Prometheus would mean no load",
        ),
        ("autoscale", "ScaledObject", setting("spec|fallback", None), "expected a fallback"),
        (
            "autoscale",
            "ScaledObject",
            setting(TRIGGER + "metadata|threshold", "3"),
            "expected 4 to 16 requests in flight for 2 workers",
        ),
        ("autoscale", "ScaledObject", setting(TRIGGER + "metricType", "Value"), "expected metricType AverageValue"),
        ("autoscale", "ScaledObject", setting("spec|maxReplicaCount", 2), "got 2 to 2"),
        (
            *("autoscale", "ScaledObject"),
            setting(TRIGGER + "metadata|query", 'saliency:in_flight:rate1m{namespace="digits"}'),
            "nothing exports or records saliency:in_flight:rate1m",
        ),
        (
            *("autoscale", "ScaledObject"),
            setting(TRIGGER + "metadata|query", "saliency:requests_in_flight:rate1m"),
            'expected namespace="digits" in its query',
        ),
        ("autoscale", "ScaledObject", setting(TRIGGER + "metadata|query", 'up{namespace="digits"}'), "names no metric of this"),
        (
            "autoscale",
            "Deployment",
            setting(CONTAINER + "args|0", "--workers=1"),
            "expected 2 to 8 requests in flight for 1 work",
        ),
        (
            *("autoscale-hpa", "HorizontalPodAutoscaler"),
            setting("spec|metrics|0|external|metric|name", "requests_in_flight"),
            "no rule of prometheus-adapter.yaml makes the metric requests_in_flight",
        ),
        (
            *("autoscale-hpa", "HorizontalPodAutoscaler"),
            *(
                setting("spec|metrics|0|external|target|averageValue", "16m"),
                "expected 4 to 16 requests in flight for 2 workers, got '16m'",
            ),
        ),
        (
            *("kserve", "InferenceService"),
            setting(PREDICTOR + "autoScaling|metrics|0|external|target|value", "3"),
            "expected 4 to 16 requests in flight for 2 workers, got '3'",
        ),
        ("kserve", "InferenceService", setting(PREDICTOR + "autoScaling", None), "scales by nothing"),
        (
            *("kserve", "InferenceService"),
            setting(
                PREDICTOR + "autoScaling|metrics|0|external|metric|query",
                'saliency:requests_in_flight:rate1m{namespace="digits"}',
            ),
            "expected last_over_time in its query",
        ),
    ],
    "rules_are_the_committed_ones": [
        (
            "monitoring",
            "PrometheusRule",
            setting("spec|groups|0|rules|0|expr", "vector(1)"),
            "is not what serve_config/prometheus",
        ),
    ],
    "names_are_unique": [
        ("cpu", "Service", setting("metadata|namespace", "other"), "expected one namespace, got ['digits', 'other']"),
    ],
}


@pytest.mark.parametrize(
    ("overlay", "kind", "change", "message"),
    WRONG_BY_SCHEMA,
    ids=[f"{kind}: {message}" for _, kind, _, message in WRONG_BY_SCHEMA],
)
def test_schema_finds_what_is_wrong(overlay: str, kind: str, change: Change, message: str) -> None:
    wrong = copy.deepcopy(one_of(rendered(overlay), kind))
    change(wrong)
    found = list(schema_problems(wrong))
    assert any(message in problem for problem in found), found


@pytest.mark.parametrize(
    ("rule", "overlay", "kind", "change", "message"),
    [(rule, *case) for rule, cases in WRONG_BY_RULE.items() for case in cases],
    ids=[f"{rule}: {kind}, {message}" for rule, cases in WRONG_BY_RULE.items() for _, kind, _, message in cases],
)
def test_rule_finds_what_is_wrong(rule: str, overlay: str, kind: str, change: Change, message: str) -> None:
    found = problems_with(overlay, kind, change)
    assert any(message in problem and problem.endswith(f"[{rule}]") for problem in found), found


def test_every_rule_and_schema_is_tested() -> None:
    elsewhere = {"config_keys_exist", "init_containers_check_the_archive"}  # below, with an archive from a volume
    others = {rule.__name__ for rule in (*POD_RULES, *AUTOSCALING_RULES, *EXPOSURE_RULES)}  # in files of their own
    assert {rule.__name__ for rule in RULES} - others == (WRONG_BY_RULE.keys() - others) | elsewhere
    kinds = {kind for _, kind, _, _ in WRONG_BY_SCHEMA}
    assert {file.stem for file in SCHEMAS.glob("*.yaml")} <= kinds | {"ServingRuntime"}


def test_two_objects_of_one_name_are_found() -> None:
    objects = rendered("cpu")
    assert any("Service/digits: is there twice" in problem for problem in problems_of([*objects, one_of(objects, "Service")]))


def test_unknown_kind_is_found() -> None:
    one = {"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "x"}}
    assert any("neither Kubernetes nor scripts/cluster/schemas has it" in problem for problem in schema_problems(one))


RUNTIME: dict[str, Any] = {
    "apiVersion": "serving.kserve.io/v1alpha1",
    "kind": "ServingRuntime",
    "metadata": {"name": "saliency-serve"},
    "spec": {
        "supportedModelFormats": [{"name": "mar", "version": "1", "autoSelect": True}],
        "protocolVersions": ["v1", "v2"],
        "containers": [{"name": "kserve-container", "image": "saliency-serve", "args": ["--archive=/mnt/models/digits.mar"]}],
    },
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting("spec|containers|0|name", "server"), "does not contain items matching"),
        (setting("spec|supportedModelFormats", []), "[] should be non-empty"),
        (setting("spec|protocolVersions|0", "v3"), "'v3' is not one of"),
        (setting("spec|modelFormats", []), "'modelFormats' was unexpected"),
    ],
    ids=["container's name", "no format", "protocol", "misspelled"],
)
def test_serving_runtime_of_an_operator_is_checked(change: Change, message: str) -> None:
    assert list(schema_problems(RUNTIME)) == []
    wrong = copy.deepcopy(RUNTIME)
    change(wrong)
    assert any(message in problem for problem in schema_problems(wrong))


# --- an archive from a volume, as an operator writes it


@pytest.fixture
def volume_overlay(tmp_path: Path) -> Path:
    """An overlay of one's own, inside a copy of the manifests."""
    folder = tmp_path / "cluster"
    shutil.copytree(CLUSTER, folder)
    own = folder / "own"
    own.mkdir()
    (own / "digits.mar.sha256").write_text(f"{'7' * 64}  digits.mar\n")
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": ["../overlays/cpu"],
        "components": ["../components/archive-volume"],
        "configMapGenerator": [{"name": "digits-archive", "namespace": "digits", "files": ["digits.mar.sha256"]}],
    }
    (own / "kustomization.yaml").write_text(yaml.safe_dump(kustomization))
    return own


def test_archive_from_a_volume_is_checked_twice(volume_overlay: Path) -> None:
    objects = [dict(one) for one in render(volume_overlay)]
    assert list(problems_of(objects)) == []
    config = one_of(objects, "ConfigMap")
    assert config["data"] == {"digits.mar.sha256": f"{'7' * 64}  digits.mar\n"}
    pod = pod_of(one_of(objects, "Deployment"))
    assert [volume["configMap"]["name"] for volume in pod["volumes"] if "configMap" in volume] == [config["metadata"]["name"]]
    assert {one["image"] for one in [*pod["initContainers"], *pod["containers"]]} == {"localhost/saliency-serve:cpu"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (setting(POD + "initContainers", None), "expected an init container with sha256sum --check [init_"),
        (setting(POD + "initContainers|0|workingDir", "/"), "expected an init container with sha256sum --check in /archives"),
        (setting(CONTAINER + "args|1", "--batch-size=8"), "expected --archive-sha256 beside --archive"),
        (
            setting(POD + "initContainers|0|command|3", "/etc/digits/sums"),
            "/etc/digits/sums is no key of ConfigMap/digits-archive-",
        ),
        (
            setting("spec|template|metadata|annotations", {}),
            "PersistentVolumeClaim/digits-archives is neither made here nor given",
        ),
        (setting(CONTAINER + "readinessProbe|exec|command|4", "build/digits.mar"), "compares with build/digits.mar"),
    ],
    ids=["no init container", "other folder", "not by the server", "no such key", "no claim", "probe of another archive"],
)
def test_unchecked_archive_is_found(volume_overlay: Path, change: Change, message: str) -> None:
    objects = [dict(one) for one in render(volume_overlay)]
    change(one_of(objects, "Deployment"))
    found = list(problems_of(objects))
    assert any(message.removesuffix(" [init_") in problem for problem in found), found


# --- the program


def test_problems_end_with_1_and_are_printed(volume_overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check.main([str(volume_overlay)]) == 0
    deployment = volume_overlay.parent / "base" / "deployment.yaml"
    deployment.write_text(deployment.read_text().replace('cpu: "2"', "cpu: two"))
    assert check.main([str(volume_overlay)]) == 1
    assert "  digits: expected a quantity as requests of cpu, got 'two' [quantities_are_numbers]" in capsys.readouterr().out


def test_folder_that_is_no_overlay_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RenderError, match="kustomization"):
        render(tmp_path)
    assert check.main([str(tmp_path)]) == 1
    assert "kustomization" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("2", 2), (2, 2), ("500m", 0.5), ("1.5", 1.5), ("3Gi", 3 * 1024**3), ("1k", 1000), ("1e3", 1000), (".5", 0.5)),
        *(("two", None), ("3GB", None), ("3 Gi", None), ("", None), ("Gi", None), (True, None), (None, None), ("1K", None)),
    ],
)
def test_quantity(text: object, value: float | None) -> None:
    quantity = quantity_of(text)
    assert (None if quantity is None else float(quantity)) == value


def test_exported_and_recorded_metrics_are_known() -> None:
    assert {
        "ts_inference_latency_microseconds",
        "saliency_requests_total",
        "saliency:requests_in_flight:rate1m",
    } <= known_metrics()


def test_image_builds_what_the_manifests_run() -> None:
    """The rules read a container's args as the entry point of the Dockerfile does."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    assert 'ENTRYPOINT ["python", "-m", "scripts.serving", "--cluster", "--log-dir", "/tmp/logs"]' in dockerfile
    assert "USER 1000:1000" in dockerfile
    assert "EXPOSE 8080 8082" in dockerfile
