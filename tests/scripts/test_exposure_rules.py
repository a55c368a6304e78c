"""Each rule on autoscalers and on what reaches the pods finds manifests that are wrong in one way, and leaves choices alone."""

import copy

import pytest

from scripts.cluster.autoscaling_rules import AUTOSCALING_RULES
from scripts.cluster.check import problems_of
from scripts.cluster.exposure_rules import EXPOSURE_RULES, seconds_of
from tests.manifests import one_of, problems_with, rendered, setting

Case = tuple[str, str, str, object, str]  # the overlay, the kind, the place, the value there (None: removed), what must be said

POLICY = ("cpu", "NetworkPolicy")
BUDGET = ("cpu", "PodDisruptionBudget", "spec")
CHOSEN = {"selector": {"matchLabels": {"app.kubernetes.io/name": "digits"}}}
ONLY_METRICS = [{"from": [{"namespaceSelector": {"matchLabels": {"team": "m"}}}], "ports": [{"port": 8082}]}]
ONLY_INFERENCE = [{"from": [{"namespaceSelector": {}}], "ports": [{"port": 8080}]}]
INGRESS = ("hardened", "Ingress")
PATH = "spec|rules|0|http|paths|0|"
NGINX = "metadata|annotations|nginx.org/"
KEDA = ("autoscale", "ScaledObject")
TRIGGER = "spec|triggers|0|metadata|"
KEDA_BEHAVIOR = "spec|advanced|horizontalPodAutoscalerConfig|behavior|"
HPA = ("autoscale-hpa", "HorizontalPodAutoscaler")
EXTERNAL = "spec|metrics|0|external|"
MONITOR = ("monitoring", "PodMonitor")
SCRAPE = "spec|podMetricsEndpoints|0|"
KSERVE = ("kserve", "InferenceService")
KSERVE_METRIC = "spec|predictor|autoScaling|metrics|0|external|metric|"
LABELS = '{job="saliency", namespace="digits"}'

