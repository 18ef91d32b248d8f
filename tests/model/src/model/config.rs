//! What is explored: how much of each thing may happen.

use crate::broken::Broken;

/// Bounds of one exploration. Suspicion needs none: it ends a session, and sessions are bounded.
#[derive(Clone, Debug)]
pub struct Config {
    pub name: &'static str,
    pub about: &'static str,
    pub arbiter: bool,
    /// Intervals of a history between seals.
    pub epochs: u16,
    /// Times that a primary connects, the first one included.
    pub sessions: u8,
    /// Processes that are killed.
    pub crashes: u8,
    /// Calls to the arbiter that fail, stay without an answer, arrive late or show an old record.
    pub arbiter_faults: u8,
    /// What people ask for, of either host.
    pub asks: u8,
    /// Epochs that do not fit the staging.
    pub too_large: u8,
    /// Guests that cannot be captured.
    pub give_ups: u8,
    /// Images that cannot be written.
    pub image_failures: u8,
    /// Switch-overs reverse the pair.
    pub reverses: bool,
    pub broken: Option<Broken>,
}

impl Config {
    const BASE: Self = Self {
        name: "",
        about: "",
        arbiter: true,
        epochs: 3,
        sessions: 1,
        crashes: 0,
        arbiter_faults: 0,
        asks: 0,
        too_large: 0,
        give_ups: 0,
        image_failures: 0,
        reverses: false,
        broken: None,
    };

    /// The configurations that CI explores.
    #[must_use]
    pub fn quick() -> Vec<Self> {
        vec![
            Self {
                name: "epochs",
                about: "an ordinary pair; either host killed",
                epochs: 4,
                crashes: 2,
                ..Self::BASE
            },
            Self {
                name: "arbiter",
                about: "calls that fail, arrive late, show old records",
                crashes: 1,
                arbiter_faults: 2,
                ..Self::BASE
            },
            Self {
                name: "people",
                about: "stops, switch-overs that end early or not, take-overs by command",
                crashes: 1,
                asks: 2,
                too_large: 1,
                image_failures: 1,
                ..Self::BASE
            },
            Self {
                name: "reversed",
                about: "switch-overs that reverse the pair, there and back; either host killed",
                epochs: 4,
                crashes: 1,
                arbiter_faults: 1,
                asks: 2,
                reverses: true,
                ..Self::BASE
            },
            Self {
                name: "copy-anew",
                about: "epochs too large, guests that cannot be captured, images that fail",
                too_large: 1,
                give_ups: 1,
                image_failures: 1,
                crashes: 1,
                ..Self::BASE
            },
            Self {
                name: "again",
                about: "a second session, in either direction",
                epochs: 3,
                sessions: 2,
                crashes: 1,
                ..Self::BASE
            },
            Self {
                name: "no-arbiter",
                about: "without an arbiter: a person decides, and is right",
                arbiter: false,
                sessions: 2,
                crashes: 1,
                asks: 2,
                too_large: 1,
                ..Self::BASE
            },
            Self {
                name: "together",
                about: "two sessions, a kill, a call that fails, a request",
                epochs: 2,
                sessions: 2,
                crashes: 1,
                arbiter_faults: 1,
                asks: 1,
                ..Self::BASE
            },
        ]
    }

    /// The same with more of everything.
    #[must_use]
    pub fn large() -> Vec<Self> {
        let mut all = Self::quick();
        for config in &mut all {
            match config.name {
                "epochs" => config.epochs = 6,
                "arbiter" => {
                    config.arbiter_faults = 3;
                    config.crashes = 2;
                    config.asks = 1;
                }
                "people" => {
                    config.asks = 3;
                    config.crashes = 2;
                    config.arbiter_faults = 1;
                }
                "reversed" => config.crashes = 2,
                "copy-anew" => {
                    config.too_large = 2;
                    config.arbiter_faults = 1;
                    config.asks = 1;
                    config.epochs = 4;
                }
                "again" => {
                    config.sessions = 3;
                    config.crashes = 2;
                    config.epochs = 4;
                }
                "together" => {
                    config.epochs = 3;
                    config.too_large = 1;
                }
                _ => {
                    config.asks = 3;
                    config.crashes = 2;
                    config.epochs = 4;
                }
            }
        }
        all
    }

    /// Bounds of one's own, as `epochs=3,sessions=2,arbiter=0`; what is not named stays as it is in an
    /// ordinary session without faults.
    ///
    /// # Errors
    /// A name or a number that is none.
    pub fn parse(text: &str) -> Result<Self, String> {
        let mut config = Self { name: "own", about: "as asked for", ..Self::BASE };
        for part in text.split(',') {
            let (name, number) =
                part.split_once('=').ok_or_else(|| format!("'{part}' has no '='"))?;
            let number: u8 =
                number.parse().map_err(|_| format!("'{number}' is no number to 255"))?;
            match name {
                "arbiter" => config.arbiter = number > 0,
                "epochs" => config.epochs = number.into(),
                "sessions" => config.sessions = number.max(1),
                "crashes" => config.crashes = number,
                "arbiter_faults" => config.arbiter_faults = number,
                "asks" => config.asks = number,
                "too_large" => config.too_large = number,
                "give_ups" => config.give_ups = number,
                "image_failures" => config.image_failures = number,
                "reverses" => config.reverses = number > 0,
                _ => return Err(format!("there is no bound '{name}'")),
            }
        }
        Ok(config)
    }

    /// The configuration in which a broken rule shows, and the property that it breaks.
    #[must_use]
    pub fn broken(broken: Broken) -> Self {
        let base = Self { name: broken.name(), broken: Some(broken), ..Self::BASE };
        match broken {
            Broken::ReleaseBeforeAck
            | Broken::TakeOverWithoutSwap
            | Broken::AckAfterSuspecting
            | Broken::AckBeforeWhole
            | Broken::StartUnacknowledged
            | Broken::StartOlder
            | Broken::ReleaseOnClaim
            | Broken::LoserGoesOn => Self { crashes: 1, ..base },
            Broken::UnknownIsWon
            | Broken::UnknownIsLost
            | Broken::ReadIsWon
            | Broken::FailedClaimDiscards => Self { arbiter_faults: 2, crashes: 1, ..base },
            Broken::HandedIsSaid => Self { asks: 1, ..base },
            Broken::OrphanStarts => Self { arbiter: false, ..base },
            Broken::ResyncWithoutClaim => Self { too_large: 1, ..base },
            Broken::HeirStartsWithoutSwap | Broken::SpeaksBeforeReached => {
                Self { asks: 1, crashes: 1, reverses: true, ..base }
            }
            Broken::DeltaOfAnother
            | Broken::AppliedBeforeItsEnd
            | Broken::RestForgets
            | Broken::GateLetsNextOut
            | Broken::WonBeforeItLasts
            | Broken::SwapOverwrites
            | Broken::UnknownWriteIsLost
            | Broken::AnotherHistoryCounts
            | Broken::OwnRefusalIsLost
            | Broken::CompareIsIgnored
            | Broken::MemberDecidesAlone => unreachable!("the model has nothing of it"),
        }
    }
}
