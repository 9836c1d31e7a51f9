"""The whole comparison on a machine with an NVIDIA GPU: python gpu.pyz BINARY [--out FOLDER]

Runs the binary's parity checks, then every case by the binary and by PyTorch (compiled, fused attention, plain attention), one
program at a time, and writes results.json and results.md. Called again with the same folder it goes on with what is missing or
has failed: where calls are limited, --deadline ends one in time, and compiled graphs are kept in the folder.
`cargo xtask gpu` packs this file and its neighbours into gpu.pyz.
"""

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

# (kind, network, samples): the sizes of the goals. Sampling is guided, so that the network sees twice as many.
CASES = [
    ("matmul", None, 0),
    ("copy", None, 0),
    ("sampling", "DiT-XL/2", 32),
    ("sampling", "DiT-D14/2", 32),
    ("fine-tune", "DiT-XL/2", 32),
    ("learn-lora", "DiT-XL/2", 32),
    ("learn-full", "DiT-XL/2", 32),
    ("masked-kd", "DiT-XL/2", 32),
]
# PyTorch's ways, by the flags of peer.py.
WAYS = {
    "torch.compile": ["--compile"],
    "torch, fused attention": [],
    "torch, plain attention": ["--attention", "plain"],
}
WARM_UP = {"torch.compile": 5}
OURS = "tinyfusion"
BLOCKS = {"DiT-XL/2": 28, "DiT-D14/2": 14}


def flops(kind, model, batch):
    """Multiplications and additions of a step's products, those of the blocks: what remains is less than a hundredth."""
    if kind == "matmul":
        return 2 * 8192**3
    if model not in BLOCKS:
        return None
    tokens, width, depth = 256, 1152, BLOCKS[model]
    sample = depth * (24 * tokens * width**2 + 4 * tokens**2 * width + 12 * width**2)
    passes = {
        "sampling": 2,  # with and without the class
        "fine-tune": 3,  # a backward is two forwards
        "masked-kd": 3 / 2 + 1,  # a student of half the blocks, and a teacher forward
        # Of the blocks that the mask leaves out nothing but their output is needed; frozen weights need no gradient.
        "learn-full": (3 + 1) / 2,
        "learn-lora": (2 + 1) / 2,
    }[kind]
    return batch * sample * passes


def smi(*arguments):
    if not shutil.which("nvidia-smi"):
        return ""
    return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, check=False).stdout.strip()


def libraries():
    """Where CUDA's libraries lie if PyTorch brought them: the binary opens them from there."""
    try:
        import nvidia
    except ImportError:
        return ""
    folders = (sorted(Path(p).glob("*/lib")) for p in nvidia.__path__)
    return ":".join(str(f) for found in folders for f in found)


def environment(out):
    paths = [os.environ.get("LD_LIBRARY_PATH", ""), libraries()]
    kept = out.resolve() / "compiled"
    return {
        **os.environ,
        "LD_LIBRARY_PATH": ":".join(p for p in paths if p),
        # One program runs at a time, so that all processors may compile for it; what they made serves the next call.
        "TORCHINDUCTOR_COMPILE_THREADS": str(os.cpu_count()),
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
        "TRITON_CACHE_DIR": str(kept / "triton"),
    }


def parity(binary, args):
    command = [binary, "bench", "parity", "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(args.out), check=False)
    checks = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = [c for c in checks if not c["within"]]
    # A run that came to its end says so by its exit code: 1 where a check failed.
    ended = checks and done.returncode == (1 if failed else 0)
    error = None if ended else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"checks": checks, "failed": failed, "error": error}


def converse(command, warm_up, args, left):
    """Seconds of the steps of a worker that speaks protocol.py, its peak memory and its summary."""
    with tempfile.TemporaryFile("w+") as errors:
        worker = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment(args.out)
        )
        # A worker that hangs, or is not done in time, ends the conversation like one that dies.
        alarm = threading.Timer(left, worker.kill)
        alarm.start()

        def answer():
            line = worker.stdout.readline()
            if line:
                return json.loads(line)
            worker.wait()
            errors.seek(0)
            raise RuntimeError("\n".join(errors.read().strip().splitlines()[-3:]) or f"exit code {worker.returncode}")

        def step():
            worker.stdin.write("step\n")
            worker.stdin.flush()
            return answer()["seconds"]

        try:
            ready = answer()
            for _ in range(warm_up):
                step()
            seconds = [step() for _ in range(args.steps)]
            worker.stdin.close()
            summary = answer()
        finally:
            alarm.cancel()
            worker.kill()
            worker.wait()
    memory = summary.get("peak_gpu_bytes")
    return {"seconds": seconds, "memory_bytes": memory, **ready.get("versions", {}), "difference": summary.get("difference")}


def contenders(binary, folder, device, dtype):
    yield OURS, [binary, "bench", "worker", str(folder), "--device", device, "--dtype", dtype]
    peer = [sys.executable, sys.argv[0], "--peer", str(folder), "--device", device, "--dtype", dtype]
    for name, flags in WAYS.items():
        yield name, peer + flags


