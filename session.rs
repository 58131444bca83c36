// SPDX-License-Identifier: GPL-2.0

//! One `fork()` in progress: its flags, its workers, its end.
//!
//! Whoever makes the rest of the copy unwanted sets a flag, then looks for pieces that are
//! `Copying`; a claimer makes its piece `Copying`, then looks at the flags. All four are SeqCst, so
//! one of the two sees the other.
//!
//! Who holds what:
//!  1. The two mms' pointers hold one reference to the session together, given up by
//!     [`Session::detach`] through an SRCU grace period, as hooks find the session without one.
//!  2. A hook holds one reference while it runs, a queued worker another.
//!  3. The session holds both `mm_struct`s, not their address spaces, and the module.

#![deny(unsafe_code)]

use core::pin::Pin;
use core::sync::atomic::{fence, AtomicBool, AtomicUsize, Ordering::*};

use kernel::alloc::{KBox, KVVec, KVec};
use kernel::new_spinlock;
use kernel::prelude::*;
use kernel::sync::{Arc, SpinLock};
use kernel::types::ARef;

use crate::mm::{self, count, Backoff, Effort, Event, Memcg, Mm};
use crate::mm_hooks::{Job, ModuleRef, Queue, Retirement, Run};
use crate::pgtable_copy::{self, Kit, Obstacle, Part, Patience};
use crate::piece::{Actor, Claim, Piece, Range, Side};
use crate::sync_proactive::{Poison, Wait};

/// The most workers a session has; `ASYNC_FORK_MAX_WORKERS` of the patch.
const MAX_WORKERS: usize = 8;

/// How long the workers let a new child alone: one that execs at once finds nothing started.
const WORKER_DELAY_MS: u32 = 2;

/// How long a worker that a test holds waits before it looks again.
const HOLD_POLL_MS: u32 = 10;

/// How long a session's first worker leaves alone what is left, as pages of it are being migrated.
const MIGRATION_POLL_MS: u32 = 50;

/// Pieces that a worker copies before it lets those of other sessions have its place in the queue.
const TURN: usize = 512;

/// PTE tables in stock for the parent's faults.
const STOCK: usize = 16;

/// Workers visit pieces in steps of this (prime, so that they visit all): an ascending writer then
/// does not meet the same worker again and again.
const STRIDE: usize = 2_654_435_761;

/// One `fork()` whose tables are not all copied yet.
pub(crate) struct Session {
    parent: ARef<Mm>,
    child: ARef<Mm>,
    memcg: Memcg,
    /// In the order of their addresses; not changed once published.
    pub(crate) ranges: KVVec<Range>,
    pieces: usize,
    remaining: AtomicUsize,
    /// How many mms still point here.
    attached: AtomicUsize,
    published: AtomicBool,
    /// The parent's TLBs are flushed: copying is allowed.
    open: AtomicBool,
    /// The child may run; its owner can be killed.
    started: AtomicBool,
    kicked: AtomicBool,
    /// How often the child has needed something.
    pulls: AtomicUsize,
    child_gone: AtomicBool,
    poisoned: AtomicBool,
    /// How many pieces the workers' first pass has handed out.
    cursor: AtomicUsize,
    stock: Pin<KBox<SpinLock<[Kit; STOCK]>>>,
    jobs: KVec<Job<Session>>,
    lifter: Job<Session>,
    retirement: Retirement<Session>,
    /// Last, so that it is dropped last.
    _module: ModuleRef,
}

impl Session {
    /// Makes a session without ranges, to be filled while `fork()` holds both `mmap_lock`s.
    pub(crate) fn new(parent: &Mm, child: &Mm, workers: u32) -> Result<Self> {
        let module = ModuleRef::get().ok_or(ENODEV)?;
        let flags = mm::session_flags();
        let workers = (workers as usize).clamp(1, MAX_WORKERS);
        let mut jobs = KVec::with_capacity(workers, flags)?;
        for _ in 0..workers {
            jobs.push(Job::new(flags)?, flags)?;
        }
        Ok(Session {
            memcg: Memcg::of(parent),
            parent: parent.grab(),
            child: child.grab(),
            ranges: KVVec::new(),
            pieces: 0,
            remaining: AtomicUsize::new(0),
            attached: AtomicUsize::new(0),
            published: AtomicBool::new(false),
            open: AtomicBool::new(false),
            started: AtomicBool::new(false),
            kicked: AtomicBool::new(false),
            pulls: AtomicUsize::new(0),
            child_gone: AtomicBool::new(false),
            poisoned: AtomicBool::new(false),
            cursor: AtomicUsize::new(0),
            stock: KBox::pin_init(
                new_spinlock!([const { Kit::EMPTY }; STOCK], "async_fork_stock"),
                flags,
            )?,
            jobs,
            lifter: Job::new(flags)?,
            retirement: Retirement::new(flags)?,
            _module: module,
        })
    }

