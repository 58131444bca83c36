// SPDX-License-Identifier: GPL-2.0

//! Page tables: levels as types, marks, and the copy of one piece.
//!
//! A piece is what one PMD entry maps. Its tables are read and written inside a [`Claim`] only, but
//! for [`mark_range`], where `fork()` holds the parent's `mmap_lock` for write.
//!
//! Lock order, inside a claim:
//!  1. `page_table_lock` or PMD lock of the child, to install a table; dropped again
//!  2. the child's PTE lock
//!  3. the parent's PTE lock, nested
//!
//! Nothing sleeps inside a claim. What needs a sleep undoes it and is told as an [`Obstacle`].

use core::marker::PhantomData;
use core::mem::MaybeUninit;
use core::ptr::{self, NonNull};

use kernel::bindings;
use kernel::error::code::*;
use kernel::prelude::*;

use crate::mm::{
    cond_resched, Effort, Memcg, Mm, PmdTable, PteTable, PudTable, RangeFacts, SparePage, VmaRef,
    WriteProtect,
};
use crate::piece::{Claim, Finish};

/// Bytes that one piece maps.
pub(crate) const PIECE_SIZE: usize = Pmd::SIZE;

/// On 5-level machines, upper tables may be missing from this address on.
pub(crate) const ADDR_LIMIT: usize = 1 << 47;

/// A level of the page table.
pub(crate) trait Level {
    /// The C type of an entry.
    type Entry;
    /// Bytes that an entry maps.
    const SIZE: usize;

    /// Returns whether the entry holds a table.
    ///
    /// # Safety
    ///
    /// `entry` points to an entry of a live table of this level.
    unsafe fn is_table(entry: *mut Self::Entry) -> bool;
}

/// A level whose entries point to tables of entries of another.
pub(crate) trait Branch: Level {
    /// The next level down.
    type Child: Level;

    /// Returns the entry for `addr` in the table that `entry` points to.
    ///
    /// # Safety
    ///
    /// As [`Level::is_table`], which must be true.
    unsafe fn descend(entry: *mut Self::Entry, addr: usize) -> *mut <Self::Child as Level>::Entry;
}

macro_rules! level {
    ($(#[$doc:meta])* $name:ident, $entry:ident, $shift:expr, $is_table:ident) => {
        $(#[$doc])*
        pub(crate) enum $name {}

        impl Level for $name {
            type Entry = bindings::$entry;
            const SIZE: usize = 1 << $shift;

            unsafe fn is_table(entry: *mut Self::Entry) -> bool {
                // SAFETY: The caller's promise.
                unsafe { bindings::$is_table(entry) }
            }
        }
    };
}

macro_rules! branch {
    ($name:ident, $child:ident, $descend:ident) => {
        impl Branch for $name {
            type Child = $child;

            unsafe fn descend(
                entry: *mut Self::Entry,
                addr: usize,
            ) -> *mut <$child as Level>::Entry {
                // SAFETY: The caller's promise.
                unsafe { bindings::$descend(entry, addr) }
            }
        }
    };
}

level! {
    /// The top level.
    Pgd, pgd_t, 48, pgd_is_table
}
level! {
    /// The fourth level, folded into the top on 4-level machines.
    P4d, p4d_t, 39, p4d_is_table
}
level! {
    /// Entries of 1 GiB.
    Pud, pud_t, 30, pud_is_table
}
level! {
    /// Entries of 2 MiB; what they point to is a piece.
    Pmd, pmd_t, 21, pmd_is_table
}
branch!(Pgd, P4d, p4d_offset);
branch!(P4d, Pud, pud_offset);
branch!(Pud, Pmd, pmd_offset);

/// One entry of a table.
///
/// # Invariants
///
/// `entry` points to an entry for `addr` of a table that stays allocated for `'a`.
struct Slot<'a, L: Level> {
    entry: NonNull<L::Entry>,
    addr: usize,
    _table: PhantomData<&'a Mm>,
}

impl<'a, L: Level> Slot<'a, L> {
    fn is_table(&self) -> bool {
        // SAFETY: The type invariant.
        unsafe { L::is_table(self.entry.as_ptr()) }
    }

    /// Returns the first address behind what this entry maps.
    fn next_addr(&self) -> usize {
        (self.addr | (L::SIZE - 1)).saturating_add(1)
    }
}

impl<'a, L: Branch> Slot<'a, L> {
    /// Returns the entry for the same address one level down.
    fn child(&self) -> Option<Slot<'a, L::Child>> {
        if !self.is_table() {
            return None;
        }
        // SAFETY: The type invariant, and it holds a table. Upper tables below a live VMA are not
        // freed, see `free_pgd_range()`'s floor and ceiling, and a claim or the `mmap_lock` keeps
        // the VMA.
        let entry = unsafe { L::descend(self.entry.as_ptr(), self.addr) };
        // INVARIANT: As above.
        NonNull::new(entry).map(|entry| Slot {
            entry,
            addr: self.addr,
            _table: PhantomData,
        })
    }
}

