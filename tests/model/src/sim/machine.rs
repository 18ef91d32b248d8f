//! The simulator's machine: pages, a server of counters in them, lines on a console, a gate.

use std::collections::BTreeSet;

use replication::ids::EpochId;

use crate::guest::{Guest, Position};
use crate::vm::Vm;

pub const PAGES: usize = 16;
pub const CLIENTS: usize = 3;

/// Pages of the counters (one a client, of the highest request that it served) and of the console.
const LINE_PAGE: usize = CLIENTS;
const FREE_PAGES: usize = CLIENTS + 1;

pub type Pages = [u64; PAGES];

/// What leaves a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// A frame: the client's request of this number is done, and these are all counters.
    Response { client: usize, request: u64, total: u64 },
    /// A line on the console, with its number.
    Line(u64),
}

impl Output {
    fn is_line(&self) -> bool {
        matches!(self, Self::Line(_))
    }
}

/// What an epoch, or a copy, carries.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Content {
    pub position: Position,
    pub pages: Vec<(usize, u64)>,
    /// Lines that were held when it was sealed: part of the console's state.
    lines: Vec<u64>,
}

/// What a backup has.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Image {
    pub position: Position,
    pub pages: Pages,
    lines: Vec<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Machine {
    pub history: Guest,
    pub pages: Pages,
    dirty: BTreeSet<usize>,
    /// Output in its order, tagged once it is sealed.
    held: Vec<(Option<EpochId>, Output)>,
    /// What has left since somebody looked.
    pub out: Vec<Output>,
}

impl Machine {
    #[must_use]
    pub fn new() -> Self {
        Self::with(Guest::new(), [0; PAGES])
    }

    fn with(history: Guest, pages: Pages) -> Self {
        Self { history, pages, dirty: BTreeSet::new(), held: vec![], out: vec![] }
    }

    fn write(&mut self, page: usize, value: u64) {
        self.pages[page] = value;
        self.dirty.insert(page);
    }

    fn send(&mut self, output: Output) {
        if self.history.is_free() {
            self.out.push(output);
        } else {
            self.held.push((None, output));
        }
    }

    /// Serves a client: a request that was served before is answered again and changes nothing.
    /// `false` for one that it cannot know: what it said before is not in its memory.
    pub fn serve(&mut self, client: usize, request: u64) -> bool {
        if self.stands() {
            return true;
        }
        let served = self.pages[client];
        if request > served + 1 {
            return false;
        }
        self.write(client, served.max(request));
        let total = self.pages[..CLIENTS].iter().sum();
        self.send(Output::Response { client, request, total });
        true
    }

    /// Computes: some pages change.
    pub fn compute(&mut self, page: usize, value: u64) {
        if !self.stands() {
            self.write(FREE_PAGES + page % (PAGES - FREE_PAGES), value);
        }
    }

    /// Says the next line.
    pub fn line(&mut self) {
        if !self.stands() {
            let line = self.pages[LINE_PAGE] + 1;
            self.write(LINE_PAGE, line);
            self.send(Output::Line(line));
        }
    }

    fn let_out(&mut self, leaves: impl Fn(Option<EpochId>, &Output) -> bool) {
        let (out, held) = self.held.drain(..).partition(|(tag, output)| leaves(*tag, output));
        self.held = held;
        let out: Vec<_> = out;
        self.out.extend(out.into_iter().map(|(_, output)| output));
    }
}

impl Default for Machine {
    fn default() -> Self {
        Self::new()
    }
}

impl Vm for Machine {
    type Content = Content;
    type Image = Image;

    fn copy(&mut self) -> Option<Content> {
        self.dirty.clear();
        let pages = self.pages.iter().copied().enumerate().collect();
        Some(Content { position: Position::default(), pages, lines: vec![] })
    }

    fn seal(&mut self, epoch: EpochId, handover: bool) -> Content {
        let position = self.history.seal(epoch, handover);
        for (tag, _) in &mut self.held {
            tag.get_or_insert(epoch);
        }
        let pages = std::mem::take(&mut self.dirty);
        let pages = pages.into_iter().map(|page| (page, self.pages[page])).collect();
        let lines = self.held.iter().filter_map(|(_, output)| match output {
            Output::Line(line) => Some(*line),
            Output::Response { .. } => None,
        });
        Content { position, pages, lines: lines.collect() }
    }

    fn hold(&mut self) {
        self.history.hold();
    }

    fn commit(&mut self, epoch: EpochId) {
        self.history.commit(epoch);
        self.let_out(|tag, _| tag.is_some_and(|tag| tag <= epoch));
    }

    fn hand_over(&mut self, epoch: EpochId) {
        self.history.hand_over(epoch);
        self.let_out(|tag, output| tag.is_some_and(|tag| tag <= epoch) && !output.is_line());
    }

    fn pass(&mut self) {
        self.history.pass();
        self.let_out(|_, _| true);
    }

    fn release(&mut self) {
        self.history.release();
    }

    fn stands(&self) -> bool {
        self.history.stands()
    }

    fn is_free(&self) -> bool {
        self.history.is_free()
    }

    fn receive(image: &mut Image, content: &Content) {
        for (page, value) in &content.pages {
            image.pages[*page] = *value;
        }
        image.position = content.position;
        image.lines.clone_from(&content.lines);
    }

    fn start_held(image: &Image) -> Self {
        let mut machine = Self::with(Guest::start_held(&image.position), image.pages);
        machine.held = image.lines.iter().map(|line| (None, Output::Line(*line))).collect();
        machine
    }

    fn kept(&self) -> Image {
        let lines = self.held.iter().filter_map(|(_, output)| match output {
            Output::Line(line) => Some(*line),
            Output::Response { .. } => None,
        });
        Image { position: self.history.kept(), pages: self.pages, lines: lines.collect() }
    }

    fn start(image: &Image) -> Self {
        let mut machine = Self::with(Guest::start(&image.position), image.pages);
        machine.out = image.lines.iter().map(|line| Output::Line(*line)).collect();
        machine
    }
}
