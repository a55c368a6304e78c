"""The soak's statistics on series that are known, its gates, and what it takes for the same answer."""

import base64
import json
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from handler.runtime.malloc import KEPT_BYTES
from scripts.bench.attacks import build_attacks
from scripts.bench.load import RECORD, Failure, Samples
from scripts.bench.load.recording import LoadTestError
from scripts.bench.soak_report import (
    MAX_SLOPE_MIB_PER_HOUR,
    MIB,
    Report,
    build_report,
    estimate_slope,
    render_html,
    render_text,
)
from scripts.bench.soak_traffic import (
    KINDS,
    TIED_SHARE,
    Answers,
    Traffic,
    build_traffic,
    is_as_described,
    read_samples,
    say_the_same,
)
from scripts.paths import SAMPLE_FILES

HALF_AN_HOUR_S = 1800.0
P99 = "p99 beside no attack of the last 5 minutes at most 10% above that of the first"
TIMES_S = np.arange(0, HALF_AN_HOUR_S, 5.0)
KIND_BY_NAME = {kind.name: kind for kind in KINDS}


def wandering(seed: int, size: float = 2.0) -> NDArray[np.float64]:
    """Noise of this standard deviation, which remembers half of itself for 20 s."""
    random, kept = np.random.default_rng(seed), 0.5 ** (5 / 20)
    noise = random.normal(0, size * (1 - kept**2) ** 0.5, len(TIMES_S))
    noise[0] = random.normal(0, size)
    for index in range(1, len(noise)):
        noise[index] += kept * noise[index - 1]
    return noise


def test_slope_of_a_line_is_exact() -> None:
    slope = estimate_slope(TIMES_S, 600 + 50 * TIMES_S / 3600)
    assert slope is not None
    assert [slope.per_hour, slope.low, slope.high] == pytest.approx([50] * 3)


def test_interval_holds_the_true_slope_as_often_as_it_says() -> None:
    """Of 400 noisy series 95 % or nearly; were the samples taken for independent, it would be far fewer."""
    held = 0
    for seed in range(400):
        slope = estimate_slope(TIMES_S, 600 + 50 * TIMES_S / 3600 + wandering(seed))
        assert slope is not None
        assert slope.low < slope.per_hour < slope.high
        held += slope.low <= 50 <= slope.high
    assert 0.90 <= held / 400 <= 0.99


@pytest.mark.parametrize("count", [0, 1, 9], ids=str)
def test_too_few_samples_have_no_slope(count: int) -> None:
    assert estimate_slope(TIMES_S[:count], TIMES_S[:count]) is None


def test_bound_of_the_slope_is_what_the_allocator_may_keep_in_half_an_hour() -> None:
    assert MAX_SLOPE_MIB_PER_HOUR * 0.5 * MIB == KEPT_BYTES


def process_at(rss_mib: float, descriptors: int = 5) -> dict[str, int]:
    return {"rss": round(rss_mib * MIB), "descriptors": descriptors, "threads": 1}


def about_of(rss_mib: NDArray[np.float64], **changes: Any) -> dict[str, Any]:
    """A soak with one worker, which leaves nothing."""
    rest = {"processes": {"worker 1": process_at(600)}, "temp_files": ["/t/socket"]}
    return {
        "url": "http://127.0.0.1:1",
        "started": "now",
        "machine": {"cores": "<2>"},
        "duration_s": HALF_AN_HOUR_S,
        "rate": 10.0,
        "rate_source": "as asked for",
        "warm_up_s": 0.0,
        "kinds": ["predict", "no image"],
        "attacks": [],
        "interrupted": False,
        "wrong_before": 0,
        "first_wrong": "",
        "before": rest,
        "after": rest,
        "resources": [
            {"s": s, "processes": {"worker 1": process_at(value)}} for s, value in zip(TIMES_S.tolist(), rss_mib, strict=True)
        ],
    } | changes


def samples_of(latency_s: NDArray[np.float64], duration_s: float = HALF_AN_HOUR_S) -> Samples:
    """Two kinds in turn, good and rightly refused."""
    records = np.zeros(len(latency_s), RECORD)
    records["scheduled_s"] = np.arange(len(records)) * duration_s / len(records)
    records["done_s"] = records["scheduled_s"] + latency_s
    records["call"] = np.arange(len(records)) % 2
    records["status"] = np.where(records["call"] == 0, 200, 400)
    return Samples(("predict", "no image"), records, duration_s, 10.0, 1, 0.1, {})


