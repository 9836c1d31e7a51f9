"""The PyTorch side of `cargo xtask bench`: python peer.py CASE_DIR [--compile]

Speaks protocol.py; where the binary has left its own first output, the last answer says how far the two are apart.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# One process per contender: no pool of idle compilers beside it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import timm  # noqa: E402
import torch  # noqa: E402

import protocol  # noqa: E402
from steps import KINDS  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=Path)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    stream = protocol.answers()

    case = json.loads((args.case / "case.json").read_text())
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    compiled = torch.compile if args.compile else lambda function: function
    step = KINDS[case["kind"]](args.case, compiled)
    versions = {"torch": torch.__version__, "timm": timm.__version__, "python": sys.version.split()[0]}
    protocol.converse(stream, step, versions, protocol.difference(args.case / "ours.safetensors"))


if __name__ == "__main__":
    main()
