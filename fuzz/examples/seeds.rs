//! Writes inputs to begin with: `seeds FOLDER` makes FOLDER/TARGET/seed-N.

use std::path::Path;
use std::{env, fs, io};

use understudy_fuzz::{TARGETS, seeds};

fn main() -> io::Result<()> {
    let folder = env::args_os().nth(1).ok_or_else(|| io::Error::other("usage: seeds FOLDER"))?;
    for target in TARGETS {
        let folder = Path::new(&folder).join(target.name);
        fs::create_dir_all(&folder)?;
        for (number, seed) in seeds::of(target.name).iter().enumerate() {
            fs::write(folder.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
