#!/usr/bin/env python3
"""Build the CUDA emulator: build.py [DIR] [--races PROGRAM ARGUMENT...]

Makes libcuda.so.1, libcublas.so.13, libcublasLt.so.13 and libcurand.so.10 in DIR (target/cuda/emulator), and in
DIR/kernels one shared library for each kernel source of candle and of this workspace. Only what has changed is made again.
Prints the line that makes a program built with `--features cuda` use it:

    eval "$(python3 xtask/cuda/emulator/build.py)"

--races runs a program so that data races between the threads of a block are reported (README.md).

Needs g++, cargo (to find candle's sources) and CUDA's cuda.h: $CUDA_HOME, as xtask/cuda/toolkit.sh sets it.
"""
import argparse
import concurrent.futures
import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CXX = os.environ.get("CXX", "g++")
COMMON = ["-std=c++17", "-O3", "-march=native", "-fPIC", "-fvisibility=hidden", "-g1"]
# Kernels cast between types as nvcc allows; and `#pragma unroll` means nothing to g++.
KERNEL = COMMON + ["-fno-strict-aliasing", "-Wno-unknown-pragmas", "-Wno-ignored-attributes"]
# What the sources may ask of the compiler: nvcc 13.0 for sm_90.
DEFINES = ["-D__CUDA_ARCH__=900", "-D__CUDACC_VER_MAJOR__=13", "-D__CUDACC_VER_MINOR__=0"]
LIBRARIES = {
    "libcuda.so.1": ["engine", "races", "modules", "memory", "pool", "faults", "statistics", "launch", "driver",
                     "driver_memory"],
    "libcublas.so.13": ["cublas", "gemm"],
    "libcublasLt.so.13": ["cublaslt", "gemm"],
    "libcurand.so.10": ["curand"],
}
# Sources of candle that nothing here runs: quantised weights.
NOT_BUILT = re.compile(r"quantized|mmvq|moe|mmq")


def run(*command: str) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def changed(output: pathlib.Path, *ingredients: str) -> str | None:
    """A digest of what `output` is made of; None if it was made of just that."""
    digest = hashlib.sha256("\0".join(ingredients).encode()).hexdigest()
    stamp = output.with_name(output.name + ".made-of")
    if output.exists() and stamp.exists() and stamp.read_text() == digest:
        return None
    return digest


def made(output: pathlib.Path, digest: str) -> None:
    output.with_name(output.name + ".made-of").write_text(digest)
    print(f"emulator: {output.name}", file=sys.stderr)


def cuda_include() -> pathlib.Path:
    include = pathlib.Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    if not (include / "cuda.h").exists():
        sys.exit(f"no cuda.h in {include}: set CUDA_HOME (xtask/cuda/toolkit.sh prints it)")
    return include


def build_library(name: str, sources: list[str], out: pathlib.Path) -> None:
    files = [HERE / "src" / f"{source}.cpp" for source in sources]
    flags = COMMON + ["-Wall", "-Wextra", "-Werror", "-isystem", str(cuda_include()), "-pthread"]
    preprocessed = run(CXX, "-E", "-P", *flags, *files)
    digest = changed(out / name, preprocessed, *flags)
    if digest:
        needs = [] if name.startswith("libcuda.") else [f"-L{out}", "-l:libcuda.so.1", "-Wl,-rpath,$ORIGIN"]
        run(CXX, *flags, "-shared", f"-Wl,-soname,{name}", "-Wl,-z,defs", *files, *needs, "-ldl", "-o", out / name)
        made(out / name, digest)


