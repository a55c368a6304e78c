"""mosec (a server in Rust with dynamic batches) + captum Saliency.

    python -m scripts.bench.peers.mosec_app --address 127.0.0.1 --port 8000 --workers 2

A PNG as the body, JSON back. Each route has worker processes of its own, as mosec requires; those of the other route idle.
"""

import argparse

from mosec import Runtime, Server, Worker

from scripts.bench.peers.captum_answers import CaptumAnswers

MAX_WAIT_MS = 1  # for other requests of a batch, as in serve_config/model-config.yaml


class Predictor(Worker):
    """Predicts a batch, or one image where there are no batches."""

    explains = False

    def __init__(self) -> None:
        super().__init__()
        self.answers = CaptumAnswers()

    def deserialize(self, data: bytes) -> bytes:
        """The body is the image."""
        return data

    def forward(self, data: bytes | list[bytes]) -> bytes | list[bytes]:
        """Answer each image of a batch; with batches of one, mosec passes the image itself."""
        if isinstance(data, list):
            return self.answers.answer(data, explain=self.explains)
        return self.answers.answer([data], explain=self.explains)[0]

    def serialize(self, data: bytes) -> bytes:
        """The answer is JSON already."""
        return data


class Explainer(Predictor):
    """Predicts and explains a batch."""

    explains = True


def main() -> None:
    """Serve until a signal. mosec reads its own options from the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--workers", type=int, default=2, help="processes a route")
    parser.add_argument("--max-batch-size", type=int, default=16, help="requests that share a pass; 1 is mosec's own default")
    arguments = parser.parse_known_args()[0]
    settings = {"num": arguments.workers, "max_batch_size": arguments.max_batch_size, "max_wait_time": MAX_WAIT_MS}
    server = Server()
    server.register_runtime({"/explain": [Runtime(Explainer, **settings)], "/predict": [Runtime(Predictor, **settings)]})
    server.run()


if __name__ == "__main__":
    main()
