//! What a backup does otherwise than its primary's configuration says.
//!
//! Another port, image or tap is another way out for the same device. Another device would be
//! another machine than the one whose state arrives.

use api::config::{ConsoleConfig, ConsoleOutputMode, DiskConfig, NetConfig, VmConfig};
use api::replication::{ReceiveReplicaData, ReplicaCard, ReplicaDisk};
use thiserror::Error;

/// Options of a backup that do not fit the VM.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum OverrideError {
    #[error(
        "The primary's VM has {found} {kind} and the override here asks for {expected}: the \
         devices must be the same"
    )]
    Port { kind: &'static str, found: &'static str, expected: &'static str },
    #[error("The primary's VM has no {kind} {which}, for which there is an override here")]
    NoDevice { kind: &'static str, which: String },
    #[error("There are two overrides for {kind} {id}")]
    Twice { kind: &'static str, id: String },
}

/// Where the frames of a card go on this host.
#[derive(Clone, Debug, Default)]
pub struct Card {
    pub id: Option<String>,
    /// A tap by name; with neither this nor descriptors one that the kernel names.
    pub tap: Option<String>,
    /// A tap that came as descriptors, as the configuration says so.
    pub fds: Option<Vec<i32>>,
}

/// This host's part of the VM.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    pub serial: Option<ConsoleConfig>,
    pub console: Option<ConsoleConfig>,
    pub disks: Vec<ReplicaDisk>,
    pub cards: Vec<Card>,
}

fn named(card: &ReplicaCard) -> Card {
    Card { id: card.id.clone(), tap: Some(card.tap.clone()), fds: None }
}

impl From<&ReceiveReplicaData> for Overrides {
    fn from(data: &ReceiveReplicaData) -> Self {
        Self {
            serial: data.serial.clone(),
            console: data.console.clone(),
            disks: data.disks.clone(),
            cards: data.net.iter().map(named).collect(),
        }
    }
}

impl Overrides {
    /// Those of the host on which a VM has this configuration: whatever another host's differs in is as it
    /// was here.
    #[must_use]
    pub fn of(config: &VmConfig) -> Self {
        let disk =
            |disk: &DiskConfig| Some(ReplicaDisk { id: disk.id.clone(), path: disk.path.clone()? });
        let card = |card: &NetConfig| Card {
            id: card.id.clone(),
            tap: card.tap.clone(),
            fds: card.fds.clone(),
        };
        Self {
            serial: Some(config.serial.clone()),
            console: Some(config.console.clone()),
            disks: config.disks.iter().flatten().filter_map(disk).collect(),
            cards: config.net.iter().flatten().map(card).collect(),
        }
    }

    /// Turns the primary's configuration into this host's.
    pub fn apply(&self, config: &mut VmConfig) -> Result<(), OverrideError> {
        lead_elsewhere("serial port", &mut config.serial, self.serial.as_ref())?;
        lead_elsewhere("console", &mut config.console, self.console.as_ref())?;
        let disks = config.disks.as_deref_mut().unwrap_or_default();
        let ids = disks.iter().map(|disk| disk.id.clone()).collect();
        let places = places("disk", ids, self.disks.iter().map(|disk| &disk.id))?;
        for (place, disk) in places.into_iter().zip(&self.disks) {
            disks[place].path = Some(disk.path.clone());
        }
        let cards = config.net.as_deref_mut().unwrap_or_default();
        let ids = cards.iter().map(|card| card.id.clone()).collect();
        let places = self::places("network card", ids, self.cards.iter().map(|card| &card.id))?;
        for (place, card) in places.into_iter().zip(&self.cards) {
            cards[place].tap.clone_from(&card.tap);
            // Not those of the primary's process.
            cards[place].fds.clone_from(&card.fds);
        }
        Ok(())
    }
}

/// For each of the `wanted` the place of its device: that of its id, or else its own.
fn places<'a>(
    kind: &'static str,
    ids: Vec<Option<String>>,
    wanted: impl Iterator<Item = &'a Option<String>>,
) -> Result<Vec<usize>, OverrideError> {
    let mut places = Vec::new();
    for (own, id) in wanted.enumerate() {
        let place = match id {
            Some(_) => ids.iter().position(|known| known == id),
            None => (own < ids.len()).then_some(own),
        };
        let Some(place) = place else {
            let which = id.clone().unwrap_or_else(|| format!("in place {}", own + 1));
            return Err(OverrideError::NoDevice { kind, which });
        };
        if places.contains(&place) {
            let id = ids[place].clone().unwrap_or_default();
            return Err(OverrideError::Twice { kind, id });
        }
        places.push(place);
    }
    Ok(places)
}

/// A serial port or console gets another backend.
fn lead_elsewhere(
    kind: &'static str,
    port: &mut ConsoleConfig,
    wanted: Option<&ConsoleConfig>,
) -> Result<(), OverrideError> {
    let Some(wanted) = wanted else { return Ok(()) };
    let (found, expected) = (is_there(port), is_there(wanted));
    if found != expected {
        let (found, expected) = (article(found), article(expected));
        return Err(OverrideError::Port { kind, found, expected });
    }
    *port = wanted.clone();
    Ok(())
}

/// Whether there is such a device.
pub(super) fn is_there(port: &ConsoleConfig) -> bool {
    port.mode != ConsoleOutputMode::Off
}