def build_libraries(out: pathlib.Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for name, files in LIBRARIES.items():
        build_library(name, files, out)


# `extern __shared__ [alignas(N)] T name[];`
DYNAMIC = re.compile(r"\bextern\s+__shared__\s+(?:alignas\([^()]*\)\s*)?([^;{}=]+?)\b(\w+)\s*\[\s*\]\s*;")
# `__shared__ [alignas(N)] T a[4][5], b;`
ARRAY = r"\w+\s*(?:\[[^\];]*\]\s*)*"
STATIC = re.compile(rf"\b__shared__\s+(?:alignas\(([^()]*)\)\s*)?([^;{{}}=]+?)\b({ARRAY}(?:,\s*{ARRAY})*);")
ENTRY = re.compile(r"\b__global__\s+(?:__attribute__\s*\(\(.*?\)\)\s*)*(?:inline\s+)?void\s+(\w+)\s*\(")


def static_shared(match: re.Match) -> str:
    """One reference per array, into memory that the engine hands out to the block."""
    alignment, kind, declarators = match.groups()
    text = ""
    for declarator in declarators.split(","):
        name, extents = re.fullmatch(r"\s*(\w+)\s*(.*?)\s*", declarator, re.S).groups()
        shape = f"emulator_type_of_{name}"
        # The lambda's static variable is a key that differs between instantiations of a template.
        text += (f"typedef {kind} {shape}{extents}; {shape} &{name} = *static_cast<{shape} *>("
                 f"::emulator::shared_memory([] {{ static char key; return &key; }}(), sizeof({shape}), "
                 f"::max(alignof({shape}), size_t({alignment or 1})), \"{name}\")); ")
    return text


def kernels_of(text: str) -> list[str]:
    """The names of the kernels, in order; templates are left to the kernels that call them."""
    names = []
    for match in ENTRY.finditer(text):
        before = re.split(r"[;}]", text[:match.start()])[-1]
        if "template" not in before and match.group(1) not in names:
            names.append(match.group(1))
    return names


def host_source(source: pathlib.Path) -> str:
    """The kernel source as C++ that g++ compiles: preprocessed, then what macros cannot express."""
    # Without the working directory, which -g would put into the text and so into the digest.
    text = run(CXX, "-E", "-fno-working-directory", *KERNEL, *DEFINES, f"-I{HERE / 'include'}", "-include",
               "emulator.hpp", "-x", "c++", source)
    names = kernels_of(text)
    text = DYNAMIC.sub(r"\1 *const \2 = static_cast<\1 *>(::emulator::dynamic_shared_memory());", text)
    text = STATIC.sub(static_shared, text)
    if "__shared__" in text:
        line = next(line for line in text.splitlines() if "__shared__" in line)
        sys.exit(f"{source}: a __shared__ declaration that build.py does not understand: {line.strip()}")
    text = text.replace("__global__", "")
    registrations = "\n".join(
        f"static const ::emulator::Registration<&{name}> emulator_registers_{name}(\"{name}\");" for name in names)
    return f"{text}\n{registrations}\n"


def build_kernels(library: pathlib.Path, source: pathlib.Path, out: pathlib.Path, flags: list[str] = KERNEL) -> None:
    text = host_source(source)
    digest = changed(library, text, *flags)
    if digest:
        generated = library.with_suffix(".ii")  # g++ takes this suffix for C++ that is preprocessed
        generated.write_text(text)
        run(CXX, *flags, "-shared", "-Wl,-z,defs", generated, f"-L{out}", "-l:libcuda.so.1", f"-Wl,-rpath,{out}",
            "-o", library)
        made(library, digest)


def build_all(kernels: dict[pathlib.Path, pathlib.Path], out: pathlib.Path, flags: list[str] = KERNEL) -> None:
    """One folder's libraries; any other in it is of a source that is gone."""
    folder = next(iter(kernels)).parent
    folder.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:
        list(workers.map(lambda item: build_kernels(*item, out, flags), kernels.items()))
    for library in folder.glob("*.so"):
        if library not in kernels:
            library.unlink()


def sources() -> dict[str, pathlib.Path]:
    """The kernel sources of candle and of this workspace, by the names of their libraries."""
    metadata = json.loads(run("cargo", "metadata", "--format-version", "1", "--all-features", "--manifest-path",
                              ROOT / "Cargo.toml"))
    folders = {"candle": pathlib.Path(package["manifest_path"]).parent / "src"
               for package in metadata["packages"] if package["name"] == "candle-kernels"}
    if not folders:
        sys.exit("candle-kernels is not among the workspace's dependencies")
    for folder in sorted(ROOT.glob("crates/*/cuda")):
        folders[folder.parent.name] = folder
    return {f"{crate}-{source.stem}": source for crate, folder in folders.items()
            for source in sorted(folder.glob("*.cu")) if not NOT_BUILT.search(source.name)}


def build_races(out: pathlib.Path, kernels: dict[pathlib.Path, pathlib.Path]) -> dict[str, str]:
    """The kernels, compiled for ThreadSanitizer; and the environment that makes a program look for races."""
    build_all(kernels, out, KERNEL + ["-O1", "-fsanitize=thread", "-Wno-tsan"])
    return {
        "LD_LIBRARY_PATH": os.pathsep.join(filter(None, [str(out), os.environ.get("LD_LIBRARY_PATH")])),
        "CUDA_EMULATOR_KERNELS": str(next(iter(kernels)).parent),
        "LD_PRELOAD": run(CXX, "-print-file-name=libtsan.so").strip(),
        # Only kernels are compiled for it: what the program does beside them cannot be judged. A block has up to
        # 1024 threads, each of which keeps a history.
        "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:history_size=0 " + os.environ.get("TSAN_OPTIONS", ""),
    }


def main() -> None:
    parser = argparse.ArgumentParser(usage=__doc__, add_help=False)
    parser.add_argument("--races", nargs=argparse.REMAINDER)
    parser.add_argument("out", nargs="?", type=pathlib.Path, default=ROOT / "target/cuda/emulator")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    build_libraries(out)
    wanted = {out / "kernels" / f"{name}.so": source for name, source in sources().items()}
    build_all(wanted, out)
    if arguments.races:
        environment = build_races(out, {out / "races" / library.name: source for library, source in wanted.items()})
        sys.exit(subprocess.run(arguments.races, env=os.environ | environment).returncode)
    print(f"export LD_LIBRARY_PATH='{out}'${{LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}}")


if __name__ == "__main__":
    main()
