"""What every peer of `cargo xtask bench` says: ready, the seconds of a step for every line `step`, a summary at the end of the input."""

import json
import os
import resource
import sys
import time
from pathlib import Path


def answers():
    """Where answers go. Whatever a library prints goes to stderr from now on: stdout is the driver's."""
    stream = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    return stream


def peak_rss_bytes():
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def converse(stream, step, versions, difference, wait=lambda: None, more=dict):
    """Repeats `step` on demand; `difference` says how far its first output is from ours, None where that cannot be said; `wait`
    returns when a device has done what it was given, and `more` has what else the summary says."""
    print(json.dumps({"ready": True, "versions": versions}), file=stream)
    first = None
    for line in sys.stdin:
        if line.strip() != "step":
            raise SystemExit(f"expected `step`, got {line.strip()!r}")
        start = time.perf_counter()
        output = step()
        wait()
        seconds = time.perf_counter() - start
        if first is None and output is not None:
            # The step may use its buffers again; a tensor has `clone`, an array `copy`.
            first = output.clone() if hasattr(output, "clone") else output.copy()
        print(json.dumps({"seconds": seconds}), file=stream)
    # The peak comes first: comparing is not part of what is measured.
    final = {"peak_rss_bytes": peak_rss_bytes(), **more()}
    apart = None if first is None else difference(first)
    if apart is not None:
        final["difference"] = apart
    print(json.dumps(final), file=stream)


def difference(file):
    """max |a - b| / max |a| between a tensor and the one that the binary left in `file`, where it is."""

    def of(output):
        if not file.exists():
            return None
        from tensors import load_file

        ours = load_file(file)["output"].to(output.device)
        if ours.shape != output.shape:
            raise SystemExit(f"{file}: shape {tuple(ours.shape)}, here {tuple(output.shape)}")
        return ((output - ours).abs().max() / output.abs().max()).item()

    return of