FLAT = 600 + wandering(1)
STEADY_S = np.random.default_rng(0).exponential(0.01, 18_000)


def failed(report: Report) -> list[str]:
    return [gate.demand for gate in report.gates if gate.passed is False]


def test_steady_server_passes_every_gate() -> None:
    report = build_report(about_of(FLAT), samples_of(STEADY_S))
    assert all(gate.passed for gate in report.gates)
    assert report.passed
    assert [(kind.name, kind.requests, kind.right) for kind in report.kinds] == [
        ("predict", 9000, 9000),
        ("no image", 9000, 9000),
    ]


@pytest.mark.parametrize("seed", range(5))
def test_leak_is_found(seed: int) -> None:
    growth = 80 * TIMES_S / 3600
    report = build_report(about_of(600 + growth + wandering(seed)), samples_of(STEADY_S))
    assert failed(report) == ["worker 1 grows by less than 64 MiB/h"]
    assert not report.passed


def test_growth_that_cannot_be_ruled_out_fails_too() -> None:
    report = build_report(about_of(600 + wandering(2, size=200.0)), samples_of(STEADY_S))
    assert failed(report) == ["worker 1 grows by less than 64 MiB/h"]


def test_slower_answers_at_the_end_are_found() -> None:
    growing_s = STEADY_S * np.linspace(1, 1.3, len(STEADY_S))
    assert failed(build_report(about_of(FLAT), samples_of(growing_s))) == [P99]


def test_short_soak_says_nothing_of_slope_and_p99() -> None:
    leak = about_of(600 + 1000 * TIMES_S / 3600, duration_s=60.0)
    report = build_report(leak, samples_of(STEADY_S * np.linspace(1, 3, len(STEADY_S)), 60.0))
    assert [gate.demand.split()[0] for gate in report.gates if gate.passed is None] == ["worker", "p99", "no"]
    assert report.passed


@pytest.mark.parametrize(
    ("changes", "demand", "found"),
    [
        ({"after": {"processes": {}, "temp_files": ["/t/socket"]}}, "the same processes at the end", "ended: worker 1"),
        (
            {"after": {"processes": {"worker 1": process_at(600, 6)}, "temp_files": ["/t/socket"]}},
            "no descriptor left open",
            "worker 1 5 -> 6",
        ),
        (
            {"after": {"processes": {"worker 1": process_at(600)}, "temp_files": ["/t/FUp_1", "/t/socket"]}},
            "no temp file left over",
            "/t/FUp_1",
        ),
        ({"wrong_before": 1, "first_wrong": "predict: 404"}, "no wrong answer", "1 of 18,000; the first: predict: 404"),
    ],
    ids=["ended", "descriptor", "temp file", "wrong"],
)
def test_what_is_left_over_is_named(changes: dict[str, Any], demand: str, found: str) -> None:
    report = build_report(about_of(FLAT, **changes), samples_of(STEADY_S))
    assert [(gate.demand, gate.found) for gate in report.gates if gate.passed is False] == [(demand, found)]


@pytest.mark.parametrize(
    ("change", "demands"),
    [
        ({"failure": Failure.WRONG_FORM}, ["no wrong answer"]),
        ({"failure": Failure.WRONG_FORM, "status": 503}, ["no wrong answer", "no 5xx"]),
        ({"failure": Failure.TIMEOUT, "status": 0}, ["no request without an answer"]),
    ],
    ids=["another answer", "5xx", "timeout"],
)
def test_one_bad_answer_of_thousands_fails(change: dict[str, int], demands: list[str]) -> None:
    samples = samples_of(STEADY_S)
    for name, value in change.items():
        samples.records[name][777] = value
    assert failed(build_report(about_of(FLAT), samples)) == demands


ATTACK = "padded TIFF"
ATTACKS_REFUSED, LATE = "each of 1 attacks ends as it has to", "no refusal after 1.5 s, no answer after 3 s"


def attacked(latency_s: NDArray[np.float64], every: int = 100) -> tuple[dict[str, Any], Samples]:
    """A soak in which each of so many requests is an attack, rightly refused."""
    samples = samples_of(latency_s)
    samples.records["call"][::every] = 2
    samples.records["status"][::every] = 413
    named = Samples((*samples.names, ATTACK), samples.records, samples.duration_s, 10.0, 1, 0.1, {})
    return about_of(FLAT, attacks=[ATTACK]), named


def found_by(report: Report, demand: str) -> tuple[bool | None, str]:
    [gate] = [gate for gate in report.gates if gate.demand == demand]
    return gate.passed, gate.found


