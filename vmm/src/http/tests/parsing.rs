//! Bytes of any kind against the pure parts.

use proptest::prelude::*;

use crate::http::head::{self, Head, HeadError, Method};
use crate::http::route;
use crate::http::{BODY_BYTES_MAX, HEAD_BYTES_MAX};

fn parsed(text: &str) -> Result<Option<(Head, usize)>, HeadError> {
    head::parse(text.as_bytes())
}

#[test]
fn a_head_says_what_it_means() {
    let text = "PUT http://localhost/api/v1/vm.create?x=1 HTTP/1.1\r\nCONTENT-LENGTH: 12\r\n\
                expect: 100-Continue\r\nConnection: Keep-Alive, close\r\n\r\nbody";
    let (head, length) = parsed(text).unwrap().unwrap();
    assert_eq!(length, text.len() - "body".len());
    assert_eq!(
        head,
        Head {
            method: Method::Put,
            path: "/api/v1/vm.create".to_owned(),
            body_length: 12,
            keep_alive: false,
            expects_continue: true,
        }
    );
}

#[test]
fn a_length_is_digits_within_the_limit() {
    let with =
        |length: &str| parsed(&format!("PUT / HTTP/1.1\r\nContent-Length: {length}\r\n\r\n"));
    assert_eq!(with("0").unwrap().unwrap().0.body_length, 0);
    assert!(with(&BODY_BYTES_MAX.to_string()).is_ok());
    assert_eq!(with(&(BODY_BYTES_MAX + 1).to_string()), Err(HeadError::BodyTooLarge));
    assert_eq!(with("99999999999999999999999999"), Err(HeadError::BodyTooLarge));
    for nonsense in ["", "-1", "+1", "0x10", "1 2", "1,1", "one"] {
        assert!(matches!(with(nonsense), Err(HeadError::Length(_))), "{nonsense:?}");
    }
}

#[test]
fn lengths_may_repeat_but_not_differ() {
    let both = "PUT / HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n";
    assert_eq!(parsed(both), Err(HeadError::LengthConflict));
    let same = "PUT / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n";
    assert_eq!(parsed(same).unwrap().unwrap().0.body_length, 2);
    let different = "PUT / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 1\r\n\r\n";
    assert_eq!(parsed(different), Err(HeadError::LengthConflict));
}

proptest! {
    #[test]
    fn no_bytes_break_the_head(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        if let Ok(Some((head, length))) = head::parse(&bytes) {
            prop_assert!(length <= bytes.len().min(HEAD_BYTES_MAX));
            prop_assert!(u64::try_from(head.body_length).unwrap() <= BODY_BYTES_MAX);
        }
    }

    #[test]
    fn no_header_breaks_the_head(name in "[a-zA-Z-]{1,20}", value in "[ -~]{0,40}") {
        let names = ["Content-Length", "Expect", "Connection", "Transfer-Encoding", name.as_str()];
        for name in names {
            let _ = parsed(&format!("GET / HTTP/1.1\r\n{name}: {value}\r\n\r\n"));
        }
    }

    #[test]
    fn a_head_is_found_wherever_it_is_cut(cut in 0_usize..60) {
        let text = b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 4\r\n\r\n{  }";
        let length = text.len() - 4;
        let found = head::parse(&text[..cut.min(text.len())]).unwrap();
        prop_assert_eq!(found.is_some(), cut >= length);
    }

    #[test]
    fn no_body_breaks_a_route(
        name in "(vm|vmm)\\.[a-z-]{1,20}",
        body in proptest::collection::vec(any::<u8>(), 0..200),
        descriptors in 0_usize..4,
    ) {
        let names = [
            "vm.create", "vm.restore", "vm.replicate", "vm.receive-replica", "vm.failover",
            "vm.snapshot", "vm.add-disk", "vm.add-net", "vmm.ping", name.as_str(),
        ];
        for name in names {
            for method in [Method::Get, Method::Put, Method::Other] {
                let _ = route::route(method, &format!("/api/v1/{name}"), &body, descriptors);
            }
        }
    }
}