impl<'a> Slot<'a, Pgd> {
    /// Returns the top entry for `addr`. `evidence` is what keeps the tables below it.
    fn top<E: ?Sized>(mm: &'a Mm, addr: usize, _evidence: &'a E) -> Option<Self> {
        // SAFETY: A live `mm_struct` has a top table.
        let entry = unsafe { bindings::pgd_offset(mm.as_raw(), addr) };
        // INVARIANT: The top table lives as long as the `mm_struct`.
        NonNull::new(entry).map(|entry| Slot {
            entry,
            addr,
            _table: PhantomData,
        })
    }
}

impl<'a> Slot<'a, Pmd> {
    fn is_none(&self) -> bool {
        // SAFETY: The type invariant.
        unsafe { bindings::pmd_is_none(self.entry.as_ptr()) }
    }

    /// Sets the mark. Only for a table entry.
    fn set_mark(&self) {
        // SAFETY: The type invariant; the bit operation is atomic.
        unsafe { bindings::pmd_table_set_mark(self.entry.as_ptr()) }
    }

    /// Clears the mark. Only for a table entry. Needs no flush: permissions grow.
    fn clear_mark(&self) {
        // SAFETY: The type invariant; the bit operation is atomic.
        unsafe { bindings::pmd_table_clear_mark(self.entry.as_ptr()) }
    }

    /// Returns the entry behind this one, if it is in the same table.
    fn next(&self) -> Option<Self> {
        let addr = self.next_addr();
        if addr % Pud::SIZE == 0 {
            return None;
        }
        // SAFETY: A PMD table maps 1 GiB, and `addr` is within the same.
        let entry = unsafe { self.entry.add(1) };
        // INVARIANT: The same table.
        Some(Slot {
            entry,
            addr,
            _table: PhantomData,
        })
    }
}

/// Either the PMD entry for an address, or the first address that may have one.
enum Found<'a> {
    Pmd(Slot<'a, Pmd>),
    Gap(usize),
}

fn find_pmd<'a, E: ?Sized>(mm: &'a Mm, addr: usize, evidence: &'a E) -> Found<'a> {
    let Some(pgd) = Slot::top(mm, addr, evidence) else {
        return Found::Gap(usize::MAX);
    };
    let Some(p4d) = pgd.child() else {
        return Found::Gap(pgd.next_addr());
    };
    let Some(pud) = p4d.child() else {
        return Found::Gap(p4d.next_addr());
    };
    match pud.child() {
        Some(pmd) => Found::Pmd(pmd),
        None => Found::Gap(pud.next_addr()),
    }
}

/// What a copier carries into claims: empty tables and a spare page.
pub(crate) struct Kit {
    pte: Option<PteTable>,
    pmd: Option<PmdTable>,
    pud: Option<PudTable>,
    page: Option<SparePage>,
}

/// What a copier ran out of.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Part {
    Pte,
    Pmd,
    Pud,
    Page,
}

impl Kit {
    /// A kit with nothing in it.
    pub(crate) const EMPTY: Kit = Kit {
        pte: None,
        pmd: None,
        pud: None,
        page: None,
    };