pub(super) fn article(is_there: bool) -> &'static str {
    if is_there { "a" } else { "no" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(serial: ConsoleOutputMode) -> VmConfig {
        let disk = |id: &str| DiskConfig {
            id: Some(id.into()),
            path: Some(format!("/a/{id}").into()),
            serial: Some("S".into()),
            ..DiskConfig::default()
        };
        let card =
            NetConfig { id: Some("n".into()), tap: Some("tap0".into()), ..Default::default() };
        let mut config = VmConfig {
            disks: Some(vec![disk("d0"), disk("d1")]),
            net: Some(vec![card]),
            ..VmConfig::default()
        };
        config.serial.mode = serial;
        config
    }

    fn disks(entries: &[(Option<&str>, &str)]) -> Overrides {
        let disk = |(id, path): &(Option<&str>, &str)| ReplicaDisk {
            id: id.map(Into::into),
            path: path.into(),
        };
        Overrides { disks: entries.iter().map(disk).collect(), ..Overrides::default() }
    }

    #[test]
    fn an_override_changes_the_backend_and_never_the_device() {
        use ConsoleOutputMode::{Null, Off, Tty};
        let serial = |mode| {
            let mode = Some(ConsoleConfig::new(mode));
            Overrides { serial: mode, ..Overrides::default() }
        };
        let console = |mode| {
            let mode = Some(ConsoleConfig::new(mode));
            Overrides { console: mode, ..Overrides::default() }
        };
        let with_console = |mode| {
            let mut config = config(Null);
            config.console.mode = mode;
            config
        };
        let mut tty = config(Tty);
        serial(Null).apply(&mut tty).unwrap();
        assert_eq!((tty.serial.mode, tty.console.mode), (Null, Tty));
        let mut tty = with_console(Tty);
        console(Null).apply(&mut tty).unwrap();
        assert_eq!(tty.console.mode, Null);
        assert!(serial(Off).apply(&mut config(Off)).is_ok());
        assert!(console(Off).apply(&mut with_console(Off)).is_ok());
        for (there, here) in [(Tty, Off), (Off, Null)] {
            let refused = serial(here).apply(&mut config(there));
            let kind = "serial port";
            assert!(
                matches!(refused, Err(OverrideError::Port { kind: found, .. }) if found == kind)
            );
            let refused = console(here).apply(&mut with_console(there));
            let kind = "console";
            assert!(
                matches!(refused, Err(OverrideError::Port { kind: found, .. }) if found == kind)
            );
        }
    }

    #[test]
    fn an_image_is_found_by_its_disk_s_id_or_place_and_nothing_else_of_the_disk_changes() {
        for (entries, paths) in [
            (&[][..], ["/a/d0", "/a/d1"]),
            (&[(None, "/b")], ["/b", "/a/d1"]),
            (&[(Some("d1"), "/b")], ["/a/d0", "/b"]),
            (&[(Some("d1"), "/b"), (Some("d0"), "/c")], ["/c", "/b"]),
            (&[(None, "/b"), (None, "/c")], ["/b", "/c"]),
        ] {
            let mut changed = config(ConsoleOutputMode::Null);
            disks(entries).apply(&mut changed).unwrap();
            let mut expected = config(ConsoleOutputMode::Null);
            for (disk, path) in expected.disks.iter_mut().flatten().zip(paths) {
                disk.path = Some(path.into());
            }
            assert_eq!(changed, expected, "{entries:?}");
        }
        let mut changed = config(ConsoleOutputMode::Null);
        let card = named(&ReplicaCard { id: None, tap: "tap1".into() });
        Overrides { cards: vec![card], ..Overrides::default() }.apply(&mut changed).unwrap();
        assert_eq!(changed.net.unwrap()[0].tap.as_deref(), Some("tap1"));
    }

    /// Of a VM that was handed over and is wanted back: the new host's description has that host's taps,
    /// images and ports, and its old host must find the machine in it that it had.
    #[test]
    fn a_host_s_own_part_turns_another_host_s_description_back_into_its_own() {
        let taps: [(Option<&str>, Option<Vec<i32>>); 3] =
            [(Some("tap0"), None), (None, None), (None, Some(vec![-1, -1]))];
        for (tap, fds) in taps {
            let mut own = config(ConsoleOutputMode::Null);
            let card = &mut own.net.as_mut().unwrap()[0];
            (card.tap, card.fds) = (tap.map(Into::into), fds.clone());
            let mut theirs = own.clone();
            let elsewhere = Overrides {
                serial: Some(ConsoleConfig::new(ConsoleOutputMode::Tty)),
                cards: vec![named(&ReplicaCard { id: None, tap: "tap9".into() })],
                ..disks(&[(None, "/b")])
            };
            elsewhere.apply(&mut theirs).unwrap();
            assert_ne!(theirs, own);
            Overrides::of(&own).apply(&mut theirs).unwrap();
            assert_eq!(theirs, own, "{tap:?} {fds:?}");
        }
    }

    #[test]
    fn an_override_without_a_device_of_its_own_is_refused() {
        let refused = |entries| disks(entries).apply(&mut config(ConsoleOutputMode::Null));
        let no = |which: &str| Err(OverrideError::NoDevice { kind: "disk", which: which.into() });
        assert_eq!(refused(&[(Some("d2"), "/b")]), no("d2"));
        assert_eq!(refused(&[(None, "/b"), (None, "/c"), (None, "/d")]), no("in place 3"));
        let twice = Err(OverrideError::Twice { kind: "disk", id: "d0".into() });
        assert_eq!(refused(&[(None, "/b"), (Some("d0"), "/c")]), twice);
        let card = named(&ReplicaCard { id: Some("x".into()), tap: "tap1".into() });
        let overrides = Overrides { cards: vec![card], ..Overrides::default() };
        assert!(overrides.apply(&mut config(ConsoleOutputMode::Null)).is_err());
    }
}
