//! Option values of the command line.
//!
//! Beside "no panic": what is written out is read again to the same.

use std::fmt::Debug;
use std::str::FromStr;

use api::config::VmConfig;
use api::endpoint::Endpoint;
use api::flag;
use api::option::{PairWriter, Pairs, parse_size};
use api::replication::{ReceiveReplicaData, ReplicateData};

use crate::reach::reached;

/// Flags of which a value was taken.
pub const PLACES: &[&str] = &[
    "options: pairs",
    "options: --console",
    "options: --disk",
    "options: --net",
    "options: --rng",
    "options: --cpus",
    "options: --memory",
    "options: --platform",
    "options: --api-socket",
    "options: --event-monitor",
    "options: --restore",
    "options: --replicate",
    "options: --receive-replica",
    "options: an endpoint",
];

const KEYS: [&str; 3] = ["a", "b", "size"];

/// The first byte says which flag the rest is the value of.
pub fn run(bytes: &[u8]) {
    let Some((which, text)) = bytes.split_first() else { return };
    let Ok(text) = std::str::from_utf8(text) else { return };
    let which = usize::from(which % 14);
    let taken = match which {
        0 => pairs(text),
        1 => flag::console(text).is_ok(),
        2 => valid(flag::disk(text), |config, disk| config.disks = Some(vec![disk])),
        3 => valid(flag::net(text), |config, card| config.net = Some(vec![card])),
        4 => valid(flag::rng(text), |config, rng| config.rng = rng),
        5 => valid(flag::cpus(text), |config, cpus| config.cpus = cpus),
        6 => valid(flag::memory(text), |config, memory| config.memory = memory),
        7 => valid(flag::platform(text), |config, platform| config.platform = Some(platform)),
        8 => flag::api_socket(text).is_ok(),
        9 => flag::event_monitor(text).is_ok(),
        10 => flag::restore(text).is_ok(),
        11 => again(text, ReplicateData::to_option),
        12 => again(text, ReceiveReplicaData::to_option),
        _ => {
            let _ = parse_size(text);
            Endpoint::from_str(text).is_ok()
        }
    };
    if taken {
        reached(PLACES[which]);
    }
}

/// Whether it was taken, as of the others.
fn valid<T, E>(parsed: Result<T, E>, put: impl FnOnce(&mut VmConfig, T)) -> bool {
    let Ok(value) = parsed else { return false };
    let mut config = VmConfig::default();
    put(&mut config, value);
    let _ = config.validate();
    let _ = config.unsupported();
    let text = serde_json::to_string(&config).expect("a configuration that can be written");
    assert_eq!(serde_json::from_str::<VmConfig>(&text).expect("what was written"), config);
    true
}

fn again<T: FromStr<Err: Debug> + PartialEq + Debug>(text: &str, write: fn(&T) -> String) -> bool {
    let Ok(value) = text.parse::<T>() else { return false };
    let written = write(&value);
    let again: T = written.parse().unwrap_or_else(|error| panic!("{written:?}: {error:?}"));
    assert_eq!(again, value, "{written:?}");
    true
}

fn pairs(text: &str) -> bool {
    let Ok(read) = Pairs::parse(text, &KEYS) else { return false };
    let mut writer = PairWriter::default();
    let mut values = read.clone();
    for key in KEYS {
        let _ = read.clone().list(key);
        let _ = read.clone().raw_list(key);
        let _ = read.clone().size(key);
        let _ = read.clone().toggle(key);
        writer = writer.optional(key, values.text(key).as_deref());
    }
    let written = writer.finish();
    let mut again = Pairs::parse(&written, &KEYS).expect("what was written");
    let mut values = read;
    for key in KEYS {
        assert_eq!(again.text(key), values.text(key), "{written:?}");
    }
    true
}
