"""What tests of the whole handler share."""

from collections.abc import Callable
from pathlib import Path

import pytest

from handler.saliency_handler import SaliencyHandler
from tests.worker import context_for


@pytest.fixture
def handler(unpack: Callable[[], Path]) -> SaliencyHandler:
    """A handler that has loaded the digits archive, as a worker does."""
    saliency_handler = SaliencyHandler()
    saliency_handler.initialize(context_for(unpack()))
    return saliency_handler
