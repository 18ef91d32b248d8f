//! One connection to a Redis, for its whole life: it is opened once, and its end is an error.

use std::io::{BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::keys::{self, Losses};
use crate::resp::{self, Reply};

/// How long a server may take to answer its first PING, and any later request. Generous: the bed
/// emulates the server's machine on an emulated machine.
const OPEN_LIMIT: Duration = Duration::from_secs(300);
const ANSWER_LIMIT: Duration = Duration::from_secs(240);
const TRY_LIMIT: Duration = Duration::from_secs(5);
const PAUSE: Duration = Duration::from_millis(200);
/// SETs that wait for their answer at any time, so that the server is never without work.
const WINDOW: u64 = 8;
/// Keys of one MGET.
const BATCH: usize = 50;

pub struct Connection {
    stream: TcpStream,
    replies: BufReader<TcpStream>,
}

/// What `Connection::write` did.
#[derive(Debug)]
pub struct Written {
    /// Keys 1 to this one were acknowledged.
    pub acknowledged: u64,
    /// The longest time between two acknowledgements, and which one ended it.
    pub silence_max: Duration,
    pub silence_before: u64,
}

impl Connection {
    /// Tries until the server answers a PING as it should.
    pub fn open(address: &str) -> Result<Self> {
        let address: SocketAddr =
            address.parse().with_context(|| format!("'{address}' is no address with a port"))?;
        let begun = Instant::now();
        loop {
            match Self::try_open(address) {
                Ok(connection) => return Ok(connection),
                Err(error) if begun.elapsed() > OPEN_LIMIT => {
                    return Err(error.context(format!("No Redis at {address}")));
                }
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }

    fn try_open(address: SocketAddr) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&address, TRY_LIMIT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(ANSWER_LIMIT))?;
        let replies = BufReader::new(stream.try_clone()?);
        let mut connection = Self { stream, replies };
        connection.send(&[b"PING"])?;
        match connection.reply()? {
            Reply::Status(status) if status == "PONG" => Ok(connection),
            other => bail!("The answer to PING is {other:?}"),
        }
    }

    /// Sets key after key until `finish`, then waits for the answers that are due. Each number goes
    /// to `log` as soon as it is acknowledged.
    pub fn write(&mut self, log: &mut impl Write, finish: impl Fn() -> bool) -> Result<Written> {
        let mut sent = 0;
        let mut last: Option<Instant> = None;
        let mut written =
            Written { acknowledged: 0, silence_max: Duration::ZERO, silence_before: 0 };
        let mut finishing = false;
        loop {
            finishing = finishing || finish();
            while !finishing && sent < written.acknowledged + WINDOW {
                sent += 1;
                self.send(&[b"SET", &keys::key(sent), &keys::value(sent)])?;
            }
            if written.acknowledged == sent {
                return Ok(written);
            }
            let number = written.acknowledged + 1;
            match self.reply().with_context(|| format!("Key {number} has no answer"))? {
                Reply::Status(status) if status == "OK" => {}
                other => bail!("The answer to the SET of key {number} is {other:?}"),
            }
            written.acknowledged = number;
            writeln!(log, "{number}").context("Cannot write down what was acknowledged")?;
            let silence = last.map_or(Duration::ZERO, |last| last.elapsed());
            if silence > written.silence_max {
                written.silence_max = silence;
                written.silence_before = number;
            }
            last = Some(Instant::now());
        }
    }

    /// Reads the numbers' keys back. Every one must be there with its own value.
    pub fn verify(&mut self, numbers: &[u64]) -> Result<()> {
        let mut losses = Losses::default();
        for batch in numbers.chunks(BATCH) {
            let names: Vec<Vec<u8>> = batch.iter().map(|&number| keys::key(number)).collect();
            let mut words: Vec<&[u8]> = vec![b"MGET"];
            words.extend(names.iter().map(Vec::as_slice));
            self.send(&words)?;
            let Reply::Array(values) = self.reply().context("MGET has no answer")? else {
                bail!("The answer to MGET is no array");
            };
            ensure!(values.len() == batch.len(), "The answer to MGET has {} values", values.len());
            for (&number, value) in batch.iter().zip(&values) {
                losses.compare(number, value.as_deref());
            }
        }
        losses.none()
    }

    fn send(&mut self, words: &[&[u8]]) -> Result<()> {
        self.stream.write_all(&resp::command(words)).context("Cannot send")
    }

    fn reply(&mut self) -> Result<Reply> {
        resp::read(&mut self.replies)?.context("The server closed the connection")
    }
}

#[cfg(test)]
#[path = "connection_tests.rs"]
mod tests;
