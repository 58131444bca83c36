// SPDX-License-Identifier: GPL-2.0

//! The boundary: what C calls. Hooks and deferred work come in as raw pointers and leave as safe
//! calls; errors become errnos here, once. No policy.
//!
//! C finds the session of an `mm_struct` in a read section of `async_fork_srcu`, takes a reference
//! there ([`get`]) and gives it up behind the hook ([`put`]): no hook holds up a grace period.

use core::cell::UnsafeCell;
use core::marker::PhantomData;
use core::mem::{self, ManuallyDrop};
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicPtr, Ordering::*};

use kernel::alloc::{Flags, KBox};
use kernel::bindings;
use kernel::error::to_result;
use kernel::ffi::{c_int, c_uint, c_ulong};
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::types::Opaque;
use kernel::{c_str, container_of};

use crate::fork::{self, Fork};
use crate::mm::{Mm, VmaRef};
use crate::piece::Side;
use crate::session::Session;
use crate::sync_proactive::{self, Access, Change, Exit, Poisoned, Wait};

/// A session as C sees it.
type RawSession = bindings::async_fork_session;

static OPS: Ops = Ops(bindings::async_fork_ops {
    owner: crate::THIS_MODULE.as_ptr(),
    admit: Some(admit),
    begin: Some(begin),
    copy_vma: Some(copy_vma),
    publish: Some(publish),
    open: Some(open),
    abort: Some(abort),
    get: Some(get),
    put: Some(put),
    start: Some(start),
    sync_addr: Some(sync_addr),
    sync_range: Some(sync_range),
    drain: Some(drain),
    exec: Some(exec),
    exit: Some(exit),
    reap: Some(reap),
    is_parent: Some(is_parent),
});

struct Ops(bindings::async_fork_ops);

// SAFETY: A table of function pointers that is never written.
unsafe impl Sync for Ops {}

/// The registration of the hooks.
pub(crate) struct Hooks(());

impl Hooks {
    /// Switches the hooks on. Fails with `EBUSY` if somebody is registered.
    pub(crate) fn register() -> Result<Self> {
        // SAFETY: The table is static, and `drop` takes it back before the module goes.
        to_result(unsafe { bindings::async_fork_register(&OPS.0) })?;
        Ok(Hooks(()))
    }
}

impl Drop for Hooks {
    fn drop(&mut self) {
        // SAFETY: Registered by `register`. Waits for whoever is inside and for SRCU callbacks.
        unsafe { bindings::async_fork_unregister(&OPS.0) }
    }
}

/// A reference to this module: it cannot be unloaded meanwhile.
pub(crate) struct ModuleRef(());

impl ModuleRef {
    /// Takes a reference, unless the module is on its way out.
    pub(crate) fn get() -> Option<Self> {
        // SAFETY: The pointer is this module's own.
        let got = unsafe { bindings::try_module_get(crate::THIS_MODULE.as_ptr()) };
        got.then_some(ModuleRef(()))
    }
}

impl Drop for ModuleRef {
    fn drop(&mut self) {
        // SAFETY: `get` took the reference. Code of the module still runs behind this; unloading
        // waits for it: it is on the module's workqueue, or C holds the module.
        unsafe { bindings::module_put(crate::THIS_MODULE.as_ptr()) }
    }
}

/// Calls `f` with the session that C hands in.
///
/// # Safety
///
/// `s` is a published session, to which the caller holds a reference, or which he found in an
/// `mm_struct` in this read section of `async_fork_srcu`.
unsafe fn with_session<R>(s: *mut RawSession, f: impl FnOnce(&Arc<Session>) -> R) -> R {
    // SAFETY: The pointer is an `Arc`'s, see `publish`. The mms' reference is given up through a
    // grace period, so one of the two keeps it. It is not dropped here.
    let session = ManuallyDrop::new(unsafe { Arc::from_raw(s.cast::<Session>().cast_const()) });
    f(&session)
}

fn errno(result: Result) -> c_int {
    match result {
        Ok(()) => 0,
        Err(e) => e.to_errno(),
    }
}

fn errno_of_child(result: Result<(), Poisoned>) -> c_int {
    errno(result.map_err(|Poisoned| EFAULT))
}

/// # Safety
///
/// As `async_fork_ops::admit`.
unsafe extern "C" fn admit(oldmm: *mut bindings::mm_struct) -> c_int {
    // SAFETY: C holds it, and its lock.
    let parent = unsafe { Mm::from_raw(oldmm) };
    match fork::admit(parent) {
        Ok(admitted) => admitted.into(),
        Err(e) => e.to_errno(),
    }
}

