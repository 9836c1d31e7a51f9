"""The PyTorch side of `cargo xtask bench`: python peer.py CASE_DIR [--compile]

Says {"ready": true} when all is loaded; answers each line `step` with {"seconds": ...} of one step, timed here; at the end of
the input says {"peak_rss_bytes": ...} and, where the binary has left its own first output, how far the two are apart.
"""

import argparse
import json
import os
import resource
import sys
import time
from pathlib import Path

# One process per contender: no pool of idle compilers beside it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import timm  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from steps import KINDS  # noqa: E402


def peak_rss_bytes():
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def difference(output, file):
    """max |a - b| / max |a| of the first outputs; None where there is nothing to compare."""
    if output is None or not file.exists():
        return None
    ours = load_file(file)["output"]
    if ours.shape != output.shape:
        raise SystemExit(f"{file}: shape {tuple(ours.shape)}, here {tuple(output.shape)}")
    return ((output - ours).abs().max() / output.abs().max()).item()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=Path)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    # Whatever a library prints goes to stderr: stdout is the driver's.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    case = json.loads((args.case / "case.json").read_text())
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    compiled = torch.compile if args.compile else lambda function: function
    step = KINDS[case["kind"]](args.case, compiled)
    versions = {"torch": torch.__version__, "timm": timm.__version__, "python": sys.version.split()[0]}
    print(json.dumps({"ready": True, "versions": versions}), file=answers)

    first = None
    for line in sys.stdin:
        if line.strip() != "step":
            raise SystemExit(f"expected `step`, got {line.strip()!r}")
        start = time.perf_counter()
        output = step()
        seconds = time.perf_counter() - start
        if first is None and output is not None:
            first = output.clone()
        print(json.dumps({"seconds": seconds}), file=answers)
    # The peak comes first: comparing is not part of what is measured.
    final = {"peak_rss_bytes": peak_rss_bytes()}
    apart = difference(first, args.case / "ours.safetensors")
    if apart is not None:
        final["difference"] = apart
    print(json.dumps(final), file=answers)


if __name__ == "__main__":
    main()