    /// Returns whether a PTE table is at hand, which almost every copy needs.
    pub(crate) fn has_pte_table(&self) -> bool {
        self.pte.is_some()
    }

    /// Takes the PTE table of another kit, if this one has none.
    pub(crate) fn take_pte_table(&mut self, other: &mut Kit) {
        if self.pte.is_none() {
            self.pte = other.pte.take();
        }
    }

    /// Allocates `part`, charged to `memcg`. May sleep, but for [`Effort::Instant`].
    pub(crate) fn allocate(&mut self, part: Part, memcg: &Memcg, effort: Effort) -> Result {
        let _charge = memcg.charge();
        let got = match part {
            Part::Pte => fill(&mut self.pte, PteTable::new(effort)),
            Part::Pmd => fill(&mut self.pmd, PmdTable::new(effort)),
            Part::Pud => fill(&mut self.pud, PudTable::new(effort)),
            Part::Page => fill(&mut self.page, SparePage::new(effort)),
        };
        if got {
            Ok(())
        } else {
            Err(ENOMEM)
        }
    }
}

/// Puts `new` in its place. Returns whether there was one.
fn fill<T>(place: &mut Option<T>, new: Option<T>) -> bool {
    let got = new.is_some();
    *place = new;
    got
}

/// Hands a page of the kit to an expression that sets it to NULL if it used it, and takes back what
/// is left.
macro_rules! install {
    ($place:expr, $ty:ident, $missing:expr, |$page:ident| $install:expr) => {{
        let mut $page = $place.take().ok_or(Obstacle::Missing($missing))?.into_raw();
        $install;
        // SAFETY: Owned, or NULL as it was used.
        $place = unsafe { $ty::from_raw($page) };
    }};
}

/// Returns the child's PMD entry for the piece, which then holds a table. Installs what is missing
/// from `kit`, as the child's own faults next door may do meanwhile.
fn child_pmd<'a>(
    child: &'a Mm,
    claim: &'a Claim<'_>,
    kit: &mut Kit,
) -> Result<Slot<'a, Pmd>, Obstacle> {
    let mm = child.as_raw();
    // Three levels may be missing; each round finds or installs one.
    for _ in 0..4 {
        let addr = claim.addr();
        // Missing on 5-level machines only, in a child without stack, binary and libraries.
        let Some(p4d) = Slot::top(child, addr, claim).and_then(|pgd| pgd.child()) else {
            return Err(Obstacle::Broken);
        };
        let Some(pud) = p4d.child() else {
            install!(kit.pud, PudTable, Part::Pud, |page| {
                // SAFETY: `p4d` is live by its invariant and `page` owned; the function re-checks
                // under `page_table_lock`.
                unsafe { bindings::async_fork_install_pud(mm, p4d.entry.as_ptr(), &mut page) }
            });
            continue;
        };
        let Some(pmd) = pud.child() else {
            install!(kit.pmd, PmdTable, Part::Pmd, |page| {
                // SAFETY: As above, under the PUD's lock.
                unsafe { bindings::async_fork_install_pmd(mm, pud.entry.as_ptr(), &mut page) }
            });
            continue;
        };
        if pmd.is_none() {
            install!(kit.pte, PteTable, Part::Pte, |page| {
                // SAFETY: As above, under the PMD's lock.
                unsafe { bindings::pmd_install(mm, pmd.entry.as_ptr(), &mut page) }
            });
            continue;
        }
        return Ok(pmd);
    }
    Err(Obstacle::Broken)
}

/// Both PTE tables of a piece, locked.
struct TablePair<'a> {
    tables: bindings::async_fork_tables,
    _slots: PhantomData<&'a Mm>,
}