def test_refused_attacks_are_counted() -> None:
    report = build_report(*attacked(STEADY_S))
    assert report.passed
    assert [(attack.name, attack.requests, attack.right) for attack in report.attacks] == [(ATTACK, 180, 180)]
    assert found_by(report, ATTACKS_REFUSED) == (True, "180 of 180")


@pytest.mark.parametrize("change", [{"status": 200}, {"status": 0}, {"status": 503}], ids=["answered", "unanswered", "5xx"])
def test_attack_that_is_not_refused_is_named(change: dict[str, int]) -> None:
    about, samples = attacked(STEADY_S)
    for name, value in {"failure": int(Failure.WRONG_FORM), **change}.items():
        samples.records[name][500] = value
    report = build_report(about, samples)
    assert found_by(report, ATTACKS_REFUSED) == (False, f"179 of 180; not: {ATTACK} (1)")
    assert not report.passed


def test_attack_may_be_told_to_come_again() -> None:
    about, samples = attacked(STEADY_S)
    samples.records["status"][500] = 503
    report = build_report(about, samples)
    assert report.passed
    assert found_by(report, ATTACKS_REFUSED) == (True, "180 of 180, 1 of them with 503 beside costly neighbours")


def test_p99_is_not_judged_where_attacks_were_always_in_flight() -> None:
    about, samples = attacked(STEADY_S)
    samples.records["done_s"][::100] += HALF_AN_HOUR_S
    report = build_report(about, samples)
    assert found_by(report, P99)[0] is None


def test_attack_that_was_never_sent_is_named_and_not_judged() -> None:
    report = build_report(about_of(FLAT, attacks=[ATTACK]), samples_of(STEADY_S))
    assert found_by(report, ATTACKS_REFUSED) == (None, f"0 of 0; not sent in this time: {ATTACK}")


@pytest.mark.parametrize(
    ("row", "latency_s", "name"),
    [
        (500, 1.4, None),
        (500, 1.6, ATTACK),
        (501, 1.6, "no image"),
        (502, 2.9, None),
        (502, 3.1, "predict"),
    ],
    ids=["refused attack", "attack refused late", "refused late", "answered", "answered late"],
)
def test_late_answers_are_named(row: int, latency_s: float, name: str | None) -> None:
    latencies_s = STEADY_S.copy()
    latencies_s[row] = latency_s
    report = build_report(*attacked(latencies_s))
    passed, found = found_by(report, LATE)
    count = 0 if name is None else 1
    assert passed is (name is None)
    assert found == f"{count} of 18,000, the slowest took {latency_s:.2f} s" + (f"; late: {name} (1)" if name else "")


def test_many_late_kinds_are_counted() -> None:
    samples = samples_of(np.full(1800, 4.0))
    samples.records["call"] = np.arange(1800) % 12
    samples = Samples(tuple(f"kind {n}" for n in range(12)), samples.records, HALF_AN_HOUR_S, 10.0, 1, 0.1, {})
    _, found = found_by(build_report(about_of(FLAT), samples), LATE)
    assert found.startswith("1,800 of 1,800, the slowest took 4.00 s; late: kind 0 (150); ")
    assert found.endswith("kind 9 (150) and 2 other kinds")


def test_neighbours_of_an_attack_say_nothing_of_the_p99() -> None:
    """Whatever happens in the last five minutes while attacks are on their way; the same without attacks is found."""
    latencies_s = STEADY_S.copy()
    latencies_s[17_000::100] = 1.0  # attacks, each beside the next ten requests
    for after in range(1, 9):
        latencies_s[17_000 + after :: 100] = 0.5
    about, samples = attacked(latencies_s)
    assert build_report(about, samples).passed
    assert failed(build_report(about | {"attacks": []}, samples)) == [P99]


def test_processes_that_cannot_be_seen_are_not_judged() -> None:
    nothing: dict[str, Any] = {"processes": {}, "temp_files": None}
    report = build_report(about_of(FLAT, before=nothing, after=nothing, resources=[]), samples_of(STEADY_S))
    assert [gate.demand for gate in report.gates if gate.passed is None] == ["processes leave nothing"]


def test_soak_that_ended_in_its_warm_up_has_no_report() -> None:
    with pytest.raises(LoadTestError, match="no request was counted"):
        build_report(about_of(FLAT), samples_of(np.zeros(0)))


