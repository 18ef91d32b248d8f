//! Serial ports and consoles.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Where a serial port or console leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleOutputMode {
    /// The guest has no such device.
    Off,
    /// A new pseudo-terminal, whose path the VMM then puts into `file`.
    Pty,
    /// The VMM's own standard input and output.
    Tty,
    /// Output goes to `file`; there is no input.
    File,
    /// A UNIX socket that the VMM listens on.
    Socket,
    /// The device is there, what it is told is dropped.
    Null,
}

/// A serial port or console.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsoleConfig {
    pub mode: ConsoleOutputMode,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
    #[serde(default)]
    pub iommu: bool,
}

impl ConsoleConfig {
    /// A mode that needs no path.
    #[must_use]
    pub fn new(mode: ConsoleOutputMode) -> Self {
        Self { mode, file: None, socket: None, iommu: false }
    }

    /// Output to a file.
    #[must_use]
    pub fn to_file(path: impl Into<PathBuf>) -> Self {
        Self { file: Some(path.into()), ..Self::new(ConsoleOutputMode::File) }
    }

    /// A UNIX socket that the VMM listens on.
    #[must_use]
    pub fn on_socket(path: impl Into<PathBuf>) -> Self {
        Self { socket: Some(path.into()), ..Self::new(ConsoleOutputMode::Socket) }
    }
}

/// Where the firmware's debug port leads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum DebugConsoleMode {
    #[default]
    Off,
    Pty,
    Tty,
    File,
    Null,
}

/// The firmware's debug port.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DebugConsoleConfig {
    pub mode: DebugConsoleMode,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iobase: Option<u16>,
}
