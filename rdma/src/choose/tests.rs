//! A choice from a folder like the kernel's.

use std::fs;
use std::path::Path;

use super::*;
use crate::devices::scan;

/// A port with entries (GID, type, interface).
fn port(root: &Path, place: &str, layer: &str, state: &str, gids: &[(&str, &str, &str)]) {
    let folder = root.join(place);
    for part in ["gids", "gid_attrs/types", "gid_attrs/ndevs"] {
        fs::create_dir_all(folder.join(part)).unwrap();
    }
    fs::write(folder.join("link_layer"), format!("{layer}\n")).unwrap();
    fs::write(folder.join("state"), format!("{state}\n")).unwrap();
    for (index, (gid, kind, interface)) in gids.iter().enumerate() {
        let write = |part: &str, text: &str| {
            fs::write(folder.join(part).join(index.to_string()), format!("{text}\n")).unwrap();
        };
        write("gids", gid);
        if !kind.is_empty() {
            write("gid_attrs/types", kind);
            write("gid_attrs/ndevs", interface);
        }
    }
}

fn devices() -> Vec<Device> {
    let root = tempfile::tempdir().unwrap();
    let unused = ("0000:0000:0000:0000:0000:0000:0000:0000", "", "");
    port(
        root.path(),
        "mlx5_0/ports/1",
        "Ethernet",
        "4: ACTIVE",
        &[
            ("fe80:0000:0000:0000:5054:00ff:fe12:3456", "IB/RoCE v1", "eth0"),
            ("fe80:0000:0000:0000:5054:00ff:fe12:3456", "RoCE v2", "eth0"),
            ("0000:0000:0000:0000:0000:ffff:0a4d:0001", "IB/RoCE v1", "eth0"),
            ("0000:0000:0000:0000:0000:ffff:0a4d:0001", "RoCE v2", "eth0"),
            unused,
            ("2001:0db8:0000:0000:0000:0000:0000:0007", "RoCE v2", "eth0.7"),
        ],
    );
    port(
        root.path(),
        "mlx5_0/ports/2",
        "Ethernet",
        "1: DOWN",
        &[("0000:0000:0000:0000:0000:ffff:0a4d:0002", "RoCE v2", "eth1")],
    );
    port(
        root.path(),
        "ib0/ports/1",
        "InfiniBand",
        "4: ACTIVE",
        &[("fe80:0000:0000:0000:0002:c903:0000:0001", "IB/RoCE v1", "")],
    );
    scan(root.path()).unwrap()
}

fn wanted(local: Option<&str>) -> Wanted {
    Wanted { local: local.map(|text| text.parse().unwrap()), ..Wanted::default() }
}

#[test]
fn a_host_without_rdma_has_no_device() {
    let root = tempfile::tempdir().unwrap();
    assert_eq!(scan(&root.path().join("infiniband")).unwrap(), []);
    let error = wanted(Some("10.77.0.1")).choose(&[]).unwrap_err().to_string();
    assert!(error.contains("with the address 10.77.0.1; there is: no RDMA device"), "{error}");
}

#[test]
fn the_folder_is_read() {
    let devices = devices();
    let names: Vec<&str> = devices.iter().map(|device| device.name.as_str()).collect();
    assert_eq!(names, ["ib0", "mlx5_0"]);
    let port = &devices[1].ports[0];
    assert_eq!((port.number, port.state), (1, PortState::Active));
    assert_eq!(port.gids.iter().map(|gid| gid.index).collect::<Vec<_>>(), [0, 1, 2, 3, 5]);
    assert_eq!(port.gids[3].kind, GidKind::RoceV2);
    assert_eq!(port.gids[4].interface.as_deref(), Some("eth0.7"));
    assert_eq!(devices[0].ports[0].gids[0].kind, GidKind::InfiniBand);
}

