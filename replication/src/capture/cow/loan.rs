//! Pages that stay as they were at the seal until a device has read them.

use std::sync::Arc;

use super::page;
use super::table::Table;
use crate::ids::PageIndex;

/// Protected pages of one group of 64. They are given back when this is dropped.
pub struct Loan {
    table: Arc<Table>,
    group: usize,
    word: u64,
    /// Who writes such a page is served as long as there are any.
    _service: Arc<dyn Send + Sync>,
}

impl Loan {
    pub(super) fn new(
        table: &Arc<Table>,
        group: usize,
        word: u64,
        service: Arc<dyn Send + Sync>,
    ) -> Self {
        Self { table: Arc::clone(table), group, word, _service: service }
    }

    /// Whether a page is among them.
    #[must_use]
    pub fn has(&self, page: PageIndex) -> bool {
        let (group, bit) = (page.0 / 64, page.0 % 64);
        group == self.group as u64 && self.word & (1 << bit) != 0
    }

    /// Gives back all but those that `wanted` names; `false` if that is all.
    pub fn retain(&mut self, wanted: impl Fn(PageIndex) -> bool) -> bool {
        let given = super::bits(self.word)
            .filter(|bit| !wanted(page(self.group, *bit)))
            .fold(0, |given, bit| given | 1 << bit);
        self.give_back(given);
        self.word != 0
    }

    fn give_back(&mut self, word: u64) {
        if word != 0 {
            self.word &= !word;
            self.table.give_back(self.group, word);
        }
    }
}

impl Drop for Loan {
    fn drop(&mut self) {
        self.give_back(self.word);
    }
}