/// # Safety
///
/// As `async_fork_ops::begin`.
unsafe extern "C" fn begin(
    oldmm: *mut bindings::mm_struct,
    mm: *mut bindings::mm_struct,
) -> *mut RawSession {
    // SAFETY: C holds both, and their locks.
    let (parent, child) = unsafe { (Mm::from_raw(oldmm), Mm::from_raw(mm)) };
    match Fork::new(parent, child) {
        Some(fork) => KBox::into_raw(fork).cast(),
        None => ptr::null_mut(),
    }
}

/// # Safety
///
/// As `async_fork_ops::copy_vma`; `s` comes from [`begin`].
unsafe extern "C" fn copy_vma(
    s: *mut RawSession,
    dst: *mut bindings::vm_area_struct,
    src: *mut bindings::vm_area_struct,
) -> c_int {
    // SAFETY: C hands back what `begin` returned, to one caller at a time.
    let fork = unsafe { &mut *s.cast::<Fork>() };
    // SAFETY: C holds both `mmap_lock`s for write.
    let (dst, src) = unsafe { (VmaRef::from_raw(dst), VmaRef::from_raw(src)) };
    errno(fork.copy_vma(dst, src))
}

/// # Safety
///
/// As `async_fork_ops::publish`; `s` comes from [`begin`] and is not used again. What this returns
/// is a reference.
unsafe extern "C" fn publish(s: *mut RawSession) -> *mut RawSession {
    // SAFETY: C gives back the ownership that `begin` gave it.
    let fork = unsafe { KBox::from_raw(s.cast::<Fork>()) };
    match KBox::into_inner(fork).publish() {
        Some(session) => Arc::into_raw(session).cast_mut().cast(),
        None => ptr::null_mut(),
    }
}

/// # Safety
///
/// As `async_fork_ops::open`; `s` comes from [`publish`] and is not used again.
unsafe extern "C" fn open(s: *mut RawSession) {
    // SAFETY: C gives back the reference that `publish` gave it.
    let session = unsafe { Arc::from_raw(s.cast::<Session>().cast_const()) };
    session.open();
    session.put();
}

/// # Safety
///
/// As `async_fork_ops::abort`; `s` comes from [`begin`] and is not used again.
unsafe extern "C" fn abort(s: *mut RawSession) {
    // SAFETY: C gives back the ownership that `begin` gave it.
    let fork = unsafe { KBox::from_raw(s.cast::<Fork>()) };
    KBox::into_inner(fork).abort();
}

/// # Safety
///
/// As `async_fork_ops::get`.
unsafe extern "C" fn get(s: *mut RawSession) {
    // SAFETY: Found in an mm, in a read section. `put` gives the reference up.
    unsafe { with_session(s, |s| mem::forget(s.clone())) }
}

/// # Safety
///
/// As `async_fork_ops::put`; `s` is not used again.
unsafe extern "C" fn put(s: *mut RawSession) {
    // SAFETY: `get` took the reference.
    unsafe { Arc::from_raw(s.cast::<Session>().cast_const()) }.put();
}

/// # Safety
///
/// As `async_fork_ops::start`.
unsafe extern "C" fn start(s: *mut RawSession, _mm: *mut bindings::mm_struct) -> bool {
    // SAFETY: C holds a reference.
    unsafe { with_session(s, |s| s.start()) }
}

/// # Safety
///
/// As `async_fork_ops::sync_addr`.
unsafe extern "C" fn sync_addr(
    s: *mut RawSession,
    mm: *mut bindings::mm_struct,
    addr: c_ulong,
    access: bindings::async_fork_access,
) -> c_int {
    let access = match access {
        bindings::async_fork_access_ASYNC_FORK_READ => Access::Read,
        _ => Access::Write,
    };
    // SAFETY: C holds it.
    let mm = unsafe { Mm::from_raw(mm) };
    // SAFETY: C holds a reference.
    unsafe {
        with_session(s, |s| {
            errno_of_child(sync_proactive::sync_addr(s, mm, addr, access))
        })
    }
}