def test_page_and_text_say_what_failed() -> None:
    about = about_of(600 + 500 * TIMES_S / 3600)
    report = build_report(about, samples_of(STEADY_S))
    page = render_html(report, about, samples_of(STEADY_S))
    for text in (page, render_text(report)):
        assert "FAILED: worker 1 grows by less than 64 MiB/h: +500" in text
    assert "<title>Soak</title>" in page
    assert "&lt;2&gt;" in page
    assert page.count("<svg") == 1


# --- right answers


def json_map(values: NDArray[np.float32], encoding: str, digit: int = 7) -> bytes:
    saliency: Any = values.tolist() if encoding == "nested" else base64.b64encode(values.tobytes()).decode()
    return json.dumps({"digit": digit, "explanation": {"saliency": saliency}}).encode()


def npy_map(values: NDArray[np.float32]) -> bytes:
    content = BytesIO()
    np.save(content, values)
    return content.getvalue()


def png_map(values: NDArray[np.float32]) -> bytes:
    content = BytesIO()
    Image.fromarray(np.clip(128 + 100 * values, 0, 255).astype(np.uint8)).save(content, format="PNG")
    return content.getvalue()


FORMS = {
    "nested": lambda values: json_map(values, "nested"),
    "base64": lambda values: json_map(values, "base64"),
    "npy": npy_map,
    "png": png_map,
}
MAP = np.random.default_rng(3).normal(size=(28, 28)).astype(np.float32)


@pytest.mark.parametrize("form", FORMS)
def test_rounding_is_the_same_answer_and_another_map_is_not(form: str) -> None:
    write = FORMS[form]
    assert say_the_same(write(MAP), write(MAP * np.float32(1 + 1e-5)))
    assert not say_the_same(write(MAP), write(MAP[::-1].copy()))
    assert not say_the_same(write(MAP), write(MAP[:27]))
    assert not say_the_same(write(MAP), b"")
    assert not say_the_same(write(MAP), write(MAP)[:-30])


@pytest.mark.parametrize("form", ["nested", "base64", "npy"])
def test_numbers_may_differ_by_a_share_of_the_largest(form: str) -> None:
    write, step = FORMS[form], np.zeros_like(MAP)
    step.flat[np.abs(MAP).argmin()] = np.abs(MAP).max()
    assert say_the_same(write(MAP), write(MAP + np.float32(5e-5) * step))
    assert not say_the_same(write(MAP), write(MAP + np.float32(2e-4) * step))


def test_logits_may_differ_by_a_share_of_the_largest() -> None:
    def write(*logits: float) -> bytes:
        return json.dumps({"digit": 7, "logits": logits}).encode()

    assert say_the_same(write(-41.29, 0.01), write(-41.29, 0.012))
    assert not say_the_same(write(-41.29, 0.01), write(-41.29, 0.02))
    assert not say_the_same(write(-41.29, 0.01), write(-41.29, float("inf")))
    assert say_the_same(write(0, 0), write(0, 0.0))
    assert not say_the_same(write(0, 0), write(0, 1e-9))
    assert not say_the_same(write(0, 0), write(0, 0, 0))


def test_ties_may_differ_only_in_few_places_of_a_prepared_image() -> None:
    few, many = MAP.copy(), MAP.copy()
    few.flat[:12] += 1
    many.flat[: int(TIED_SHARE * MAP.size) + 1] += 1
    one = json_map(MAP, "nested")
    assert say_the_same(one, json_map(few, "nested"), TIED_SHARE)
    assert not say_the_same(one, json_map(few, "nested"))
    assert not say_the_same(one, json_map(many, "nested"), TIED_SHARE)
    assert not say_the_same(one, json_map(MAP, "nested", digit=3), TIED_SHARE)


def error_of(kind: str) -> bytes:
    return json.dumps({"error": {"type": kind}}).encode()


@pytest.mark.parametrize(
    ("name", "status", "body", "expected"),
    [
        ("predict", 200, b'{"digit": 7}', True),
        ("predict", 200, b'{"digit": 3}', False),
        ("predict", 400, b'{"digit": 7}', False),
        ("predict", 200, b"", False),
        ("no image", 400, error_of("UnreadableImage"), True),
        ("no image", 400, error_of("EmptyRequest"), False),
        ("no image", 200, b'{"digit": 7}', False),
        ("JSON, lists in a tensor", 413, b'{"error": "too large", "type": "RequestTooLarge"}', True),
        ("JSON, lists in a tensor", 413, b'{"error": "too large", "type": "WrongShape"}', False),
        ("JSON, lists in a tensor", 413, b"too large", False),
        ("large PNG of empty deflate blocks", 200, b'{"digit": 3}', True),
        ("large PNG of empty deflate blocks", 413, error_of("ImageTooLarge"), True),
        ("large PNG of empty deflate blocks", 503, error_of("Overloaded"), False),
    ],
)
def test_first_answer_has_to_be_what_its_kind_asks_for(name: str, status: int, body: bytes, expected: bool) -> None:
    assert is_as_described(KIND_BY_NAME[name], 7, status, body) is expected


