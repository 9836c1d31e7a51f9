"""The whole comparison on a machine with an NVIDIA GPU: python gpu.pyz BINARY [--out FOLDER]

Runs the binary's parity checks, then every case by the binary and by PyTorch (compiled, fused attention, plain attention), which
take turns of a few steps, and writes results.json and results.md. Called again with the same folder it goes on with what is
missing or has failed: where calls are limited, --deadline ends one in time, and compiled graphs and prepared cases are kept in
the folder. `cargo xtask gpu` packs this file and its neighbours into gpu.pyz.
"""

import argparse
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import gpu_report
import gpu_turns
from gpu_report import COMPILED, OURS

# Flags of `bench prepare`, and sizes that its work is counted by.
Network = namedtuple("Network", "name flags tokens width blocks")
# The sizes of the goals; whole and half.
NETWORKS = [
    Network("DiT-XL/2", ["--model", "DiT-XL/2"], 256, 1152, 28),
    Network("DiT-D14/2", ["--model", "DiT-D14/2"], 256, 1152, 14),
]
SMALL = [
    Network("DiT-S/8", ["--model", "DiT-S/8"], 16, 384, 12),
    Network("DiT-S/8 of 6 blocks", ["--model", "DiT-S/8", "--depth", "6"], 16, 384, 6),
]
# Sampling is guided, so that the network sees twice as many.
SAMPLES, FEW = 32, 2
# PyTorch's ways, by the flags of peer.py.
WAYS = {
    COMPILED: ["--compile"],
    "torch, fused attention": [],
    "torch, plain attention": ["--attention", "plain"],
}
WARM_UP = {COMPILED: 5}
# One operation each, which has no ways.
PROBES = ("matmul", "copy")
TRAINING = ("fine-tune", "learn-lora", "learn-full", "masked-kd")
KINDS = (*PROBES, "sampling", *TRAINING)


def cases(networks, samples):
    """(kind, network, samples)"""
    whole, half = networks
    yield from ((kind, None, 0) for kind in PROBES)
    yield from (("sampling", network, samples) for network in (whole, half))
    yield from ((kind, whole, samples) for kind in TRAINING)


def flops(kind, network, batch):
    """Multiplications and additions of a step's products, those of the blocks: what remains is less than a hundredth."""
    if network is None:
        return 2 * 8192**3 if kind == "matmul" else None
    tokens, width = network.tokens, network.width
    sample = network.blocks * (24 * tokens * width**2 + 4 * tokens**2 * width + 12 * width**2)
    passes = {
        "sampling": 2,  # with and without the class
        "fine-tune": 3,  # a backward is two forwards
        "masked-kd": 3 / 2 + 1,  # a student of half the blocks, and a teacher forward
        # Of the blocks that the mask leaves out nothing but their output is needed; frozen weights need no gradient.
        "learn-full": (3 + 1) / 2,
        "learn-lora": (2 + 1) / 2,
    }[kind]
    return batch * sample * passes


def smi(query, args):
    if not shutil.which("nvidia-smi"):
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    index = visible if args.gpu_index is None else str(args.gpu_index)
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", index]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def free_bytes(args):
    """Of the GPU; None where there is none to ask about."""
    mebibytes = smi("memory.free", args) if args.device == "cuda" else ""
    return int(mebibytes) * 2**20 if mebibytes.isdigit() else None


def libraries():
    """Where CUDA's libraries lie if PyTorch brought them: the binary opens them from there."""
    try:
        import nvidia
    except ImportError:
        return ""
    folders = (sorted(Path(p).glob("*/lib")) for p in nvidia.__path__)
    return ":".join(str(f) for found in folders for f in found)


