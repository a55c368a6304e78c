"""The samples of a load test or soak in a file: all that reports are made from."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from scripts.bench.load.samples import Samples

STEP_FACTS = ("names", "duration_s", "offered_rate", "connections", "cpu_share")  # of Samples, beside the records


class LoadTestError(RuntimeError):
    """A load test or soak cannot run, or has nothing to report; the message says why, for a person."""


@dataclass(frozen=True, slots=True)
class Recording:
    """All steps of a test. `about` says what was tested, when and on what."""

    about: dict[str, Any]
    steps: list[Samples]


def write_recording(recording: Recording, file: Path) -> None:
    """Write an .npz: `about`, a JSON text, and for each step `step_0`, ...: one record a request, of `samples.RECORD`."""
    steps = [{name: getattr(samples, name) for name in STEP_FACTS} for samples in recording.steps]
    about = orjson.dumps(recording.about | {"steps": steps}).decode()
    file.parent.mkdir(parents=True, exist_ok=True)
    records = {f"step_{number}": samples.records for number, samples in enumerate(recording.steps)}
    np.savez(file, allow_pickle=False, about=np.array(about), **records)


def read_recording(file: Path) -> Recording:
    """Read what `write_recording` wrote; the replies are not part of it.

    Raises:
        LoadTestError: there is no such file, or it is another kind of file.
    """
    try:
        with np.load(file, allow_pickle=False) as opened:
            about: dict[str, Any] = orjson.loads(str(opened["about"]))
            steps = [
                Samples(
                    records=opened[f"step_{number}"],
                    first_replies={},
                    **{name: facts[name] for name in STEP_FACTS if name != "names"},
                    names=tuple(facts["names"]),
                )
                for number, facts in enumerate(about.pop("steps"))
            ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadTestError(f"{file} holds no samples of a load test: {error}") from error
    return Recording(about, steps)
