"""Print the figures of this server's frontend for /metrics, and then those of the machine, as TorchServe's own collector does.

TorchServe starts this once a minute (system_metrics_cmd) as a child of its JVM, and reads what it prints. Standard library alone.
"""

import os
import re
import runpy
import socket
import sys
import time
from pathlib import Path

LIMIT_VARIABLE = "SALIENCY_FRONTEND_BYTES"  # `server.py` sets both where it starts the JVM
REPLACEMENTS_VARIABLE = "SALIENCY_REPLACEMENTS"
COLLECTOR = "ts/metrics/metric_collector.py"  # in the folder that TorchServe starts it in


def main() -> None:
    """Print one line for each figure, in TorchServe's format."""
    status = Path("/proc", str(os.getppid()), "status").read_text()
    resident = re.search(r"(?m)^VmRSS:\s+(\d+) kB", status)
    figures = {
        "saliency_frontend_resident_bytes.Bytes": int(resident[1]) * 1024 if resident else 0,
        "saliency_frontend_limit_bytes.Bytes": int(os.environ.get(LIMIT_VARIABLE, "0")),
        "saliency_server_replacements.Count": int(os.environ.get(REPLACEMENTS_VARIABLE, "0")),
    }
    for name, value in figures.items():
        print(f"{name}:{value}|#Level:Host|#hostname:{socket.gethostname()},{int(time.time())}")
    sys.stdout.flush()
    runpy.run_path(COLLECTOR, run_name="__main__")


if __name__ == "__main__":
    main()
