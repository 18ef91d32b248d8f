//! The kernel command line: `key=value` words, separated by blanks. A word that is not known is
//! an error, so that a misspelt test does not test something else.

use core::fmt;
use core::net::Ipv4Addr;

use crate::machine::{PAGE_SIZE, VCPUS_MAX};
use crate::order::Pattern;

/// What the guest does; several at once are possible.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Workloads {
    pub count: bool,
    pub verify: bool,
    pub dirty: bool,
    pub compute: bool,
    pub kv: bool,
}

/// How a processor waits that has nothing to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Halted, woken by the local APIC's timer.
    Halt,
    /// In a loop that reads the clock.
    Spin,
}

/// How the guest ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    PowerOff,
    Reset,
    TripleFault,
}

/// What `dirty` writes once before it begins, so that no page is empty or easily compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fill {
    Nothing,
    /// The pages of `dirty_set`.
    Set,
    /// The whole working area.
    All,
}

/// The guest's own address and its network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipv4Cidr {
    pub address: Ipv4Addr,
    pub prefix: u8,
}

/// The whole command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub workloads: Workloads,
    /// None: as many as the MADT lists.
    pub vcpus: Option<u32>,
    /// Report lines after which the guest ends; 0: never.
    pub ticks: u64,
    pub tick_ms: u64,
    pub seed: u64,
    /// None: ask CPUID.
    pub tsc_khz: Option<u64>,
    pub wait: Wait,
    /// Longest nap of `idle`, whose waking up writes memory.
    pub nap_ms: u64,
    pub end: End,
    /// None: all free memory.
    pub verify_mib: Option<u64>,
    /// Pages per second and processor; 0: as many as possible.
    pub verify_rate: u64,
    /// Pages per second of the whole machine; 0: as many as possible.
    pub dirty_pages: u64,
    pub dirty_order: Pattern,
    /// None: all free memory, or 64 MiB where `verify` runs too.
    pub dirty_mib: Option<u64>,
    pub hot_pages: u64,
    /// Pages that are rewritten in rounds, instead of any order and rate; 0: none.
    pub dirty_set: u64,
    /// Sets of that many pages, of which each round has the next one.
    pub dirty_sets: u64,
    /// Adjacent pages of the set.
    pub dirty_run: u64,
    /// From the start of one round to the next; 0: without a wait.
    pub dirty_period_ms: u64,
    /// Bytes of a page that a round changes.
    pub dirty_bytes: u64,
    pub dirty_fill: Fill,
    /// Never None with the workload `kv`.
    pub ip: Option<Ipv4Cidr>,
    /// Where `kv` listens.
    pub port: u16,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            workloads: Workloads::default(),
            vcpus: None,
            ticks: 0,
            tick_ms: 100,
            seed: 1,
            tsc_khz: None,
            wait: Wait::Halt,
            nap_ms: 20,
            end: End::PowerOff,
            verify_mib: None,
            verify_rate: 2000,
            dirty_pages: 0,
            dirty_order: Pattern::Sequential,
            dirty_mib: None,
            hot_pages: 256,
            dirty_set: 0,
            dirty_sets: 1,
            dirty_run: 1,
            dirty_period_ms: 0,
            dirty_bytes: 8,
            dirty_fill: Fill::Nothing,
            ip: None,
            port: 7,
        }
    }
}

/// A word that says nothing sensible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CmdlineError<'a> {
    NotKeyValue(&'a str),
    UnknownKey(&'a str),
    BadValue { key: &'a str, value: &'a str },
    NoAddress,
}

impl fmt::Display for CmdlineError<'_> {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotKeyValue(word) => write!(formatter, "'{word}' is not key=value"),
            Self::UnknownKey(key) => write!(formatter, "Unknown key '{key}'"),
            Self::BadValue { key, value } => write!(formatter, "Bad value '{value}' of '{key}'"),
            Self::NoAddress => formatter.write_str("workload=kv needs 'ip'"),
        }
    }
}

