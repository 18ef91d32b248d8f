//! What of a VM's devices is another on the backup's host: images and taps.
//!
//! As text, within `disks=[…]` and `net=[…]`: `<path>` or `<id>@<path>`, `<tap>` or `<id>@<tap>`.
//! A value that has an `@` of its own and no id is written `@<value>`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::config::{DiskConfig, NetConfig};

/// The image of a disk on the backup's host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaDisk {
    /// The disk's id at the primary; without one the entry is for the disk in its own place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    pub path: PathBuf,
}

/// The tap of a network card on the backup's host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReplicaCard {
    /// The card's id at the primary; without one the entry is for the card in its own place.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    pub tap: String,
}

/// What a backup cannot do otherwise than its primary.
pub const DISK_KEYS: &str = "on a backup a disk has a path and an id, all else is the primary's";
/// The same for a card.
pub const CARD_KEYS: &str = "on a backup a card has a tap and an id, all else is the primary's";

impl ReplicaDisk {
    /// Of a whole disk, which may say nothing but path and id.
    ///
    /// # Errors
    /// It says more, or has no path.
    pub fn of(disk: &DiskConfig) -> Result<Self, &'static str> {
        let (id, path) = (disk.id.clone(), disk.path.clone());
        let plain = DiskConfig { id: id.clone(), path: path.clone(), ..DiskConfig::default() };
        match path {
            Some(path) if plain == *disk => Ok(Self { id, path }),
            _ => Err(DISK_KEYS),
        }
    }

    pub(crate) fn from_text(text: &str) -> Option<Self> {
        let (id, path) = parts(text)?;
        Some(Self { id, path: path.into() })
    }

    pub(crate) fn to_text(&self) -> String {
        whole(self.id.as_deref(), &self.path.display().to_string())
    }
}

impl ReplicaCard {
    /// Of a whole card, which may say nothing but tap and id.
    ///
    /// # Errors
    /// It says more, or has no tap.
    pub fn of(card: &NetConfig) -> Result<Self, &'static str> {
        let (id, tap) = (card.id.clone(), card.tap.clone());
        let plain = NetConfig { id: id.clone(), tap: tap.clone(), ..NetConfig::default() };
        match tap {
            Some(tap) if plain == *card => Ok(Self { id, tap }),
            _ => Err(CARD_KEYS),
        }
    }

    pub(crate) fn from_text(text: &str) -> Option<Self> {
        let (id, tap) = parts(text)?;
        Some(Self { id, tap: tap.to_owned() })
    }

    pub(crate) fn to_text(&self) -> String {
        whole(self.id.as_deref(), &self.tap)
    }
}

fn parts(text: &str) -> Option<(Option<String>, &str)> {
    let (id, value) = text.split_once('@').unwrap_or(("", text));
    let id = (!id.is_empty()).then(|| id.to_owned());
    (!value.is_empty()).then_some((id, value))
}

fn whole(id: Option<&str>, value: &str) -> String {
    match id {
        None if !value.contains('@') => value.to_owned(),
        id => format!("{}@{value}", id.unwrap_or_default()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_an_id_or_stands_in_its_own_place() {
        let disk = |id: Option<&str>, path: &str| {
            Some(ReplicaDisk { id: id.map(Into::into), path: path.into() })
        };
        for (text, read) in [
            ("/b.img", disk(None, "/b.img")),
            ("root@/b.img", disk(Some("root"), "/b.img")),
            ("@/a@b", disk(None, "/a@b")),
            ("root@/a@b", disk(Some("root"), "/a@b")),
            ("root@", None),
            ("@", None),
            ("", None),
        ] {
            assert_eq!(ReplicaDisk::from_text(text), read, "{text}");
            if let Some(read) = read {
                assert_eq!(read.to_text(), text);
            }
        }
    }

    #[test]
    fn a_backup_cannot_change_a_device() {
        let path = Some(PathBuf::from("/b.img"));
        let disk = DiskConfig { path: path.clone(), ..DiskConfig::default() };
        assert_eq!(ReplicaDisk::of(&disk).unwrap().path, PathBuf::from("/b.img"));
        for other in [
            DiskConfig { path: None, ..disk.clone() },
            DiskConfig { readonly: true, ..disk.clone() },
            DiskConfig { num_queues: 2, ..disk },
        ] {
            assert_eq!(ReplicaDisk::of(&other), Err(DISK_KEYS));
        }
        let card = NetConfig { tap: Some("tap1".into()), ..NetConfig::default() };
        assert_eq!(ReplicaCard::of(&card).unwrap().tap, "tap1");
        for other in [
            NetConfig { tap: None, ..card.clone() },
            NetConfig { mac: Some("02:00:00:00:00:01".into()), ..card },
        ] {
            assert_eq!(ReplicaCard::of(&other), Err(CARD_KEYS));
        }
    }
}