/// # Safety
///
/// As `async_fork_ops::sync_range`.
unsafe extern "C" fn sync_range(
    s: *mut RawSession,
    mm: *mut bindings::mm_struct,
    start: c_ulong,
    end: c_ulong,
    change: bindings::async_fork_change,
) -> c_int {
    let change = match change {
        bindings::async_fork_change_ASYNC_FORK_LOOK => Change::Look,
        bindings::async_fork_change_ASYNC_FORK_ZAP => Change::Zap,
        _ => Change::Change,
    };
    // SAFETY: C holds it.
    let mm = unsafe { Mm::from_raw(mm) };
    // SAFETY: C holds a reference.
    unsafe {
        with_session(s, |s| {
            errno_of_child(sync_proactive::sync_range(s, mm, start, end, change))
        })
    }
}

/// # Safety
///
/// As `async_fork_ops::drain`.
unsafe extern "C" fn drain(
    s: *mut RawSession,
    mm: *mut bindings::mm_struct,
    killable: bool,
) -> c_int {
    let wait = if killable {
        Wait::UntilKilled
    } else {
        Wait::ToTheEnd
    };
    // SAFETY: C holds it.
    let mm = unsafe { Mm::from_raw(mm) };
    // SAFETY: C holds a reference.
    unsafe { with_session(s, |s| errno(sync_proactive::drain(s, mm, wait))) }
}

/// # Safety
///
/// As `async_fork_ops::exec`.
unsafe extern "C" fn exec(s: *mut RawSession, mm: *mut bindings::mm_struct) {
    // SAFETY: C holds it.
    let mm = unsafe { Mm::from_raw(mm) };
    // SAFETY: C holds a reference.
    unsafe { with_session(s, |s| sync_proactive::exec(s, mm)) }
}

/// # Safety
///
/// As `async_fork_ops::exit`.
unsafe extern "C" fn exit(s: *mut RawSession, mm: *mut bindings::mm_struct, victim: bool) {
    let exit = if victim {
        Exit::OomVictim
    } else {
        Exit::Normal
    };
    // SAFETY: C holds it.
    let mm = unsafe { Mm::from_raw(mm) };
    // SAFETY: C holds a reference.
    unsafe { with_session(s, |s| sync_proactive::exit(s, mm, exit)) }
}

/// # Safety
///
/// As `async_fork_ops::reap`.
unsafe extern "C" fn reap(s: *mut RawSession, mm: *mut bindings::mm_struct) {
    // SAFETY: C holds it.
    let mm = unsafe { Mm::from_raw(mm) };
    // SAFETY: C holds a reference.
    unsafe { with_session(s, |s| sync_proactive::reap(s, mm)) }
}

/// # Safety
///
/// As `async_fork_ops::is_parent`.
unsafe extern "C" fn is_parent(s: *mut RawSession, mm: *mut bindings::mm_struct) -> bool {
    // SAFETY: C holds it.
    let mm = unsafe { Mm::from_raw(mm) };
    // SAFETY: C holds a reference.
    unsafe { with_session(s, |s| s.side_of(mm) == Side::Parent) }
}

/// The module's workqueues while it is loaded, else NULL.
static QUEUES: [AtomicPtr<bindings::workqueue_struct>; 3] =
    [const { AtomicPtr::new(ptr::null_mut()) }; 3];

/// One of the module's workqueues, all unbound.
#[derive(Clone, Copy)]
pub(crate) enum Queue {
    /// Copying, which takes long; to be tuned below `/sys/devices/virtual/workqueue`.
    Copy,
    /// Lifting marks, which must not wait for the copying of others.
    Lift,
    /// Freeing sessions, which waits for locks of their `anon_vma`s and so for some user's rmap walk.
    Free,
}

impl Queue {
    fn place(self) -> &'static AtomicPtr<bindings::workqueue_struct> {
        let [copy, lift, free] = &QUEUES;
        match self {
            Queue::Copy => copy,
            Queue::Lift => lift,
            Queue::Free => free,
        }
    }

    /// How many work items of all sessions run at once, on each NUMA node; 0 is the kernel's default.
    fn max_active(self) -> c_int {
        match self {
            Queue::Copy | Queue::Lift => 8,
            Queue::Free => 0,
        }
    }

    /// Returns the C structure. The caller keeps the module loaded.
    fn as_raw(self) -> *mut bindings::workqueue_struct {
        self.place().load(Acquire)
    }
}

/// A workqueue of the module, to be destroyed with it.
struct OwnedQueue(Queue);

impl OwnedQueue {
    fn new(which: Queue, name: &'static CStr, flags: c_uint) -> Result<Self> {
        // SAFETY: The name is a format without arguments.
        let queue = unsafe {
            bindings::alloc_workqueue(
                name.as_char_ptr(),
                bindings::wq_flags_WQ_UNBOUND | flags,
                which.max_active(),
            )
        };
        if queue.is_null() {
            return Err(ENOMEM);
        }
        which.place().store(queue, Release);
        Ok(OwnedQueue(which))
    }
}