impl core::error::Error for CmdlineError<'_> {}

/// Longest wait between two report lines: an hour.
/// More would be none at all.
const SETS_MAX: u64 = 64;
const TICK_MS_MAX: u64 = 3_600_000;
/// 64 TiB; what is more than free memory is cut down to it.
const MIB_MAX: u64 = 1 << 26;
/// A server's lines are few, so that what is measured is the server.
const KV_TICK_MS: u64 = 1000;

impl Config {
    pub fn parse(line: &str) -> Result<Self, CmdlineError<'_>> {
        let mut config = Self::default();
        for word in line.split_ascii_whitespace() {
            let (key, value) = word.split_once('=').ok_or(CmdlineError::NotKeyValue(word))?;
            config.set(key, value)?;
        }
        if config.workloads.kv && config.ip.is_none() {
            return Err(CmdlineError::NoAddress);
        }
        let is_paced = line.split_ascii_whitespace().any(|word| word.starts_with("tick_ms="));
        if config.workloads.is_only_kv() && !is_paced {
            config.tick_ms = KV_TICK_MS;
        }
        if let Pattern::Hot { hot } = &mut config.dirty_order {
            *hot = config.hot_pages;
        }
        Ok(config)
    }

    fn set<'a>(&mut self, key: &'a str, value: &'a str) -> Result<(), CmdlineError<'a>> {
        let bad = CmdlineError::BadValue { key, value };
        let number = |least, most| number(key, value, least, most);
        match key {
            "workload" => self.workloads = Workloads::parse(value).ok_or(bad)?,
            "vcpus" => {
                let vcpus = number(1, u64::from(VCPUS_MAX))?;
                self.vcpus = Some(u32::try_from(vcpus).map_err(|_| bad)?);
            }
            "ticks" => self.ticks = number(0, u64::MAX)?,
            "tick_ms" => self.tick_ms = number(1, TICK_MS_MAX)?,
            "seed" => self.seed = number(0, u64::MAX)?,
            "tsc_khz" => self.tsc_khz = Some(number(1000, 100_000_000)?),
            "wait" => {
                self.wait = match value {
                    "halt" => Wait::Halt,
                    "spin" => Wait::Spin,
                    _ => return Err(bad),
                }
            }
            "nap_ms" => self.nap_ms = number(1, TICK_MS_MAX)?,
            "end" => {
                self.end = match value {
                    "off" => End::PowerOff,
                    "reset" => End::Reset,
                    "triple" => End::TripleFault,
                    _ => return Err(bad),
                }
            }
            "verify_mib" => self.verify_mib = Some(number(1, MIB_MAX)?),
            "verify_rate" => self.verify_rate = number(0, u64::from(u32::MAX))?,
            _ if key.starts_with("dirty_") || key == "hot_pages" => {
                return self.set_dirty(key, value);
            }
            "ip" => self.ip = Some(Ipv4Cidr::parse(value).ok_or(bad)?),
            "port" => self.port = u16::try_from(number(1, 65535)?).map_err(|_| bad)?,
            _ => return Err(CmdlineError::UnknownKey(key)),
        }
        Ok(())
    }

    fn set_dirty<'a>(&mut self, key: &'a str, value: &'a str) -> Result<(), CmdlineError<'a>> {
        let bad = CmdlineError::BadValue { key, value };
        let number = |least, most| number(key, value, least, most);
        let many = u64::from(u32::MAX);
        match key {
            "dirty_pages" => self.dirty_pages = number(0, many)?,
            "dirty_order" => {
                self.dirty_order = match value {
                    "seq" => Pattern::Sequential,
                    "random" => Pattern::Random,
                    "hot" => Pattern::Hot { hot: 0 },
                    _ => return Err(bad),
                }
            }
            "dirty_mib" => self.dirty_mib = Some(number(1, MIB_MAX)?),
            "hot_pages" => self.hot_pages = number(1, many)?,
            "dirty_set" => self.dirty_set = number(0, many)?,
            "dirty_sets" => self.dirty_sets = number(1, SETS_MAX)?,
            "dirty_run" => self.dirty_run = number(1, many)?,
            "dirty_period_ms" => self.dirty_period_ms = number(0, TICK_MS_MAX)?,
            "dirty_bytes" => {
                let is_words = |bytes: &u64| bytes.is_multiple_of(8);
                self.dirty_bytes = Some(number(8, PAGE_SIZE)?).filter(is_words).ok_or(bad)?;
            }
            "dirty_fill" => {
                self.dirty_fill = match value {
                    "nothing" => Fill::Nothing,
                    "set" => Fill::Set,
                    "all" => Fill::All,
                    _ => return Err(bad),
                }
            }
            _ => return Err(CmdlineError::UnknownKey(key)),
        }
        Ok(())
    }
}

