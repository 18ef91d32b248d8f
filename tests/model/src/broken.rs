//! Rules of the protocol, broken on purpose: a checker that does not find these finds nothing.
//!
//! Each is a change of what the modelled engines do around the shipped machines, and in the simulator of what is
//! around the shipped engines; machines and engines themselves have no switch for it.

/// One broken rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Broken {
    /// The primary lets an epoch's output out at its seal.
    ReleaseBeforeAck,
    /// The backup that suspects starts at once, whatever the arbiter says.
    TakeOverWithoutSwap,
    /// The backup goes on acknowledging while it claims.
    AckAfterSuspecting,
    /// The backup acknowledges an epoch of which it has the seal and not the pages.
    AckBeforeWhole,
    /// The backup starts from an epoch that it has staged and not acknowledged.
    StartUnacknowledged,
    /// The backup starts from the epoch before the one that it acknowledged last.
    StartOlder,
    /// A call to the arbiter that failed counts as won.
    UnknownIsWon,
    /// A call to the arbiter that failed counts as lost.
    UnknownIsLost,
    /// The primary lets all output out when it asks the arbiter, before the verdict.
    ReleaseOnClaim,
    /// The primary that has lost its claim goes on.
    LoserGoesOn,
    /// A record that says what it said before counts as a won claim.
    ReadIsWon,
    /// What a switch-over's state carries leaves at the old host, too.
    HandedIsSaid,
    /// The backup without an arbiter starts by itself.
    OrphanStarts,
    /// A primary that copies anew passes its output before the arbiter says that it is alone.
    ResyncWithoutClaim,
    /// The backup claims, and forgets its replica when its call fails.
    FailedClaimDiscards,
    /// The old host of a reversed pair that is not called goes on from the last epoch at once, whatever
    /// the arbiter says.
    HeirStartsWithoutSwap,
    /// The new host of a reversed pair lets output out before its old one has acknowledged anything.
    SpeaksBeforeReached,
    /// What a connection remembers of pages outlives a copy anew: a delta is of another content than the
    /// backup has.
    DeltaOfAnother,
    /// A part of an epoch goes into the image as it comes.
    AppliedBeforeItsEnd,
    /// What may differ does not have the pages of epochs that nobody acknowledged.
    RestForgets,
    /// The gates let out what the next epoch is to commit.
    GateLetsNextOut,
    /// A record counts as won that a power cut of the arbiter's storage may take.
    WonBeforeItLasts,
    /// A record takes the place of one of the same generation.
    SwapOverwrites,
    /// A write of a record whose outcome is unknown counts as refused.
    UnknownWriteIsLost,
    /// An answer of another cluster, or of an earlier time than was seen, counts.
    AnotherHistoryCounts,
    /// A transaction that was refused by the very record that it had put counts as lost.
    OwnRefusalIsLost,
    /// A transaction puts whatever stands.
    CompareIsIgnored,
    /// A member that sees no majority answers by what it has.
    MemberDecidesAlone,
}

impl Broken {
    /// Those of the protocol, which the model is to find as well.
    pub const ALL: [Self; 17] = [
        Self::ReleaseBeforeAck,
        Self::TakeOverWithoutSwap,
        Self::AckAfterSuspecting,
        Self::AckBeforeWhole,
        Self::StartUnacknowledged,
        Self::StartOlder,
        Self::UnknownIsWon,
        Self::UnknownIsLost,
        Self::ReleaseOnClaim,
        Self::LoserGoesOn,
        Self::ReadIsWon,
        Self::HandedIsSaid,
        Self::OrphanStarts,
        Self::ResyncWithoutClaim,
        Self::FailedClaimDiscards,
        Self::HeirStartsWithoutSwap,
        Self::SpeaksBeforeReached,
    ];

    /// Those of what the model has nothing of: memory's way to the backup, the gates, the arbiter's storage
    /// and cluster.
    pub const SIMULATED: [Self; 11] = [
        Self::DeltaOfAnother,
        Self::AppliedBeforeItsEnd,
        Self::RestForgets,
        Self::GateLetsNextOut,
        Self::WonBeforeItLasts,
        Self::SwapOverwrites,
        Self::UnknownWriteIsLost,
        Self::AnotherHistoryCounts,
        Self::OwnRefusalIsLost,
        Self::CompareIsIgnored,
        Self::MemberDecidesAlone,
    ];

    /// Of these, those of the arbiter in a directory.
    pub const OF_FILES: [Self; 3] =
        [Self::WonBeforeItLasts, Self::SwapOverwrites, Self::UnknownWriteIsLost];

    /// And those of the arbiter in a cluster.
    pub const OF_ETCD: [Self; 4] = [
        Self::AnotherHistoryCounts,
        Self::OwnRefusalIsLost,
        Self::CompareIsIgnored,
        Self::MemberDecidesAlone,
    ];

    /// All that the simulator is to find.
    pub fn every() -> impl Iterator<Item = Self> {
        Self::ALL.into_iter().chain(Self::SIMULATED)
    }

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ReleaseBeforeAck => "release-before-ack",
            Self::TakeOverWithoutSwap => "take-over-without-swap",
            Self::AckAfterSuspecting => "ack-after-suspecting",
            Self::AckBeforeWhole => "ack-before-whole",
            Self::StartUnacknowledged => "start-unacknowledged",
            Self::StartOlder => "start-older",
            Self::UnknownIsWon => "unknown-is-won",
            Self::UnknownIsLost => "unknown-is-lost",
            Self::ReleaseOnClaim => "release-on-claim",
            Self::LoserGoesOn => "loser-goes-on",
            Self::ReadIsWon => "read-is-won",
            Self::HandedIsSaid => "handed-is-said",
            Self::OrphanStarts => "orphan-starts",
            Self::ResyncWithoutClaim => "resync-without-claim",
            Self::FailedClaimDiscards => "failed-claim-discards",
            Self::HeirStartsWithoutSwap => "heir-starts-without-swap",
            Self::SpeaksBeforeReached => "speaks-before-reached",
            Self::DeltaOfAnother => "delta-of-another",
            Self::AppliedBeforeItsEnd => "applied-before-its-end",
            Self::RestForgets => "rest-forgets",
            Self::GateLetsNextOut => "gate-lets-next-out",
            Self::WonBeforeItLasts => "won-before-it-lasts",
            Self::SwapOverwrites => "swap-overwrites",
            Self::UnknownWriteIsLost => "unknown-write-is-lost",
            Self::AnotherHistoryCounts => "another-history-counts",
            Self::OwnRefusalIsLost => "own-refusal-is-lost",
            Self::CompareIsIgnored => "compare-is-ignored",
            Self::MemberDecidesAlone => "member-decides-alone",
        }
    }
}
