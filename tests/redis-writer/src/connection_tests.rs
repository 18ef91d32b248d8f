//! The client against servers that keep their promises, and that do not.

use std::cell::Cell;
use std::collections::HashMap;
use std::net::TcpListener;
use std::thread::JoinHandle;

use super::*;

/// How a server misbehaves.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Fault {
    None,
    /// Acknowledges this key and does not keep it.
    Forgets(u64),
    /// Keeps this key with another value.
    Garbles(u64),
    /// Answers this key with an error.
    Refuses(u64),
    /// Closes the connection in place of this key's answer.
    Closes(u64),
    /// Is silent this long before it acknowledges this key.
    Waits(u64, Duration),
}

struct Server {
    address: String,
    /// Ends with the number of its connections, once the listener has had as many.
    serving: JoinHandle<()>,
}

/// A server for `connections` connections, one after the other, with one store.
fn server(fault: Fault, connections: usize) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let serving = thread::spawn(move || {
        let mut store = HashMap::new();
        for _ in 0..connections {
            serve(listener.accept().unwrap().0, fault, &mut store);
        }
    });
    Server { address, serving }
}

fn serve(stream: TcpStream, fault: Fault, store: &mut HashMap<Vec<u8>, Vec<u8>>) {
    let mut out = stream.try_clone().unwrap();
    let mut requests = BufReader::new(stream);
    // A client that gave up resets the connection.
    while let Ok(Some(Reply::Array(words))) = resp::read(&mut requests) {
        let mut words = words.into_iter().flatten();
        let verb = words.next().unwrap();
        let answer = match verb.as_slice() {
            b"PING" => b"+PONG\r\n".to_vec(),
            b"SET" => {
                let (key, value) = (words.next().unwrap(), words.next().unwrap());
                let is = |number| key == keys::key(number);
                match fault {
                    Fault::Forgets(number) if is(number) => {}
                    Fault::Garbles(number) if is(number) => {
                        store.insert(key, b"garbled".to_vec());
                    }
                    Fault::Refuses(number) if is(number) => {
                        out.write_all(b"-MISCONF no\r\n").unwrap();
                        continue;
                    }
                    Fault::Closes(number) if is(number) => return,
                    Fault::Waits(number, time) if is(number) => {
                        thread::sleep(time);
                        store.insert(key, value);
                    }
                    _ => {
                        store.insert(key, value);
                    }
                }
                b"+OK\r\n".to_vec()
            }
            _ => {
                let values: Vec<_> = words.map(|key| store.get(&key)).collect();
                let mut answer = format!("*{}\r\n", values.len()).into_bytes();
                for value in values {
                    match value {
                        None => answer.extend(b"$-1\r\n"),
                        Some(value) => {
                            answer.extend(format!("${}\r\n", value.len()).as_bytes());
                            answer.extend(value);
                            answer.extend(b"\r\n");
                        }
                    }
                }
                answer
            }
        };
        if out.write_all(&answer).is_err() {
            return;
        }
    }
}

/// Writes until `rounds` answers were waited for, and reads all back.
fn session(fault: Fault, rounds: u64) -> (Result<Written>, Vec<u8>) {
    let server = server(fault, 1);
    let asked = Cell::new(0);
    let finish = || {
        asked.set(asked.get() + 1);
        asked.get() > rounds
    };
    let mut log = Vec::new();
    let mut connection = Connection::open(&server.address).unwrap();
    let written = connection.write(&mut log, finish).and_then(|written| {
        connection.verify(&(1..=written.acknowledged).collect::<Vec<_>>())?;
        Ok(written)
    });
    drop(connection);
    server.serving.join().unwrap();
    (written, log)
}

fn complaint(fault: Fault) -> String {
    format!("{:#}", session(fault, 40).0.unwrap_err())
}

#[test]
fn every_key_is_acknowledged_written_down_and_read_back() {
    let (written, log) = session(Fault::None, 100);
    let acknowledged = written.unwrap().acknowledged;
    assert_eq!(acknowledged, 100 + WINDOW - 1);
    let lines: String = (1..=acknowledged).map(|number| format!("{number}\n")).collect();
    assert_eq!(String::from_utf8(log).unwrap(), lines);
}

#[test]
fn the_longest_silence_is_measured() {
    let time = Duration::from_millis(300);
    let written = session(Fault::Waits(20, time), 40).0.unwrap();
    assert!(written.silence_max >= time);
    assert_eq!(written.silence_before, 20);
}

#[test]
fn a_lost_key_is_an_error() {
    let said = complaint(Fault::Forgets(7));
    assert_eq!(said, "1 acknowledged keys are lost or wrong: key 7 is missing");
}

#[test]
fn a_wrong_value_is_an_error() {
    assert!(complaint(Fault::Garbles(7)).contains("key 7 holds 'garbled'"));
}

#[test]
fn a_refused_key_is_an_error_and_not_written_down() {
    let (written, log) = session(Fault::Refuses(3), 40);
    assert!(
        format!("{:#}", written.unwrap_err()).contains("SET of key 3 is Error(\"MISCONF no\")")
    );
    assert_eq!(log, b"1\n2\n");
}

#[test]
fn a_closed_connection_is_an_error() {
    let (written, log) = session(Fault::Closes(3), 40);
    // By a reset where requests were under way, which may take answers with it.
    written.unwrap_err();
    assert!(b"1\n2\n".starts_with(&log));
}

#[test]
fn a_second_connection_finds_the_keys_of_the_first() {
    let server = server(Fault::Forgets(5), 3);
    let open = || Connection::open(&server.address).unwrap();
    let asked = Cell::new(0);
    let finish = || asked.replace(asked.get() + 1) >= 10;
    open().write(&mut Vec::new(), finish).unwrap();
    open().verify(&[1, 2, 3, 4, 6]).unwrap();
    assert!(open().verify(&[4, 5, 6]).is_err());
    server.serving.join().unwrap();
}
