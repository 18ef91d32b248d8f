//! Builds `tests/guest` with a cargo of its own: the guest is linked at a fixed address, always
//! optimized, and in no workspace.
//!
//! The image is left at `<target directory>/guest/understudy-guest`, for scripts.

use std::env;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::Command;

const TRIPLE: &str = "x86_64-unknown-linux-gnu";
const NAME: &str = "understudy-guest";

/// Everything that the image depends on, relative to `tests/guest`. The workspace's manifest is
/// among it because the logic crate takes its lints from there.
const SOURCES: &[&str] = &[
    ".cargo/config.toml",
    "../../Cargo.toml",
    "Cargo.lock",
    "Cargo.toml",
    "build.rs",
    "guest.ld",
    "logic/Cargo.toml",
    "logic/src",
    "src",
];

fn main() -> Result<(), Box<dyn Error>> {
    let manifest_dir = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let guest = manifest_dir.parent().ok_or("The crate has no parent directory")?.join("guest");
    for source in SOURCES {
        println!("cargo:rerun-if-changed={}", guest.join(source).display());
    }
    let image_dir = target_directory(&PathBuf::from(variable("OUT_DIR")?)).join("guest");
    let built = build(&guest, &image_dir.join("build"))?;
    let image = image_dir.join(NAME);
    install(&built, &image)?;
    // Also made anew when somebody has removed it.
    println!("cargo:rerun-if-changed={}", image.display());
    println!("cargo:rustc-env=GUEST_IMAGE={}", image.display());
    Ok(())
}

/// `OUT_DIR` is `<target directory>[/<triple>]/<profile>/build/<package>/out`.
fn target_directory(out_dir: &Path) -> PathBuf {
    let above_profile = out_dir.ancestors().nth(4).unwrap_or(out_dir);
    let is_triple = above_profile.file_name() == env::var_os("TARGET").as_deref();
    let root = if is_triple { above_profile.parent() } else { None };
    root.unwrap_or(above_profile).to_path_buf()
}

fn build(guest: &Path, target_dir: &Path) -> Result<PathBuf, Box<dyn Error>> {
    let mut cargo = Command::new(variable("CARGO")?);
    // From its own directory, for the sake of its .cargo/config.toml.
    cargo.current_dir(guest).args(["build", "--release", "--locked", "--quiet"]);
    cargo.args(["--target", TRIPLE]).arg("--target-dir").arg(target_dir);
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_ours) {
            cargo.env_remove(name);
        }
    }
    let status = cargo.status()?;
    if !status.success() {
        return Err(format!("Building the test guest failed: {status}").into());
    }
    Ok(target_dir.join(TRIPLE).join("release").join(NAME))
}

/// What the outer cargo, clippy or a coverage tool tells *its* build is not for the guest's.
fn is_ours(name: &str) -> bool {
    const KEPT: &[&str] = &["CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN"];
    const OURS: &[&str] = &["CARGO_", "RUST", "LLVM_PROFILE", "__CARGO", "CLIPPY_"];
    const EXACT: &[&str] = &["CARGO", "TARGET", "HOST", "PROFILE", "OPT_LEVEL", "DEBUG"];
    !KEPT.contains(&name)
        && (EXACT.contains(&name) || OURS.iter().any(|prefix| name.starts_with(prefix)))
}

/// Copies beside and renames, so that a VM that is just starting never reads half an image.
fn install(built: &Path, image: &Path) -> Result<(), Box<dyn Error>> {
    let contents = std::fs::read(built)?;
    if std::fs::read(image).is_ok_and(|present| present == contents) {
        return Ok(());
    }
    let beside = image.with_extension(format!("{}.new", std::process::id()));
    std::fs::write(&beside, contents)?;
    std::fs::rename(&beside, image)?;
    Ok(())
}

fn variable(name: &str) -> Result<std::ffi::OsString, Box<dyn Error>> {
    env::var_os(name).ok_or_else(|| format!("Cargo did not set {name}").into())
}
