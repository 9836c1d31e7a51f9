"""The PyTorch side of `cargo xtask bench` and of gpu.py: python peer.py CASE_DIR [--compile]

Speaks protocol.py; where the binary has left its own first output, the last answer says how far the two are apart.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# One process per contender: no pool of idle compilers beside it.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

import torch  # noqa: E402

import protocol  # noqa: E402
import setting  # noqa: E402


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("case", type=Path)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--attention", choices=["fused", "plain"], default="fused")
    args = parser.parse_args()
    stream = protocol.answers()

    case = json.loads((args.case / "case.json").read_text())
    torch.set_num_threads(case["threads"])
    torch.manual_seed(0)
    setting.choose(args.device, args.dtype)
    # Their tables are made where the steps will run.
    import dit
    from steps import KINDS

    dit.FUSED_ATTENTION = args.attention == "fused"
    compiled = torch.compile if args.compile else lambda function: function
    step = KINDS[case["kind"]](args.case, compiled)
    versions = {"torch": torch.__version__, "python": sys.version.split()[0], **timm_version()}
    protocol.converse(stream, step, versions, protocol.difference(args.case / "ours.safetensors"), setting.wait, setting.memory)


def timm_version():
    try:
        import timm
    except ImportError:
        return {}
    return {"timm": timm.__version__}


if __name__ == "__main__":
    main()
