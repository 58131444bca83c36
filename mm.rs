// SPDX-License-Identifier: GPL-2.0

//! Safe wrappers over the parts of mm that 6.12's `kernel` crate lacks.
//!
//! Names follow mainline's `kernel::mm` where it has the same thing, so that this file shrinks on
//! newer kernels.
//!
//! Everything here may be called in process context; what may not be called in atomic context says
//! so.

use core::marker::PhantomData;
use core::mem::{ManuallyDrop, MaybeUninit};
use core::ptr::{self, NonNull};
use core::sync::atomic::AtomicU8;

use kernel::alloc::{flags::*, Flags, KVVec};
use kernel::bindings;
use kernel::error::to_result;
use kernel::prelude::*;
use kernel::types::{ARef, AlwaysRefCounted, Opaque};

/// Flags for the memory of a session: charged to the caller's cgroup; fails before it would invoke
/// the OOM killer, which would pick the parent.
pub(crate) fn session_flags() -> Flags {
    GFP_KERNEL_ACCOUNT | __GFP_NORETRY | __GFP_NOWARN
}

/// An `mm_struct` that is allocated; its address space may be gone already.
///
/// # Invariants
///
/// Instances are reached through a counted reference (`mmgrab()`), or are borrowed from a caller
/// who has one.
#[repr(transparent)]
pub(crate) struct Mm {
    mm: Opaque<bindings::mm_struct>,
}

// SAFETY: `mmdrop()` may run on any thread.
unsafe impl Send for Mm {}
// SAFETY: All methods synchronise in C.
unsafe impl Sync for Mm {}

// SAFETY: `mmgrab()` and `mmdrop()` count `mm_count`, which keeps the structure allocated.
unsafe impl AlwaysRefCounted for Mm {
    fn inc_ref(&self) {
        // SAFETY: The type invariant gives a live `mm_struct`.
        unsafe { bindings::mmgrab(self.as_raw()) }
    }

    unsafe fn dec_ref(obj: NonNull<Self>) {
        // SAFETY: The caller gives up one reference.
        unsafe { bindings::mmdrop(obj.cast().as_ptr()) }
    }
}

impl Mm {
    /// Borrows an `mm_struct` from C.
    ///
    /// # Safety
    ///
    /// `mm` is allocated for as long as `'a`.
    pub(crate) unsafe fn from_raw<'a>(mm: *const bindings::mm_struct) -> &'a Mm {
        // SAFETY: `Mm` is transparent over `mm_struct`; the caller vouches for the lifetime.
        unsafe { &*mm.cast() }
    }

    /// Returns the C structure.
    pub(crate) fn as_raw(&self) -> *mut bindings::mm_struct {
        self.mm.get()
    }

    /// Returns a counted reference.
    pub(crate) fn grab(&self) -> ARef<Mm> {
        self.into()
    }

    /// Returns whether `other` is the same address space.
    pub(crate) fn is(&self, other: &Mm) -> bool {
        ptr::eq(self, other)
    }

    /// Returns whether the current task runs on this address space.
    pub(crate) fn is_current(&self) -> bool {
        // SAFETY: The pointer is only compared.
        unsafe { bindings::mm_is_current(self.as_raw()) }
    }

    /// Returns whether a secondary MMU was ever registered; never becomes false again.
    pub(crate) fn has_notifiers(&self) -> bool {
        // SAFETY: The type invariant gives a live `mm_struct`.
        unsafe { bindings::mm_has_notifiers(self.as_raw()) }
    }

    /// Returns whether a page was ever pinned by `FOLL_PIN`; never becomes false again.
    pub(crate) fn has_pinned(&self) -> bool {
        // SAFETY: The type invariant gives a live `mm_struct`.
        unsafe { bindings::mm_flag_test(self.as_raw(), bindings::MMF_HAS_PINNED as _) }
    }

    /// Returns whether memory of this address space was lost, so that holes are not zeroes.
    pub(crate) fn is_unstable(&self) -> bool {
        // SAFETY: The type invariant gives a live `mm_struct`.
        unsafe { bindings::mm_flag_test(self.as_raw(), bindings::MMF_UNSTABLE as _) }
    }

    /// Makes anonymous faults on holes fail from now on. A full barrier.
    pub(crate) fn set_unstable(&self) {
        // SAFETY: The type invariant gives a live `mm_struct`.
        unsafe { bindings::mm_flag_set(self.as_raw(), bindings::MMF_UNSTABLE as _) }
    }

