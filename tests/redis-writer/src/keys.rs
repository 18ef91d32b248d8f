//! What is written: a key for each number, and a value that belongs to no other.

/// Bytes of a value: some keys share a page of the append-only file, and some span two.
const VALUE_BYTES: usize = 200;

pub fn key(number: u64) -> Vec<u8> {
    format!("key:{number}").into_bytes()
}

pub fn value(number: u64) -> Vec<u8> {
    format!("value {number} ").into_bytes().into_iter().cycle().take(VALUE_BYTES).collect()
}

/// Collects what is wrong with the acknowledged keys, for one message.
#[derive(Default)]
pub struct Losses {
    first: Option<String>,
    count: u64,
}

impl Losses {
    /// Compares what was found for a key with what was acknowledged.
    pub fn compare(&mut self, number: u64, found: Option<&[u8]>) {
        let what = match found {
            Some(found) if found == value(number) => return,
            Some(found) => format!("key {number} holds '{}'", String::from_utf8_lossy(found)),
            None => format!("key {number} is missing"),
        };
        self.count += 1;
        self.first.get_or_insert(what);
    }

    /// An error that names the first, when there was any.
    pub fn none(self) -> anyhow::Result<()> {
        match self.first {
            None => Ok(()),
            Some(first) => {
                anyhow::bail!("{} acknowledged keys are lost or wrong: {first}", self.count)
            }
        }
    }
}
