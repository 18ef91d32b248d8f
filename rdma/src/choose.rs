//! Which device, port and GID to use for a peer.
//!
//! Enters: what there is, what is wanted. Leaves: one place, or an error that lists what there is. A pure
//! function. The order of preference: a port that is active, one that has the address, RoCE v2 before v1, the
//! lower index.

use std::net::IpAddr;

use crate::devices::{Device, Gid, GidEntry, GidKind, LinkLayer, Port, PortState};
use crate::error::Error;

/// What is asked for; nothing: any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    pub device: Option<String>,
    /// From 1 on.
    pub port: Option<u8>,
    pub gid_index: Option<u8>,
    /// The address of this host from which the peer is reached. On Ethernet the GID must be this address,
    /// unless `gid_index` names one; InfiniBand has other GIDs, so there the device must be named.
    pub local: Option<IpAddr>,
}

/// Where queue pairs are made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    pub device: String,
    pub port: u8,
    pub gid_index: u8,
    pub gid: Gid,
    pub link_layer: LinkLayer,
}

impl Wanted {
    /// Chooses from `devices`.
    ///
    /// # Errors
    /// If nothing fits, or what fits cannot be used.
    pub fn choose(&self, devices: &[Device]) -> Result<Place, Error> {
        let mut fitting: Vec<(&Device, &Port, &GidEntry)> = Vec::new();
        for device in devices {
            for port in &device.ports {
                let gids = port.gids.iter().filter(|gid| self.fits(device, port, gid));
                fitting.extend(gids.map(|gid| (device, port, gid)));
            }
        }
        let usable = fitting.iter().filter(|(device, port, _)| {
            device.problem.is_none() && port.state == PortState::Active
        });
        // An index alone may be there on several ports: the one towards the peer is meant.
        let is_away = |port: &Port| {
            self.local.is_some_and(|local| port.gids.iter().all(|gid| gid.gid != Gid::of(local)))
        };
        let best = usable
            .min_by_key(|(_, port, gid)| (is_away(port), gid.kind == GidKind::RoceV1, gid.index));
        let Some((device, port, gid)) = best else {
            let mut wanted = self.words();
            if !fitting.is_empty() {
                wanted.push_str(", active, and on a device without a problem");
            }
            return Err(Error::NoPlace { wanted, present: list(devices) });
        };
        Ok(Place {
            device: device.name.clone(),
            port: port.number,
            gid_index: gid.index,
            gid: gid.gid,
            link_layer: port.link_layer,
        })
    }

    fn fits(&self, device: &Device, port: &Port, gid: &GidEntry) -> bool {
        let named = self.device.as_ref().is_none_or(|name| *name == device.name)
            && self.port.is_none_or(|number| number == port.number)
            && self.gid_index.is_none_or(|index| index == gid.index);
        let reached = match (self.local, port.link_layer) {
            (None, _) => true,
            (Some(_), LinkLayer::InfiniBand) => self.device.is_some(),
            (Some(local), _) => self.gid_index.is_some() || gid.gid == Gid::of(local),
        };
        named && reached
    }

    fn words(&self) -> String {
        let mut words = Vec::new();
        words.extend(self.device.as_ref().map(|device| format!("of the device {device}")));
        words.extend(self.port.map(|port| format!("number {port}")));
        words.extend(self.gid_index.map(|index| format!("with a GID {index}")));
        if self.gid_index.is_none() {
            words.extend(self.local.map(|address| format!("with the address {address}")));
        }
        if words.is_empty() { "to be used".to_owned() } else { words.join(" and ") }
    }
}

/// What `open` makes of the place that fits best; of the next one if its device cannot be opened. Each device is
/// opened once at most, and none that is not chosen.
pub(crate) fn first_usable<T>(
    mut devices: Vec<Device>,
    wanted: &Wanted,
    mut open: impl FnMut(&Place) -> Result<T, Error>,
) -> Result<(T, Place), Error> {
    loop {
        let place = wanted.choose(&devices)?;
        let problem = match open(&place) {
            Ok(opened) => return Ok((opened, place)),
            Err(error) => error.in_words(),
        };
        for device in devices.iter_mut().filter(|device| device.name == place.device) {
            device.problem = Some(problem.clone());
        }
    }
}

fn list(devices: &[Device]) -> String {
    if devices.is_empty() {
        return "no RDMA device at all (Soft-RoCE: rdma link add rxe0 type rxe netdev <interface>)"
            .to_owned();
    }
    devices.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests;
