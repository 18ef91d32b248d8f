//! Reads what a pair says of its memory, epoch by epoch, see `replication/src/checking.rs`.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use crate::pair::Setup;

const SWITCH: &str = "UNDERSTUDY_TEST_EQUALITY";

/// What was compared so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Compared {
    pub epochs: u64,
    pub pages: u64,
    pub different: u64,
    /// The first epoch with a page that differs, and that page's guest address.
    pub first: Option<(u64, String)>,
}

/// Where a pair writes its verdict.
#[derive(Debug)]
pub struct Equality {
    folder: PathBuf,
}

impl Equality {
    /// Has the pair of `setup` compare its memory, in a new folder below `folder`.
    pub fn switch_on(folder: &Path, setup: &mut Setup) -> Result<Self> {
        let folder = folder.join("equality");
        std::fs::create_dir(&folder)
            .with_context(|| format!("Cannot create {}", folder.display()))?;
        for environment in [&mut setup.primary_environment, &mut setup.backup_environment] {
            environment.push((SWITCH.into(), folder.display().to_string()));
        }
        Ok(Self { folder })
    }

    pub fn compared(&self) -> Result<Compared> {
        let path = self.folder.join("verdict");
        // There is none before the first epoch.
        let text = if path.exists() { std::fs::read_to_string(path)? } else { String::new() };
        read(&text)
    }
}

fn read(verdict: &str) -> Result<Compared> {
    let mut compared = Compared::default();
    let mut last = 0;
    // The last line may be in the making.
    for line in verdict.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let words: Vec<_> = line.split_whitespace().collect();
        let [epoch, pages, different, first] = words[..] else {
            anyhow::bail!("no verdict on an epoch: {line:?}");
        };
        let (epoch, different) = (epoch.parse::<u64>()?, different.parse::<u64>()?);
        compared.epochs += 1;
        // A session begins with the first one.
        ensure!(epoch == 1 || epoch == last + 1, "epoch {epoch} was compared after {last}");
        last = epoch;
        compared.pages += pages.parse::<u64>()?;
        compared.different += different;
        if different > 0 {
            compared.first.get_or_insert((epoch, first.to_owned()));
        }
    }
    Ok(compared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_add_up_and_gaps_are_seen() -> Result<()> {
        let compared = read("1 100 0 -\n2 100 3 0x5000\n3 100 1 0x9000\n4 10")?;
        let first = Some((2, "0x5000".to_owned()));
        assert_eq!(compared, Compared { epochs: 3, pages: 300, different: 4, first });
        assert!(read("1 100 0 -\n3 100 0 -\n").is_err());
        assert_eq!(read("1 100 0 -\n2 100 0 -\n1 100 0 -\n")?.epochs, 3, "two sessions");
        assert!(read("1 100 0\n").is_err());
        Ok(())
    }
}
