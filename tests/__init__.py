"""Tests, and what they share: clients and servers, oracles, doubles, hostile requests."""

import pytest

pytest.register_assert_rewrite("tests.client", "tests.servers", "tests.openapi", "tests.worker")
