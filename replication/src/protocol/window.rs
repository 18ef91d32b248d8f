//! When the primary's device may write the backup's memory.
//!
//! ```text
//!   Approach (primary)                                        Gate (backup)
//!
//!   Ring ──ask──> Asked ──opened──> Opening ──opened──> Open   Shut ──asked──> Opening ──opened──> Open
//!    ^ ^           │ │               │  │      (all)     │      ^ ^            │ │ │               │
//!    │ └──none─────┘ │               │  └none─> Short    │      │ └failed,─────┘ │ └failed─> Short │
//!    │               └end┐        end┤       end─┤    end┤      │  nothing told  └ended┐   ended┤  │
//!    │                   v           v           v       │      │                      v        v  │
//!    └──────closed───── Ending <─────────────────────────┘      └─────closed────── Shutting <──────┘
//! ```
//!
//! Enters: what the peer says, what became of registering and giving back. Leaves: what to do. Always holds, whatever the
//! order and whatever the peer says: the primary writes only in Opening, Open and Short, what it was told is open, and pairs
//! only in Ring; what it was told is open stays so until it ends that; whoever ends what was
//! asked for waits until the other side says that it is closed, or was never open. The backup is Shut from
//! the moment at which its memory is its own, and not before: it acknowledges nothing in any other state.

/// The backup's side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Gate {
    state: Inner,
    /// What was asked for last.
    number: u64,
    /// That was refused, and the primary may end it before it hears so.
    refused: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Inner {
    /// Nobody else writes the memory.
    #[default]
    Shut,
    /// It is being registered, and the primary told of each piece. `wanted`: it has not ended it yet.
    Opening {
        wanted: bool,
    },
    Open,
    /// No more of it can be registered, and the primary has what is.
    Short,
    /// It is being given back.
    Shutting,
}

/// What became of registering a memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    All,
    /// Some of it, which the primary was told of, and that is registered still.
    Some,
    /// Nobody else writes any of it.
    Nothing,
}

/// What the backup does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Wait for the primary.
    Nothing,
    /// Register the memory, piece by piece.
    Open,
    /// Stop registering, as soon as it can be.
    CallOff,
    /// Give back what was registered.
    Shut,
    /// That another piece is open.
    TellOpen(u64),
    /// That no more will be.
    TellNone(u64),
    TellClosed(u64),
}

/// Why the primary is not to be believed.
pub const OUT_OF_TURN: &str = "The primary asked out of turn for the writing of this host's memory";

impl Gate {
    /// Whether the memory is this side's alone.
    #[must_use]
    pub fn is_shut(&self) -> bool {
        self.state == Inner::Shut
    }

    /// The primary asks for the copy of this number.
    ///
    /// # Errors
    /// Out of turn.
    pub fn asked(&mut self, number: u64) -> Result<Work, &'static str> {
        if !self.is_shut() || Some(number) != self.number.checked_add(1) {
            return Err(OUT_OF_TURN);
        }
        *self = Self { state: Inner::Opening { wanted: true }, number, refused: false };
        Ok(Work::Open)
    }

    /// Another piece of the memory is registered.
    pub fn widened(&mut self) -> Option<Work> {
        match self.state {
            Inner::Opening { wanted: true } => Some(Work::TellOpen(self.number)),
            // The primary is done.
            Inner::Opening { wanted: false } => Some(Work::Nothing),
            Inner::Shut | Inner::Open | Inner::Short | Inner::Shutting => None,
        }
    }

    /// Registering is over.
    pub fn opened(&mut self, outcome: Outcome) -> Option<Work> {
        let Inner::Opening { wanted } = self.state else { return None };
        let (state, work) = match (outcome, wanted) {
            (Outcome::All, true) => (Inner::Open, Work::Nothing),
            (Outcome::Some, true) => (Inner::Short, Work::TellNone(self.number)),
            (Outcome::All | Outcome::Some, false) => (Inner::Shutting, Work::Shut),
            (Outcome::Nothing, true) => (Inner::Shut, Work::TellNone(self.number)),
            (Outcome::Nothing, false) => (Inner::Shut, Work::TellClosed(self.number)),
        };
        self.refused = outcome == Outcome::Nothing && wanted;
        self.state = state;
        Some(work)
    }

    /// The primary ends what it asked for.
    ///
    /// # Errors
    /// Out of turn.
    pub fn ended(&mut self, number: u64) -> Result<Work, &'static str> {
        if number != self.number {
            return Err(OUT_OF_TURN);
        }
        match self.state {
            Inner::Opening { wanted: true } => {
                self.state = Inner::Opening { wanted: false };
                Ok(Work::CallOff)
            }
            Inner::Open | Inner::Short => {
                self.state = Inner::Shutting;
                Ok(Work::Shut)
            }
            Inner::Shut if std::mem::take(&mut self.refused) => Ok(Work::TellClosed(number)),
            Inner::Shut | Inner::Opening { wanted: false } | Inner::Shutting => Err(OUT_OF_TURN),
        }
    }

    /// What was registered is given back, all of it.
    pub fn closed(&mut self) -> Option<Work> {
        if self.state != Inner::Shutting {
            return None;
        }
        self.state = Inner::Shut;
        Some(Work::TellClosed(self.number))
    }
}

