//! `--api-socket`, `--event-monitor`, `--restore`.

use std::path::PathBuf;

use crate::config::{RestoreConfig, RestoredNet};
use crate::option::{OptionError, Pairs, bad, items};

/// A file or a descriptor that the parent process left open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Path(PathBuf),
    Descriptor(i32),
}

/// `--api-socket path=<path>|fd=<n>|<path>`.
///
/// # Errors
///
/// The value is none of these.
pub fn api_socket(text: &str) -> Result<Place, OptionError> {
    // A bare path is what most clients give.
    if !text.starts_with("path=") && !text.starts_with("fd=") && !text.is_empty() {
        return Ok(Place::Path(PathBuf::from(text)));
    }
    place(text)
}

/// `--event-monitor path=<path>|fd=<n>`.
///
/// # Errors
///
/// The value is neither.
pub fn event_monitor(text: &str) -> Result<Place, OptionError> {
    place(text)
}

fn place(text: &str) -> Result<Place, OptionError> {
    let mut pairs = Pairs::parse(text, &["path", "fd"])?;
    let wanted = "a descriptor's number";
    let descriptor = pairs.with("fd", wanted, |fd| fd.parse().ok().filter(|fd| *fd >= 0))?;
    match (pairs.path("path")?, descriptor) {
        (Some(path), None) => Ok(Place::Path(path)),
        (None, Some(fd)) => Ok(Place::Descriptor(fd)),
        _ => Err(OptionError::BadWord { wanted: "path=<path>|fd=<n>", value: text.to_owned() }),
    }
}

/// `--restore source_url=<url>,prefault=on|off,resume=on|off,net_fds=[<id>@[3,4]]`.
///
/// # Errors
///
/// The syntax is broken, or `source_url` missing.
pub fn restore(text: &str) -> Result<RestoreConfig, OptionError> {
    let mut pairs = Pairs::parse(text, &["source_url", "prefault", "resume", "net_fds"])?;
    let net_fds = pairs.raw_list("net_fds")?;
    let net_fds = net_fds
        .map(|items| {
            let refuse = |item: &str| bad("net_fds", "items as net1@[3,4]", item);
            items.iter().map(|item| net(item).ok_or_else(|| refuse(item))).collect()
        })
        .transpose()?;
    Ok(RestoreConfig {
        source_url: pairs.required("source_url")?,
        prefault: pairs.toggle("prefault")?.unwrap_or(false),
        net_fds,
        resume: pairs.toggle("resume")?.unwrap_or(false),
    })
}

fn net(item: &str) -> Option<RestoredNet> {
    let (id, list) = item.split_once('@')?;
    let fds: Vec<i32> =
        items(list)?.iter().map(|fd| fd.parse().ok()).collect::<Option<Vec<_>>>()?;
    (!id.is_empty()).then(|| RestoredNet { id: id.to_owned(), num_fds: fds.len(), fds: Some(fds) })
}