impl Drop for OwnedQueue {
    fn drop(&mut self) {
        let queue = self.0.place().swap(ptr::null_mut(), AcqRel);
        // SAFETY: `new` made it, and no session is left to queue more. Waits for what runs.
        unsafe { bindings::destroy_workqueue(queue) }
    }
}

/// All workqueues.
pub(crate) struct Queues {
    _copy: OwnedQueue,
    _lift: OwnedQueue,
    _free: OwnedQueue,
}

impl Queues {
    /// Makes the queues.
    pub(crate) fn new() -> Result<Self> {
        Ok(Queues {
            _copy: OwnedQueue::new(
                Queue::Copy,
                c_str!("async_fork"),
                bindings::wq_flags_WQ_SYSFS,
            )?,
            _lift: OwnedQueue::new(Queue::Lift, c_str!("async_fork_lift"), 0)?,
            _free: OwnedQueue::new(Queue::Free, c_str!("async_fork_free"), 0)?,
        })
    }
}

/// What a [`Job`] runs.
pub(crate) trait Run: Send + Sync + 'static {
    /// Runs on one of the module's workqueues, in process context. `slot` tells jobs of one object
    /// apart.
    fn run(self: &Arc<Self>, slot: usize);

    /// Gives up a reference. Any context: the last one is dropped in a work item of its own.
    fn put(self: Arc<Self>);
}

#[repr(C)]
struct RawJob<T> {
    /// First, so that the work's address is the job's.
    work: Opaque<bindings::delayed_work>,
    target: AtomicPtr<T>,
    slot: UnsafeCell<usize>,
}

/// Delayed work on behalf of a `T` that owns it. Queued, it holds a reference to the `T`.
///
/// # Invariants
///
/// `target` is NULL, or the `T` that owns this; `slot` does not change once that is set.
pub(crate) struct Job<T: Run>(KBox<RawJob<T>>);

// SAFETY: The workqueue synchronises; `target` is atomic.
unsafe impl<T: Run> Send for Job<T> {}
// SAFETY: As above.
unsafe impl<T: Run> Sync for Job<T> {}

impl<T: Run> Job<T> {
    /// Makes a job that is not queued.
    pub(crate) fn new(flags: Flags) -> Result<Self> {
        let job = KBox::new(
            RawJob {
                work: Opaque::uninit(),
                target: AtomicPtr::new(ptr::null_mut()),
                slot: UnsafeCell::new(0),
            },
            flags,
        )?;
        // SAFETY: The box does not move what it holds.
        unsafe { bindings::init_delayed_work(job.work.get(), Some(job_runs::<T>)) };
        Ok(Job(job))
    }

    /// Readies a reference for a run; to be dropped if there is none.
    fn aim(&self, target: Arc<T>, slot: usize) -> *const T {
        let target = Arc::into_raw(target);
        if self.0.target.load(Acquire).is_null() {
            // SAFETY: Every caller passes the same slot, and a run reads it behind the queueing.
            unsafe { ptr::write_volatile(self.0.slot.get(), slot) };
            self.0.target.store(target.cast_mut(), Release);
        }
        target
    }

    /// Queues the job to run on `queue` in `delay_ms`, unless it is queued.
    pub(crate) fn queue(&self, target: Arc<T>, slot: usize, queue: Queue, delay_ms: u32) {
        let target = self.aim(target, slot);
        // SAFETY: The queue lives as long as the module, which the target holds.
        if !unsafe { bindings::queue_delayed_work(queue.as_raw(), self.0.work.get(), delay_ms) } {
            // SAFETY: `aim` made it; the run that is queued has one of its own.
            drop(unsafe { Arc::from_raw(target) });
        }
    }

    /// Lets the job run now on `queue`, queued or not.
    pub(crate) fn kick(&self, target: Arc<T>, slot: usize, queue: Queue) {
        let target = self.aim(target, slot);
        // SAFETY: As in `queue`.
        if unsafe { bindings::mod_delayed_work(queue.as_raw(), self.0.work.get()) } {
            // SAFETY: `aim` made it; the run that was queued has one of its own.
            drop(unsafe { Arc::from_raw(target) });
        }
    }
}

