//! The device on a real tap, in a network namespace of the test's own.

use std::net::UdpSocket;

use nix::sched::{CloneFlags, unshare};

use super::*;

/// Runs `test` where it can do no harm. Needs root (or CAP_SYS_ADMIN and CAP_NET_ADMIN) and
/// /dev/net/tun.
pub(in super::super) fn in_own_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap_or_else(|errno| {
            panic!("this test needs a network namespace of its own, so root: {errno}")
        });
        assert!(
            std::path::Path::new("/dev/net/tun").exists(),
            "this test needs /dev/net/tun: modprobe tun"
        );
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn settings() -> TapSettings {
    TapSettings {
        ip: Some("192.168.77.1".parse().unwrap()),
        mask: Some("255.255.255.0".parse().unwrap()),
        mac: Some("02:00:00:00:00:77".parse().unwrap()),
        mtu: None,
    }
}

/// A UDP datagram of the host must come out of the receive ring, and one that the guest sends must
/// reach the host, once its epoch is committed.
#[test]
fn packets_pass_between_a_real_tap_and_the_guest() {
    in_own_namespace(|| {
        let tap = TapSource::Named("utap0".to_owned());
        let options = NetOptions { tap, host: settings(), mtu: Some(1400), ..options(1) };
        let net = Net::new(options).unwrap();
        assert!(!std::path::Path::new("/proc/self/net/dev_snmp6/utap0").exists());
        net.try_attach().unwrap();
        let refused = net.attach_with(|_, _, _| Err(io::ErrorKind::OutOfMemory.into()));
        assert!(refused.unwrap_err().to_string().contains("Cannot start a thread"));
        assert!(!std::path::Path::new("/proc/self/net/dev_snmp6/utap0").exists(), "it was let go");
        net.attach().unwrap();
        net.try_attach().unwrap();
        let tap = TapSource::Named("utap0".to_owned());
        let busy = Net::new(NetOptions { tap, ..self::options(1) }).unwrap();
        let refused = busy.try_attach().unwrap_err();
        assert!(refused.to_string().contains("utap0"), "{refused}");
        let again = net.attach().unwrap_err();
        assert!(again.to_string().contains("attached before"), "{again}");

        let mut bench = Bench::idle(self::options(1));
        bench.net = net;
        bench.activate(bench.net.features() & !features::EVENT_IDX);
        for slot in 0..8 {
            bench.offer(0, BUFFERS + 0x40_0000 + 0x1000 * slot, 4096);
        }
        let socket = UdpSocket::bind("192.168.77.1:7777").unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        socket.send_to(b"who are you", "192.168.77.2:7778").unwrap();
        let request = receive(&mut bench, |frame| frame[12..14] == [0x08, 0x06]);
        bench.send(0, &with_header(&arp_reply(&request)));
        let packet = receive(&mut bench, |frame| frame[12..14] == [0x08, 0x00]);
        assert_eq!(packet[..6], [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
        assert!(packet.ends_with(b"who are you"));

        // The guest's answer waits for its epoch.
        bench.net.gate().hold();
        bench.send(0, &with_header(&udp_answer(&packet, b"the guest")));
        wait_for("it waits in the gate", || bench.net.gate().open_bytes() > 0);
        socket.set_nonblocking(true).unwrap();
        settle();
        assert!(socket.recv(&mut [0; 64]).is_err(), "nothing leaves before its commit");
        socket.set_nonblocking(false).unwrap();
        bench.net.gate().seal(1);
        bench.net.gate().commit(1);
        let mut answer = [0; 64];
        let (len, from) = socket.recv_from(&mut answer).unwrap();
        assert_eq!(&answer[..len], b"the guest");
        assert_eq!(from.to_string(), "192.168.77.2:7778");
        assert_eq!(bench.heard.reset_count(), 0);
    });
}

/// Frames of many flows arrive on the pairs that the driver uses, whichever the host chooses, and
/// none is lost to a queue that nobody reads.
#[test]
fn a_real_tap_feeds_the_pairs_in_use() {
    in_own_namespace(|| {
        let tap = TapSource::Named("utap1".to_owned());
        let net = Net::new(NetOptions { tap, host: settings(), ..options(2) }).unwrap();
        net.attach().unwrap();
        let mut bench = Bench::idle(self::options(2));
        bench.net = net;
        bench.activate(bench.net.features() & !features::EVENT_IDX);
        wait_for("the second queue is off", || {
            bench.net.shared.taps_enabled.load(Ordering::SeqCst) == 1
        });
        let socket = UdpSocket::bind("192.168.77.1:0").unwrap();
        socket.set_broadcast(true).unwrap();
        for pairs in [1u8, 2, 1] {
            bench.write(BUFFERS, &[4, 0, pairs, 0]);
            bench.control.add(&[(BUFFERS, 4, 0), (BUFFERS + 16, 1, WRITE)]);
            bench.control.kick();
            bench.control.wait_used(1);
            assert_eq!(bench.read(BUFFERS + 16, 1), [0]);
            // More flows than a hash puts on one queue. No ARP: everybody is meant.
            for port in 9000..9040 {
                socket.send_to(&[pairs], ("192.168.77.255", port)).unwrap();
                let mut found = false;
                wait_for("the datagram", || {
                    for pair in 0..2 {
                        if bench.receive[pair].avail == bench.receive[pair].seen {
                            bench.offer(pair, BUFFERS + 0x1000 * (1 + pair as u64), 4096);
                        }
                        for (_, len) in bench.receive[pair].take_used() {
                            let address = BUFFERS + 0x1000 * (1 + pair as u64);
                            let frame = bench.read(address, usize::try_from(len).unwrap());
                            assert!(pair < usize::from(pairs), "pair {pair} is not in use");
                            found |= frame.ends_with(&[pairs]);
                        }
                    }
                    found
                });
            }
        }
        assert_eq!(bench.net.shared.counters.rx_errors.get(), 0);
    });
}

/// The next frame of the wanted kind that the guest receives, without its header.
fn receive(bench: &mut Bench, wanted: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let mut found = None;
    wait_for("a frame of the wanted kind", || {
        for (head, len) in bench.receive[0].take_used() {
            let address = BUFFERS + 0x40_0000 + 0x1000 * u64::from(head % 8);
            let frame = bench.read(address, usize::try_from(len).unwrap());
            bench.offer(0, address, 4096);
            if wanted(&frame[HEADER_BYTES..]) {
                found = Some(frame[HEADER_BYTES..].to_vec());
                return true;
            }
        }
        false
    });
    found.unwrap()
}

fn with_header(frame: &[u8]) -> Vec<u8> {
    let mut all = vec![0; HEADER_BYTES];
    all.extend(frame);
    all
}

const GUEST_MAC: [u8; 6] = [0x52, 0x54, 0, 0x12, 0x34, 0x56];

fn arp_reply(request: &[u8]) -> Vec<u8> {
    let mut reply = request.to_vec();
    reply[..6].copy_from_slice(&request[6..12]);
    reply[6..12].copy_from_slice(&GUEST_MAC);
    reply[21] = 2;
    reply[22..28].copy_from_slice(&GUEST_MAC);
    reply[28..32].copy_from_slice(&request[38..42]);
    reply[32..42].copy_from_slice(&request[22..32]);
    reply
}

/// An answer to an IPv4 packet without options. UDP's checksum is optional there.
fn udp_answer(packet: &[u8], payload: &[u8]) -> Vec<u8> {
    let mut answer = packet[..42].to_vec();
    answer[..6].copy_from_slice(&packet[6..12]);
    answer[6..12].copy_from_slice(&GUEST_MAC);
    let len = u16::try_from(payload.len()).unwrap();
    answer[16..18].copy_from_slice(&(28 + len).to_be_bytes());
    answer[24..26].fill(0);
    answer[26..30].copy_from_slice(&packet[30..34]);
    answer[30..34].copy_from_slice(&packet[26..30]);
    let sum: u32 = answer[14..34]
        .chunks(2)
        .map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]])))
        .sum();
    let sum = u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    answer[24..26].copy_from_slice(&(!sum).to_be_bytes());
    answer[34..36].copy_from_slice(&packet[36..38]);
    answer[36..38].copy_from_slice(&packet[34..36]);
    answer[38..40].copy_from_slice(&(8 + len).to_be_bytes());
    answer[40..42].fill(0);
    answer.extend(payload);
    answer
}
