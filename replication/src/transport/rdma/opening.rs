//! What several threads need and one of them makes, with an end to the others' patience.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::aside::hung;
use super::lock;
use crate::transport::TransportError;

enum State<T> {
    Missing,
    /// By a thread that a device may keep.
    UnderWay,
    Made(Arc<T>),
}

/// One of these is made, by the first who asks.
pub(super) struct Opening<T> {
    state: Mutex<State<T>>,
    over: Condvar,
}

impl<T> Opening<T> {
    pub(super) fn new() -> Self {
        Self { state: Mutex::new(State::Missing), over: Condvar::new() }
    }

    /// What was made; else this thread makes it, or waits for whoever does.
    ///
    /// # Errors
    /// Those of `make`, whom the next one calls again; [`TransportError::Hung`].
    pub(super) fn get(
        &self,
        patience: Duration,
        make: impl FnOnce() -> Result<T, ::rdma::Error>,
    ) -> Result<Arc<T>, TransportError> {
        let under_way = |state: &mut State<T>| matches!(state, State::UnderWay);
        let waited = self.over.wait_timeout_while(lock(&self.state), patience, under_way);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match &*state {
            State::Made(made) => return Ok(Arc::clone(made)),
            State::UnderWay => return Err(hung(patience)),
            State::Missing => *state = State::UnderWay,
        }
        drop(state);
        let made = make().map(Arc::new);
        *lock(&self.state) = made.as_ref().map_or(State::Missing, |made| State::Made(made.clone()));
        self.over.notify_all();
        made.map_err(TransportError::Rdma)
    }

    pub(super) fn take(&self) -> Option<Arc<T>> {
        match std::mem::replace(&mut *lock(&self.state), State::Missing) {
            State::Made(made) => Some(made),
            State::Missing | State::UnderWay => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn one_makes_it_and_the_others_wait_for_it() {
        let opening = Opening::<u32>::new();
        let (begun, begins) = mpsc::channel();
        let (go, goes) = mpsc::channel::<()>();
        thread::scope(|scope| {
            let first = move || {
                begun.send(()).unwrap();
                goes.recv().unwrap();
                Ok(7)
            };
            let of = &opening;
            let first = scope.spawn(move || *of.get(LONG, first).unwrap());
            begins.recv().unwrap();
            let second = scope.spawn(|| *opening.get(LONG, || panic!("being made")).unwrap());
            let late = opening.get(Duration::from_millis(20), || panic!("being made"));
            assert!(matches!(late, Err(TransportError::Hung { patience_ms: 20 })), "{late:?}");
            go.send(()).unwrap();
            assert_eq!([first, second].map(|thread| thread.join().unwrap()), [7, 7]);
        });
        assert_eq!(*opening.get(LONG, || panic!("made")).unwrap(), 7);
        assert!(opening.take().is_some());
    }

    #[test]
    fn what_could_not_be_made_is_tried_again() {
        let opening = Opening::<u32>::new();
        let broken = || Err(::rdma::Error::Option { what: "broken".to_owned() });
        assert!(matches!(opening.get(LONG, broken), Err(TransportError::Rdma(_))));
        assert_eq!(*opening.get(LONG, || Ok(7)).unwrap(), 7);
    }
}