WRONG: dict[str, list[Case]] = {
    "policies_let_in_who_asks": [
        (*POLICY, "spec|policyTypes", ["Egress"], "expected Ingress among policyTypes"),
        (*POLICY, "spec|policyTypes", ["Ingress"], "expected Egress among policyTypes"),
        (*POLICY, "spec|ingress", [], "lets requests in to port 8080"),
        (*POLICY, "spec|ingress", ONLY_METRICS, "lets requests in to port 8080"),
        (*POLICY, "spec|ingress|0|ports|0|port", "metrics", "lets requests in to port 8080"),
        (*POLICY, "spec|ingress", [{}], "expected ports in each rule of ingress"),
        (*POLICY, "spec|ingress|0|ports", None, "expected ports in each rule of ingress"),
        (*POLICY, "spec|egress", [{}], "lets everything out"),
        (*POLICY, "spec|ingress|0|ports|0|protocol", "UDP", "expected TCP to port 8080, got UDP"),
        (*POLICY, "spec|ingress|1|from", None, "expected the namespace of Prometheus to port 8082, got everyone"),
        (*POLICY, "spec|ingress|1|from", [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "the namespace of Prometheus to port 8082"),
        (*POLICY, "spec|ingress|1|from|0|namespaceSelector|matchLabels", {"name": "monitoring"}, "which Kubernetes does not"),
        ("autoscale", "NetworkPolicy", "spec|ingress", ONLY_INFERENCE, "lets requests in to port 8082"),
        ("kserve", "NetworkPolicy", "spec|ingress", ONLY_INFERENCE, "lets requests in to port 8082"),
        ("kserve", "NetworkPolicy", "spec|ingress", ONLY_METRICS, "lets requests in to port 8080"),
        ("autoscale", "NetworkPolicy", "spec|ingress|1|from|0", {"podSelector": {}}, "expected the namespace monitoring"),
        ("hardened", "NetworkPolicy", "spec|ingress|0|from|0|namespaceSelector", {}, "the namespace of the ingress to port 8080"),
        ("hardened", "NetworkPolicy", "spec|ingress|0|from", [], "the namespace of the ingress to port 8080"),
    ],
    "services_go_to_the_server": [
        ("cpu", "Service", "spec|ports|0|targetPort", "metrics", "expected a targetPort of 8080, got [8082]"),
        ("cpu", "Service", "spec|ports|0|protocol", "UDP", "expected TCP"),
        ("cpu", "Service", "spec|ports|0|port", 0, "a port of 1 to 65535"),
    ],
    "scrapes_find_the_metrics": [
        ("autoscale", "PodMonitor", SCRAPE + "port", "http", "expected the port of the metrics, 8082; got http"),
        (*MONITOR, SCRAPE + "path", "/metric", "expected /metrics by http, got /metric"),
        (*MONITOR, SCRAPE + "interval", "60s", "expected an interval of up to 20 s"),
        (*MONITOR, SCRAPE + "interval", "10m", "expected an interval of up to 20 s"),
        (*MONITOR, SCRAPE + "interval", None, "expected an interval of up to 20 s, for rate[1m]; got 30"),
        (*MONITOR, SCRAPE + "scrapeTimeout", "20s", "expected a scrapeTimeout of up to 10 s"),
        (*MONITOR, SCRAPE + "relabelings", None, "expected a relabeling of job to saliency"),
        (*MONITOR, SCRAPE + "relabelings|0|replacement", "digits", "expected a relabeling of job to saliency"),
        (*MONITOR, SCRAPE + "relabelings|0|targetLabel", "jobs", "expected a relabeling of job to saliency"),
    ],
    "disruptions_are_possible": [
        (*BUDGET, {**CHOSEN, "minAvailable": 2}, "no pod may ever be moved: minAvailable of 2, and 2 pods"),
        (*BUDGET, {**CHOSEN, "minAvailable": "100%"}, "no pod may ever be moved"),
        (*BUDGET, {**CHOSEN, "minAvailable": "two"}, "expected a number or a percentage"),
        (*BUDGET, {**CHOSEN, "minAvailable": 0}, "all pods may go at once"),
        (*BUDGET, {**CHOSEN, "maxUnavailable": "100%"}, "all pods may go at once"),
        (*BUDGET, {**CHOSEN, "maxUnavailable": 2}, "all pods may go at once"),
        (*BUDGET, {**CHOSEN, "maxUnavailable": "0%"}, "no pod may ever be moved"),
        (*BUDGET, {**CHOSEN, "minAvailable": 1, "maxUnavailable": 1}, "expected one of minAvailable and maxUnavailable"),
        (*BUDGET, CHOSEN, "expected one of minAvailable and maxUnavailable, got {}"),
        ("autoscale", *BUDGET[1:], {**CHOSEN, "minAvailable": 2}, "no pod may ever be moved"),
        ("autoscale-hpa", *BUDGET[1:], {**CHOSEN, "minAvailable": 2}, "no pod may ever be moved"),
        ("kserve", *BUDGET[1:], {**CHOSEN, "minAvailable": 2}, "no pod may ever be moved"),
    ],
    "routes_exist": [
        (*INGRESS, PATH + "path", "/ping", "/ping is no route of the API for users"),
        (*INGRESS, PATH + "path", "/", "/ is no route"),
        (*INGRESS, PATH + "path", "/predictions/mnist", "expected digits as model, got /predictions/mnist"),
        (*INGRESS, PATH + "path", "/v1/models/mnist:explain", "expected digits as model"),
        (*INGRESS, PATH + "path", "/v2/models/mnist", "expected digits as model"),
        (*INGRESS, PATH + "backend", {"resource": {"kind": "Bucket", "name": "x"}}, "expected a service behind"),
        (*INGRESS, "spec|defaultBackend", {"service": {"name": "digits", "port": {"name": "http"}}}, "no defaultBackend"),
    ],
    "ingresses_are_guarded": [
        (*INGRESS, "spec|ingressClassName", None, "as ingressClassName, got None"),
        (*INGRESS, "spec|ingressClassName", "ngnix", "as ingressClassName, got ngnix"),
        (*INGRESS, "spec|tls|0|secretName", None, "expected a secretName"),
        (*INGRESS, NGINX + "basic-auth-secret", None, "expected users"),
        (*INGRESS, NGINX + "basic-auth-secret", "digits-tls", "expected passwords as basic-auth-secret, got digits-tls"),
        (*INGRESS, NGINX + "limit-req-zone-sizes", "10M", "expected nginx.org/limit-req-zone-size, got"),
        (*INGRESS, NGINX + "proxy-read-timeout", "10s", "expected proxy-read-timeout of 20 s at least, got 10s"),
        (*INGRESS, NGINX + "limit-req-rate", "100/s", "expected a rate such as 100r/s"),
        (*INGRESS, NGINX + "limit-req-rate", None, "expected a rate such as 100r/s as limit-req-rate, got None"),
        (*INGRESS, NGINX + "limit-req-key", "binary_remote_addr", "expected a variable such as ${binary_remote_addr}"),
    ],
    "kserve_runs_deployments": [
        (*KSERVE, "metadata|annotations|serving.kserve.io/deploymentMode", None, "deploymentMode Standard, got None"),
        (*KSERVE, "metadata|annotations|serving.kserve.io/deploymentMode", "Knative", "deploymentMode Standard, got Knative"),
        (*KSERVE, "metadata|annotations|serving.kserve.io/autoscalerClass", None, "autoscalerClass keda"),
        (*KSERVE, "metadata|annotations|serving.kserve.io/autoscalerClass", "hpa", "autoscalerClass keda"),
        (*KSERVE, "metadata|annotations", {"serving.kserve.io/autoscalerclass": "keda"}, "autoscalerClass keda"),
        (*KSERVE, "metadata|name", "mnist", "expected the model's name, digits"),
    ],
    "autoscalers_fit": [
        (*KEDA, "spec|scaleTargetRef|kind", "StatefulSet", "expected apps/v1 Deployment as scaleTargetRef, got apps/v1 Stateful"),
        (*KEDA, "spec|scaleTargetRef|apiVersion", "apps/v1beta1", "expected apps/v1 Deployment"),
        (*HPA, "spec|scaleTargetRef|kind", "Deploymet", "expected apps/v1 Deployment"),
        (*HPA, "spec|scaleTargetRef|apiVersion", None, "expected apps/v1 Deployment as scaleTargetRef, got None Deployment"),
        (*HPA, "spec|scaleTargetRef|name", "digit", "there is no Deployment/digit"),
        (*KEDA, TRIGGER + "query", f"saliency:server_errors:ratio5m{LABELS}", "expected saliency:requests_in_flight:rate1m in"),
        (*KEDA, TRIGGER + "query", f"ts_inference_latency_microseconds{LABELS}", "expected saliency:requests_in_flight:rate1m"),
        (*KEDA, TRIGGER + "query", f"saliency:requests_in_flight:rate1m{LABELS[:-1]}", "as many closing as opening"),
        (*KSERVE, KSERVE_METRIC + "query", f"last_over_time(saliency:requests_in_flight:rate1m{LABELS}[1h]", "as many closing"),
        (
            *(*KEDA, TRIGGER + "query", 'saliency:requests_in_flight:rate1m{job="digits", namespace="digits"}'),
            'expected job="saliency" in its query, got job="digits"',
        ),
    ],
    "autoscalers_ask_their_metric": [
        (*HPA, "spec|metrics|0|type", "Externl", "expected the field of metric type Externl"),
        (*HPA, "spec|metrics|0|type", "Pods", "expected the field of metric type Pods, got ['external']"),
        (*HPA, EXTERNAL + "target|type", "Value", "expected AverageValue and averageValue"),
        (*HPA, EXTERNAL + "target", {"type": "Value", "value": "16"}, "expected AverageValue and averageValue"),
        (*HPA, EXTERNAL + "target", {"type": "AverageValue", "value": "16"}, "expected AverageValue and averageValue"),
        (*HPA, EXTERNAL + "metric|selector", {"matchLabels": {"pod": "x"}}, "expected no labels but"),
    ],
    "autoscalers_can_act": [
        (*KEDA, "spec|fallback|replicas", 0, "expected 2 to 20 replicas as fallback, got 0"),
        (*KEDA, "spec|fallback|replicas", 30, "expected 2 to 20 replicas as fallback, got 30"),
        (*KEDA, KEDA_BEHAVIOR + "scaleUp|selectPolicy", "Disabled", "which never adds a pod"),
        (*HPA, "spec|behavior|scaleUp|selectPolicy", "Disabled", "which never adds a pod"),
        (*HPA, "spec|behavior|scaleDown|stabilizationWindowSeconds", 7200, "expected 0 to 3600 as stabilizationWindowSeconds"),
        (*HPA, "spec|behavior|scaleUp|policies|0|value", 0, "expected a value above 0"),
        (*HPA, "spec|behavior|scaleUp|policies|0|periodSeconds", 4000, "1 to 1800 periodSeconds"),
    ],
    "prometheus_is_found": [
        (*KEDA, TRIGGER + "serverAddress", "http://prometheus-operated:9090", "expected http://SERVICE.NAMESPACE:PORT"),
        (*KEDA, TRIGGER + "serverAddress", "http://prometheus-operated.monitoring:9091", "expected port 9090"),
        (*KEDA, TRIGGER + "serverAddress", "http://prometheus-operated.monitoring", "expected port 9090"),
        (*KSERVE, KSERVE_METRIC + "serverAddress", "http://prometheus-operated.monitoring:9091", "expected port 9090"),
    ],
}

MAY_BE_CHOSEN = [
    ("cpu", "Service", "spec|type", "NodePort"),
    ("cpu", "Service", "spec|sessionAffinity", "ClientIP"),
    ("cpu", "Service", "spec|ports", [{"name": "http", "port": 80, "targetPort": 8080}, {"name": "metrics", "port": 8082}]),
    (*POLICY, "spec|ingress|0|from", [{"ipBlock": {"cidr": "10.0.0.0/8"}}]),
    (*POLICY, "spec|ingress|0|from", None),
    (*POLICY, "spec|ingress|0|ports|0|port", "http"),
    (*POLICY, "spec|ingress|1|from|0|namespaceSelector|matchLabels|kubernetes.io/metadata.name", "observability"),
    (*POLICY, "spec|egress", [{"ports": [{"port": 53, "protocol": "UDP"}]}]),
    ("autoscale", "NetworkPolicy", "spec|ingress|1|from|0|namespaceSelector|matchLabels", {"team": "observability"}),
    ("hardened", "NetworkPolicy", "spec|ingress|0|from|0|namespaceSelector|matchLabels", {"kubernetes.io/metadata.name": "edge"}),
    (*BUDGET, {**CHOSEN, "minAvailable": 1}),
    (*BUDGET, {**CHOSEN, "maxUnavailable": "50%"}),
    (*MONITOR, SCRAPE + "interval", "15s"),
    (*MONITOR, SCRAPE + "path", None),
    (*INGRESS, "spec|ingressClassName", "nginx-public"),
    (*INGRESS, PATH + "backend|service|port", {"number": 80}),
    (*INGRESS, NGINX + "proxy-read-timeout", "2m"),
    (*INGRESS, NGINX + "proxy-read-timeout", None),
    (*KEDA, TRIGGER + "serverAddress", "https://thanos-query.observability.svc:10902"),
    (*KEDA, KEDA_BEHAVIOR + "scaleUp|selectPolicy", "Min"),
    (*HPA, EXTERNAL + "metric|selector", {"matchLabels": {"job": "saliency"}}),
    (*KSERVE, "metadata|annotations|serving.kserve.io/deploymentMode", "RawDeployment"),
]


@pytest.mark.parametrize(
    ("rule", "overlay", "kind", "path", "value", "message"),
    [(rule, *case) for rule, cases in WRONG.items() for case in cases],
    ids=[f"{rule}: {overlay}, {path} {value}" for rule, cases in WRONG.items() for overlay, _, path, value, _ in cases],
)
def test_rule_finds_what_is_wrong(rule: str, overlay: str, kind: str, path: str, value: object, message: str) -> None:
    found = problems_with(overlay, kind, setting(path, value))
    assert any(message in problem and problem.endswith(f"[{rule}]") for problem in found), found


def test_every_rule_is_tested() -> None:
    assert {rule.__name__ for rule in (*AUTOSCALING_RULES, *EXPOSURE_RULES)} == WRONG.keys()


@pytest.mark.parametrize(
    ("overlay", "kind", "path", "value"),
    MAY_BE_CHOSEN,
    ids=[f"{overlay}: {kind}, {path} {value}" for overlay, kind, path, value in MAY_BE_CHOSEN],
)
def test_what_may_be_chosen_is_left_alone(overlay: str, kind: str, path: str, value: object) -> None:
    assert problems_with(overlay, kind, setting(path, value)) == []


def test_backend_without_a_port_is_a_problem() -> None:
    found = problems_with("hardened", "Ingress", setting(PATH + "backend|service|port", {}))
    assert any("no service digits with the port None [ports_exist]" in problem for problem in found), found


def test_one_policy_each_for_what_comes_in_and_what_goes_out() -> None:
    objects = copy.deepcopy(rendered("cpu"))
    coming = one_of(objects, "NetworkPolicy")
    going = copy.deepcopy(coming)
    coming["spec"].pop("egress", None)
    coming["spec"]["policyTypes"] = ["Ingress"]
    going["metadata"]["name"] = "digits-out"
    going["spec"].pop("ingress")
    going["spec"]["policyTypes"] = ["Egress"]
    assert list(problems_of([*objects, going])) == []


@pytest.mark.parametrize(("text", "seconds"), [("10s", 10), ("500ms", 0.5), ("1m30s", 90), ("2h", 7200), ("60", 60)])
def test_durations(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds
