use super::*;
use crate::virtio::net::tests::namespace::in_own_namespace;

fn open_one(name: &str, pairs: usize) -> Result<Vec<Arc<dyn TapQueue>>, TapError> {
    open(&TapSource::Named(name.to_owned()), pairs, &TapSettings::default())
}

fn interface<R>(name: &str, f: impl FnOnce(Interface<'_>) -> R) -> R {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    f(Interface { socket: socket.as_fd(), name: &name_bytes(name).unwrap() })
}

#[test]
fn names_that_no_interface_can_have_are_refused() {
    for name in ["", "a/b", "a b", "0123456789abcdef", "tab\t"] {
        assert!(matches!(name_bytes(name), Err(TapError::Name(_))), "{name:?}");
    }
    assert_eq!(shown(&name_bytes("0123456789abcde").unwrap()), "0123456789abcde");
}

#[test]
fn errors_say_what_to_do() {
    let error = |errno| io::Error::from_raw_os_error(errno);
    assert!(device_hint(&error(libc::ENOENT)).contains("modprobe tun"));
    assert!(bind_hint(&error(libc::EPERM), 1).contains("CAP_NET_ADMIN"));
    assert!(bind_hint(&error(libc::EBUSY), 1).contains("another process"));
    assert!(bind_hint(&error(libc::EINVAL), 2).contains("multi_queue"));
    let bind = TapError::Bind { name: "tap9".into(), hint: "hint", source: error(libc::EBUSY) };
    let attach = AttachError::from(bind);
    assert_eq!(attach.what, "Cannot use the tap tap9: hint");
    assert_eq!(attach.source.unwrap().raw_os_error(), Some(libc::EBUSY));
}

#[test]
fn a_tap_is_made_and_configured() {
    in_own_namespace(|| {
        let settings = TapSettings {
            ip: Some("10.1.2.3".parse().unwrap()),
            mask: Some("255.255.0.0".parse().unwrap()),
            mac: Some("02:11:22:33:44:55".parse().unwrap()),
            mtu: Some(1300),
        };
        let taps = open(&TapSource::Named("ut0".into()), 1, &settings).unwrap();
        interface("ut0", |interface| {
            assert!(interface.is_up().unwrap());
            assert_eq!(interface.mtu().unwrap(), 1300);
            assert_eq!(interface.mac().unwrap(), [2, 0x11, 0x22, 0x33, 0x44, 0x55]);
        });
        UdpSocket::bind("10.1.2.3:0").unwrap();
        // Nothing to read: at once, not later.
        let error = loop {
            match taps[0].read(&mut [0; 2048]) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let all = GuestOffloads::negotiated(u64::MAX);
        taps[0].set_offloads(all).unwrap();
        taps[0].set_offloads(GuestOffloads::default()).unwrap();
        // A header that is nonsense is the host's to refuse.
        assert!(taps[0].write(&[0xff; 80]).is_err());
        // A second user of a tap of one queue.
        let busy = open_one("ut0", 1).map(drop).unwrap_err();
        assert!(busy.to_string().contains("another process uses it"), "{busy}");
        drop(taps);
        assert!(if_nametoindex("ut0").is_err(), "what was made for us ends with us");
    });
}

/// The kernel would take it for one of class A, and route all of 10.0.0.0/8 to the tap.
#[test]
fn an_address_without_a_mask_is_one_of_256() {
    in_own_namespace(|| {
        let settings =
            TapSettings { ip: Some("10.1.2.3".parse().unwrap()), ..TapSettings::default() };
        let _taps = open(&TapSource::Named("ut4".into()), 1, &settings).unwrap();
        let socket = UdpSocket::bind("10.1.2.3:0").unwrap();
        socket.connect("10.1.2.200:9").unwrap();
        let error = socket.connect("10.1.3.200:9").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::NetworkUnreachable);
    });
}

#[test]
fn a_tap_of_ipv6_and_one_without_a_name() {
    in_own_namespace(|| {
        let settings = TapSettings {
            ip: Some("fd00::1".parse().unwrap()),
            mask: Some("ffff:ffff:ffff:ffff::".parse().unwrap()),
            ..TapSettings::default()
        };
        if std::path::Path::new("/proc/sys/net/ipv6").exists() {
            let taps = open(&TapSource::Named("ut6".into()), 1, &settings).unwrap();
            drop(taps);
        }
        let gaps = TapSettings { mask: Some("ff::1".parse().unwrap()), ..settings };
        let refused = open(&TapSource::Named("ut7".into()), 1, &gaps).map(drop);
        assert!(matches!(refused, Err(TapError::Mask(_))), "{refused:?}");
        let unnamed = open(&TapSource::Unnamed, 1, &TapSettings::default()).unwrap();
        assert!(if_nametoindex("vmtap0").is_ok());
        drop(unnamed);
    });
}

#[test]
fn several_pairs_have_several_queues() {
    in_own_namespace(|| {
        let taps = open_one("utm0", 3).unwrap();
        for enabled in [false, true, false] {
            taps[2].set_enabled(enabled).unwrap();
        }
        // A tap that was made for one queue has no second.
        let single = open_one("uts0", 1).unwrap();
        drop(single);
        let single = open_one("uts0", 1).unwrap();
        let refused = open_one("uts0", 2).map(drop).unwrap_err();
        assert!(refused.to_string().contains("multi_queue"), "{refused}");
        drop(single);
        // And one that was made for several can be used with one.
        let one = open_one("utm0", 1).unwrap();
        drop((one, taps));
    });
}

#[test]
fn descriptors_are_adopted_if_they_are_a_tap_s() {
    in_own_namespace(|| {
        let raw = |flags: u16| -> OwnedFd {
            let file = OpenOptions::new().read(true).write(true).open(TUN).unwrap();
            ioctl::bind(file.as_fd(), &name_bytes("utd%d").unwrap(), flags).unwrap();
            file.into()
        };
        let adopt = |fds| open(&TapSource::Descriptors(fds), 1, &TapSettings::default());
        let good = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        let taps = adopt(vec![raw(good)]).unwrap();
        let error = loop {
            match taps[0].read(&mut [0; 2048]) {
                Ok(_) => {}
                Err(error) => break error,
            }
        };
        assert_ne!(error.kind(), io::ErrorKind::InvalidInput);
        let refused = |fds| adopt(fds).map(drop).unwrap_err().to_string();
        assert!(refused(vec![raw(IFF_TAP | IFF_NO_PI)]).contains("IFF_VNET_HDR"));
        // Without IFF_NO_PI: kernels that have no packet information left report the flag anyway.
        if ioctl::bound_to(raw(IFF_TAP | IFF_VNET_HDR).as_fd()).unwrap().1 & IFF_NO_PI == 0 {
            assert!(refused(vec![raw(IFF_TAP | IFF_VNET_HDR)]).contains("IFF_NO_PI"));
        }
        assert!(refused(vec![raw(0x0001 | IFF_NO_PI | IFF_VNET_HDR)]).contains("tun device"));
        assert!(refused(vec![File::open("/dev/null").unwrap().into()]).contains("not bound"));
        assert!(refused(vec![raw(good), raw(good)]).contains("2 descriptors"));
    });
}
