//! Compiles the kernels in `cuda/` to PTX where the feature `cuda` is on; otherwise does nothing.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::{env, fs};

fn main() -> Result<(), String> {
    println!("cargo::rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_CUDA").is_none() {
        return Ok(());
    }
    for variable in ["NVCC", "CUDA_HOME", "CUDA_COMPUTE_CAP"] {
        println!("cargo::rerun-if-env-changed={variable}");
    }
    let variable = |name: &str| env::var(name).map_err(|e| format!("{name}: {e}"));
    let (sources, out) = (
        Path::new(&variable("CARGO_MANIFEST_DIR")?).join("cuda"),
        PathBuf::from(variable("OUT_DIR")?),
    );
    let nvcc = nvcc();
    // PTX runs on its own compute capability and on every later one. `90a` and the like are of one alone.
    let capability = env::var("CUDA_COMPUTE_CAP").unwrap_or_else(|_| "80".into());
    let entries = fs::read_dir(&sources).map_err(|e| format!("{}: {e}", sources.display()))?;
    let mut kernels = 0;
    for entry in entries {
        let path = entry
            .map_err(|e| format!("{}: {e}", sources.display()))?
            .path();
        println!("cargo::rerun-if-changed={}", path.display());
        if path.extension().is_some_and(|e| e == "cu") {
            let ptx = out
                .join(path.file_stem().unwrap_or_default())
                .with_extension("ptx");
            compile(&nvcc, &capability, &path, &ptx)?;
            kernels += 1;
        }
    }
    println!("cargo::rerun-if-changed={}", sources.display());
    if kernels == 0 {
        return Err(format!("no kernel (*.cu) in {}", sources.display()));
    }
    Ok(())
}

/// `$NVCC`, else that of `$CUDA_HOME`, else that of the `PATH`.
fn nvcc() -> PathBuf {
    match (env::var_os("NVCC"), env::var_os("CUDA_HOME")) {
        (Some(nvcc), _) => nvcc.into(),
        (None, Some(home)) => Path::new(&home).join("bin/nvcc"),
        (None, None) => "nvcc".into(),
    }
}

fn compile(nvcc: &Path, capability: &str, source: &Path, ptx: &Path) -> Result<(), String> {
    let output = Command::new(nvcc)
        .args(["-ptx", "-O3", "-std=c++17", "--Werror", "all-warnings"])
        .arg(format!("-arch=compute_{capability}"))
        .arg(source)
        .arg("-o")
        .arg(ptx)
        .output()
        .map_err(|e| {
            format!(
                "the feature `cuda` needs CUDA's compiler; `{}` does not start: {e}. \
                 `cargo xtask gpu` builds with a toolkit of its own: see xtask/cuda/README.md",
                nvcc.display()
            )
        })?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!(
        "`{}` on {}: {}\n{}{}",
        nvcc.display(),
        source.display(),
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}
