//! Several clients, and such as do not behave.

use std::io::Write;
use std::os::unix::net::UnixListener;

use super::*;
use crate::http::{CONNECTIONS_MAX, HttpError, serve};

fn ping(_: &Request) -> Result<Reply, Failure> {
    Ok(Reply::Json("{}".to_owned()))
}

/// A client that has been served, so that it certainly has its place.
fn settled(bed: &Bed) -> UnixStream {
    let mut stream = bed.connect();
    stream.write_all(&get("vmm.ping")).unwrap();
    assert_eq!(read_answer(&mut stream).0, 200);
    stream
}

#[test]
fn one_client_too_many_is_told_so() {
    let bed = Bed::new(ping);
    let mut clients: Vec<UnixStream> = (0..CONNECTIONS_MAX).map(|_| settled(&bed)).collect();
    let mut late = bed.connect();
    late.write_all(&get("vmm.ping")).unwrap();
    let answer = read_all(&mut late);
    assert_eq!(status_of(&answer), "HTTP/1.1 503 Service Unavailable");
    assert_eq!(body_of(&answer), "[\"10 clients are being served already\"]");
    // The others have noticed nothing.
    for client in &mut clients {
        client.write_all(&get("vmm.ping")).unwrap();
        assert_eq!(read_answer(client).0, 200);
    }
    drop(clients.pop());
    // The server notices at its own pace that a client has left.
    loop {
        let mut next = bed.connect();
        next.write_all(&get("vmm.ping")).unwrap();
        match read_answer(&mut next).0 {
            503 => thread::yield_now(),
            status => break assert_eq!(status, 200),
        }
    }
}

#[test]
fn clients_are_served_at_the_same_time() {
    let bed = Bed::new(ping);
    thread::scope(|scope| {
        for _ in 0..CONNECTIONS_MAX {
            scope.spawn(|| {
                let mut stream = settled(&bed);
                for _ in 0..100 {
                    stream.write_all(&get("vmm.ping")).unwrap();
                    assert_eq!(read_answer(&mut stream).0, 200);
                }
            });
        }
    });
    assert_eq!(bed.seen().len(), CONNECTIONS_MAX * 101);
}

#[test]
fn a_client_that_dawdles_is_cut_off_and_holds_nobody_up() {
    let patience = Patience { request: Duration::from_millis(300), ..Patience::default() };
    let bed = Bed::with_patience(ping, patience);
    let mut dawdlers: Vec<UnixStream> = (1..CONNECTIONS_MAX)
        .map(|_| {
            let mut stream = bed.connect();
            stream.write_all(b"GET /api/v1/vmm.ping HT").unwrap();
            stream
        })
        .collect();
    let mut client = settled(&bed);
    client.write_all(&get("vmm.ping")).unwrap();
    assert_eq!(read_answer(&mut client).0, 200);
    // A byte now and then does not help.
    for dawdler in &mut dawdlers {
        let _ = dawdler.write_all(b"T");
    }
    for dawdler in &mut dawdlers {
        let answer = read_all(dawdler);
        assert_eq!(status_of(&answer), "HTTP/1.1 408 Request Timeout");
    }
}

#[test]
fn a_silent_client_loses_its_place() {
    let patience = Patience { idle: Duration::from_millis(50), ..Patience::default() };
    let bed = Bed::with_patience(ping, patience);
    let mut silent = bed.connect();
    assert_eq!(read_all(&mut silent), "");
}

#[test]
fn a_client_that_does_not_read_holds_nobody_up() {
    fn large(request: &Request) -> Result<Reply, Failure> {
        match request {
            Request::VmInfo => Ok(Reply::Json("x".repeat(8 << 20))),
            _ => Ok(Reply::Empty),
        }
    }
    let patience = Patience { answer: Duration::from_millis(300), ..Patience::default() };
    let bed = Bed::with_patience(large, patience);
    let mut deaf = bed.connect();
    deaf.write_all(&get("vm.info")).unwrap();
    let mut client = bed.connect();
    client.write_all(&put("vm.pause", "")).unwrap();
    assert_eq!(read_answer(&mut client).0, 204);
    // The server gives it up: what comes is the beginning of an answer, and an end.
    let mut started = [0; 1];
    deaf.read_exact(&mut started).unwrap();
    drop(bed);
}