def run_case(binary, case, args, results):
    kind, model, batch = case
    label = kind if model is None else f"{kind} {model}, {batch} samples"
    entry = results["cases"].setdefault(label, {"flops": flops(*case), "programs": {}})
    # What failed is tried again.
    done = lambda name: "seconds" in entry["programs"].get(name, {})  # noqa: E731
    if all(done(name) for name, _ in contenders(binary, "", args.device, args.dtype)):
        return
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        prepare = [binary, "bench", "prepare", folder, "--kind", kind, "--batch", str(max(batch, 1)), "--micro-batches", "1"]
        subprocess.run(prepare + (["--model", model] if model else []), check=True, stdout=subprocess.DEVNULL, env=environment(args.out))
        for name, command in contenders(binary, folder, args.device, args.dtype):
            if done(name):
                continue
            began = time.perf_counter()
            left = args.ends - time.monotonic()
            if left <= 0:
                return
            try:
                found = converse(command, WARM_UP.get(name, 3), args, left)
            except (RuntimeError, OSError, ValueError) as error:
                found = {"error": str(error) or type(error).__name__}
            entry["programs"][name] = found
            write(args.out, results)
            said = found.get("error") or f"{1e3 * statistics.median(found['seconds']):.2f} ms"
            print(f"{label}: {name}: {said} ({time.perf_counter() - began:.0f} s)", flush=True)


def write(out, results):
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", table(results))):
        part = out / (name + ".partial")
        part.write_text(text + "\n")
        part.replace(out / name)


def table(results):
    machine = results["machine"]
    lines = [f"On {machine['gpu'] or 'no GPU'}, driver {machine['driver'] or 'none'}, {results['dtype']}; medians.", ""]
    checks = results["parity"]
    lines += [f"Parity with the CPU: {len(checks['checks']) - len(checks['failed'])} of {len(checks['checks'])} checks hold.", ""]
    lines += ["| case | program | ms | to tinyfusion | share of the matrix rate | peak memory |", "|---|---|--:|--:|--:|--:|"]
    memory = lambda found: f"{found['memory_bytes'] / 2**30:.1f} GiB" if found.get("memory_bytes") else ""  # noqa: E731
    median = lambda found: statistics.median(found["seconds"]) if found and "seconds" in found else None  # noqa: E731
    rates = [median(p) for p in results["cases"].get("matmul", {}).get("programs", {}).values()]
    rates = [2 * 8192**3 / s for s in rates if s]
    for label, case in results["cases"].items():
        ours = median(case["programs"].get(OURS))
        for name, found in case["programs"].items():
            seconds = median(found)
            if seconds is None:
                lines.append(f"| {label} | {name} | failed: {found['error'].splitlines()[-1]} | | | |")
                continue
            ratio = f"{seconds / ours:.2f}×" if ours else ""
            share = f"{100 * case['flops'] / seconds / max(rates):.0f} %" if case["flops"] and rates else ""
            lines.append(f"| {label} | {name} | {1e3 * seconds:.2f} | {ratio} | {share} | {memory(found)} |")
    whole, half = (median(results["cases"].get(f"sampling {m}, 32 samples", {}).get("programs", {}).get(OURS)) for m in BLOCKS)
    if whole and half:
        lines += ["", f"Half the blocks: {whole / half:.2f}× as fast as all of them."]
    return "\n".join(lines)


def refuse_what_cannot_run():
    """An error before the first minute is spent, where the driver or the libraries are too old for the binary."""
    for library in ("libcuda.so.1", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10"):
        folders = [*libraries().split(":"), *os.environ.get("LD_LIBRARY_PATH", "").split(":"), "/usr/local/cuda/lib64"]
        for place in [library, *(str(Path(folder) / library) for folder in folders if folder)]:
            try:
                ctypes.CDLL(place)
                break
            except OSError:
                continue
        else:
            raise SystemExit(f"{library} was not found: a driver of the 580 series or newer and the libraries of CUDA 13 are needed")


def build_of(binary):
    return hashlib.sha256(Path(binary).read_bytes()).hexdigest()


def torch_version():
    try:
        import torch
    except ImportError:
        return None
    return torch.__version__


def main():
    if sys.argv[1:2] == ["--peer"]:
        del sys.argv[1]
        import peer

        return peer.main()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", help="tinyfusion, built with the feature cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--scratch", type=Path, help="where cases are written, 3 GB each (default: the system's place)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bf16", "f32"], default="bf16")
    parser.add_argument("--deadline", type=float, default=1e9, metavar="SECONDS", help="begin nothing later, and end what runs then")
    parser.add_argument("--only", nargs="*", help="kinds to run: " + ", ".join(dict.fromkeys(c[0] for c in CASES)))
    parser.add_argument("--tiny", action="store_true", help="small networks and few steps: a rehearsal")
    args = parser.parse_args()
    binary = str(Path(args.binary).resolve())
    file = args.out / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {"dtype": args.dtype, "cases": {}}
    args.ends = time.monotonic() + args.deadline
    if args.device.startswith("cuda"):
        refuse_what_cannot_run()
    if results["dtype"] != args.dtype:
        raise SystemExit(f"{file} has results in {results['dtype']}; give another --out")
    if results.setdefault("binary_sha256", build_of(binary)) != build_of(binary):
        raise SystemExit(f"{file} has results of another build; give another --out")
    if torch_version() is None:
        print("PyTorch is not installed: only tinyfusion is timed")
        WAYS.clear()
    results["machine"] = {
        "gpu": smi("--query-gpu=name", "--format=csv,noheader"),
        "driver": smi("--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": torch_version(),
    }
    if not results.get("parity") or results["parity"]["error"] or results["parity"]["failed"]:
        results["parity"] = parity(binary, args)
        for failed in results["parity"]["failed"]:
            print(f"differs from the CPU: {failed}")
        write(args.out, results)
    cases = [(k, m and "DiT-S/8", m and 2) for k, m, _ in CASES[2:]] if args.tiny else CASES
    for case in cases:
        if not args.only or case[0] in args.only:
            run_case(binary, case, args, results)
    print(table(results))
    if results["parity"]["failed"] or results["parity"]["error"]:
        raise SystemExit(f"parity: {results['parity']['error'] or 'checks failed'}")


if __name__ == "__main__":
    main()
