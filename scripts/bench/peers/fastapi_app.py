"""FastAPI + captum Saliency.

    python -m uvicorn scripts.bench.peers.fastapi_app:app --port 8000 --workers 2 --no-access-log

A PNG as the body, JSON back. The network runs in the event loop: a thread pool would cost time, and one worker process has only
one core. orjson writes the JSON, and FastAPI passes a plain `Response` on unchanged.
"""

from fastapi import FastAPI, Request, Response

from scripts.bench.peers.captum_answers import CaptumAnswers

answers = CaptumAnswers()
app = FastAPI()


async def explain(request: Request) -> Response:
    """Predict and explain."""
    (body,) = answers.answer([await request.body()], explain=True)
    return Response(body, media_type="application/json")


async def predict(request: Request) -> Response:
    """Predict."""
    (body,) = answers.answer([await request.body()], explain=False)
    return Response(body, media_type="application/json")


app.add_api_route("/explain", explain, methods=["POST"])
app.add_api_route("/predict", predict, methods=["POST"])
