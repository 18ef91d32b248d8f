//! The arbiter's record.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::ids::Generation;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub Uuid);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id! {
    /// One VMM process. A new process is a new host: it cannot know what the old one let out.
    HostId
}
id! {
    /// One VM, named at its first protection; the name moves with it.
    VmId
}

/// Who this process is and which VM it speaks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HostIdentity {
    pub host: HostId,
    pub vm: VmId,
}

impl HostIdentity {
    /// A new process with a VM that was never protected.
    #[must_use]
    pub fn random() -> Self {
        Self { host: HostId(Uuid::new_v4()), vm: VmId(Uuid::new_v4()) }
    }
}

impl Default for HostIdentity {
    fn default() -> Self {
        Self::random()
    }
}

/// Who may release output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Standing {
    /// The primary, and each epoch only after the backup's acknowledgement.
    Pair { primary: HostId, backup: HostId },
    /// The owner alone.
    Solo { owner: HostId },
}

/// What the arbiter keeps for a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    pub generation: Generation,
    pub vm: VmId,
    pub standing: Standing,
}

impl Record {
    /// The host that runs the VM as far as this record says.
    #[must_use]
    pub fn runs_on(&self) -> HostId {
        match self.standing {
            Standing::Pair { primary, .. } => primary,
            Standing::Solo { owner } => owner,
        }
    }

    /// Whether it says that this process runs this VM.
    #[must_use]
    pub fn is_of(&self, identity: HostIdentity) -> bool {
        self.vm == identity.vm && self.runs_on() == identity.host
    }
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {}, VM {}, ", self.generation, self.vm)?;
        match self.standing {
            Standing::Pair { primary, backup } => {
                write!(f, "primary {primary} with backup {backup}")
            }
            Standing::Solo { owner } => write!(f, "owned by {owner} alone"),
        }
    }
}