/// The primary's side.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Approach {
    state: Way,
    number: u64,
    /// The backup has said of that number that it opens no more.
    refused: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Way {
    /// Everything goes through the rings.
    #[default]
    Ring,
    Asked,
    /// Some is open, and more may be.
    Opening,
    /// All is.
    Open,
    /// Some is open, and no more will be.
    Short,
    Ending,
}

impl Approach {
    /// Whether nothing is open, nor may be.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == Way::Ring
    }

    /// Whether something is open.
    #[must_use]
    pub fn is_open(&self) -> bool {
        matches!(self.state, Way::Opening | Way::Open | Way::Short)
    }

    /// Begins; the number to ask for.
    ///
    /// # Panics
    /// If what was asked for before is not over.
    pub fn ask(&mut self) -> u64 {
        assert!(self.is_over(), "one window at a time");
        *self = Self { state: Way::Asked, number: self.number + 1, refused: false };
        self.number
    }

    /// The backup has opened some more, with which it `is_whole` or not; `None` if that is no answer. Whether it is of
    /// use: it is not once it was ended.
    pub fn opened(&mut self, number: u64, is_whole: bool) -> Option<bool> {
        match self.state {
            Way::Asked | Way::Opening if number == self.number => {
                self.state = if is_whole { Way::Open } else { Way::Opening };
                Some(true)
            }
            Way::Ending if number == self.number => Some(false),
            _ => None,
        }
    }

    /// The backup does not open any more; `false` if that is no answer.
    pub fn none(&mut self, number: u64) -> bool {
        if number != self.number || self.refused {
            return false;
        }
        self.state = match self.state {
            Way::Asked => Way::Ring,
            // What is open stays so until it is ended.
            Way::Opening => Way::Short,
            // It says that it is closed as well.
            Way::Ending => Way::Ending,
            Way::Ring | Way::Open | Way::Short => return false,
        };
        self.refused = true;
        true
    }

    /// Nothing more will be written, and what was has arrived; the number to tell, if there is something to end.
    pub fn end(&mut self) -> Option<u64> {
        if !matches!(self.state, Way::Asked | Way::Opening | Way::Open | Way::Short) {
            return None;
        }
        self.state = Way::Ending;
        Some(self.number)
    }

    /// The backup has closed; `false` if that is no answer.
    pub fn closed(&mut self, number: u64) -> bool {
        let is_answer = self.state == Way::Ending && number == self.number;
        if is_answer {
            self.state = Way::Ring;
        }
        is_answer
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    enum Word {
        Ask(u64),
        Open(u64),
        None(u64),
        End(u64),
        Closed(u64),
        Paired,
    }

    const PIECES: u64 = 3;

    /// Both sides, what is on its way between them, and the backup's device.
    #[derive(Default)]
    struct Pair {
        approach: Approach,
        gate: Gate,
        there: VecDeque<Word>,
        back: VecDeque<Word>,
        /// The thread that registers or gives back is at it.
        opens: bool,
        shuts: bool,
        /// Pieces, of so many, that the device lets the peer write, and that the primary knows of.
        registered: u64,
        known: u64,
        /// WRITEs that were posted and have not arrived, each to a piece.
        writes: Vec<u64>,
        acked: u64,
        /// What a build does wrong: a memory that cannot be registered to its end is given back at once.
        gives_back: bool,
    }

    impl Pair {
        fn work(&mut self, work: Work) {
            match work {
                Work::Nothing => {}
                Work::Open => self.opens = true,
                Work::CallOff => assert!(self.opens),
                Work::Shut => self.shuts = true,
                Work::TellOpen(number) => self.back.push_back(Word::Open(number)),
                Work::TellNone(number) => self.back.push_back(Word::None(number)),
                Work::TellClosed(number) => self.back.push_back(Word::Closed(number)),
            }
        }

        /// The primary's device writes into the backup's memory.
        fn write_arrives(&mut self) {
            if let Some(piece) = self.writes.pop() {
                assert!(piece < self.registered, "a WRITE failed");
                assert!(!self.gate.is_shut(), "written, and taken for its own");
            }
        }

        /// The backup takes the primary's next word.
        fn backup(&mut self) {
            match self.there.pop_front() {
                Some(Word::Ask(number)) => {
                    let work = self.gate.asked(number).unwrap();
                    self.work(work);
                }
                Some(Word::End(number)) => {
                    assert!(self.writes.is_empty(), "all had arrived");
                    let work = self.gate.ended(number).unwrap();
                    self.work(work);
                }
                Some(Word::Paired) => {
                    // What an engine does with an epoch: see `is_busy`.
                    assert!(self.gate.is_shut() && self.registered == 0, "acknowledged while open");
                    self.acked += 1;
                }
                Some(other) => panic!("{other:?}"),
                None => {}
            }
        }

        fn primary(&mut self) {
            let is_good = match self.back.pop_front() {
                Some(Word::Open(number)) => {
                    self.known += 1;
                    self.approach.opened(number, self.known == PIECES).is_some()
                }
                Some(Word::None(number)) => self.approach.none(number),
                Some(Word::Closed(number)) => self.approach.closed(number),
                Some(other) => panic!("{other:?}"),
                None => true,
            };
            assert!(is_good, "{:?} was told what is no answer", self.approach);
        }

        /// The thread that registers, or gives back, goes on by a piece.
        fn device(&mut self, is_good: bool) {
            let work = if self.opens && is_good && self.registered < PIECES {
                self.registered += 1;
                self.gate.widened()
            } else if self.opens {
                self.opens = false;
                if self.gives_back && self.registered < PIECES {
                    self.registered = 0;
                }
                self.gate.opened(match self.registered {
                    0 => Outcome::Nothing,
                    PIECES => Outcome::All,
                    _ => Outcome::Some,
                })
            } else if self.shuts {
                self.registered = self.registered.saturating_sub(1);
                if self.registered > 0 {
                    return;
                }
                self.shuts = false;
                self.gate.closed()
            } else {
                return;
            };
            self.work(work.unwrap());
        }

        fn step(&mut self, what: u8, is_good: bool) {
            match what % 7 {
                0 if self.approach.is_over() && self.there.is_empty() => {
                    let number = self.approach.ask();
                    self.known = 0;
                    self.there.push_back(Word::Ask(number));
                }
                1 if self.approach.is_open() => self.writes.push(u64::from(what / 7) % self.known),
                2 => self.write_arrives(),
                3 => self.backup(),
                4 => self.primary(),
                5 => self.device(is_good),
                // Whether it was answered or not: it need not wait.
                6 if self.writes.is_empty() => self.end_or_pair(),
                _ => {}
            }
        }

        fn end_or_pair(&mut self) {
            if let Some(number) = self.approach.end() {
                self.there.push_back(Word::End(number));
            } else if self.approach.is_over() {
                self.there.push_back(Word::Paired);
            }
        }
    }

    proptest! {
        /// Any order of asking, registering, writing, ending and giving back: no epoch is acknowledged while
        /// the memory is open, no WRITE comes when it is not, and every copy comes to its end.
        #[test]
        fn both_sides_agree_in_any_order(
            steps in prop::collection::vec((any::<u8>(), any::<bool>()), 1..300)
        ) {
            let mut pair = Pair::default();
            for (what, is_good) in steps {
                pair.step(what, is_good);
            }
            // All that is under way comes to its end.
            for _ in 0..8 {
                while !pair.writes.is_empty() {
                    pair.write_arrives();
                }
                if !pair.approach.is_over() {
                    pair.end_or_pair();
                }
                for _ in 0..400 {
                    pair.backup();
                    pair.device(true);
                    pair.primary();
                }
            }
            prop_assert!(pair.approach.is_over() && pair.gate.is_shut() && pair.registered == 0);
            let before = pair.acked;
            pair.end_or_pair();
            pair.backup();
            prop_assert_eq!(pair.acked, before + 1);
        }

        /// A primary that says anything: the backup counts its memory as its own only when it is.
        #[test]
        fn no_primary_gets_an_acknowledgement_while_it_may_write(
            steps in prop::collection::vec((0u8..5, 0u64..4, any::<bool>()), 1..100)
        ) {
            let (mut gate, mut opens, mut is_registered, mut shuts) = (Gate::default(), false, false, false);
            for (what, number, is_open) in steps {
                let work = match what {
                    0 => gate.asked(number).ok(),
                    1 => gate.ended(number).ok(),
                    2 if opens => {
                        opens = false;
                        // What it was told of stays.
                        let outcome = match (is_open, is_registered) {
                            (true, _) => Outcome::All,
                            (false, true) => Outcome::Some,
                            (false, false) => Outcome::Nothing,
                        };
                        is_registered |= is_open;
                        gate.opened(outcome)
                    }
                    4 if opens => {
                        is_registered = true;
                        gate.widened()
                    }
                    3 if shuts => {
                        (shuts, is_registered) = (false, false);
                        gate.closed()
                    }
                    _ => None,
                };
                match work {
                    Some(Work::Open) => {
                        prop_assert!(!opens && !shuts && !is_registered, "two at once");
                        opens = true;
                    }
                    Some(Work::Shut) => {
                        prop_assert!(is_registered && !shuts);
                        shuts = true;
                    }
                    _ => {}
                }
                prop_assert!(!gate.is_shut() || !opens && !is_registered && !shuts);
            }
        }
    }

    /// The test above tells a build that takes from the primary what it may be at.
    #[test]
    #[should_panic(expected = "a WRITE failed")]
    fn a_build_that_gives_back_what_it_told_of_is_found() {
        let mut pair = Pair { gives_back: true, ..Pair::default() };
        // Asked, heard, a piece is registered, told, written; then the next one fails.
        for (what, is_good) in [(0, true), (3, true), (5, true), (4, true), (1, true), (5, false)] {
            pair.step(what, is_good);
        }
        pair.step(2, true);
    }

    #[test]
    fn a_word_out_of_turn_changes_nothing() {
        let mut gate = Gate::default();
        assert!(gate.asked(0).is_err() && gate.asked(2).is_err() && gate.ended(0).is_err());
        assert_eq!(gate.asked(1), Ok(Work::Open));
        assert!(gate.asked(1).is_err() && gate.asked(2).is_err() && gate.ended(2).is_err());
        assert_eq!(gate.widened(), Some(Work::TellOpen(1)));
        assert_eq!(gate.opened(Outcome::All), Some(Work::Nothing));
        assert_eq!((gate.opened(Outcome::All), gate.widened(), gate.closed()), (None, None, None));
        assert_eq!(gate.ended(1), Ok(Work::Shut));
        assert!(gate.ended(1).is_err() && gate.asked(2).is_err() && !gate.is_shut());
        assert_eq!(gate.closed(), Some(Work::TellClosed(1)));
        assert!(gate.is_shut() && gate.ended(1).is_err() && gate.asked(1).is_err());
        assert_eq!(gate.asked(2), Ok(Work::Open));
        // It cannot be registered to its end.
        assert_eq!(gate.widened(), Some(Work::TellOpen(2)));
        assert_eq!(gate.opened(Outcome::Some), Some(Work::TellNone(2)));
        assert!(!gate.is_shut() && gate.asked(3).is_err() && gate.widened().is_none());
        assert_eq!((gate.ended(2), gate.closed()), (Ok(Work::Shut), Some(Work::TellClosed(2))));
        // The primary has ended it meanwhile.
        assert_eq!((gate.asked(3), gate.ended(3)), (Ok(Work::Open), Ok(Work::CallOff)));
        assert_eq!(gate.widened(), Some(Work::Nothing));
        assert_eq!(gate.opened(Outcome::Some), Some(Work::Shut));

        let mut approach = Approach::default();
        assert!(approach.opened(0, false).is_none() && !approach.none(0) && !approach.closed(0));
        assert_eq!((approach.end(), approach.ask()), (None, 1));
        assert!(approach.opened(2, true).is_none() && !approach.closed(1) && !approach.is_open());
        assert_eq!(approach.opened(1, false), Some(true));
        assert!(!approach.none(2) && approach.is_open());
        assert_eq!(approach.opened(1, true), Some(true));
        assert!(!approach.none(1) && approach.opened(1, true).is_none() && approach.is_open());
        assert_eq!((approach.end(), approach.end()), (Some(1), None));
        // What was under way.
        assert_eq!((approach.opened(1, false), approach.none(1)), (Some(false), true));
        assert!(!approach.none(1), "once is enough");
        assert!(!approach.closed(2) && !approach.is_over() && approach.closed(1));
        assert!(approach.is_over() && !approach.closed(1));
        // No more than some.
        assert_eq!((approach.ask(), approach.opened(2, false)), (2, Some(true)));
        assert!(approach.none(2) && approach.is_open() && !approach.is_over());
        assert!(approach.opened(2, false).is_none() && !approach.none(2) && !approach.closed(2));
        assert_eq!((approach.end(), approach.closed(2)), (Some(2), true));
    }
}
