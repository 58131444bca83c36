// SPDX-License-Identifier: GPL-2.0

//! What `fork()` itself does: decide whether it is lazy, copy or mark each VMA, publish.
//!
//! All of it runs in `dup_mmap()`, with both `mmap_lock`s held for write; the parent's VMA at hand
//! is write-locked too. May sleep.

#![deny(unsafe_code)]

use kernel::alloc::KBox;
use kernel::prelude::*;
use kernel::sync::{Arc, UniqueArc};

use crate::mm::{self, count, Event, Mm, RangeFacts, VmaRef};
use crate::pgtable_copy::{self, ADDR_LIMIT, PIECE_SIZE};
use crate::piece::Range;
use crate::session::Session;

/// The most pieces of one VMA: 2 TiB, for which the states take 1 MiB. A larger one, mostly a
/// reservation that holds little, is copied now.
const MAX_RANGE_PIECES: usize = 1 << 20;

/// A lazy fork that is not published yet.
pub(crate) struct Fork {
    session: UniqueArc<Session>,
    /// Somebody pinned a page meanwhile: this VMA and all later ones are copied now.
    pinned: bool,
}

/// Returns why `parent` must fork plainly, if it must.
fn obstacle(parent: &Mm) -> Option<Event> {
    if parent.workers() == 0 || mm::is_xen_pv() {
        Some(Event::FALLBACK_OFF)
    } else if parent.mapped_bytes() < mm::min_bytes() {
        Some(Event::FALLBACK_SMALL)
    } else if parent.has_notifiers() {
        Some(Event::FALLBACK_NOTIFIER)
    } else if parent.has_pinned() {
        Some(Event::FALLBACK_PINNED)
    } else {
        None
    }
}

/// Returns whether `parent`, which is in no session, forks lazily; if not, the reason is counted.
///
/// Fails if it has lost memory itself, as its holes are not zeroes. Does not sleep.
pub(crate) fn admit(parent: &Mm) -> Result<bool> {
    if parent.is_unstable() {
        return Err(ENOMEM);
    }
    match obstacle(parent) {
        Some(reason) => count(reason),
        None => return Ok(true),
    }
    Ok(false)
}

impl Fork {
    /// Begins a lazy fork; `None` is plain fork, as there is no memory.
    pub(crate) fn new(parent: &Mm, child: &Mm) -> Option<KBox<Self>> {
        let fork = Self::try_new(parent, child);
        if fork.is_err() {
            count(Event::FALLBACK_NOMEM);
        }
        fork.ok()
    }

    fn try_new(parent: &Mm, child: &Mm) -> Result<KBox<Self>> {
        // The switches may have changed since: then one worker does.
        let workers = parent.workers();
        let flags = mm::session_flags();
        let session = UniqueArc::new(Session::new(parent, child, workers)?, flags)?;
        Ok(KBox::new(
            Fork {
                session,
                pinned: false,
            },
            flags,
        )?)
    }

    /// Copies `src` to `dst`: what can wait is marked, the rest is copied now.
    pub(crate) fn copy_vma(&mut self, dst: &VmaRef, src: &VmaRef) -> Result {
        let start = src.start().next_multiple_of(PIECE_SIZE);
        let end = src.end() - src.end() % PIECE_SIZE;
        let pieces = end.saturating_sub(start) / PIECE_SIZE;
        let lazy = !self.pinned
            && pieces > 0
            && pieces <= MAX_RANGE_PIECES
            && end <= ADDR_LIMIT
            && src.is_plain_anon()
            && dst.is_plain_anon();
        if !lazy {
            return dst.copy_page_range(src);
        }
        match self.add_range(dst, src, start, end) {
            Ok(()) => {}
            Err(_) => {
                count(Event::FALLBACK_NOMEM);
                return dst.copy_page_range(src);
            }
        }
        self.mark(dst, src)
    }

    fn add_range(&mut self, dst: &VmaRef, src: &VmaRef, start: usize, end: usize) -> Result {
        let range = Range::new(RangeFacts::new(dst, src, start, end))?;
        Ok(self.session.ranges.push(range, mm::session_flags())?)
    }

    /// Marks the range that was added last, and copies the rest of its VMA.
    fn mark(&mut self, dst: &VmaRef, src: &VmaRef) -> Result {
        let session = &*self.session;
        let Some(range) = session.ranges.last() else {
            return Err(EINVAL);
        };
        let facts = range.facts();
        let section = session.parent().write_protect();
        if section.has_pinned() {
            drop(section);
            // The range stays, with nothing to copy in it.
            self.pinned = true;
            count(Event::FALLBACK_PINNED);
            return dst.copy_page_range(src);
        }
        dst.copy_now(src, src.start(), facts.start(), &section)?;
        pgtable_copy::mark_range(session.parent(), dst, src, facts, &section, |index| {
            range.set_uncopied(index)
        })?;
        dst.copy_now(src, facts.end(), src.end(), &section)
    }

    /// Ends a `fork()` that succeeded: `None` if nothing was left to copy later. The marks are
    /// set; the parent's TLBs must be flushed before [`Session::open`].
    pub(crate) fn publish(mut self) -> Option<Arc<Session>> {
        if self.session.count_pieces() == 0 {
            return None;
        }
        let session = Arc::from(self.session);
        session.publish();
        Some(session)
    }

    /// Ends a `fork()` that failed: lifts the marks.
    pub(crate) fn abort(self) {
        self.session.unmark();
    }
}