@pytest.fixture(scope="module")
def traffic() -> Traffic:
    return build_traffic("http://127.0.0.1:1", "digits", read_samples(SAMPLE_FILES[1::25]))


def test_every_kind_is_sent_as_often_as_it_says(traffic: Traffic) -> None:
    names = [call.name for call in traffic.calls]
    assert set(names) == KIND_BY_NAME.keys()
    assert all(names.count(kind.name) == 2 * kind.weight for kind in KINDS if kind.weight)
    attacks = build_attacks(0).keys()
    assert {kind.name for kind in KINDS if kind.attack} == attacks
    assert all(names.count(name) == 1 for name in attacks)
    bad = sum(kind.weight for kind in KINDS if kind.is_bad)
    assert 0.1 < bad / sum(kind.weight for kind in KINDS) < 0.3
    distinct = traffic.distinct_calls()
    assert [distinct[index] for index in traffic.distinct] == traffic.calls


def test_answer_that_belongs_to_another_request_is_wrong(traffic: Traffic) -> None:
    answers = Answers(traffic)
    mine = next(index for index, call in enumerate(traffic.calls) if call.name == "predict")
    label = traffic.labels[traffic.distinct[mine]]
    body = json.dumps({"digit": label, "logits": [1.5]}).encode()
    assert answers.learn(traffic.distinct[mine], 200, body)
    assert answers.check(mine, 200, body)
    assert answers.check(mine, 200, body.replace(b"1.5", b"1.500001"))
    assert answers.wrong_count == 0
    assert not answers.check(mine, 200, body.replace(b"1.5", b"2.5"))
    assert not answers.check(mine, 503, body)
    assert answers.wrong_count == 2
    assert answers.first_wrong.startswith("predict: status 200, b'{")


@pytest.mark.parametrize(
    ("name", "learned", "answer", "expected"),
    [
        ("JSON, digits", (400, error_of("MalformedJSON")), (400, error_of("MalformedJSON")), True),
        ("JSON, digits", (400, error_of("MalformedJSON")), (400, error_of("WrongShape")), False),
        ("JSON, digits", (400, error_of("MalformedJSON")), (200, b'{"digit": 1}'), False),
        ("JSON, digits", (400, error_of("MalformedJSON")), (503, error_of("Overloaded")), True),
        ("JSON, digits", (400, error_of("MalformedJSON")), (503, b"{}"), False),
        ("JSON, digits", (400, error_of("MalformedJSON")), (500, error_of("Overloaded")), False),
        ("TIFF, tiles with padding of their own", (200, b'{"digit": 1}'), (413, error_of("ImageTooLarge")), True),
        ("TIFF, tiles with padding of their own", (413, error_of("ImageTooLarge")), (200, b'{"digit": 1}'), True),
        ("TIFF, tiles with padding of their own", (200, b'{"digit": 1}'), (200, b'{"digit": 1}'), True),
        ("TIFF, tiles with padding of their own", (200, b'{"digit": 1}'), (200, b'{"digit": 2}'), False),
        ("TIFF, tiles with padding of their own", (200, b'{"digit": 1}'), (500, b"{}"), False),
    ],
)
def test_attack_has_to_end_as_it_says(
    traffic: Traffic, name: str, learned: tuple[int, bytes], answer: tuple[int, bytes], expected: bool
) -> None:
    answers = Answers(traffic)
    [call] = [index for index, call in enumerate(traffic.calls) if call.name == name]
    assert answers.learn(traffic.distinct[call], *learned)
    assert answers.check(call, *answer) is expected
    assert answers.wrong_count == (not expected)


def test_refusals_of_an_attack_may_name_what_was_measured(traffic: Traffic) -> None:
    answers = Answers(traffic)
    [call] = [index for index, call in enumerate(traffic.calls) if call.name == "64 progressive JPEGs with smoothgrad"]
    first, second = (
        json.dumps({"error": {"type": "RequestTooLarge", "message": f"expected at most 2.4 s, got one that takes about {s} s"}})
        for s in (3.4, 3.5)
    )
    assert answers.learn(traffic.distinct[call], 413, first.encode())
    assert answers.check(call, 413, second.encode())
