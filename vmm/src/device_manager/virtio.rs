//! Which virtio devices a configuration asks for, in the order of their slots.
//!
//! The first one gets slot 1, and the order is a part of what a guest sees: a device is in the
//! same slot at each boot, after a restore and on the backup.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use api::config::{DiskConfig, NetConfig, VmConfig};
use devices::console::PortMode;
use devices::virtio::blk::{BlkConfig, Disk, ImageType};
use devices::virtio::console::Console;
use devices::virtio::device::VirtioDevice;
use devices::virtio::net::gate::Limits;
use devices::virtio::net::mac::MacAddress;
use devices::virtio::net::tap::{TapSettings, TapSource};
use devices::virtio::net::{Net, NetOptions, Offloads};
use devices::virtio::rng::Rng;

use thiserror::Error;

use super::pci::PciError;
use super::taps::{self, TapDescriptors};

const RNG_ID: &str = "__rng";
const CONSOLE_ID: &str = "__console";

/// The devices, by what else is to be known of them than that they are virtio devices.
pub struct VirtioDevices {
    pub rng: Arc<Rng>,
    pub console: Option<Arc<Console>>,
    pub disks: Vec<Arc<Disk>>,
    pub cards: Vec<Arc<Net>>,
}

impl VirtioDevices {
    /// Makes them; none of them but the console, whose backend is opened, has taken anything of the
    /// host yet. `config` is complete, see [`complete`].
    pub fn new(
        config: &VmConfig,
        console: Option<&PortMode>,
        mut taps: TapDescriptors,
    ) -> Result<Self, PciError> {
        let rng = Rng::new(RNG_ID, config.rng.src.clone())
            .map_err(|source| PciError::Make { id: RNG_ID.into(), source: source.into() })?;
        let console = console.map(|mode| made(CONSOLE_ID, Console::open(CONSOLE_ID, mode)));
        let console = console.transpose()?.map(Arc::new);
        let disks = config.disks.iter().flatten().map(disk).collect::<Result<_, _>>()?;
        let cards = config.net.iter().flatten();
        let cards = cards.map(|config| card(config, &mut taps)).collect::<Result<_, _>>()?;
        Ok(Self { rng: Arc::new(rng), console, disks, cards })
    }

    /// All of them, in the order of their slots.
    pub fn all(&self) -> impl Iterator<Item = Arc<dyn VirtioDevice>> + '_ {
        let disks = self.disks.iter().map(|disk| Arc::clone(disk) as Arc<dyn VirtioDevice>);
        let cards = self.cards.iter().map(|card| Arc::clone(card) as _);
        let console = self.console.iter().map(|console| Arc::clone(console) as _);
        std::iter::once(Arc::clone(&self.rng) as _).chain(console).chain(disks).chain(cards)
    }
}

/// Names the devices that have no name, as upstream does: one count over all of them, and chooses
/// the addresses that the client left to us. All of that travels to a backup and into a snapshot,
/// where the guest must see the same.
///
/// # Errors
/// The system gives no random bytes.
pub fn complete(config: &mut VmConfig) -> std::io::Result<()> {
    // Past all that were named before: devices may be added one by one.
    let ids = config.disks.iter().flatten().map(|disk| &disk.id);
    let ids = ids.chain(config.net.iter().flatten().map(|card| &card.id));
    let used: BTreeSet<u32> = ids.flatten().filter_map(|id| automatic_number(id)).collect();
    let first = used.last().map_or(0, |number| number.saturating_add(1));
    // A client may have given any number, the last one among them.
    let mut free = (first..=u32::MAX).chain(0..first).filter(|number| !used.contains(number));
    let mut name = |id: &mut Option<String>, kind: &str| {
        if id.is_none() {
            *id = free.next().map(|number| format!("_{kind}{number}"));
        }
    };
    for disk in config.disks.iter_mut().flatten() {
        name(&mut disk.id, "disk");
    }
    for card in config.net.iter_mut().flatten() {
        name(&mut card.id, "net");
        if card.mac.is_none() {
            card.mac = Some(MacAddress::random()?.to_string());
        }
    }
    Ok(())
}

/// The number in an id that [`complete`] gives.
fn automatic_number(id: &str) -> Option<u32> {
    id.strip_prefix("_disk").or_else(|| id.strip_prefix("_net"))?.parse().ok()
}

fn made<T>(
    id: &str,
    result: Result<T, impl std::error::Error + Send + Sync + 'static>,
) -> Result<T, PciError> {
    result.map_err(|source| PciError::Make { id: id.to_owned(), source: Box::new(source) })
}

fn disk(config: &DiskConfig) -> Result<Arc<Disk>, PciError> {
    let id = config.id.clone().unwrap_or_default();
    let raw = config.image_type.as_deref().is_some_and(|name| name.eq_ignore_ascii_case("raw"));
    let options = BlkConfig {
        id: id.clone(),
        path: config.path.clone().unwrap_or_default(),
        image_type: if raw { ImageType::Raw } else { ImageType::Detect },
        readonly: config.readonly,
        direct: config.direct,
        num_queues: u16::try_from(config.num_queues).unwrap_or(u16::MAX),
        queue_size: config.queue_size,
        sparse: config.sparse,
        serial: config.serial.clone(),
    };
    Ok(Arc::new(made(&id, Disk::new(options))?))
}

