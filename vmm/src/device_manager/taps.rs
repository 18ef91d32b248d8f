//! Taps that a client gave as open descriptors.
//!
//! A configuration says of such a card `fds: [-1, …]`, an entry for each descriptor: how many there
//! are travels in snapshots and to backups, and a number of another process would mean nothing. The
//! descriptors themselves are kept here for as long as the VM has a configuration, so that it can be
//! booted again.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;

use api::config::{NetConfig, RestoredNet, VmConfig};

/// What stands in a configuration for a descriptor.
const ELSEWHERE: i32 = -1;

/// Descriptors by the id of their card.
#[derive(Debug, Default)]
pub struct TapDescriptors(BTreeMap<String, Vec<OwnedFd>>);

impl TapDescriptors {
    /// Sorts what came with a restore by the cards for which it came.
    ///
    /// # Errors
    /// The id of a card that is named twice.
    pub fn of_restore(cards: &[RestoredNet], fds: Vec<OwnedFd>) -> Result<Self, String> {
        let (mut fds, mut sorted) = (fds.into_iter(), BTreeMap::new());
        for card in cards {
            let own: Vec<_> = fds.by_ref().take(card.num_fds).collect();
            if sorted.insert(card.id.clone(), own).is_some() {
                return Err(card.id.clone());
            }
        }
        Ok(Self(sorted))
    }

    /// Those for which a configuration has no card.
    pub fn strays<'a>(&'a self, config: &'a VmConfig) -> impl Iterator<Item = &'a str> {
        let is_card =
            |id: &str| config.net.iter().flatten().any(|card| card.id.as_deref() == Some(id));
        self.0.keys().map(String::as_str).filter(move |id| !is_card(id))
    }

    /// Keeps the descriptors of a card, in the place of what it had.
    pub fn insert(&mut self, id: String, fds: Vec<OwnedFd>) {
        self.0.insert(id, fds);
    }

    /// Descriptors for one machine; these stay for the next.
    ///
    /// # Errors
    /// No descriptor is free.
    pub fn duplicate(&self) -> io::Result<Self> {
        let mut copies = BTreeMap::new();
        for (id, fds) in &self.0 {
            let own = fds.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>()?;
            copies.insert(id.clone(), own);
        }
        Ok(Self(copies))
    }

    /// Takes those of a card; `None` if there are none for it.
    pub(super) fn take(&mut self, id: &str) -> Option<Vec<OwnedFd>> {
        self.0.remove(id)
    }
}

/// Says in a configuration that `count` descriptors came for the card.
pub fn mark(card: &mut NetConfig, count: usize) {
    card.fds = Some(vec![ELSEWHERE; count]);
}

/// How many descriptors a configuration says that the card has.
#[must_use]
pub fn count(card: &NetConfig) -> usize {
    card.fds.as_ref().map_or(0, Vec::len)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsRawFd;

    use super::*;

    fn some_fd() -> OwnedFd {
        File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn descriptors_go_to_their_cards_and_stay_for_the_next_machine() {
        let card = |id: &str, num_fds| RestoredNet { id: id.into(), num_fds, fds: None };
        let fds = vec![some_fd(), some_fd(), some_fd()];
        let raw: Vec<_> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let mut kept = TapDescriptors::of_restore(&[card("a", 1), card("b", 2)], fds).unwrap();
        let twice = TapDescriptors::of_restore(&[card("a", 1), card("a", 1)], vec![some_fd()]);
        assert_eq!(twice.unwrap_err(), "a");
        let has_a = NetConfig { id: Some("a".into()), ..NetConfig::default() };
        let config = VmConfig { net: Some(vec![has_a]), ..VmConfig::default() };
        assert_eq!(kept.strays(&config).collect::<Vec<_>>(), ["b"]);
        for _ in 0..2 {
            let mut copies = kept.duplicate().unwrap();
            assert_eq!(copies.take("a").unwrap().len(), 1);
            assert_eq!(copies.take("b").unwrap().len(), 2);
            assert!(copies.take("b").is_none());
        }
        let found: Vec<_> = kept.take("b").unwrap().iter().map(AsRawFd::as_raw_fd).collect();
        assert_eq!(found, raw[1..]);
    }

    #[test]
    fn a_configuration_names_no_descriptor() {
        let mut card = NetConfig { fds: Some(vec![7, 8]), ..NetConfig::default() };
        assert_eq!(count(&card), 2);
        mark(&mut card, 1);
        assert_eq!(card.fds, Some(vec![-1]));
        assert_eq!(count(&NetConfig::default()), 0);
    }
}