impl<'a> TablePair<'a> {
    fn lock(
        child: &'a Mm,
        dst: &Slot<'a, Pmd>,
        parent: &'a Mm,
        src: &Slot<'a, Pmd>,
    ) -> Option<Self> {
        let mut tables = MaybeUninit::uninit();
        // SAFETY: Both entries are live by their invariant; `tables` is written on success.
        let locked = unsafe {
            bindings::async_fork_lock_tables(
                child.as_raw(),
                dst.entry.as_ptr(),
                parent.as_raw(),
                src.entry.as_ptr(),
                src.addr,
                tables.as_mut_ptr(),
            )
        };
        if !locked {
            return None;
        }
        // SAFETY: Written, as the function succeeded.
        let tables = unsafe { tables.assume_init() };
        Some(TablePair {
            tables,
            _slots: PhantomData,
        })
    }

    /// Copies all entries that the child lacks.
    fn copy(
        &mut self,
        facts: &RangeFacts,
        child: &Mm,
        parent: &Mm,
        addr: usize,
        kit: &mut Kit,
    ) -> Result<(), Stop> {
        let mut entry = bindings::swp_entry_t { val: 0 };
        let mut folio = kit.page.take().map_or(ptr::null_mut(), SparePage::into_raw);
        // SAFETY: Both tables are locked; the facts and both mms outlive the call; `folio` is owned
        // or NULL.
        let ret = unsafe {
            bindings::async_fork_copy_ptes(
                facts.as_raw(),
                child.as_raw(),
                parent.as_raw(),
                &mut self.tables,
                addr,
                &mut folio,
                &mut entry,
            )
        };
        // SAFETY: Owned, or NULL as it was used.
        kit.page = unsafe { SparePage::from_raw(folio) };
        const MIGRATION: i32 = -(bindings::EINPROGRESS as i32);
        const SWAP_COUNT: i32 = -(bindings::EIO as i32);
        const BUSY: i32 = -(bindings::EBUSY as i32);
        const PAGE: i32 = -(bindings::EAGAIN as i32);
        match ret {
            0 => Ok(()),
            MIGRATION => Err(Stop::Migration(entry)),
            SWAP_COUNT => Err(Stop::SwapCount(entry)),
            BUSY => Err(Stop::Busy),
            PAGE => Err(Stop::Page),
            _ => Err(Stop::Broken),
        }
    }

    /// Drops all but the parent's lock.
    fn keep_parent_lock(mut self) -> *mut bindings::spinlock_t {
        // SAFETY: Both tables are locked.
        let ptl = unsafe { bindings::async_fork_unlock_dst(&mut self.tables) };
        core::mem::forget(self);
        ptl
    }
}

impl Drop for TablePair<'_> {
    fn drop(&mut self) {
        // SAFETY: Both tables are locked.
        unsafe { bindings::async_fork_unlock_tables(&mut self.tables) }
    }
}

/// Where a copy of entries stopped, the tables still locked.
enum Stop {
    Migration(bindings::swp_entry_t),
    SwapCount(bindings::swp_entry_t),
    Busy,
    Page,
    Broken,
}

/// A swap entry whose count needs one more page of counters.
pub(crate) struct SwapEntry(bindings::swp_entry_t);

impl SwapEntry {
    /// Allocates the counters. May sleep.
    pub(crate) fn extend_count(self, memcg: &Memcg, effort: Effort) -> Result {
        let _charge = memcg.charge();
        let gfp = effort.of(bindings::GFP_KERNEL);
        // SAFETY: A stale entry is told from a live one under its device's lock.
        kernel::error::to_result(unsafe { bindings::swap_count_continue(self.0, gfp) })
    }
}

/// What stands between a copier and the end of a piece; the claim is undone.
pub(crate) enum Obstacle {
    /// The kit lacks a part.
    Missing(Part),
    /// [`SwapEntry::extend_count`] first.
    SwapCount(SwapEntry),
    /// Somebody holds a lock on a page for a short time.
    Busy,
    /// A page is being migrated. With [`Patience::Wait`] it has been waited for.
    Migration,
    /// The memory that should be copied is broken, or the tables are not what they should be.
    Broken,
}