/// # Safety
///
/// `work` is the first field of a [`RawJob<T>`] that was queued with a reference.
unsafe extern "C" fn job_runs<T: Run>(work: *mut bindings::work_struct) {
    // SAFETY: The reference that was queued keeps the job.
    let job = unsafe { &*work.cast::<RawJob<T>>().cast_const() };
    // SAFETY: Not written since the job was queued.
    let slot = unsafe { ptr::read_volatile(job.slot.get()) };
    // SAFETY: `Job::queue` or `kick` leaked this reference for this run.
    let target = unsafe { Arc::from_raw(job.target.load(Acquire).cast_const()) };
    target.run(slot);
    target.put();
}

#[repr(C)]
struct RawRetirement<T> {
    rcu: Opaque<bindings::callback_head>,
    work: Opaque<bindings::work_struct>,
    target: AtomicPtr<T>,
    fired: AtomicBool,
}

/// A reference to the `T` that owns this, to be dropped in process context: after an SRCU grace
/// period, and once more if somebody who must not drop it turns out to have the last.
pub(crate) struct Retirement<T>(KBox<RawRetirement<T>>, PhantomData<Arc<T>>);

// SAFETY: What is shared is atomic; SRCU and the workqueue synchronise the rest.
unsafe impl<T: Send + Sync> Send for Retirement<T> {}
// SAFETY: As above.
unsafe impl<T: Send + Sync> Sync for Retirement<T> {}

impl<T: Send + Sync + 'static> Retirement<T> {
    /// Makes one that holds nothing.
    pub(crate) fn new(flags: Flags) -> Result<Self> {
        let raw = KBox::new(
            RawRetirement {
                rcu: Opaque::uninit(),
                work: Opaque::uninit(),
                target: AtomicPtr::new(ptr::null_mut()),
                fired: AtomicBool::new(false),
            },
            flags,
        )?;
        // SAFETY: The box does not move what it holds.
        unsafe { bindings::init_work(raw.work.get(), Some(retirement_runs::<T>)) };
        Ok(Retirement(raw, PhantomData))
    }

    /// Takes the reference. Returns the pointer it became, which lives until it is dropped.
    pub(crate) fn arm(&self, target: Arc<T>) -> *const T {
        let raw = Arc::into_raw(target);
        self.0.target.store(raw.cast_mut(), Release);
        raw
    }

    /// Drops the last reference to `target`, which owns `this`, in a work item. Any context.
    pub(crate) fn put_last(target: Arc<T>, this: fn(&T) -> &Self) {
        let target = Arc::into_raw(target);
        // SAFETY: A reference that nobody drops before the work does.
        let raw = &this(unsafe { &*target }).0;
        raw.target.store(target.cast_mut(), Release);
        // SAFETY: The work is not queued, as it would have a reference. It lives until it has dropped
        // this one, and the queue until the module goes, which the target holds.
        unsafe { bindings::queue_work(Queue::Free.as_raw(), raw.work.get()) };
    }

    /// Starts the grace period. Once. Any context.
    pub(crate) fn fire(&self) {
        if !self.0.fired.swap(true, AcqRel) {
            // SAFETY: The head is not in use, as `fired` was false, and lives until the callback's
            // work drops the reference.
            unsafe { bindings::call_async_fork_srcu(self.0.rcu.get(), Some(grace_is_over::<T>)) }
        }
    }
}

/// Runs with bottom halves off, where the last reference must not be dropped.
///
/// # Safety
///
/// `head` is that of a [`RawRetirement<T>`] that fired.
unsafe extern "C" fn grace_is_over<T>(head: *mut bindings::callback_head) {
    // SAFETY: The head is the first field, and the reference keeps it.
    let raw = unsafe { &*head.cast::<RawRetirement<T>>().cast_const() };
    // SAFETY: The module is unloaded only after `srcu_barrier()`, and its queues go after that.
    unsafe { bindings::queue_work(Queue::Free.as_raw(), raw.work.get()) };
}

/// # Safety
///
/// `work` is that of a [`RawRetirement<T>`], queued by `grace_is_over` or `put_last`.
unsafe extern "C" fn retirement_runs<T>(work: *mut bindings::work_struct) {
    let work = work.cast::<Opaque<bindings::work_struct>>();
    // SAFETY: The work is a field of it.
    let raw = unsafe { container_of!(work, RawRetirement<T>, work) };
    // SAFETY: The reference keeps it until it is dropped below.
    let target = unsafe { (*raw).target.swap(ptr::null_mut(), AcqRel) };
    if !target.is_null() {
        // SAFETY: `arm` or `put_last` leaked this reference.
        drop(unsafe { Arc::from_raw(target.cast_const()) });
    }
}