    /// Returns the parent's address space.
    pub(crate) fn parent(&self) -> &Mm {
        &self.parent
    }

    /// Returns which side of the session `mm` is.
    pub(crate) fn side_of(&self, mm: &Mm) -> Side {
        if self.child.is(mm) {
            Side::Child
        } else {
            Side::Parent
        }
    }

    /// Returns whether the child has lost memory.
    pub(crate) fn is_poisoned(&self) -> bool {
        self.poisoned.load(SeqCst)
    }

    /// Returns whether copying has no use any more.
    pub(crate) fn is_over(&self) -> bool {
        self.child_gone.load(SeqCst) || self.is_poisoned()
    }

    /// Counts the pieces that wait for their copy.
    pub(crate) fn count_pieces(&mut self) -> usize {
        for range in self.ranges.as_mut_slice() {
            self.pieces = range.number_from(self.pieces);
        }
        let uncopied = self.ranges.iter().map(Range::uncopied).sum();
        self.remaining = AtomicUsize::new(uncopied);
        uncopied
    }

    /// Lets both mms point to the session; they hold `self` together from now on. Both `mmap_lock`s
    /// are held for write. Copying starts with [`Session::open`].
    pub(crate) fn publish(self: &Arc<Self>) {
        count(Event::SESSION);
        self.published.store(true, Relaxed);
        self.attached.store(2, Relaxed);
        let handle = self.retirement.arm(self.clone());
        self.parent.attach(handle);
        self.child.attach(handle);
    }

    /// Allows copying. The parent's TLBs hold no writable translation of what is marked.
    pub(crate) fn open(&self) {
        self.open.store(true, Release);
    }

    /// Returns whether copying is allowed yet.
    pub(crate) fn is_open(&self) -> bool {
        self.open.load(Acquire)
    }

    /// Waits for the end of the `fork()` that makes this session; it is about to flush TLBs.
    pub(crate) fn wait_until_open(&self) {
        let mut backoff = Backoff::default();
        while !self.is_open() {
            backoff.wait();
        }
    }

    /// Lifts every mark of a session that is not published. Both `mmap_lock`s are held for write.
    pub(crate) fn unmark(&self) {
        for range in self.ranges.iter() {
            for piece in range.all().filter(|piece| !piece.is_done()) {
                pgtable_copy::clear_mark_at(&self.parent, piece.addr(), self);
            }
            mm::cond_resched();
        }
    }

    /// Arms the workers as the child is about to run. False: it is poisoned already.
    pub(crate) fn start(self: &Arc<Self>) -> bool {
        self.started.store(true, SeqCst);
        if self.is_poisoned() {
            return false;
        }
        for (slot, job) in self.jobs.iter().enumerate() {
            job.queue(self.clone(), slot, Queue::Copy, WORKER_DELAY_MS);
        }
        true
    }

    /// Starts the workers now, once.
    pub(crate) fn kick(self: &Arc<Self>) {
        if !self.kicked.load(Relaxed) && !self.kicked.swap(true, Relaxed) {
            for (slot, job) in self.jobs.iter().enumerate() {
                job.kick(self.clone(), slot, Queue::Copy);
            }
        }
    }

    /// Tells that the child needs a piece. The second time starts the workers: the first may be the
    /// kernel's write to the stack of a thread that forked and is about to exec.
    pub(crate) fn child_pulls(self: &Arc<Self>) {
        if self.pulls.load(Relaxed) > 0 || self.pulls.fetch_add(1, Relaxed) > 0 {
            self.kick();
        }
    }

    /// Has the marks lifted, as copying is over; also when no worker was ever started.
    fn kick_lifter(self: &Arc<Self>) {
        if self.remaining.load(SeqCst) > 0 {
            self.lifter.kick(self.clone(), self.jobs.len(), Queue::Lift);
        }
    }

    /// Returns the range that holds `addr`.
    fn range_at(&self, addr: usize) -> Option<&Range> {
        let behind = self
            .ranges
            .partition_point(|range| range.facts().start() <= addr);
        let range = self.ranges.get(behind.checked_sub(1)?)?;
        (addr < range.facts().end()).then_some(range)
    }

