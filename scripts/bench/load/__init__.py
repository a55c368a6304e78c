"""HTTP load: what to send, sending it, and what was measured.

    calls = [build_call("predict", "http://127.0.0.1:8080", "/predictions/digits", png, {})]
    samples = run_load(Load("http://127.0.0.1:8080", calls, rate=100, duration_s=10))
    samples.latency_quantiles_ms([0.5, 0.99])

Knows nothing of digits, files or reports.
"""

from scripts.bench.load.generator import Inspect, Load, Tick, run_load
from scripts.bench.load.http_messages import Call, GarbageReply, ReplyReader, build_call
from scripts.bench.load.samples import QUANTILES, RECORD, Failure, Figures, FirstReply, Samples

__all__ = [
    "QUANTILES",
    "RECORD",
    "Call",
    "Failure",
    "Figures",
    "FirstReply",
    "GarbageReply",
    "Inspect",
    "Load",
    "ReplyReader",
    "Samples",
    "Tick",
    "build_call",
    "run_load",
]
