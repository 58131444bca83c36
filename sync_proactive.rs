// SPDX-License-Identifier: GPL-2.0

//! Who syncs what, before it touches what is not copied yet (the paper's proactive
//! synchronisation).
//!
//! The parent's content is right as it is; it syncs before it writes, pins, frees, moves or changes
//! entries, as every fault does. The child syncs before every look at content. Both call in with
//! their own `mmap_lock` or VMA lock held as the caller has it; nothing here takes a lock of the
//! other side. May sleep.

#![deny(unsafe_code)]

use kernel::prelude::*;
use kernel::sync::Arc;

use crate::mm::{self, Mm};
use crate::piece::{Actor, Side};
use crate::session::Session;

/// A sync of a range larger than this starts the workers, to help.
const HELP_BYTES: usize = 32 << 20;

/// What somebody is about to do at an address.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Access {
    /// A read of what is mapped; its entry stays as it is.
    Read,
    /// A write, an unshare, a pin or any fault.
    Write,
}

/// What somebody is about to do to a range.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Change {
    /// Look at entries.
    Look,
    /// Change or move entries.
    Change,
    /// Drop all entries of the range.
    Zap,
}

/// Why a child cannot have the rest of its memory.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Poison {
    /// No memory for its page tables.
    NoMemory,
    /// A page that had to be copied is broken.
    Broken,
    /// The OOM reaper takes the parent's memory.
    Reaped,
}

/// The child has lost memory; it is being killed.
#[derive(Debug)]
pub(crate) struct Poisoned;

/// Returns what the child must be told: its memory is whole, or not.
fn verdict(session: &Session, side: Side) -> Result<(), Poisoned> {
    if side == Side::Child && session.is_poisoned() {
        session.punish();
        return Err(Poisoned);
    }
    Ok(())
}

/// Brings the piece at `addr` of `this` up to date for `access`.
pub(crate) fn sync_addr(
    session: &Arc<Session>,
    this: &Mm,
    addr: usize,
    access: Access,
) -> Result<(), Poisoned> {
    let side = session.side_of(this);
    if side == Side::Parent && access == Access::Read {
        return Ok(());
    }
    session.wait_until_open();
    if let Some(piece) = session.piece_at(addr) {
        if side == Side::Child {
            session.child_pulls();
        }
        session.bring(piece, Actor::Side(side));
    }
    // Behind the copy: `Done` may be a hole's, and then the flag is visible.
    verdict(session, side)
}

/// Brings every piece in `[start, end)` of `this` up to date for `change`.
pub(crate) fn sync_range(
    session: &Arc<Session>,
    this: &Mm,
    start: usize,
    end: usize,
    change: Change,
) -> Result<(), Poisoned> {
    let side = session.side_of(this);
    if side == Side::Parent && change == Change::Look {
        return Ok(());
    }
    session.wait_until_open();
    if end.saturating_sub(start) > HELP_BYTES {
        session.kick();
    }
    for range in session.ranges_in(start, end) {
        for piece in range.pieces(start, end) {
            let drops = side == Side::Child && change == Change::Zap;
            if drops && piece.is_within(start, end) {
                session.discard(piece, Actor::Side(side));
            } else {
                session.bring(piece, Actor::Side(side));
            }
            mm::cond_resched();
            if change == Change::Look && mm::fatal_signal_pending() {
                return verdict(session, side);
            }
        }
    }
    verdict(session, side)
}

/// How long somebody is ready to wait.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Wait {
    ToTheEnd,
    UntilKilled,
}

/// Ends the session for `this` by copying all of it. Fails with `EINTR` when the caller is killed
/// meanwhile and `wait` says so.
///
/// A session that another thread's `fork()` is still making is left to the caller's lock.
pub(crate) fn drain(session: &Arc<Session>, this: &Mm, wait: Wait) -> Result {
    let side = session.side_of(this);
    if !session.is_open() {
        return Ok(());
    }
    session.drain(side, wait)
}

/// Prepares for the last user's exec, which drops `this` with locks held that others wait for.
pub(crate) fn exec(session: &Arc<Session>, this: &Mm) {
    if session.side_of(this) == Side::Parent {
        // `EINTR` of a killed caller is no harm: `exit` does the rest.
        let _ = session.drain(Side::Parent, Wait::UntilKilled);
    }
}

/// Why an address space goes.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Exit {
    /// Its last user left.
    Normal,
    /// So that others have its memory.
    OomVictim,
}

/// Ends the session for `this`, whose last user is gone. The tables may be freed behind this.
pub(crate) fn exit(session: &Arc<Session>, this: &Mm, exit: Exit) {
    match session.side_of(this) {
        Side::Child => session.child_exits(),
        Side::Parent => {
            match exit {
                Exit::OomVictim => session.abandon(Poison::Reaped),
                // Nobody needs the marks lifted in tables that are about to go.
                Exit::Normal if session.is_over() => {}
                Exit::Normal => {
                    // Cannot fail: nothing interrupts it.
                    let _ = session.drain(Side::Parent, Wait::ToTheEnd);
                }
            }
            session.parent_exits();
        }
    }
}

/// Gives up the session as the OOM reaper is about to unmap `this`, whose `mmap_lock` it holds for
/// reading. Allocates nothing and waits for nothing but copiers inside.
pub(crate) fn reap(session: &Arc<Session>, this: &Mm) {
    if !session.is_open() {
        return;
    }
    match session.side_of(this) {
        Side::Child => session.child_is_reaped(),
        Side::Parent => session.abandon(Poison::Reaped),
    }
}
