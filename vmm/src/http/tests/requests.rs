//! One client that does as it should, or asks for what it cannot have.

use std::io::{IoSlice, Write};
use std::os::fd::AsRawFd;

use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::*;
use crate::request::FailureKind;

fn script(request: &Request) -> Result<Reply, Failure> {
    match request {
        Request::VmmPing => Ok(Reply::Json("{\"version\":\"1\"}".to_owned())),
        Request::VmInfo => Err(Failure::new(FailureKind::NotFound, "No VM is created")),
        Request::VmBoot => Err(Failure {
            kind: FailureKind::Internal,
            chain: vec!["Cannot boot".to_owned(), "Kernel \"x\" is none".to_owned()],
        }),
        Request::VmReplicate(_) => Err(Failure::new(FailureKind::Conflict, "Already")),
        Request::VmResume => Err(Failure::new(FailureKind::BadRequest, "Bad")),
        _ => Ok(Reply::Empty),
    }
}

#[test]
fn an_answer_is_spelled_as_clients_read_it() {
    let bed = Bed::new(script);
    assert_eq!(
        bed.exchange(&get("vmm.ping")),
        "HTTP/1.1 200 OK\r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
         Content-Type: application/json\r\nContent-Length: 15\r\n\r\n{\"version\":\"1\"}"
    );
    assert_eq!(
        bed.exchange(&put("vm.pause", "")),
        "HTTP/1.1 204 No Content\r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\r\n"
    );
    assert_eq!(
        bed.exchange(&put("vmm.shutdown", "")),
        "HTTP/1.1 200 OK\r\nServer: Cloud Hypervisor API\r\nConnection: keep-alive\r\n\
         Content-Length: 0\r\n\r\n"
    );
}

#[test]
fn failures_have_their_code_and_the_whole_chain() {
    let bed = Bed::new(script);
    let cases = [
        (get("vm.info"), "404 Not Found", "[\"No VM is created\"]"),
        (
            put("vm.boot", ""),
            "500 Internal Server Error",
            "[\"Cannot boot\",\"Kernel \\\"x\\\" is none\"]",
        ),
        (put("vm.replicate", "{\"destination_url\":\"\"}"), "409 Conflict", "[\"Already\"]"),
        (put("vm.resume", ""), "400 Bad Request", "[\"Bad\"]"),
    ];
    for (bytes, status, body) in cases {
        let answer = bed.exchange(&bytes);
        assert_eq!(status_of(&answer), format!("HTTP/1.1 {status}"));
        assert_eq!(body_of(&answer), body);
    }
}

#[test]
fn every_route_reaches_the_control_loop_as_its_own_request() {
    let bed = Bed::new(|_| Ok(Reply::Empty));
    let url = "{\"source_url\":\"file:///a\",\"destination_url\":\"file:///a\",\
               \"receiver_url\":\"tcp:a:1\"}";
    let gets = [
        ("vmm.ping", "VmmPing"),
        ("vm.info", "VmInfo"),
        ("vm.counters", "VmCounters"),
        ("vm.replication-info", "VmReplicationInfo"),
    ];
    let bodyless = [
        ("vmm.shutdown", "VmmShutdown"),
        ("vm.delete", "VmDelete"),
        ("vm.boot", "VmBoot"),
        ("vm.pause", "VmPause"),
        ("vm.resume", "VmResume"),
        ("vm.shutdown", "VmShutdown"),
        ("vm.reboot", "VmReboot"),
        ("vm.power-button", "VmPowerButton"),
        ("vm.stop-replication", "VmStopReplication"),
    ];
    let bodied = [
        ("vm.create", "{}", "VmCreate"),
        ("vm.snapshot", url, "VmSnapshot"),
        ("vm.restore", url, "VmRestore"),
        ("vm.send-migration", url, "VmSendMigration"),
        ("vm.receive-migration", url, "VmReceiveMigration"),
        ("vm.replicate", "{\"destination_url\":\"tcp:a:1\"}", "VmReplicate"),
        ("vm.receive-replica", "{\"receiver_url\":\"tcp:a:1\"}", "VmReceiveReplica"),
        ("vm.failover", "{}", "VmFailover"),
    ];
    let mut wanted = Vec::new();
    for (name, request) in gets {
        assert!(bed.exchange(&get(name)).starts_with("HTTP/1.1 2"), "{name}");
        wanted.push(request);
    }
    for (name, request) in bodyless {
        assert!(bed.exchange(&put(name, "")).starts_with("HTTP/1.1 2"), "{name}");
        wanted.push(request);
    }
    for (name, body, request) in bodied {
        assert!(bed.exchange(&put(name, body)).starts_with("HTTP/1.1 204"), "{name}");
        wanted.push(request);
    }
    let seen = bed.seen();
    assert_eq!(seen.len(), wanted.len());
    for ((seen, _), wanted) in seen.iter().zip(wanted) {
        assert_eq!(seen.split('(').next(), Some(wanted));
    }
}

#[test]
fn what_cannot_be_asked_is_refused_before_the_control_loop() {
    let bed = Bed::new(script);
    let cases = [
        (get("vm.nothing"), "404 Not Found", "Route is unknown: /api/v1/vm.nothing"),
        (b"GET / HTTP/1.1\r\n\r\n".to_vec(), "404 Not Found", "Route is unknown: /"),
        (get("vm.boot"), "400 Bad Request", "vm.boot takes the method PUT"),
        (put("vmm.ping", ""), "400 Bad Request", "vmm.ping takes the method GET"),
        (put("vm.boot", "{}"), "400 Bad Request", "vm.boot takes no body"),
        (put("vm.create", ""), "400 Bad Request", "vm.create needs a body"),
        (put("vm.create", "{"), "400 Bad Request", "Cannot parse the body of vm.create"),
        (
            put("vm.create", " []"),
            "400 Bad Request",
            "The body of vm.create is an array, not an object",
        ),
        (put("vm.create", "\"x\""), "400 Bad Request", "Cannot parse the body of vm.create"),
        (put("vm.failover", "{\"x\":1}"), "400 Bad Request", "unknown field `x`"),
        (put("vm.add-disk", "{}"), "400 Bad Request", "disks[0].path is missing"),
        (put("vm.add-disk", "{\"path\":\"/a\",\"iommu\":true}"), "400 Bad Request", "disks iommu"),
        (put("vm.add-net", "{\"vhost_user\":true}"), "400 Bad Request", "net vhost_user"),
        (put("vm.add-net", "{\"fds\":[3]}"), "400 Bad Request", "net fds"),
        (
            b"DELETE /api/v1/vm.delete HTTP/1.1\r\n\r\n".to_vec(),
            "400 Bad Request",
            "vm.delete takes the method PUT",
        ),
        (
            b"PUT /api/v1/vm.create HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
                .to_vec(),
            "411 Length Required",
            "Transfer-Encoding is not supported",
        ),
        (
            b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: +2\r\n\r\n{}".to_vec(),
            "400 Bad Request",
            "Header Content-Length is no number",
        ),
        (
            b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"
                .to_vec(),
            "400 Bad Request",
            "contradict each other",
        ),
        (
            b"PUT /api/v1/vm.create HTTP/1.1\r\nExpect: 200-maybe\r\n\r\n".to_vec(),
            "417 Expectation Failed",
            "200-maybe",
        ),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n".to_vec(), "400 Bad Request", "malformed"),
        (b"GET /api/v1/vmm.ping HTTP/3.0\r\n\r\n".to_vec(), "400 Bad Request", "malformed"),
    ];
    for (bytes, status, message) in cases {
        let answer = bed.exchange(&bytes);
        assert_eq!(status_of(&answer), format!("HTTP/1.1 {status}"), "{message}");
        let chain: Vec<String> = serde_json::from_str(body_of(&answer)).unwrap();
        assert!(chain.iter().any(|cause| cause.contains(message)), "{message}: {chain:?}");
    }
    assert_eq!(bed.seen(), []);
}

#[test]
fn a_connection_serves_many_requests() {
    let bed = Bed::new(script);
    let mut stream = bed.connect();
    for _ in 0..100 {
        for (bytes, status) in [
            (get("vmm.ping"), 200),
            (get("vm.nothing"), 404),
            (put("vm.create", "{}"), 204),
            (put("vm.create", "nonsense"), 400),
            (put("vm.boot", ""), 500),
        ] {
            stream.write_all(&bytes).unwrap();
            assert_eq!(read_answer(&mut stream).0, status);
        }
    }
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let bed = Bed::new(script);
    let mut bytes = get("vmm.ping");
    bytes.extend(put("vm.create", "{\"cpus\":{\"boot_vcpus\":1,\"max_vcpus\":1}}"));
    bytes.extend(get("vm.info"));
    bytes.extend(put("vmm.shutdown", ""));
    let answers = bed.exchange(&bytes);
    let codes: Vec<&str> = answers
        .match_indices("HTTP/1.1 ")
        .map(|(at, found)| &answers[at + found.len()..][..3])
        .collect();
    assert_eq!(codes, ["200", "204", "404", "200"]);
}

#[test]
fn a_request_may_come_byte_by_byte() {
    let bed = Bed::new(script);
    let mut stream = bed.connect();
    for byte in put("vm.create", "{ }") {
        stream.write_all(&[byte]).unwrap();
    }
    assert_eq!(read_answer(&mut stream).0, 204);
}

#[test]
fn the_connection_ends_when_the_client_asks_for_it() {
    let bed = Bed::new(script);
    let mut stream = bed.connect();
    stream.write_all(b"GET /api/v1/vmm.ping HTTP/1.1\r\nConnection: close\r\n\r\n").unwrap();
    let answer = read_all(&mut stream);
    assert!(answer.contains("\r\nConnection: close\r\n"), "{answer}");
    let mut stream = bed.connect();
    stream.write_all(b"GET /api/v1/vmm.ping HTTP/1.0\r\n\r\n").unwrap();
    assert!(read_all(&mut stream).starts_with("HTTP/1.1 200 OK"));
}

#[test]
fn the_target_may_name_a_host_and_a_query() {
    let bed = Bed::new(script);
    for target in ["http://localhost/api/v1/vmm.ping", "/api/v1/vmm.ping?a=b", "/api/v1/vmm.ping"] {
        let answer = bed.exchange(format!("GET {target} HTTP/1.1\r\n\r\n").as_bytes());
        assert_eq!(status_of(&answer), "HTTP/1.1 200 OK", "{target}");
    }
}

#[test]
fn a_client_that_expects_a_continue_gets_one() {
    let bed = Bed::new(script);
    let mut stream = bed.connect();
    let head =
        b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n";
    stream.write_all(head).unwrap();
    assert_eq!(read_answer(&mut stream).0, 100);
    stream.write_all(b"{}").unwrap();
    assert_eq!(read_answer(&mut stream).0, 204);
    // Where the body would be refused, the client is spared sending it.
    let head = b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 9999999\r\n\
                 Expect: 100-continue\r\n\r\n";
    stream.write_all(head).unwrap();
    assert_eq!(read_answer(&mut stream).0, 413);
}

#[test]
fn a_body_is_taken_up_to_the_limit() {
    let bed = Bed::new(script);
    let limit = usize::try_from(super::super::BODY_BYTES_MAX).unwrap();
    let largest = format!("{{{}}}", " ".repeat(limit - 2));
    assert!(bed.exchange(&put("vm.create", &largest)).starts_with("HTTP/1.1 204"));
    let larger = format!("{{{}}}", " ".repeat(limit - 1));
    assert!(bed.exchange(&put("vm.create", &larger)).starts_with("HTTP/1.1 413"));
}

#[test]
fn a_hundred_mebibytes_get_one_clear_answer() {
    let bed = Bed::new(script);
    let length = 100 << 20;
    let mut stream = bed.connect();
    let head = format!("PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: {length}\r\n\r\n");
    stream.write_all(head.as_bytes()).unwrap();
    let chunk = vec![b' '; 1 << 20];
    for _ in 0..100 {
        // A client that only writes must get through, or be told; it is not to hang.
        if stream.write_all(&chunk).is_err() {
            break;
        }
    }
    let answer = read_all(&mut stream);
    assert_eq!(status_of(&answer), "HTTP/1.1 413 Content Too Large");
    assert_eq!(answer.matches("HTTP/1.1").count(), 1);
    assert_eq!(body_of(&answer), "[\"Request body is larger than 4194304 bytes\"]");
    assert_eq!(bed.seen(), []);
}

#[test]
fn a_head_is_taken_up_to_the_limit() {
    let bed = Bed::new(script);
    let with = |padding: usize| {
        format!("GET /api/v1/vmm.ping HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(padding)).into_bytes()
    };
    let fitting = super::super::HEAD_BYTES_MAX - with(0).len();
    assert_eq!(status_of(&bed.exchange(&with(fitting))), "HTTP/1.1 200 OK");
    let refused = "HTTP/1.1 431 Request Header Fields Too Large";
    assert_eq!(status_of(&bed.exchange(&with(fitting + 1))), refused);
    assert_eq!(status_of(&bed.exchange(&vec![b'x'; 1 << 20])), refused);
    let many = format!("GET / HTTP/1.1\r\n{}\r\n", "A: b\r\n".repeat(1000));
    assert_eq!(status_of(&bed.exchange(many.as_bytes())), "HTTP/1.1 400 Bad Request");
}

#[test]
fn a_request_that_ends_early_is_told_so() {
    let bed = Bed::new(script);
    let answer = bed.exchange(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Le");
    assert_eq!(status_of(&answer), "HTTP/1.1 400 Bad Request");
    assert_eq!(body_of(&answer), "[\"Request ended within its head\"]");
    let answer = bed.exchange(b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 10\r\n\r\n{}");
    assert_eq!(body_of(&answer), "[\"Request body ended after 2 of 10 bytes\"]");
    assert_eq!(bed.exchange(b""), "");
    assert_eq!(bed.seen(), []);
}

/// Sends `bytes` with `count` descriptors.
fn send_with_descriptors(stream: &UnixStream, bytes: &[u8], count: usize) {
    let file = std::fs::File::open("/dev/null").unwrap();
    let raw = vec![file.as_raw_fd(); count];
    let control = [ControlMessage::ScmRights(&raw)];
    let slices = [IoSlice::new(bytes)];
    let sent = sendmsg::<()>(stream.as_raw_fd(), &slices, &control, MsgFlags::empty(), None);
    assert_eq!(sent.unwrap(), bytes.len());
}

#[test]
fn descriptors_come_with_their_own_request() {
    let bed = Bed::new(script);
    let mut stream = bed.connect();
    let restore = "{\"source_url\":\"file:///a\",\"net_fds\":[{\"id\":\"n\",\"num_fds\":3}]}";
    // A request before and one after on the same connection have none.
    stream.write_all(&get("vmm.ping")).unwrap();
    send_with_descriptors(&stream, &put("vm.restore", restore), 3);
    stream.write_all(&get("vmm.ping")).unwrap();
    assert_eq!(read_answer(&mut stream).0, 200);
    assert_eq!(read_answer(&mut stream).0, 204);
    assert_eq!(read_answer(&mut stream).0, 200);
    let card = "{\"num_queues\":4}";
    send_with_descriptors(&stream, &put("vm.add-net", card), 2);
    stream.write_all(&put("vm.add-net", card)).unwrap();
    assert_eq!(read_answer(&mut stream).0, 204);
    assert_eq!(read_answer(&mut stream).0, 204);
    let counts: Vec<usize> = bed.seen().iter().map(|(_, count)| *count).collect();
    assert_eq!(counts, [0, 3, 0, 2, 0]);
}

#[test]
fn a_request_takes_all_the_descriptors_of_a_message() {
    let bed = Bed::new(script);
    let mut stream = bed.connect();
    for count in [65, 253] {
        let nets = format!("[{{\"id\":\"n\",\"num_fds\":{count}}}]");
        let restore = format!("{{\"source_url\":\"file:///a\",\"net_fds\":{nets}}}");
        send_with_descriptors(&stream, &put("vm.restore", &restore), count);
        assert_eq!(read_answer(&mut stream).0, 204, "{count}");
    }
    // The largest card.
    send_with_descriptors(&stream, &put("vm.add-net", "{\"num_queues\":256}"), 128);
    assert_eq!(read_answer(&mut stream).0, 204);
    let counts: Vec<usize> = bed.seen().iter().map(|(_, count)| *count).collect();
    assert_eq!(counts, [65, 253, 128]);
}

#[test]
fn a_wrong_number_of_descriptors_is_refused() {
    let bed = Bed::new(script);
    let mut stream = bed.connect();
    let restore = "{\"source_url\":\"file:///a\",\"net_fds\":[{\"id\":\"n\",\"num_fds\":2}]}";
    for count in [1, 3] {
        send_with_descriptors(&stream, &put("vm.restore", restore), count);
        let (status, body) = read_answer(&mut stream);
        assert_eq!(status, 400);
        assert_eq!(body, format!("[\"vm.restore takes 2 descriptors here, {count} came\"]"));
    }
    // A card has its tap by name, or a descriptor for each queue pair.
    let card = "{\"num_queues\":4,\"fds\":[-1,-1]}";
    send_with_descriptors(&stream, &put("vm.add-net", card), 1);
    let (status, body) = read_answer(&mut stream);
    assert_eq!(status, 400);
    assert_eq!(body, "[\"vm.add-net takes 2 descriptors here, 1 came\"]");
    send_with_descriptors(&stream, &get("vmm.ping"), 1);
    assert_eq!(read_answer(&mut stream).0, 400);
    // No message carries more than 253.
    let request = put("vm.restore", restore);
    send_with_descriptors(&stream, &request[..9], 253);
    send_with_descriptors(&stream, &request[9..], 1);
    let (status, body) = read_answer(&mut stream);
    assert_eq!((status, body.as_str()), (400, "[\"More than 253 descriptors came\"]"));
    assert_eq!(bed.seen(), []);
}