    /// Returns the bytes that the page tables can map: 512 times their own size, as each table of
    /// 4 KiB maps 2 MiB. Upper levels make it a little too large.
    pub(crate) fn mapped_bytes(&self) -> usize {
        // SAFETY: The type invariant gives a live `mm_struct`.
        unsafe { bindings::mm_pgtables_bytes(self.as_raw()) }.saturating_mul(512)
    }

    /// Returns how many workers the switches grant to a fork of this process; 0 is plain fork.
    pub(crate) fn workers(&self) -> u32 {
        // SAFETY: The type invariant gives a live `mm_struct`.
        unsafe { bindings::async_fork_workers(self.as_raw()) }
    }

    /// Publishes `session` as the one this address space is in. A release.
    pub(crate) fn attach<T>(&self, session: *const T) {
        let session = session.cast_mut().cast();
        // SAFETY: The type invariant gives a live `mm_struct`; readers treat the pointer as opaque
        // and hand it back to `mm_hooks`.
        unsafe { bindings::mm_attach_session(self.as_raw(), session) }
    }

    /// Takes `session` back. Returns whether it was still attached. A full barrier.
    pub(crate) fn detach<T>(&self, session: &T) -> bool {
        let session = ptr::from_ref(session).cast_mut().cast();
        // SAFETY: The type invariant gives a live `mm_struct`.
        unsafe { bindings::mm_detach_session(self.as_raw(), session) }
    }

    /// Sends `SIGKILL` to the process that owns this address space; returns its pid, if there is
    /// one.
    pub(crate) fn kill_owner(&self) -> Option<i32> {
        // SAFETY: The type invariant gives a live `mm_struct`; the owner is read under RCU.
        match unsafe { bindings::mm_kill_owner(self.as_raw()) } {
            0 => None,
            pid => Some(pid),
        }
    }

    /// Starts a section in which GUP-fast pins nothing, for `fork()` of this address space.
    ///
    /// The caller holds the `mmap_lock` for write and is in no other such section.
    pub(crate) fn write_protect(&self) -> WriteProtect<'_> {
        // SAFETY: The type invariant gives a live `mm_struct`.
        unsafe { bindings::write_protect_begin(self.as_raw()) }
        WriteProtect {
            mm: self,
            _not_send: PhantomData,
        }
    }
}

/// A raised `write_protect_seq`: whoever pinned by GUP-fast is seen by [`Mm::has_pinned`], or backs
/// out.
#[must_use = "the section ends when the guard is dropped"]
pub(crate) struct WriteProtect<'a> {
    mm: &'a Mm,
    _not_send: PhantomData<*mut ()>,
}

impl WriteProtect<'_> {
    /// Returns whether a page was ever pinned. False holds until the section ends.
    pub(crate) fn has_pinned(&self) -> bool {
        self.mm.has_pinned()
    }
}

impl Drop for WriteProtect<'_> {
    fn drop(&mut self) {
        // SAFETY: `write_protect_begin()` was called when the guard was made.
        unsafe { bindings::write_protect_end(self.mm.as_raw()) }
    }
}

/// A VMA of a process that forks; its `mmap_lock` is held for write.
#[repr(transparent)]
pub(crate) struct VmaRef {
    vma: Opaque<bindings::vm_area_struct>,
}

impl VmaRef {
    /// Borrows a VMA from C.
    ///
    /// # Safety
    ///
    /// The `mmap_lock` of its mm is held for write for as long as `'a`.
    pub(crate) unsafe fn from_raw<'a>(vma: *const bindings::vm_area_struct) -> &'a VmaRef {
        // SAFETY: `VmaRef` is transparent; the caller's lock keeps the VMA.
        unsafe { &*vma.cast() }
    }

    /// Returns the C structure.
    pub(crate) fn as_raw(&self) -> *mut bindings::vm_area_struct {
        self.vma.get()
    }

    /// Returns the first address.
    pub(crate) fn start(&self) -> usize {
        // SAFETY: The lock is held, see `from_raw`.
        unsafe { bindings::vma_start(self.as_raw()) }
    }

    /// Returns the address behind the last one.
    pub(crate) fn end(&self) -> usize {
        // SAFETY: The lock is held, see `from_raw`.
        unsafe { bindings::vma_end(self.as_raw()) }
    }

    /// Returns whether the VMA is anonymous, has an anon_vma, and nothing that makes its entries
    /// special.
    pub(crate) fn is_plain_anon(&self) -> bool {
        // SAFETY: The lock is held, see `from_raw`.
        let flags = unsafe { bindings::vma_flags(self.as_raw()) };
        // SAFETY: As above.
        let anon = unsafe { bindings::vma_is_anon(self.as_raw()) };
        anon && flags & bindings::ASYNC_FORK_EAGER_VM_FLAGS == 0
    }

