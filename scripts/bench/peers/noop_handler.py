"""A TorchServe handler that does nothing: it measures the server's own time.

It returns the same bytes to every request: `explanation.json` or `prediction.json` of its archive, by the route. As every handler
that runs a network it imports torch, so that memory and start of its workers can be compared.
"""

from pathlib import Path
from typing import Any

import torch
from ts.context import Context


class NoOpHandler:
    """Answers with a constant."""

    def initialize(self, context: Context) -> None:
        """Read the two replies."""
        torch.set_num_threads(1)
        model_dir = Path(context.system_properties["model_dir"])
        self.explanation = (model_dir / "explanation.json").read_bytes()
        self.prediction = (model_dir / "prediction.json").read_bytes()

    def handle(self, data: list[Any], context: Context) -> list[bytes]:
        """Give each request of a batch the reply of its route."""
        replies = []
        for index in range(len(data)):
            context.set_response_content_type(index, "application/json")
            explained = context.get_request_header(index, "explain") == "True"
            replies.append(self.explanation if explained else self.prediction)
        return replies