fn number<'a>(
    key: &'a str,
    value: &'a str,
    least: u64,
    most: u64,
) -> Result<u64, CmdlineError<'a>> {
    let bad = CmdlineError::BadValue { key, value };
    let number = value.parse::<u64>().map_err(|_| bad)?;
    (least..=most).contains(&number).then_some(number).ok_or(bad)
}

impl Ipv4Cidr {
    fn parse(value: &str) -> Option<Self> {
        let (address, prefix) = value.split_once('/')?;
        let address: Ipv4Addr = address.parse().ok()?;
        let prefix = prefix.parse().ok().filter(|prefix| *prefix <= 32)?;
        let is_host = !address.is_unspecified() && !address.is_multicast();
        (is_host && !address.is_broadcast()).then_some(Self { address, prefix })
    }
}

impl Workloads {
    fn parse(value: &str) -> Option<Self> {
        let mut workloads = Self::default();
        for name in value.split('+') {
            match name {
                "count" => workloads.count = true,
                "verify" => workloads.verify = true,
                "dirty" => workloads.dirty = true,
                "compute" => workloads.compute = true,
                "kv" => workloads.kv = true,
                "idle" if value == "idle" => {}
                _ => return None,
            }
        }
        Some(workloads)
    }

    /// Whether any processor but the first has something to do.
    #[must_use]
    pub fn need_all_vcpus(self) -> bool {
        self.verify || self.dirty || self.compute
    }

    #[must_use]
    pub fn is_only_kv(self) -> bool {
        self == Self { kv: true, ..Self::default() }
    }

    #[must_use]
    pub fn is_idle(self) -> bool {
        self == Self::default()
    }
}