    /// Copies all entries of `src` to `self`, as plain fork does.
    ///
    /// Not inside [`Mm::write_protect`], which this does itself. May sleep.
    pub(crate) fn copy_page_range(&self, src: &VmaRef) -> Result {
        // SAFETY: Both locks are held, see `from_raw`.
        to_result(unsafe { bindings::copy_whole_vma(self.as_raw(), src.as_raw()) })
    }

    /// Copies the entries of `[start, end)` of `src` to `self`, inside [`Mm::write_protect`].
    ///
    /// May sleep.
    pub(crate) fn copy_now(
        &self,
        src: &VmaRef,
        start: usize,
        end: usize,
        _section: &WriteProtect<'_>,
    ) -> Result {
        if start >= end {
            return Ok(());
        }
        // SAFETY: Both locks are held, see `from_raw`; the section is raised.
        to_result(unsafe { bindings::async_fork_copy_now(self.as_raw(), src.as_raw(), start, end) })
    }
}

/// What copying needs to know of a VMA, as it was at fork.
///
/// # Invariants
///
/// `0.anon_vma` holds a reference.
pub(crate) struct RangeFacts(bindings::async_fork_range);

// SAFETY: Plain facts and a counted reference that any thread may drop.
unsafe impl Send for RangeFacts {}
// SAFETY: As above; nothing is written after construction.
unsafe impl Sync for RangeFacts {}

impl RangeFacts {
    /// Records `[start, end)` of `src` and of its copy `dst`.
    pub(crate) fn new(dst: &VmaRef, src: &VmaRef, start: usize, end: usize) -> Self {
        let mut facts = MaybeUninit::uninit();
        // INVARIANT: The helper takes a reference.
        // SAFETY: Both locks are held, see `VmaRef::from_raw`; the helper writes every field.
        unsafe {
            bindings::async_fork_range_init(
                facts.as_mut_ptr(),
                dst.as_raw(),
                src.as_raw(),
                start,
                end,
            )
        }
        // SAFETY: Initialised just now.
        RangeFacts(unsafe { facts.assume_init() })
    }

    /// Returns the C structure.
    pub(crate) fn as_raw(&self) -> *const bindings::async_fork_range {
        &self.0
    }

    /// Returns the first address.
    pub(crate) fn start(&self) -> usize {
        self.0.start
    }

    /// Returns the address behind the last one.
    pub(crate) fn end(&self) -> usize {
        self.0.end
    }
}

impl Drop for RangeFacts {
    fn drop(&mut self) {
        // SAFETY: By the type invariant there is a reference to give up. This may sleep; sessions
        // are freed in process context.
        unsafe { bindings::put_anon_vma(self.0.anon_vma) }
    }
}

/// A reference to the memory cgroup that pays for a child's page tables.
pub(crate) struct Memcg(*mut bindings::mem_cgroup);

// SAFETY: The reference may be dropped on any thread.
unsafe impl Send for Memcg {}
// SAFETY: Charging synchronises in C.
unsafe impl Sync for Memcg {}

impl Memcg {
    /// Returns the group that `mm` is charged to now.
    pub(crate) fn of(mm: &Mm) -> Self {
        // SAFETY: The mm is live by its invariant.
        Memcg(unsafe { bindings::get_mem_cgroup_from_mm(mm.as_raw()) })
    }

    /// Charges the current task's accounted allocations to this group for as long as the guard.
    pub(crate) fn charge(&self) -> ActiveMemcg<'_> {
        // SAFETY: The reference keeps the group.
        let old = unsafe { bindings::set_active_memcg(self.0) };
        ActiveMemcg {
            old,
            _group: PhantomData,
            _not_send: PhantomData,
        }
    }
}

impl Drop for Memcg {
    fn drop(&mut self) {
        // SAFETY: `get_mem_cgroup_from_mm()` took the reference. NULL is allowed.
        unsafe { bindings::mem_cgroup_put(self.0) }
    }
}

/// A scope in which allocations are charged to a [`Memcg`].
#[must_use = "charging ends when the guard is dropped"]
pub(crate) struct ActiveMemcg<'a> {
    old: *mut bindings::mem_cgroup,
    _group: PhantomData<&'a Memcg>,
    _not_send: PhantomData<*mut ()>,
}