#[test]
fn the_gid_is_the_address_from_which_the_peer_is_reached() {
    let devices = devices();
    for (address, index) in [("10.77.0.1", 3), ("2001:db8::7", 5), ("fe80::5054:ff:fe12:3456", 1)] {
        let place = wanted(Some(address)).choose(&devices).unwrap();
        assert_eq!((place.device.as_str(), place.port, place.gid_index), ("mlx5_0", 1, index));
        assert_eq!(place.gid, Gid::of(address.parse().unwrap()));
    }
}

#[test]
fn what_is_named_counts_more() {
    let devices = devices();
    let local = Some("10.77.0.1".parse().unwrap());
    let named = Wanted { gid_index: Some(2), local, ..Wanted::default() };
    assert_eq!(named.choose(&devices).unwrap().gid_index, 2);
    let named = Wanted { device: Some("ib0".to_owned()), local, ..Wanted::default() };
    let place = named.choose(&devices).unwrap();
    assert_eq!((place.device.as_str(), place.gid_index), ("ib0", 0));
    assert_eq!(place.link_layer, LinkLayer::InfiniBand);
}

/// The index is on two ports: the one that the routes say is meant, not the first.
#[test]
fn an_index_alone_is_one_of_the_port_towards_the_peer() {
    let mut devices = devices();
    let mut other = devices[1].clone();
    other.name = "aaa_0".to_owned();
    for gid in &mut other.ports[0].gids {
        gid.gid = Gid([gid.index + 1; 16]);
    }
    devices.insert(0, other);
    let named = Wanted { gid_index: Some(1), ..wanted(Some("10.77.0.1")) };
    let place = named.choose(&devices).unwrap();
    assert_eq!((place.device.as_str(), place.gid_index), ("mlx5_0", 1));
}

#[test]
fn an_error_lists_what_there_is() {
    let devices = devices();
    let named = Wanted { device: Some("mlx5_1".to_owned()), ..wanted(None) };
    let error = named.choose(&devices).unwrap_err().to_string();
    assert!(
        error.starts_with("No RDMA port here is of the device mlx5_1; there is: ib0"),
        "{error}"
    );
    assert!(error.contains("gid 3 ::ffff:10.77.0.1 (RoCE v2, eth0)"), "{error}");
    let error = wanted(Some("10.77.0.2")).choose(&devices).unwrap_err().to_string();
    assert!(
        error.contains("with the address 10.77.0.2, active, and on a device without"),
        "{error}"
    );
    let error = wanted(Some("10.77.0.9")).choose(&devices).unwrap_err().to_string();
    assert!(error.contains("with the address 10.77.0.9; there is"), "{error}");
}

#[test]
fn a_device_that_cannot_be_used_is_not_chosen() {
    let mut devices = devices();
    devices[1].problem = Some("no provider".to_owned());
    let error = wanted(Some("10.77.0.1")).choose(&devices).unwrap_err().to_string();
    assert!(error.contains("mlx5_0 (no provider) port 1"), "{error}");
}

#[test]
fn another_device_is_opened_only_if_the_best_cannot_be() {
    let refused = |device: &str| Error::NoDevice { name: device.to_owned() };
    let wanted = Wanted::default();
    let mut asked = Vec::new();
    let opened = first_usable(devices(), &wanted, |place| {
        asked.push(place.device.clone());
        Ok(())
    });
    let best = opened.unwrap().1.device;
    assert_eq!(asked, std::slice::from_ref(&best));
    let (_, next) = first_usable(devices(), &wanted, |place| match place.device == best {
        true => Err(refused(&best)),
        false => Ok(()),
    })
    .unwrap();
    assert_ne!(next.device, best);
    let mut asked = Vec::new();
    let none = first_usable::<()>(devices(), &wanted, |place| {
        asked.push(place.device.clone());
        Err(refused(&place.device))
    });
    assert_eq!(asked, [best, next.device]);
    let why = none.unwrap_err().to_string();
    let words = ["on a device without a problem", "knows a provider for"];
    assert!(words.iter().all(|part| why.contains(part)), "{why}");
}
