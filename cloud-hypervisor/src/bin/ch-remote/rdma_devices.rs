//! What RDMA this host has, and what an `rdma:` URL would use of it.
//!
//! Enters: this host's devices and addresses, as the VMM itself reads them; no VMM is asked. Leaves:
//! text, and whether `rdma:` can work here from any address.

use std::fmt::Write;
use std::net::IpAddr;

use anyhow::{Context, anyhow};
use nix::ifaddrs::getifaddrs;
use rdma::{Device, Gid, Library, LinkLayer, Port, Wanted};

use crate::output;

/// An address of this host, and the interface that has it.
type Local = (IpAddr, String);

/// Prints the devices, and for each address what would be used from it.
pub(crate) fn run() -> anyhow::Result<()> {
    const FAILED: &str = "This host cannot do RDMA";
    let devices = Library::load().and_then(|library| library.devices()).context(FAILED)?;
    let (text, is_usable) = report(&devices, &addresses()?);
    output::print(&text)?;
    if devices.is_empty() {
        return Err(anyhow!(
            "There is no RDMA device: load the adapter's driver, or make a Soft-RoCE one \
             (rdma link add rxe0 type rxe netdev <interface>)"
        ))
        .context(FAILED);
    }
    if !is_usable {
        return Err(anyhow!("No port that can be used has an address of this host"))
            .context(FAILED);
    }
    Ok(())
}

/// The addresses that a peer may reach this host by; one that needs an interface's name is none, as
/// no URL can have it.
fn addresses() -> anyhow::Result<Vec<Local>> {
    let all = getifaddrs().context("Cannot list the addresses of this host")?;
    let mut addresses: Vec<Local> = all
        .filter_map(|entry| {
            let storage = entry.address?;
            let v4 = storage.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            let v6 = storage.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip()));
            v4.or(v6).map(|address| (address, entry.interface_name))
        })
        .filter(|(address, _)| {
            !address.is_loopback()
                && !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local())
        })
        .collect();
    addresses.sort_unstable();
    addresses.dedup();
    Ok(addresses)
}

fn report(devices: &[Device], addresses: &[Local]) -> (String, bool) {
    let mut text = String::new();
    for device in devices {
        let _ = writeln!(text, "{}", device.name);
        if let Some(problem) = &device.problem {
            let _ = writeln!(text, "  cannot be used: {problem}");
        }
        device.ports.iter().for_each(|port| describe(port, &mut text));
    }
    let mut is_usable = false;
    for (address, interface) in addresses {
        let chosen = chosen(devices, *address);
        is_usable |= chosen.is_ok();
        let words = chosen.unwrap_or_else(|why| format!("none, {why}"));
        let _ = writeln!(text, "{address} ({interface}): {words}");
    }
    (text, is_usable)
}

fn describe(port: &Port, text: &mut String) {
    let _ = write!(text, "  port {}: {:?}, {:?}", port.number, port.link_layer, port.state);
    if let Some(mtu_bytes) = port.mtu_bytes {
        let _ = write!(text, ", MTU {mtu_bytes}");
    }
    if port.link_layer == LinkLayer::InfiniBand {
        text.push_str(", used if rdma_device names it (never tried)");
    }
    text.push('\n');
    for entry in &port.gids {
        let _ = write!(text, "    GID {}: {} ({}", entry.index, entry.gid, entry.kind);
        if let Some(interface) = &entry.interface {
            let _ = write!(text, ", {interface}");
        }
        text.push_str(")\n");
    }
}

/// The place that a connection from `address` would be at, by the rule of the VMM; or why there is none.
fn chosen(devices: &[Device], address: IpAddr) -> Result<String, &'static str> {
    let wanted = Wanted { local: Some(address), ..Wanted::default() };
    let gids = || devices.iter().flat_map(|d| d.ports.iter().map(move |port| (d, port)));
    let Ok(place) = wanted.choose(devices) else {
        let mut all = gids().flat_map(|(_, port)| &port.gids);
        return Err(if all.any(|entry| entry.gid == Gid::of(address)) {
            "its port is not active, or its device cannot be used"
        } else {
            "no port has this address"
        });
    };
    let mut words =
        format!("device {}, port {}, GID {}", place.device, place.port, place.gid_index);
    let port = gids().find(|(d, port)| d.name == place.device && port.number == place.port);
    let kind = port.and_then(|(_, p)| p.gids.iter().find(|gid| gid.index == place.gid_index));
    if let Some(entry) = kind {
        let _ = write!(words, " ({})", entry.kind);
    }
    Ok(words)
}

#[cfg(test)]
mod tests {
    use rdma::{GidEntry, GidKind, PortState};

    use super::*;

    fn port(number: u8, state: PortState, gids: &[(u8, &str, GidKind)]) -> Port {
        let gids = gids.iter().map(|(index, address, kind)| GidEntry {
            index: *index,
            gid: Gid::of(address.parse().unwrap()),
            kind: *kind,
            interface: Some(format!("eth{number}")),
        });
        let gids = gids.collect();
        Port { number, state, link_layer: LinkLayer::Ethernet, mtu_bytes: Some(4096), gids }
    }

    fn local(address: &str) -> Local {
        (address.parse().unwrap(), "eth1".to_owned())
    }

    #[test]
    fn each_address_is_told_its_place_or_why_it_has_none() {
        let v4 = "10.77.0.1";
        let one = port(
            1,
            PortState::Active,
            &[(0, "fe80::1", GidKind::RoceV2), (1, v4, GidKind::RoceV1), (2, v4, GidKind::RoceV2)],
        );
        let two = port(2, PortState::Down, &[(0, "10.78.0.1", GidKind::RoceV2)]);
        let devices = [
            Device { name: "mlx5_0".to_owned(), ports: vec![one, two], problem: None },
            Device { name: "b".to_owned(), ports: vec![], problem: Some("no provider".to_owned()) },
        ];
        let addresses = [local(v4), local("10.78.0.1"), local("2001:db8::7")];
        let (text, is_usable) = report(&devices, &addresses);
        assert!(is_usable);
        assert_eq!(
            text,
            "mlx5_0\n  \
             port 1: Ethernet, Active, MTU 4096\n    \
             GID 0: fe80::1 (RoCE v2, eth1)\n    \
             GID 1: ::ffff:10.77.0.1 (RoCE v1, eth1)\n    \
             GID 2: ::ffff:10.77.0.1 (RoCE v2, eth1)\n  \
             port 2: Ethernet, Down, MTU 4096\n    \
             GID 0: ::ffff:10.78.0.1 (RoCE v2, eth2)\n\
             b\n  \
             cannot be used: no provider\n\
             10.77.0.1 (eth1): device mlx5_0, port 1, GID 2 (RoCE v2)\n\
             10.78.0.1 (eth1): none, its port is not active, or its device cannot be used\n\
             2001:db8::7 (eth1): none, no port has this address\n"
        );
    }

    #[test]
    fn a_port_of_infiniband_is_used_by_its_device_s_name_only() {
        let ib = Port {
            link_layer: LinkLayer::InfiniBand,
            ..port(1, PortState::Active, &[(0, "fe80::1", GidKind::InfiniBand)])
        };
        let devices = [Device { name: "ib0".to_owned(), ports: vec![ib], problem: None }];
        let (text, is_usable) = report(&devices, &[local("10.77.0.1")]);
        assert!(!is_usable);
        assert!(
            text.contains("InfiniBand, Active, MTU 4096, used if rdma_device names it"),
            "{text}"
        );
        assert!(text.ends_with("10.77.0.1 (eth1): none, no port has this address\n"), "{text}");
    }
}