impl Drop for ActiveMemcg<'_> {
    fn drop(&mut self) {
        // SAFETY: `old` is what was active in this task before.
        unsafe { bindings::set_active_memcg(self.old) };
    }
}

/// Returns whether the machine's page tables may be written by hypercalls only.
pub(crate) fn is_xen_pv() -> bool {
    // SAFETY: Reads a CPU feature.
    unsafe { bindings::is_xen_pv() }
}

/// Returns the size below which a process takes the plain path, in bytes of mapped memory.
pub(crate) fn min_bytes() -> usize {
    // SAFETY: Reads a switch.
    unsafe { bindings::async_fork_min_bytes() }
}

/// Returns whether a test holds the workers; always false without `CONFIG_ASYNC_FORK_DEBUG`.
pub(crate) fn workers_held() -> bool {
    // SAFETY: Reads a switch.
    unsafe { bindings::async_fork_held() }
}

/// Returns whether the current task is being killed.
pub(crate) fn fatal_signal_pending() -> bool {
    // SAFETY: Looks at the current task.
    unsafe { bindings::fatal_signal_pending() }
}

/// Sends `SIGKILL` to the current process.
pub(crate) fn kill_current() {
    // SAFETY: The current task is alive.
    unsafe { bindings::kill_current() }
}

/// Lets others run. May sleep.
pub(crate) fn cond_resched() {
    // SAFETY: Process context, see the file's head.
    unsafe { bindings::cond_resched() }
}

/// An event that `/proc/vmstat` counts as `async_fork_*`.
#[derive(Clone, Copy)]
pub(crate) struct Event(bindings::vm_event_item);

macro_rules! events {
    ($($name:ident = $item:ident;)*) => {
        /// Named as in `linux/vm_event_item.h`, which tells what each means.
        impl Event {
            $(pub(crate) const $name: Event = Event(bindings::$item);)*
        }
    };
}

events! {
    SESSION = vm_event_item_ASYNC_FORK_SESSION;
    END = vm_event_item_ASYNC_FORK_END;
    PIECE_WORKER = vm_event_item_ASYNC_FORK_PIECE_WORKER;
    PIECE_PARENT = vm_event_item_ASYNC_FORK_PIECE_PARENT;
    PIECE_CHILD = vm_event_item_ASYNC_FORK_PIECE_CHILD;
    PIECE_LIFTED = vm_event_item_ASYNC_FORK_PIECE_LIFTED;
    CANCEL = vm_event_item_ASYNC_FORK_CANCEL;
    POISON = vm_event_item_ASYNC_FORK_POISON;
    WAIT_MIGRATION = vm_event_item_ASYNC_FORK_WAIT_MIGRATION;
    FALLBACK_OFF = vm_event_item_ASYNC_FORK_FALLBACK_OFF;
    FALLBACK_SMALL = vm_event_item_ASYNC_FORK_FALLBACK_SMALL;
    FALLBACK_NOTIFIER = vm_event_item_ASYNC_FORK_FALLBACK_NOTIFIER;
    FALLBACK_PINNED = vm_event_item_ASYNC_FORK_FALLBACK_PINNED;
    FALLBACK_NOMEM = vm_event_item_ASYNC_FORK_FALLBACK_NOMEM;
}

/// Counts `event` once. Any context.
pub(crate) fn count(event: Event) {
    // SAFETY: The item is one of the kernel's own.
    unsafe { bindings::count_vm_event(event.0) }
}

/// A section that does not sleep and, on kernels that preempt, is not preempted; and, for lockdep,
/// the lock that a claim is.
#[must_use = "the section ends when the guard is dropped"]
pub(crate) struct ClaimSection(PhantomData<*mut ()>);

impl ClaimSection {
    /// Starts a section. One at a time for a task.
    pub(crate) fn enter() -> Self {
        // SAFETY: Undone by `drop`, on the same task as the guard is not `Send`.
        unsafe { bindings::preempt_disable() };
        // SAFETY: As above.
        unsafe { bindings::claim_map_acquire() };
        ClaimSection(PhantomData)
    }

    /// Tells lockdep that the caller is about to wait for somebody's section.
    pub(crate) fn might_wait() {
        // SAFETY: Balanced.
        unsafe { bindings::claim_map_acquire() };
        // SAFETY: Balanced.
        unsafe { bindings::claim_map_release() };
    }
}

impl Drop for ClaimSection {
    fn drop(&mut self) {
        // SAFETY: Acquired by `enter`.
        unsafe { bindings::claim_map_release() };
        // SAFETY: Disabled by `enter`.
        unsafe { bindings::preempt_enable() };
    }
}