def environment(args):
    paths = [os.environ.get("LD_LIBRARY_PATH", ""), libraries()]
    kept = args.out.resolve() / "compiled"
    # As nvidia-smi counts.
    chosen = {} if args.gpu_index is None else {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": str(args.gpu_index)}
    return {
        **os.environ,
        **chosen,
        "LD_LIBRARY_PATH": ":".join(p for p in paths if p),
        # One program steps at a time, so that all processors may compile for it; what they made serves the next call.
        "TORCHINDUCTOR_COMPILE_THREADS": str(os.cpu_count()),
        "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
        "TRITON_CACHE_DIR": str(kept / "triton"),
    }


def left(args):
    """Seconds until the deadline; no wait may be longer than a day."""
    return min(max(args.ends - time.monotonic(), 0), 86400)


def parity(binary, args):
    command = [binary, "bench", "parity", "--device", "cuda", *([] if args.tiny else ["--large"])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment(args), check=False, timeout=left(args))
        out, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        out, errors, code = (late.stdout or b"").decode(), "the time was over", None
    checks = [json.loads(line) for line in out.splitlines() if line.startswith("{") and line.endswith("}")]
    failed = [c for c in checks if not c["within"]]
    # A run that came to its end says so by its exit code: 1 where a check failed.
    ended = checks and code == (1 if failed else 0)
    lines = errors.strip().splitlines() or [f"exit code {code}"]
    error = None if ended else next((line for line in lines if line.startswith("error")), lines[-1])
    return {"checks": checks, "failed": failed, "error": error}


def contenders(binary, kind, folder, args):
    where = ["--device", args.device, "--dtype", args.dtype]
    yield OURS, [binary, "bench", "worker", str(folder), *where]
    if torch_version():
        for name, flags in ({"torch": []} if kind in PROBES else WAYS).items():
            yield name, [sys.executable, sys.argv[0], "--peer", str(folder), *where, *flags]


class Cases:
    """Folders of cases. Cases of a network share its weights, gigabytes, which are written once and stay for the next call."""

    def __init__(self, binary, build, wanted, args):
        self.binary, self.wanted, self.args = binary, wanted, args
        # Another build may write another format.
        self.root = args.scratch / f"cases-{build[:12]}"

    def folder(self, case):
        kind, network, batch = case
        folder = self.root / slug(label(case))
        if (folder / "case.json").exists():
            return folder
        folder.mkdir(parents=True, exist_ok=True)
        if network is None:
            self.prepare(folder, kind, [], 1)
            return folder
        shared = self.weights(network, batch)
        for part in ("model", "student", "selection.json", "batch.safetensors"):
            link = folder / part
            if (shared / part).exists() and not link.is_symlink():
                # Relative, so that the folder may be moved.
                link.symlink_to(os.path.relpath(shared / part, folder))
        about = json.loads((shared / "case.json").read_text())
        # Last: what has it is whole.
        (folder / "case.json").write_text(json.dumps({**about, "kind": kind}))
        return folder

    def weights(self, network, batch):
        """A folder with all that the network's cases need: masked KD has a student beside."""
        kinds = [kind for kind, n, _ in self.wanted if n == network]
        alone = self.root / slug(f"weights {network.name} {batch}")
        both = self.root / slug(f"weights {network.name} {batch} and student")
        enough = [both] if "masked-kd" in kinds else [both, alone]
        for folder in enough:
            if (folder / "case.json").exists():
                return folder
        self.prepare(enough[-1], "masked-kd" if enough[-1] == both else kinds[0], network.flags, batch)
        return enough[-1]

    def prepare(self, folder, kind, flags, batch):
        began = time.perf_counter()
        command = [self.binary, "bench", "prepare", str(folder), "--kind", kind, "--batch", str(batch), "--micro-batches", "1", *flags]
        environ = environment(self.args)
        try:
            done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False, timeout=left(self.args))
        except subprocess.TimeoutExpired:
            raise gpu_turns.OutOfTime from None
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}: {done.stderr.strip() or f'exit code {done.returncode}'}")
        print(f"prepared {folder.name} ({time.perf_counter() - began:.0f} s)", flush=True)

    def remove(self):
        shutil.rmtree(self.root, ignore_errors=True)


def label(case):
    kind, network, batch = case
    return kind if network is None else f"{kind} {network.name}, {batch} samples"


def slug(name):
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def run_case(binary, case, folders, args, results):
    kind, network, _ = case
    empty = {"kind": kind, "network": network and network.name, "flops": flops(*case), "programs": {}}
    entry = results["cases"].setdefault(label(case), empty)

    def missing(folder):
        # What failed is tried again.
        all_of_them = contenders(binary, kind, folder, args)
        return [(name, command) for name, command in all_of_them if "seconds" not in entry["programs"].get(name, {})]

    if not missing(""):
        return

    def record(name, found):
        entry["programs"][name] = found
        write(args.out, results)
        said = found.get("error") or f"{1e3 * gpu_report.median(found):.2f} ms"
        print(f"{label(case)}: {name}: {said}", flush=True)

    wanted = [gpu_turns.Contender(name, command, WARM_UP.get(name, 3)) for name, command in missing(folders.folder(case))]
    place = gpu_turns.Place(args.turn, args.steps, args.ends, environment(args), lambda: free_bytes(args))
    began = time.perf_counter()
    print(f"{label(case)}: {', '.join(c.name for c in wanted)}: loading and warming up", flush=True)
    gpu_turns.measure(wanted, place, record)
    print(f"{label(case)}: {time.perf_counter() - began:.0f} s", flush=True)


def write(out, results):
    out.mkdir(parents=True, exist_ok=True)
    results["verdicts"] = gpu_report.verdicts(results, *results["settings"]["networks"])
    for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", gpu_report.text(results))):
        part = out / (name + ".partial")
        part.write_text(text + "\n")
        part.replace(out / name)


def refuse_what_cannot_run():
    """An error before the first minute is spent, where the driver or the libraries are too old for the binary."""
    # In a process of its own: what is opened here would be PyTorch's, too.
    command = [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])"]
    opens = lambda place: subprocess.run([*command, place], capture_output=True, check=False).returncode == 0  # noqa: E731
    for library in ("libcuda.so.1", "libcublas.so.13", "libcublasLt.so.13", "libcurand.so.10"):
        folders = [*libraries().split(":"), *os.environ.get("LD_LIBRARY_PATH", "").split(":"), "/usr/local/cuda/lib64"]
        if not any(map(opens, [library, *(str(Path(folder) / library) for folder in folders if folder)])):
            raise SystemExit(f"{library} was not found: a driver of the 580 series or newer and the libraries of CUDA 13 are needed")


