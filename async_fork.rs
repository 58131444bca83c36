// SPDX-License-Identifier: GPL-2.0

//! Async fork: `fork()` without copying the page tables in the caller.
//!
//! `docs/architecture.md` tells how one `fork()` travels through these files.

use kernel::prelude::*;

mod fork;
mod mm;
mod mm_hooks;
mod pgtable_copy;
mod piece;
mod session;
mod sync_proactive;

use mm_hooks::{Hooks, Queues};

module! {
    type: AsyncFork,
    name: "async_fork",
    author: "The async-fork developers",
    description: "fork() without copying the page tables in the caller",
    license: "GPL v2",
}

/// The loaded module.
///
/// Fields are dropped in this order: first the hooks go and an SRCU grace period passes, so that
/// nobody is inside and no callback is left, then the queues are drained.
struct AsyncFork {
    _hooks: Hooks,
    _queues: Queues,
}

impl kernel::Module for AsyncFork {
    fn init(_module: &'static ThisModule) -> Result<Self> {
        let queues = Queues::new()?;
        let hooks = Hooks::register()?;
        Ok(AsyncFork {
            _hooks: hooks,
            _queues: queues,
        })
    }
}