impl fmt::Display for Workloads {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let all = [
            (self.count, "count"),
            (self.verify, "verify"),
            (self.dirty, "dirty"),
            (self.compute, "compute"),
            (self.kv, "kv"),
            (self.is_idle(), "idle"),
        ];
        let mut separator = "";
        for (_, name) in all.iter().filter(|(chosen, _)| *chosen) {
            write!(formatter, "{separator}{name}")?;
            separator = "+";
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_line_is_idle() {
        let config = Config::parse("  ").unwrap();
        assert_eq!(config, Config::default());
        assert_eq!(config.workloads.to_string(), "idle");
    }

    #[test]
    fn all_keys() {
        let config = Config::parse(
            "workload=verify+dirty vcpus=4 ticks=10 tick_ms=50 seed=9 tsc_khz=2000000 wait=spin \
             nap_ms=90 end=reset verify_mib=64 verify_rate=0 dirty_pages=500 dirty_order=hot \
             dirty_mib=8 hot_pages=32 dirty_set=100 dirty_sets=3 dirty_run=4 dirty_period_ms=25 dirty_bytes=64 \
             dirty_fill=all ip=10.0.0.2/24 port=700",
        )
        .unwrap();
        let expected = Config {
            workloads: Workloads { verify: true, dirty: true, ..Workloads::default() },
            vcpus: Some(4),
            ticks: 10,
            tick_ms: 50,
            seed: 9,
            tsc_khz: Some(2_000_000),
            wait: Wait::Spin,
            nap_ms: 90,
            end: End::Reset,
            verify_mib: Some(64),
            verify_rate: 0,
            dirty_pages: 500,
            dirty_order: Pattern::Hot { hot: 32 },
            dirty_mib: Some(8),
            hot_pages: 32,
            dirty_set: 100,
            dirty_sets: 3,
            dirty_run: 4,
            dirty_period_ms: 25,
            dirty_bytes: 64,
            dirty_fill: Fill::All,
            ip: Some(Ipv4Cidr { address: Ipv4Addr::new(10, 0, 0, 2), prefix: 24 }),
            port: 700,
        };
        assert_eq!(config, expected);
        assert_eq!(config.workloads.to_string(), "verify+dirty");
    }

    #[test]
    fn a_server_says_little() {
        let tick_ms = |line| Config::parse(line).unwrap().tick_ms;
        assert_eq!(tick_ms("workload=kv ip=10.0.0.2/8"), 1000);
        assert_eq!(tick_ms("workload=kv ip=10.0.0.2/8 tick_ms=100"), 100);
        assert_eq!(tick_ms("workload=kv+verify ip=10.0.0.2/8"), 100);
        let config = Config::parse("workload=verify+kv ip=10.0.0.2/8").unwrap();
        assert_eq!((config.workloads.to_string().as_str(), config.port), ("verify+kv", 7));
    }

    #[test]
    fn a_hot_set_may_be_sized_before_it_is_chosen() {
        let config = Config::parse("hot_pages=7 dirty_order=hot").unwrap();
        assert_eq!(config.dirty_order, Pattern::Hot { hot: 7 });
    }

    #[test]
    fn nonsense_is_refused() {
        let cases = [
            ("quiet", "'quiet' is not key=value"),
            ("workloads=count", "Unknown key 'workloads'"),
            ("workload=sleep", "Bad value 'sleep' of 'workload'"),
            ("workload=count+idle", "Bad value 'count+idle' of 'workload'"),
            ("workload=", "Bad value '' of 'workload'"),
            ("vcpus=0", "Bad value '0' of 'vcpus'"),
            ("vcpus=255", "Bad value '255' of 'vcpus'"),
            ("ticks=-1", "Bad value '-1' of 'ticks'"),
            ("ticks=99999999999999999999", "Bad value '99999999999999999999' of 'ticks'"),
            ("tick_ms=0", "Bad value '0' of 'tick_ms'"),
            ("dirty_order=hottest", "Bad value 'hottest' of 'dirty_order'"),
            ("dirty_bytes=12", "Bad value '12' of 'dirty_bytes'"),
            ("dirty_bytes=4104", "Bad value '4104' of 'dirty_bytes'"),
            ("dirty_sets=65", "Bad value '65' of 'dirty_sets'"),
            ("dirty_run=0", "Bad value '0' of 'dirty_run'"),
            ("dirty_fill=some", "Bad value 'some' of 'dirty_fill'"),
            ("dirty_rate=1", "Unknown key 'dirty_rate'"),
            ("wait=", "Bad value '' of 'wait'"),
            ("end=now", "Bad value 'now' of 'end'"),
            ("ip=10.0.0.2", "Bad value '10.0.0.2' of 'ip'"),
            ("ip=10.0.0/24", "Bad value '10.0.0/24' of 'ip'"),
            ("ip=10.0.0.2/33", "Bad value '10.0.0.2/33' of 'ip'"),
            ("ip=0.0.0.0/0", "Bad value '0.0.0.0/0' of 'ip'"),
            ("ip=224.0.0.1/24", "Bad value '224.0.0.1/24' of 'ip'"),
            ("port=0", "Bad value '0' of 'port'"),
            ("port=65536", "Bad value '65536' of 'port'"),
            ("workload=kv", "workload=kv needs 'ip'"),
        ];
        for (line, message) in cases {
            assert_eq!(Config::parse(line).unwrap_err().to_string(), message);
        }
    }
}