    /// Returns the piece that holds `addr`.
    pub(crate) fn piece_at(&self, addr: usize) -> Option<Piece<'_>> {
        self.range_at(addr)?.piece_at(addr)
    }

    /// Returns the ranges that overlap `[start, end)`.
    pub(crate) fn ranges_in(&self, start: usize, end: usize) -> impl Iterator<Item = &Range> {
        let first = self
            .ranges
            .partition_point(|range| range.facts().end() <= start);
        self.ranges
            .iter()
            .skip(first)
            .take_while(move |range| range.facts().start() < end)
    }

    /// Brings `piece` to `Done`: copies it, or lifts its mark if the copy has no use any more. May
    /// sleep. The caller holds a reference.
    pub(crate) fn bring(self: &Arc<Self>, piece: Piece<'_>, actor: Actor) {
        let mut kit = Kit::EMPTY;
        while !self.step(piece, actor, &mut kit, Patience::Wait) {}
        // Somebody else was faster.
        if kit.has_pte_table() {
            self.shelve(&mut kit);
        }
    }

    /// Brings `piece` to `Done` without a copy: its side is about to drop the content. May sleep.
    pub(crate) fn discard(&self, piece: Piece<'_>, actor: Actor) {
        let mut backoff = Backoff::default();
        while !piece.is_done() {
            match Claim::try_new(self, piece, actor) {
                Some(claim) => pgtable_copy::lift_piece(claim, &self.parent),
                None => backoff.wait(),
            }
        }
    }

    /// One try at a piece. Returns whether it is `Done`, or must be skipped.
    fn step(
        self: &Arc<Self>,
        piece: Piece<'_>,
        actor: Actor,
        kit: &mut Kit,
        patience: Patience,
    ) -> bool {
        let mut backoff = Backoff::default();
        loop {
            if piece.is_done() {
                return true;
            }
            // Almost every copy needs one. If there is none, the copy tells whether this one does.
            if !kit.has_pte_table() && !self.is_over() {
                let _ = self.reach(kit, Part::Pte, actor);
            }
            let Some(claim) = Claim::try_new(self, piece, actor) else {
                backoff.wait();
                continue;
            };
            // Behind the claim: see the file's head.
            if self.is_over() {
                pgtable_copy::lift_piece(claim, &self.parent);
                return true;
            }
            return match pgtable_copy::copy_piece(claim, &self.parent, &self.child, kit, patience) {
                Ok(()) => true,
                Err(Obstacle::Migration) => {
                    count(Event::WAIT_MIGRATION);
                    patience == Patience::Skip
                }
                Err(obstacle) => {
                    if let Err(why) = self.overcome(obstacle, kit, actor) {
                        self.give_up(piece, actor, why);
                    }
                    false
                }
            };
        }
    }

    #[cold]
    fn overcome(&self, obstacle: Obstacle, kit: &mut Kit, actor: Actor) -> Result<(), Poison> {
        match obstacle {
            Obstacle::Missing(part) => self.supply(kit, part, actor),
            // The entry is spent by one try; a second is a new run of the copy.
            Obstacle::SwapCount(entry) => entry
                .extend_count(&self.memcg, Effort::Stubborn)
                .map_err(|_| Poison::NoMemory),
            Obstacle::Busy | Obstacle::Migration => {
                mm::cond_resched();
                Ok(())
            }
            Obstacle::Broken => Err(Poison::Broken),
        }
    }

    /// Gets `part` for `kit` from the stock or from free memory. Returns whether there was one.
    /// Does not sleep.
    fn reach(&self, kit: &mut Kit, part: Part, actor: Actor) -> bool {
        if part == Part::Pte && actor == Actor::Side(Side::Parent) {
            let mut stock = self.stock.lock();
            if let Some(shelf) = stock.iter_mut().find(|shelf| shelf.has_pte_table()) {
                kit.take_pte_table(shelf);
                return true;
            }
        }
        kit.allocate(part, &self.memcg, Effort::Instant).is_ok()
    }

    /// Gets `part` for `kit`, by reclaim if there is no other way. May sleep.
    fn supply(&self, kit: &mut Kit, part: Part, actor: Actor) -> Result<(), Poison> {
        if self.reach(kit, part, actor)
            || kit.allocate(part, &self.memcg, Effort::Quick).is_ok()
            // Then the next claim needs no part.
            || self.is_over()
        {
            return Ok(());
        }
        kit.allocate(part, &self.memcg, Effort::Stubborn)
            .map_err(|_| Poison::NoMemory)
    }

    /// Puts the PTE table of `kit`, if it has one, on a place of the stock that is empty.
    fn shelve(&self, kit: &mut Kit) {
        let mut stock = self.stock.lock();
        if let Some(shelf) = stock.iter_mut().find(|shelf| !shelf.has_pte_table()) {
            shelf.take_pte_table(kit);
        }
    }

    /// Poisons the child as `piece` cannot be copied, unless somebody else has copied it by now. The
    /// claim keeps the session in both mms meanwhile, so that a child that is whole is left alone.
    #[cold]
    fn give_up(self: &Arc<Self>, piece: Piece<'_>, actor: Actor, why: Poison) {
        if let Some(claim) = Claim::try_new(self, piece, actor) {
            self.poison(why);
            pgtable_copy::lift_piece(claim, &self.parent);
        }
    }

    /// Fills one place of the stock, if one is empty. Workers only.
    fn restock(&self) {
        let is_empty = |shelf: &Kit| !shelf.has_pte_table();
        let wanted = !self.is_over() && self.stock.lock().iter().any(is_empty);
        let mut kit = Kit::EMPTY;
        if wanted && self.reach(&mut kit, Part::Pte, Actor::Worker) {
            self.shelve(&mut kit);
        }
    }

    /// Some pieces were brought to `Done`; the last one ends the session.
    pub(crate) fn pieces_done(&self, pieces: usize) {
        if pieces > 0 && self.remaining.fetch_sub(pieces, SeqCst) == pieces {
            self.leave(Side::Parent);
            self.leave(Side::Child);
        }
    }

    /// Takes the session out of one mm, if it is still there. None of its pieces needs that mm.
    fn detach(&self, side: Side) {
        let mm = match side {
            Side::Parent => &self.parent,
            Side::Child => &self.child,
        };
        if mm.detach(self) && self.attached.fetch_sub(1, SeqCst) == 1 {
            self.retirement.fire();
        }
    }

    /// Copies all that is left, workers helping, and takes the session out of `side`'s mm. May
    /// sleep. Fails with `EINTR` when the caller is killed meanwhile and `wait` says so.
    pub(crate) fn drain(self: &Arc<Self>, side: Side, wait: Wait) -> Result {
        self.kick();
        for piece in self.ranges.iter().flat_map(Range::all) {
            if wait == Wait::UntilKilled && mm::fatal_signal_pending() {
                return Err(EINTR);
            }
            self.bring(piece, Actor::Side(side));
            mm::cond_resched();
        }
        self.leave(side);
        Ok(())
    }

    /// Takes the session out of `side`'s mm as all pieces are `Done`. A poisoned child is held until
    /// it exits: its holes must never be read as zeroes.
    fn leave(&self, side: Side) {
        if side == Side::Parent || !self.is_poisoned() {
            self.detach(side);
        }
    }

    /// Ends the child's part as its address space is about to go: stops the copying and waits for
    /// copiers inside.
    pub(crate) fn child_exits(self: &Arc<Self>) {
        let first = !self.child_gone.swap(true, SeqCst);
        fence(SeqCst);
        if first && self.is_cancelled() {
            count(Event::CANCEL);
        }
        self.kick_lifter();
        for piece in self.ranges.iter().flat_map(Range::all) {
            piece.wait_while_copying();
            mm::cond_resched();
        }
        self.detach(Side::Child);
    }

    /// Returns whether a child that goes leaves something uncopied, which it did not lose before.
    fn is_cancelled(&self) -> bool {
        self.remaining.load(SeqCst) > 0 && !self.is_poisoned()
    }

    /// Ends the parent's part: no lifter may walk its tables, which are about to go.
    pub(crate) fn parent_exits(&self) {
        let mut forced = 0;
        for piece in self.ranges.iter().flat_map(Range::all) {
            while !piece.is_done() {
                if piece.force_done() {
                    count(Event::PIECE_LIFTED);
                    forced += 1;
                } else {
                    piece.wait_while_copying();
                }
            }
            mm::cond_resched();
        }
        self.pieces_done(forced);
        self.detach(Side::Parent);
    }

    /// Gives up the child's part, as the OOM reaper is about to unmap it, without allocating. Nobody
    /// reads its holes: it is being killed, and its faults fail.
    pub(crate) fn child_is_reaped(&self) {
        if !self.child_gone.swap(true, SeqCst) && self.is_cancelled() {
            count(Event::CANCEL);
        }
        for piece in self.ranges.iter().flat_map(Range::all) {
            self.discard(piece, Actor::Side(Side::Child));
            mm::cond_resched();
        }
    }

    /// Poisons the child and lifts every mark, without allocating; unless all is copied.
    pub(crate) fn abandon(self: &Arc<Self>, why: Poison) {
        for piece in self.ranges.iter().flat_map(Range::all) {
            let mut backoff = Backoff::default();
            while !piece.is_done() {
                self.give_up(piece, Actor::Side(Side::Parent), why);
                backoff.wait();
            }
            mm::cond_resched();
        }
    }

    /// Gives up on the child: nobody will ever read what it lacks. Does not sleep or allocate.
    pub(crate) fn poison(self: &Arc<Self>, why: Poison) {
        // Before the flag, and so before any mark is lifted: faults on holes fail from here on.
        self.child.set_unstable();
        if self.poisoned.swap(true, SeqCst) || self.child_gone.load(SeqCst) {
            return;
        }
        count(Event::POISON);
        let reason = match why {
            Poison::NoMemory => "no memory for its page tables",
            Poison::Broken => "a page that it needs cannot be copied",
            Poison::Reaped => "its memory went to the OOM killer",
        };
        // Before it runs, `start` sees the flag, and the hook kills it.
        if !self.started.load(SeqCst) {
            pr_warn!("a new child is not to run: {reason}\n");
        } else if let Some(pid) = self.child.kill_owner() {
            pr_warn!("killed child {pid}: {reason}\n");
        } else {
            pr_warn!("a child has no process left to kill: {reason}\n");
        }
        self.kick_lifter();
    }

    /// Kills the current task if it runs on the child's memory, which has holes.
    pub(crate) fn punish(&self) {
        if self.child.is_current() {
            mm::kill_current();
        }
    }

    /// A worker's first pass: pieces nobody else has taken, in strides.
    fn next_piece(&self) -> Option<Piece<'_>> {
        let turn = self.cursor.fetch_add(1, Relaxed);
        if turn >= self.pieces {
            return None;
        }
        let number = turn.wrapping_mul(STRIDE) % self.pieces;
        let behind = self.ranges.partition_point(|range| range.first() <= number);
        let range = self.ranges.get(behind.checked_sub(1)?)?;
        range.piece(number - range.first())
    }

    /// Works on the session for one turn. Returns when to go on, in ms; `None`: not again.
    fn work(self: &Arc<Self>, slot: usize) -> Option<u32> {
        let mut kit = Kit::EMPTY;
        for _ in 0..TURN {
            let Some(piece) = self.next_piece() else {
                return self.work_on_rest(slot, &mut kit);
            };
            while !self.step(piece, Actor::Worker, &mut kit, Patience::Skip) {}
            self.restock();
            mm::cond_resched();
        }
        Some(0)
    }

    /// The second pass: what was skipped, and what was undone by somebody else meanwhile. Sleeps for
    /// no migration: who does it may have no CPU time, and other sessions need the place.
    fn work_on_rest(self: &Arc<Self>, slot: usize, kit: &mut Kit) -> Option<u32> {
        let ranges = self.ranges.iter().inspect(|_| mm::cond_resched());
        let mut rest = ranges.flat_map(Range::all).filter(|piece| !piece.is_done());
        let mut is_blocked = false;
        for piece in rest.by_ref().take(TURN) {
            while !self.step(piece, Actor::Worker, kit, Patience::Skip) {}
            is_blocked |= !piece.is_done();
            mm::cond_resched();
        }
        if is_blocked {
            return (slot == 0).then_some(MIGRATION_POLL_MS);
        }
        rest.next().map(|_| 0)
    }
}

impl Run for Session {
    fn run(self: &Arc<Self>, slot: usize) {
        let (job, queue) = match self.jobs.get(slot) {
            Some(job) => (job, Queue::Copy),
            None => (&self.lifter, Queue::Lift),
        };
        // Millions of pieces may be left that hold nothing.
        if self.remaining.load(SeqCst) == 0 {
            return;
        }
        if mm::workers_held() && !self.is_over() {
            job.queue(self.clone(), slot, queue, HOLD_POLL_MS);
        } else if let Some(delay) = self.work(slot) {
            job.queue(self.clone(), slot, queue, delay);
        }
    }

    fn put(self: Arc<Self>) {
        if let Some(last) = self.into_unique_or_drop() {
            Retirement::put_last(last.into(), |session| &session.retirement);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        if self.published.load(Relaxed) {
            count(Event::END);
        }
    }
}
