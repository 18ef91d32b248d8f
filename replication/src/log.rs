//! What happens again and again, told once and now and then.

use std::time::{Duration, Instant};

/// How often the same is told again.
const REMINDER: Duration = Duration::from_secs(60);
/// Most that is told within that time: whoever may say anything says something else each time.
const LINES_MAX: usize = 8;

/// Says what is worth a line, so that nobody fills the log.
#[derive(Debug, Default)]
pub(crate) struct Log {
    told: Vec<(String, Instant)>,
}

impl Log {
    /// Whether `reason` is worth a line now.
    pub(crate) fn is_news(&mut self, reason: &str, now: Instant) -> bool {
        self.told.retain(|(_, at)| now.saturating_duration_since(*at) < REMINDER);
        let is_known = self.told.iter().any(|(told, _)| told == reason);
        let is_news = !is_known && self.told.len() < LINES_MAX;
        if is_news {
            self.told.push((reason.to_owned(), now));
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_is_told_once_and_now_and_then() {
        let (mut log, start) = (Log::default(), Instant::now());
        let at = |s: u64| start + Duration::from_secs(s);
        let told = [("a", 0), ("a", 59), ("b", 59), ("b", 60), ("a", 60), ("a", 120), ("a", 121)]
            .map(|(reason, s)| log.is_news(reason, at(s)));
        assert_eq!(told, [true, false, true, false, true, true, false]);
    }

    #[test]
    fn reasons_that_take_turns_are_told_as_seldom() {
        let (mut log, start) = (Log::default(), Instant::now());
        let told = (0..600).filter(|turn| {
            let reason = ["a", "b"][usize::from(turn % 2 == 0)];
            log.is_news(reason, start + Duration::from_millis(100 * turn))
        });
        assert_eq!(told.count(), 2);
    }

    #[test]
    fn whoever_always_says_something_else_does_not_fill_it() {
        let (mut log, start) = (Log::default(), Instant::now());
        let mut told = |second: u64| {
            let at = start + Duration::from_secs(second);
            (0..1000).filter(|what| log.is_news(&format!("{second}: {what}"), at)).count()
        };
        assert_eq!([told(0), told(59), told(60)], [LINES_MAX, 0, LINES_MAX]);
        assert_eq!(log.told.len(), LINES_MAX);
    }
}