#[test]
fn a_client_that_leaves_before_its_answer_hurts_nobody() {
    let bed = Bed::new(ping);
    for _ in 0..50 {
        let mut stream = bed.connect();
        stream.write_all(&get("vmm.ping")).unwrap();
        drop(stream);
    }
    loop {
        let mut stream = bed.connect();
        let sent = stream.write_all(&get("vmm.ping"));
        match sent.map(|()| read_answer(&mut stream).0) {
            Ok(503) => thread::yield_now(),
            status => break assert_eq!(status.unwrap(), 200),
        }
    }
}

#[test]
fn without_a_control_loop_there_is_an_error() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("api.sock");
    let (calls, receiver) = unbounded();
    let server = serve(ApiSocket::Path(path.clone()), calls).unwrap();
    drop(receiver);
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(&get("vmm.ping")).unwrap();
    let (status, body) = read_answer(&mut stream);
    assert_eq!((status, body.as_str()), (500, "[\"The VMM is shutting down\"]"));
    drop(server);
}

#[test]
fn the_last_answer_is_sent_before_the_server_has_ended() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("api.sock");
    let (calls, receiver) = unbounded::<Call>();
    let patience = Patience { farewell: HANG, ..Patience::default() };
    let server = serve_with(ApiSocket::Path(path.clone()), calls, patience).unwrap();
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(&put("vmm.shutdown", "")).unwrap();
    let call = receiver.recv().unwrap();
    call.reply.send(Ok(Reply::Empty)).unwrap();
    drop(server);
    // The process may end here, so there must be nothing left to wait for.
    stream.set_nonblocking(true).unwrap();
    assert!(!path.exists());
    assert_eq!(read_answer(&mut stream).0, 200);
    assert_eq!(read_all(&mut stream), "");
}

#[test]
fn a_client_that_writes_before_it_reads_gets_to_read_why_it_is_refused() {
    let patience = Patience { linger: HANG, ..Patience::default() };
    let bed = Bed::with_patience(ping, patience);
    let mut stream = bed.connect();
    let head = b"PUT /api/v1/vm.create HTTP/1.1\r\nContent-Length: 8388608\r\n\r\n";
    stream.write_all(head).unwrap();
    for _ in 0..8 {
        stream.write_all(&vec![b' '; 1 << 20]).unwrap();
    }
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(read_all(&mut stream).starts_with("HTTP/1.1 413 "));
}

#[test]
fn an_inherited_socket_is_served() {
    let directory = TempDir::new().unwrap();
    let path = directory.path().join("api.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let (calls, receiver) = unbounded();
    let server = serve(ApiSocket::Descriptor(listener.into()), calls).unwrap();
    let control = thread::spawn(move || control_loop(&receiver, ping, &Mutex::default()));
    let mut stream = UnixStream::connect(&path).unwrap();
    stream.write_all(&get("vmm.ping")).unwrap();
    assert_eq!(read_answer(&mut stream).0, 200);
    drop(server);
    control.join().unwrap();
    // Who made the socket removes it.
    assert!(path.exists());
}

#[test]
fn a_descriptor_that_is_no_listening_socket_is_refused() {
    let (calls, _receiver) = unbounded();
    let file = std::fs::File::open("/dev/null").unwrap();
    let error = serve(ApiSocket::Descriptor(file.into()), calls.clone()).unwrap_err();
    assert!(matches!(error, HttpError::NotListening(_)), "{error:?}");
    let (one, _other) = UnixStream::pair().unwrap();
    let error = serve(ApiSocket::Descriptor(one.into()), calls).unwrap_err();
    assert!(matches!(error, HttpError::NotListening(_)), "{error:?}");
}
