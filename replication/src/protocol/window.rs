//! When the primary's device may write the backup's memory.
//!
//! ```text
//!            Approach (primary)                               Gate (backup)
//!
//!   Ring ──ask──> Asked ──opened──> Open        Shut ──asked──> Opening ──opened──> Open
//!    ^ ^            │ │              │            ^ ^            │   │               │
//!    │ └───none─────┘ └end─┐     end─┤            │ └──failed────┘   └ended┐    ended┤
//!    │                     v         │            │                        v         │
//!    └───────closed──── Ending <─────┘            └──────closed──────── Shutting <───┘
//! ```
//!
//! Enters: what the peer says, what became of registering and giving back. Leaves: what to do. Always holds, whatever the
//! order and whatever the peer says: the primary writes only in Open, and pairs only in Ring; whoever ends what was
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
    /// It is being registered. `wanted`: the primary has not ended it yet.
    Opening {
        wanted: bool,
    },
    Open,
    /// It is being given back.
    Shutting,
}

/// What the backup does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    /// Register the memory, piece by piece.
    Open,
    /// Stop registering, as soon as it can be.
    CallOff,
    /// Give back what was registered.
    Shut,
    TellOpen(u64),
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

    /// All of the memory is registered, or nothing of it.
    pub fn opened(&mut self, is_open: bool) -> Option<Work> {
        let Inner::Opening { wanted } = self.state else { return None };
        let (state, work) = match (is_open, wanted) {
            (true, true) => (Inner::Open, Work::TellOpen(self.number)),
            (true, false) => (Inner::Shutting, Work::Shut),
            (false, true) => (Inner::Shut, Work::TellNone(self.number)),
            (false, false) => (Inner::Shut, Work::TellClosed(self.number)),
        };
        self.refused = work == Work::TellNone(self.number);
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
            Inner::Open => {
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
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Way {
    /// Everything goes through the rings.
    #[default]
    Ring,
    Asked,
    Open,
    Ending,
}

impl Approach {
    /// Whether nothing is open, nor may be.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.state == Way::Ring
    }

    #[must_use]
    pub fn is_open(&self) -> bool {
        self.state == Way::Open
    }

    /// Whether the backup has not answered what it was asked, or told.
    #[must_use]
    pub fn awaits_answer(&self) -> bool {
        matches!(self.state, Way::Asked | Way::Ending)
    }

    /// Begins; the number to ask for.
    ///
    /// # Panics
    /// If what was asked for before is not over.
    pub fn ask(&mut self) -> u64 {
        assert!(self.is_over(), "one window at a time");
        self.number += 1;
        self.state = Way::Asked;
        self.number
    }

    /// The backup has opened; `None` if that is no answer. Whether it is of use: it is not once it was
    /// ended.
    pub fn opened(&mut self, number: u64) -> Option<bool> {
        match self.state {
            Way::Asked if number == self.number => {
                self.state = Way::Open;
                Some(true)
            }
            Way::Ending if number == self.number => Some(false),
            _ => None,
        }
    }

    /// The backup does not open; `false` if that is no answer.
    pub fn none(&mut self, number: u64) -> bool {
        match self.state {
            Way::Asked if number == self.number => {
                self.state = Way::Ring;
                true
            }
            // It says that it is closed as well.
            Way::Ending => number == self.number,
            _ => false,
        }
    }

    /// Nothing more will be written, and what was has arrived; the number to tell, if there is something to end.
    pub fn end(&mut self) -> Option<u64> {
        if !matches!(self.state, Way::Asked | Way::Open) {
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
        /// The device lets the peer write.
        is_registered: bool,
        /// WRITEs that were posted and have not arrived.
        writes: usize,
        acked: u64,
    }

    impl Pair {
        fn work(&mut self, work: Work) {
            match work {
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
            if self.writes > 0 {
                self.writes -= 1;
                assert!(self.is_registered, "a WRITE failed");
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
                    assert_eq!(self.writes, 0, "all had arrived");
                    let work = self.gate.ended(number).unwrap();
                    self.work(work);
                }
                Some(Word::Paired) => {
                    // What an engine does with an epoch: see `is_busy`.
                    assert!(self.gate.is_shut() && !self.is_registered, "acknowledged while open");
                    self.acked += 1;
                }
                Some(other) => panic!("{other:?}"),
                None => {}
            }
        }

        fn primary(&mut self) {
            let is_good = match self.back.pop_front() {
                Some(Word::Open(number)) => self.approach.opened(number).is_some(),
                Some(Word::None(number)) => self.approach.none(number),
                Some(Word::Closed(number)) => self.approach.closed(number),
                Some(other) => panic!("{other:?}"),
                None => true,
            };
            assert!(is_good, "{:?} was told what is no answer", self.approach);
        }

        fn device(&mut self, is_open: bool) {
            let work = if self.opens {
                self.opens = false;
                self.is_registered = is_open;
                self.gate.opened(is_open)
            } else if self.shuts {
                self.shuts = false;
                self.is_registered = false;
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
                    self.there.push_back(Word::Ask(number));
                }
                1 if self.approach.is_open() => self.writes += 1,
                2 => self.write_arrives(),
                3 => self.backup(),
                4 => self.primary(),
                5 => self.device(is_good),
                // Whether it was answered or not: it need not wait.
                6 if self.writes == 0 => self.end_or_pair(),
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
                while pair.writes > 0 {
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
            prop_assert!(pair.approach.is_over() && pair.gate.is_shut() && !pair.is_registered);
            let before = pair.acked;
            pair.end_or_pair();
            pair.backup();
            prop_assert_eq!(pair.acked, before + 1);
        }

        /// A primary that says anything: the backup counts its memory as its own only when it is.
        #[test]
        fn no_primary_gets_an_acknowledgement_while_it_may_write(
            steps in prop::collection::vec((0u8..4, 0u64..4, any::<bool>()), 1..100)
        ) {
            let (mut gate, mut opens, mut is_registered, mut shuts) = (Gate::default(), false, false, false);
            for (what, number, is_open) in steps {
                let work = match what {
                    0 => gate.asked(number).ok(),
                    1 => gate.ended(number).ok(),
                    2 if opens => {
                        (opens, is_registered) = (false, is_open);
                        gate.opened(is_open)
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

    #[test]
    fn a_word_out_of_turn_changes_nothing() {
        let mut gate = Gate::default();
        assert!(gate.asked(0).is_err() && gate.asked(2).is_err() && gate.ended(0).is_err());
        assert_eq!(gate.asked(1), Ok(Work::Open));
        assert!(gate.asked(1).is_err() && gate.asked(2).is_err() && gate.ended(2).is_err());
        assert_eq!(gate.opened(true), Some(Work::TellOpen(1)));
        assert_eq!((gate.opened(true), gate.closed()), (None, None));
        assert_eq!(gate.ended(1), Ok(Work::Shut));
        assert!(gate.ended(1).is_err() && gate.asked(2).is_err() && !gate.is_shut());
        assert_eq!(gate.closed(), Some(Work::TellClosed(1)));
        assert!(gate.is_shut() && gate.ended(1).is_err() && gate.asked(1).is_err());
        assert_eq!(gate.asked(2), Ok(Work::Open));

        let mut approach = Approach::default();
        assert!(approach.opened(0).is_none() && !approach.none(0) && !approach.closed(0));
        assert_eq!((approach.end(), approach.ask()), (None, 1));
        assert!(approach.opened(2).is_none() && !approach.closed(1) && approach.awaits_answer());
        assert_eq!(approach.opened(1), Some(true));
        assert!(!approach.none(1) && approach.opened(1).is_none() && approach.is_open());
        assert_eq!((approach.end(), approach.end()), (Some(1), None));
        assert!(!approach.closed(2) && !approach.is_over() && approach.closed(1));
        assert!(approach.is_over() && !approach.closed(1));
    }
}
