"""Spoiled requests to a real server; `make fuzz-http` sends more of them."""

import random

import pytest

from scripts.paths import SAMPLE_FILES
from scripts.serving.launcher import TorchServe
from tests.fuzz_http import SEED, Fuzzer, seeds_of, spoil

FIRST_SECONDS, LONG_SECONDS = 8, 180


def test_same_seed_spoils_alike_and_another_does_not() -> None:
    seeds = seeds_of(SAMPLE_FILES[:1])

    def spoiled(seed: int) -> list[object]:
        chance = random.Random(seed)
        return [spoil(chance, seeds) for _ in range(50)]

    assert spoiled(1) == spoiled(1) != spoiled(2)


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