/// A wait for somebody who does not sleep but whose CPU may be taken away by a hypervisor.
#[derive(Default)]
pub(crate) struct Backoff {
    rounds: u32,
}

impl Backoff {
    /// Spins that take some microseconds, before the first sleep.
    const SPINS: u32 = 1 << 12;

    /// Waits a little; longer from some calls on. May sleep.
    pub(crate) fn wait(&mut self) {
        if self.rounds == 0 {
            ClaimSection::might_wait();
        }
        self.rounds = self.rounds.saturating_add(1);
        if self.rounds < Self::SPINS {
            // SAFETY: A hint to the CPU.
            unsafe { bindings::cpu_relax() };
        } else {
            // SAFETY: Process context, see the file's head.
            unsafe { bindings::usleep_range(20, 50) };
        }
    }
}

/// Returns `n` zero bytes to be used atomically.
pub(crate) fn zeroed_bytes(n: usize) -> Result<KVVec<AtomicU8>> {
    let mut bytes = KVVec::<AtomicU8>::with_capacity(n, session_flags() | __GFP_ZERO)?;
    // SAFETY: The capacity is at least `n`, its memory was zeroed, and zero is a valid `AtomicU8`.
    unsafe { bytes.set_len(n) };
    Ok(bytes)
}

/// How hard an allocation tries. None invokes the OOM killer; but kernels that debug spinlocks
/// allocate the lock of a PTE table with `GFP_KERNEL`, whatever the flags.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Effort {
    /// Takes what is free: neither reclaims, nor is throttled above `memory.high`.
    Instant,
    /// One round of reclaim.
    Quick,
    /// As many as help.
    Stubborn,
}

impl Effort {
    /// Returns `gfp` with this effort.
    pub(crate) fn of(self, gfp: bindings::gfp_t) -> bindings::gfp_t {
        let gfp = gfp | bindings::__GFP_NOWARN;
        match self {
            Effort::Instant => gfp & !bindings::__GFP_DIRECT_RECLAIM,
            Effort::Quick => gfp | bindings::__GFP_NORETRY,
            Effort::Stubborn => gfp | bindings::__GFP_RETRY_MAYFAIL,
        }
    }
}

macro_rules! owned_page {
    ($(#[$doc:meta])* $name:ident, $ty:ident, $gfp:ident, $alloc:ident, $free:ident) => {
        $(#[$doc])*
        pub(crate) struct $name(NonNull<bindings::$ty>);

        // SAFETY: The page is owned and no other thread knows it.
        unsafe impl Send for $name {}

        impl $name {
            /// Allocates one, charged to the active [`Memcg`]. May sleep, but for
            /// [`Effort::Instant`].
            pub(crate) fn new(effort: Effort) -> Option<Self> {
                // SAFETY: Process context.
                let page = unsafe { bindings::$alloc(effort.of(bindings::$gfp)) };
                // SAFETY: Allocated just now, or NULL.
                unsafe { $name::from_raw(page) }
            }

            /// Takes back what [`Self::into_raw`] gave, unless C used it and set it to NULL.
            ///
            /// # Safety
            ///
            /// `page` is NULL or owned by the caller.
            pub(crate) unsafe fn from_raw(page: *mut bindings::$ty) -> Option<Self> {
                NonNull::new(page).map($name)
            }

            /// Gives up the page; it must be given back or installed.
            pub(crate) fn into_raw(self) -> *mut bindings::$ty {
                ManuallyDrop::new(self).0.as_ptr()
            }
        }

        impl Drop for $name {
            fn drop(&mut self) {
                // SAFETY: The page is owned and not installed.
                unsafe { bindings::$free(self.0.as_ptr()) }
            }
        }
    };
}

owned_page!(
    /// An empty PTE table that is not installed.
    PteTable,
    page,
    GFP_PGTABLE_USER,
    pte_table_alloc,
    pte_table_free
);
owned_page!(
    /// An empty PMD table that is not installed.
    PmdTable,
    pmd_t,
    GFP_PGTABLE_USER,
    pmd_table_alloc,
    pmd_table_free
);
owned_page!(
    /// An empty PUD table that is not installed.
    PudTable,
    pud_t,
    GFP_PGTABLE_USER,
    pud_table_alloc,
    pud_table_free
);
owned_page!(
    /// A page for the child that nothing is copied to yet.
    SparePage,
    folio,
    GFP_HIGHUSER_MOVABLE,
    async_fork_alloc_folio,
    folio_put
);