impl From<Stop> for Obstacle {
    fn from(stop: Stop) -> Self {
        match stop {
            Stop::Migration(_) => Obstacle::Migration,
            Stop::SwapCount(entry) => Obstacle::SwapCount(SwapEntry(entry)),
            Stop::Busy => Obstacle::Busy,
            Stop::Page => Obstacle::Missing(Part::Page),
            Stop::Broken => Obstacle::Broken,
        }
    }
}

/// What to do about a page that is being migrated.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Patience {
    /// Sleep until it is over.
    Wait,
    /// Come back later.
    Skip,
}

/// Copies the claimed piece and finishes it, or undoes the claim and tells why. Sleeps only to wait
/// for a migration, without the claim.
pub(crate) fn copy_piece(
    claim: Claim<'_>,
    parent: &Mm,
    child: &Mm,
    kit: &mut Kit,
    patience: Patience,
) -> Result<(), Obstacle> {
    let stop = {
        let addr = claim.addr();
        let src = match find_pmd(parent, addr, &claim) {
            Found::Pmd(src) if src.is_table() => src,
            Found::Pmd(src) if !src.is_none() => {
                claim.undo();
                return Err(Obstacle::Broken);
            }
            _ => {
                claim.finish(Finish::Lifted);
                return Ok(());
            }
        };
        let dst = match child_pmd(child, &claim, kit) {
            Ok(dst) => dst,
            Err(obstacle) => {
                claim.undo();
                return Err(obstacle);
            }
        };
        let Some(mut pair) = TablePair::lock(child, &dst, parent, &src) else {
            claim.undo();
            return Err(Obstacle::Broken);
        };
        match pair.copy(claim.facts(), child, parent, addr, kit) {
            Ok(()) => {
                // Before the locks are dropped, and before `Done`: see DESIGN.md section 3.
                src.clear_mark();
                drop(pair);
                claim.finish(Finish::Copied);
                return Ok(());
            }
            Err(Stop::Migration(entry)) if patience == Patience::Wait => {
                let ptl = pair.keep_parent_lock();
                claim.undo();
                // SAFETY: `ptl` is held and protects the entry that was read; the function drops
                // it. With it held the parent cannot zap the entry, so the table stays.
                unsafe { bindings::migration_wait_unlock(entry, ptl) };
                return Err(Obstacle::Migration);
            }
            Err(stop) => stop,
        }
        // `pair` is unlocked here, before the claim is undone.
    };
    claim.undo();
    Err(stop.into())
}

/// Clears the mark of the claimed piece and finishes it without a copy.
pub(crate) fn lift_piece(claim: Claim<'_>, parent: &Mm) {
    clear_mark_at(parent, claim.addr(), &claim);
    claim.finish(Finish::Lifted);
}

/// Clears the mark at `addr`, if there is a table. `evidence` is what keeps the tables.
pub(crate) fn clear_mark_at<E: ?Sized>(parent: &Mm, addr: usize, evidence: &E) {
    if let Found::Pmd(pmd) = find_pmd(parent, addr, evidence) {
        if pmd.is_table() {
            pmd.clear_mark();
        }
    }
}

/// Marks every table of `facts`'s range in the parent, calling `marked` with the piece's index, and
/// copies what is a huge PMD now. May sleep.
pub(crate) fn mark_range(
    parent: &Mm,
    dst: &VmaRef,
    src: &VmaRef,
    facts: &RangeFacts,
    section: &WriteProtect<'_>,
    mut marked: impl FnMut(usize),
) -> Result {
    let mut addr = facts.start();
    while addr < facts.end() {
        let mut slot = match find_pmd(parent, addr, section) {
            Found::Pmd(pmd) => Some(pmd),
            Found::Gap(next) => {
                addr = next;
                continue;
            }
        };
        cond_resched();
        while let Some(pmd) = slot {
            if pmd.is_table() {
                marked((addr - facts.start()) / PIECE_SIZE);
                pmd.set_mark();
            } else if !pmd.is_none() {
                dst.copy_now(src, addr, pmd.next_addr(), section)?;
            }
            addr = pmd.next_addr();
            slot = if addr < facts.end() { pmd.next() } else { None };
        }
    }
    Ok(())
}