fn card(config: &NetConfig, taps: &mut TapDescriptors) -> Result<Arc<Net>, PciError> {
    let id = config.id.clone().unwrap_or_default();
    let address = |text: &Option<String>| {
        text.as_ref().map(|text| made(&id, text.parse::<MacAddress>())).transpose()
    };
    let mac = match address(&config.mac)? {
        Some(mac) => mac,
        None => made(&id, MacAddress::random())?,
    };
    let options = NetOptions {
        id: id.clone(),
        tap: made(&id, tap(config, taps.take(&id)))?,
        mac,
        mtu: config.mtu,
        host: TapSettings {
            ip: config.ip,
            mask: config.mask,
            mac: address(&config.host_mac)?,
            mtu: config.mtu,
        },
        queue_pairs: u16::try_from(config.num_queues / 2).unwrap_or(u16::MAX),
        queue_size: config.queue_size,
        offloads: Offloads {
            csum: config.offload_csum,
            tso: config.offload_tso,
            ufo: config.offload_ufo,
        },
        limits: Limits::default(),
    };
    Ok(Arc::new(made(&id, Net::new(options))?))
}

/// A card's tap was opened by somebody else, and not for this process.
#[derive(Debug, Error)]
#[error(
    "Its tap was given to another process as descriptors: name a tap of this host, with --net \
     tap=<name>,id=<id> on a backup, or give descriptors, with net_fds for a restore"
)]
struct NoDescriptors;

/// Where the frames of a card go, for which `fds` came.
fn tap(config: &NetConfig, fds: Option<Vec<OwnedFd>>) -> Result<TapSource, NoDescriptors> {
    match (fds, &config.tap) {
        (Some(fds), _) => Ok(TapSource::Descriptors(fds)),
        (None, Some(name)) => Ok(TapSource::Named(name.clone())),
        (None, None) if taps::count(config) > 0 => Err(NoDescriptors),
        (None, None) => Ok(TapSource::Unnamed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tap_of_another_process_is_not_made_anew_here() {
        let config = |name: Option<&str>, fds: Option<Vec<i32>>| NetConfig {
            tap: name.map(Into::into),
            fds,
            ..NetConfig::default()
        };
        assert!(matches!(tap(&config(None, None), None), Ok(TapSource::Unnamed)));
        assert!(matches!(tap(&config(None, Some(vec![-1])), None), Err(NoDescriptors)));
        assert!(matches!(tap(&config(Some("t"), Some(vec![-1])), None), Ok(TapSource::Named(_))));
        let fds = vec![std::fs::File::open("/dev/null").unwrap().into()];
        let found = tap(&config(None, Some(vec![-1])), Some(fds));
        assert!(matches!(found, Ok(TapSource::Descriptors(fds)) if fds.len() == 1));
    }

    #[test]
    fn names_and_addresses_are_given_once() {
        let named = DiskConfig { id: Some("mine".into()), ..DiskConfig::default() };
        let mut config = VmConfig {
            disks: Some(vec![DiskConfig::default(), named, DiskConfig::default()]),
            net: Some(vec![NetConfig::default()]),
            ..VmConfig::default()
        };
        complete(&mut config).unwrap();
        let ids: Vec<_> = config.disks.iter().flatten().map(|disk| disk.id.clone()).collect();
        assert_eq!(ids, ["_disk0", "mine", "_disk1"].map(|id| Some(id.to_owned())));
        let card = &config.net.as_ref().unwrap()[0];
        assert_eq!(card.id.as_deref(), Some("_net2"));
        let mac: MacAddress = card.mac.as_ref().unwrap().parse().unwrap();
        assert_eq!(mac.bytes()[0] & 3, 2, "locally administered, for one card");
        let once = config.clone();
        complete(&mut config).unwrap();
        assert_eq!(config, once);
        // One that is added later gets a name that nobody has.
        config.net.as_mut().unwrap().push(NetConfig::default());
        config.disks.as_mut().unwrap().insert(0, DiskConfig::default());
        complete(&mut config).unwrap();
        assert_eq!(config.disks.as_ref().unwrap()[0].id.as_deref(), Some("_disk3"));
        assert_eq!(config.net.as_ref().unwrap()[1].id.as_deref(), Some("_net4"));
    }

    #[test]
    fn a_name_is_given_once_whatever_number_a_client_gave() {
        let named = |id: &str| DiskConfig { id: Some(id.into()), ..DiskConfig::default() };
        let last = format!("_disk{}", u32::MAX);
        let mut config = VmConfig {
            disks: Some(vec![
                named(&last),
                named("_disk1"),
                DiskConfig::default(),
                DiskConfig::default(),
            ]),
            net: Some(vec![NetConfig::default()]),
            ..VmConfig::default()
        };
        complete(&mut config).unwrap();
        let ids = config.disks.iter().flatten().map(|disk| disk.id.clone().unwrap());
        let ids: Vec<_> = ids.chain(config.net.unwrap()[0].id.clone()).collect();
        assert_eq!(ids, [&last, "_disk1", "_disk0", "_disk2", "_net3"]);
    }
}
