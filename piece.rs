// SPDX-License-Identifier: GPL-2.0

//! Ranges, their pieces, and the claim on a piece.
//!
//! A piece's state is its lock:
//!
//! ```text
//! Uncopied --claim--> Copying --finish--> Done
//!                         \------undo---> Uncopied
//! ```
//!
//! `Copying` does not sleep. `Done`, seen by an acquire load, means that no copier is inside and
//! none will come: the tables may be freed.

#![deny(unsafe_code)]

use core::sync::atomic::{AtomicU8, Ordering::*};

use kernel::alloc::KVVec;
use kernel::prelude::*;

use crate::mm::{self, count, Backoff, ClaimSection, Event, RangeFacts};
use crate::pgtable_copy::PIECE_SIZE;
use crate::session::Session;

const DONE: u8 = 0;
const UNCOPIED: u8 = 1;
const COPYING: u8 = 2;

/// Which address space of a session somebody works for.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Side {
    Parent,
    Child,
}

/// Who copies a piece, for the counters.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Actor {
    Worker,
    Side(Side),
}

/// The PMD-aligned inside of a VMA at fork, and a state for each of its pieces.
pub(crate) struct Range {
    facts: RangeFacts,
    /// The number of its first piece among all of the session's.
    first: usize,
    states: KVVec<AtomicU8>,
}

impl Range {
    /// Makes a range whose pieces are all `Done`.
    pub(crate) fn new(facts: RangeFacts) -> Result<Self> {
        let pieces = (facts.end() - facts.start()) / PIECE_SIZE;
        Ok(Range {
            facts,
            first: 0,
            states: mm::zeroed_bytes(pieces)?,
        })
    }

    /// Returns what is known of the VMA.
    pub(crate) fn facts(&self) -> &RangeFacts {
        &self.facts
    }

    /// Numbers the pieces from `first` on; returns the next number.
    pub(crate) fn number_from(&mut self, first: usize) -> usize {
        self.first = first;
        first + self.states.len()
    }

    /// Returns the number of the first piece.
    pub(crate) fn first(&self) -> usize {
        self.first
    }

    /// Makes piece `index` wait for its copy. Before the session is published.
    pub(crate) fn set_uncopied(&self, index: usize) {
        if let Some(state) = self.states.get(index) {
            state.store(UNCOPIED, Relaxed);
        }
    }

    /// Counts the pieces that wait. Before the session is published.
    pub(crate) fn uncopied(&self) -> usize {
        self.states
            .iter()
            .filter(|state| state.load(Relaxed) == UNCOPIED)
            .count()
    }

    /// Returns the pieces that overlap `[start, end)`.
    pub(crate) fn pieces(&self, start: usize, end: usize) -> impl Iterator<Item = Piece<'_>> {
        let start = start.max(self.facts.start());
        let end = end.min(self.facts.end()).max(start);
        let first = (start - self.facts.start()) / PIECE_SIZE;
        let last = (end - self.facts.start()).div_ceil(PIECE_SIZE);
        (first..last).filter_map(|index| self.piece(index))
    }

    /// Returns all pieces.
    pub(crate) fn all(&self) -> impl Iterator<Item = Piece<'_>> {
        self.pieces(0, usize::MAX)
    }

    /// Returns the piece that holds `addr`, which is not below the range.
    pub(crate) fn piece_at(&self, addr: usize) -> Option<Piece<'_>> {
        self.piece(addr.checked_sub(self.facts.start())? / PIECE_SIZE)
    }

    /// Returns piece `index`, if there are so many.
    pub(crate) fn piece(&self, index: usize) -> Option<Piece<'_>> {
        let state = self.states.get(index)?;
        Some(Piece {
            facts: &self.facts,
            addr: self.facts.start() + index * PIECE_SIZE,
            state,
        })
    }
}

/// 2 MiB of a range: the unit of copying.
#[derive(Clone, Copy)]
pub(crate) struct Piece<'a> {
    facts: &'a RangeFacts,
    addr: usize,
    state: &'a AtomicU8,
}

impl Piece<'_> {
    /// Returns the first address.
    pub(crate) fn addr(&self) -> usize {
        self.addr
    }

    /// Brings the piece from `Uncopied` to `Done` without a look at its tables. Returns whether it
    /// was `Uncopied`.
    pub(crate) fn force_done(&self) -> bool {
        self.state
            .compare_exchange(UNCOPIED, DONE, SeqCst, Relaxed)
            .is_ok()
    }

    /// Returns whether all of the piece is in `[start, end)`.
    pub(crate) fn is_within(&self, start: usize, end: usize) -> bool {
        start <= self.addr && self.addr + PIECE_SIZE <= end
    }

    /// Returns whether no copier is inside and none will come. An acquire.
    pub(crate) fn is_done(&self) -> bool {
        self.state.load(Acquire) == DONE
    }

    /// Waits until no copier is inside.
    pub(crate) fn wait_while_copying(&self) {
        let mut backoff = Backoff::default();
        while self.state.load(SeqCst) == COPYING {
            backoff.wait();
        }
    }
}

/// How a piece came to its end.
#[derive(Clone, Copy)]
pub(crate) enum Finish {
    /// The child has it.
    Copied,
    /// Nobody needs it.
    Lifted,
}

/// The right to look at both sides' tables of one piece and to change them. Atomic context.
#[must_use = "finish or undo it; dropping undoes it"]
pub(crate) struct Claim<'a> {
    session: &'a Session,
    piece: Piece<'a>,
    actor: Actor,
    /// What dropping leaves behind.
    after: u8,
    _section: ClaimSection,
}

impl<'a> Claim<'a> {
    /// Claims `piece`, if it is `Uncopied`. The caller then looks at the session's flags.
    pub(crate) fn try_new(session: &'a Session, piece: Piece<'a>, actor: Actor) -> Option<Self> {
        let section = ClaimSection::enter();
        piece
            .state
            .compare_exchange(UNCOPIED, COPYING, SeqCst, Relaxed)
            .ok()?;
        Some(Claim {
            session,
            piece,
            actor,
            after: UNCOPIED,
            _section: section,
        })
    }

    /// Returns the first address of the piece.
    pub(crate) fn addr(&self) -> usize {
        self.piece.addr
    }

    /// Returns what is known of the piece's VMA.
    pub(crate) fn facts(&self) -> &'a RangeFacts {
        self.piece.facts
    }

    /// Ends the piece. The mark is clear and no lock is held.
    pub(crate) fn finish(mut self, how: Finish) {
        count(match (how, self.actor) {
            (Finish::Lifted, _) => Event::PIECE_LIFTED,
            (Finish::Copied, Actor::Worker) => Event::PIECE_WORKER,
            (Finish::Copied, Actor::Side(Side::Parent)) => Event::PIECE_PARENT,
            (Finish::Copied, Actor::Side(Side::Child)) => Event::PIECE_CHILD,
        });
        self.after = DONE;
        let session = self.session;
        drop(self);
        session.pieces_done(1);
    }

    /// Gives the piece back as it was; what is copied of it stays.
    pub(crate) fn undo(self) {}
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.piece.state.store(self.after, Release);
        // `_section` ends behind this.
    }
}
