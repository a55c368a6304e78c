"""Spoiled requests to a real server; `make fuzz-http` sends more of them."""

import json
import random

import pytest
import requests

from scripts.paths import SAMPLE_FILES
from scripts.serving.launcher import TorchServe
from tests.fuzz_http import SEED, Fuzzer, Spoiled, is_form_error, seeds_of, spoil

FIRST_SECONDS, LONG_SECONDS = 8, 180


def test_same_seed_spoils_alike_and_another_does_not() -> None:
    seeds = seeds_of(SAMPLE_FILES[:1])

    def spoiled(seed: int) -> list[object]:
        chance = random.Random(seed)
        return [spoil(chance, seeds) for _ in range(50)]

    assert spoiled(1) == spoiled(1) != spoiled(2)


FORM = {"Content-Type": "multipart/form-data; boundary=B"}
NO_FORM = Spoiled("/predictions/digits", b"", {})


@pytest.mark.parametrize("disposition", ["form-data", "form-data; name", "form-data; x"])
def test_forms_that_the_frontend_cannot_take_apart_are_its_own_error(server: TorchServe, disposition: str) -> None:
    form = f"--B\r\nContent-Disposition: {disposition}\r\n\r\n1\r\n--B--\r\n".encode()
    reply = requests.post(f"{server.address}/predictions/digits", data=form, headers=FORM, timeout=60)
    sent = Spoiled("/predictions/digits", form, FORM)
    assert is_form_error(sent, reply.status_code, reply.content)
    assert not is_form_error(NO_FORM, reply.status_code, reply.content)


@pytest.mark.parametrize(
    ("status", "kind"), [(500, "InternalServerException"), (507, "OutOfMemoryError"), (500, "InternalError"), (400, "XException")]
)
def test_other_errors_to_a_form_are_none_of_it(status: int, kind: str) -> None:
    content = json.dumps({"code": status, "type": kind, "message": "Worker died."}, indent=2).encode()
    assert not is_form_error(Spoiled("/predictions/digits", b"", FORM), status, content)


def test_spoiled_requests_cost_nobody_an_answer(server: TorchServe) -> None:
    fuzzer = Fuzzer(server, SEED)
    fuzzer.run(FIRST_SECONDS)
    assert {"200", "400"} <= fuzzer.outcomes.keys()


@pytest.mark.long
@pytest.mark.parametrize("seed", [SEED + 1, SEED + 2])
def test_many_spoiled_requests_cost_nobody_an_answer(server: TorchServe, seed: int) -> None:
    fuzzer = Fuzzer(server, seed)
    fuzzer.run(LONG_SECONDS)
    print(fuzzer.report())