def build_of(binary):
    return hashlib.sha256(Path(binary).read_bytes()).hexdigest()


@functools.cache
def torch_version():
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        return None
    except ImportError as error:
        raise SystemExit(f"PyTorch is installed and does not load: {error}") from None
    return torch.__version__


def opened(args, networks, build):
    """The results of the folder, which have to be of the same program and settings, on the same machine."""
    file = args.out / "results.json"
    name, driver = (smi(query, args) for query in ("name", "driver_version"))
    machine = {"gpu": name, "driver": driver, "torch": torch_version()}
    names = [n.name for n in networks]
    settings = {"dtype": args.dtype, "device": args.device, "tiny": args.tiny, "networks": names, "binary_sha256": build}
    if not file.exists():
        return {"settings": settings, "machine": machine, "parity": None, "cases": {}}
    results = json.loads(file.read_text())
    found = {**results.get("settings", {}), **results.get("machine", {})}
    for name, value in {**settings, **machine}.items():
        if found.get(name) != value:
            raise SystemExit(f"{file} has results of another {name} ({found.get(name)}, here {value}); give another --out")
    return results


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("binary", help="tinyfusion, built with the feature cuda")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"))
    parser.add_argument("--scratch", type=Path, help="where cases are written, 6 GB (default: the folder of --out)")
    parser.add_argument("--keep", action="store_true", help="leave the cases there at the end")
    parser.add_argument("--steps", type=int, default=20, help="steps that are timed")
    parser.add_argument("--turn", type=int, default=5, help="steps of a program before it is the next one's turn")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--gpu-index", type=int, help="which GPU, as nvidia-smi counts them")
    parser.add_argument("--dtype", choices=["bf16", "f32"], help="default: bf16, and f32 on a CPU")
    parser.add_argument("--deadline", type=float, default=1e9, metavar="SECONDS", help="begin nothing later, and end what runs then")
    parser.add_argument("--only", nargs="+", choices=KINDS, metavar="KIND", help="kinds to run: " + ", ".join(KINDS))
    parser.add_argument("--tiny", action="store_true", help="small networks, no probes: a rehearsal")
    args = parser.parse_args()
    if not os.access(args.binary, os.X_OK) or Path(args.binary).is_dir():
        parser.error(f"{args.binary} is no program")
    if args.device == "cpu" and args.dtype == "bf16":
        parser.error("--dtype bf16 needs a GPU")
    if args.tiny and args.only and not set(args.only) - set(PROBES):
        parser.error(f"--tiny leaves {' and '.join(PROBES)} out")
    if args.steps < 1 or args.turn < 1:
        parser.error("--steps and --turn must be at least 1")
    args.dtype = args.dtype or ("bf16" if args.device == "cuda" else "f32")
    args.scratch = args.scratch or args.out
    args.ends = time.monotonic() + args.deadline
    return args


def main():
    if sys.argv[1:2] == ["--peer"]:
        del sys.argv[1]
        import peer

        return peer.main()
    try:
        run(arguments())
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on from here") from None


def run(args):
    binary = str(Path(args.binary).resolve())
    networks, samples = (SMALL, FEW) if args.tiny else (NETWORKS, SAMPLES)
    build = build_of(binary)
    if args.device == "cuda":
        refuse_what_cannot_run()
    results = opened(args, networks, build)
    if torch_version() is None:
        print("PyTorch is not installed: only tinyfusion is timed")
    compared = results["parity"]
    if args.device == "cuda" and (not compared or compared["error"] or compared["failed"]):
        print("comparing every operation and network with the CPU", flush=True)
        compared = results["parity"] = parity(binary, args)
        for check in compared["failed"]:
            print(f"differs from the CPU: {check['check']} in {check['dtype']}: {check['error'] or check['off']}")
        write(args.out, results)
    wanted = [case for case in cases(networks, samples) if not (args.tiny and case[0] in PROBES)]
    wanted = [case for case in wanted if not args.only or case[0] in args.only]
    folders = Cases(binary, build, wanted, args)
    late = False
    try:
        for case in wanted:
            run_case(binary, case, folders, args, results)
    except gpu_turns.OutOfTime:
        late = True
    write(args.out, results)
    if not late and not args.keep:
        folders.remove()
    print(gpu_report.text(results))
    if compared and (compared["failed"] or compared["error"]):
        raise SystemExit(f"parity: {compared['error'] or 'checks failed'}")
    if late:
        raise SystemExit("the time is over: the same command goes on from here")
    programs = [p for case in results["cases"].values() for p in case["programs"].values()]
    failed = sum("seconds" not in p for p in programs)
    if failed:
        raise SystemExit(f"{failed} of {len(programs)} programs failed; the same command tries them again")


if __name__ == "__main__":
    main()
