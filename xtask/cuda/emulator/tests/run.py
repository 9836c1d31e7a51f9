#!/usr/bin/env python3
"""The emulator's own test: run.py [DIR]    (where build.py puts the emulator: target/cuda/emulator)"""
import os
import pathlib
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import build  # noqa: E402  (beside this folder)

# Kernels of kernels.cu that must fail, and what the emulator must say about each.
FAILING = {
    "barrier_for_some": "24 threads have ended",
    "two_barriers": "32 threads wait at the barrier",
    "shuffles_apart": "lanes of a warp differ",
    "past_shared_memory": "wrote past the end of few",
    "asserts": "assertion out == nullptr failed",
    "past_the_end": "wrote past the end of an allocation of 256 bytes",
    "released_pointer": "argument 2, the pointer",
}
# Kernels that ThreadSanitizer must report, or must not.
RACING = {"without_barrier": True, "shuffle_for_order": True, "without_race": False}

failures = 0


def report(good: bool, what: str, done: subprocess.CompletedProcess) -> None:
    global failures
    print(f"{'ok  ' if good else 'FAIL'} {what}")
    if not good:
        failures += 1
        print(done.stdout + done.stderr)


def main() -> None:
    if len(sys.argv) > 2:
        sys.exit(__doc__)
    out = pathlib.Path(sys.argv[1] if len(sys.argv) == 2 else build.ROOT / "target/cuda/emulator").resolve()
    build.build_libraries(out)
    folder, source = out / "selftest", HERE / "kernels.cu"
    build.build_all({folder / "kernels/selftest.so": source}, out)

    def compiled(name: str, *libraries: str) -> pathlib.Path:
        linked = [f"-l:{library}" for library in ("libcuda.so.1", *libraries)]
        build.run(build.CXX, "-std=c++17", "-O1", "-Wall", "-Werror", "-isystem", build.cuda_include(),
                  HERE / f"{name}.cpp", f"-L{out}", *linked, f"-Wl,-rpath,{out}", "-o", folder / name)
        return folder / name

    program = compiled("selftest")

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
        settings = {"CUDA_EMULATOR_KERNELS": str(folder / "kernels")} | environment
        return subprocess.run([program, *arguments], env=os.environ | settings, capture_output=True, text=True)

    for order in ["forward", "reverse", "random"]:
        done = run(CUDA_EMULATOR_ORDER=order)
        report(done.returncode == 0, f"results and refusals, threads in {order} order", done)
    for name, text in FAILING.items():
        done = run(name)
        report(text in done.stderr and done.returncode == 0, f"{name} is reported", done)
    # With the fence it is the fault itself, which ends the process.
    done = run("past_the_end", CUDA_EMULATOR_FENCE="1")
    text = "thread (0, 0, 0) touches byte 256 of an allocation of 256 bytes"
    report(text in done.stderr and done.returncode < 0, "past_the_end is stopped by the fence", done)
    done = subprocess.run([compiled("cublaslt", "libcublasLt.so.13")], capture_output=True, text=True)
    report(done.returncode == 0, "products with an epilogue, and refusals", done)
    races = build.build_races(out, {folder / "races/selftest.so": source})
    for name, racing in RACING.items():
        done = run(name, **races)
        good = ("data race" in done.stderr) == racing and (done.returncode != 0) == racing
        report(good, f"{name}: {'a race' if racing else 'no race'} is reported", done)
    sys.exit(failures != 0)


if __name__ == "__main__":
    main()
