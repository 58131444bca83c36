// SPDX-License-Identifier: GPL-2.0
/* What the owner of a slot does to its pages. The slot is locked meanwhile. */
#include <errno.h>
#include <sched.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include "fuzz.h"

/* Missing in older headers. */
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ	22
#define MADV_POPULATE_WRITE	23
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED	24
#endif
#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE		25
#endif

/* Widens or narrows to 2 MiB boundaries, where that leaves something. */
static struct span align_span(const struct slot *s, struct span span)
{
	size_t skew = (uintptr_t)s->base / AF_PAGE % AF_PIECE_PAGES;
	size_t first = (span.first + skew) / AF_PIECE_PAGES * AF_PIECE_PAGES;
	size_t pages = (span.pages + AF_PIECE_PAGES - 1) / AF_PIECE_PAGES *
		       AF_PIECE_PAGES;

	if (first < skew)
		first += AF_PIECE_PAGES;
	first -= skew;
	while (pages && first + pages > s->pages)
		pages -= AF_PIECE_PAGES;
	return pages && first < s->pages ? (struct span){ first, pages } : span;
}

/* A part of the slot: a page, a few, many, all, or whole page tables. */
struct span pick(const struct slot *s, struct rng *rng)
{
	struct span span = { below(rng, s->pages), 1 };
	size_t left = s->pages - span.first;

	switch (below(rng, 6)) {
	case 0:
		break;
	case 1:
	case 2:
		span.pages = 1 + below(rng, left < 32 ? left : 32);
		break;
	case 3:
		span.pages = 1 + below(rng, left);
		break;
	case 4:
		span.pages = 1 + below(rng, left);
		return align_span(s, span);
	default:
		if (one_in(rng, 2))
			return (struct span){ 0, s->pages };
		span.pages = left;
	}
	return span;
}

/* Calls @fn for each stretch of mapped pages. */
void each_run(struct slot *s, struct span span,
	      void (*fn)(struct slot *s, struct span run, long arg), long arg)
{
	size_t i, start, end = span.first + span.pages;

	for (i = span.first; i < end; i++) {
		start = i;
		while (i < end && page_of(me, s, i)->flags & PG_MAPPED)
			i++;
		if (i > start)
			fn(s, (struct span){ start, i - start }, arg);
	}
}

void map_fresh(struct slot *s, struct span span, int flags)
{
	void *p = mmap(addr_of(s, span.first), span.pages * AF_PAGE,
		       PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS |
		       MAP_FIXED | flags, -1, 0);

	if (p == MAP_FAILED)
		fail_op(s, "mmap", span.first, span.pages);
	else
		set_pages(s, span.first, span.pages,
			  (struct page){ 0, PG_FRESH });
}

/*
 * How far apart the pages are that an operation touches: a few hundred tell as
 * much as thousands, and each may cost a fault.
 */
static size_t stride(size_t pages, struct rng *rng)
{
	if (one_in(rng, 6))
		return 1 + below(rng, 600);
	return one_in(rng, 8) ? 1 : 1 + pages / (1 + below(rng, 300));
}

static void op_write(struct slot *s, struct rng *rng)
{
	static const enum way ways[] = { BY_LOAD, BY_LOAD, BY_LOAD, BY_PIPE,
					 BY_MEM };
	enum way way = ways[below(rng, 5)];
	struct span span = pick(s, rng);
	size_t step = stride(span.pages, rng), i;

	/* The kernel's ways are slow. */
	if (way != BY_LOAD && span.pages > 24 * step)
		span.pages = 24 * step;
	for (i = 0; i < span.pages; i += step)
		write_page(s, span.first + i, way);
	note(s, "write", span.first, span.pages, way, step);
}

static void op_verify(struct slot *s, struct rng *rng)
{
	struct span span = pick(s, rng);
	enum way way = one_in(rng, 2) ? BY_LOAD : 1 + below(rng, 3);
	size_t step = stride(span.pages, rng), i;

	if (way != BY_LOAD && span.pages > 24 * step)
		span.pages = 24 * step;
	for (i = 0; i < span.pages; i += step)
		verify(s, span.first + i, way);
}

static void op_map(struct slot *s, struct rng *rng)
{
	struct span span = pick(s, rng);

	map_fresh(s, span, one_in(rng, 4) ? MAP_POPULATE : 0);
	note(s, "mmap", span.first, span.pages, 0, 0);
}

static void op_unmap(struct slot *s, struct rng *rng)
{
	struct span span = pick(s, rng);

	if (munmap(addr_of(s, span.first), span.pages * AF_PAGE)) {
		fail_op(s, "munmap", span.first, span.pages);
		return;
	}
	set_pages(s, span.first, span.pages, (struct page){ 0 });
	note(s, "munmap", span.first, span.pages, 0, 0);
	if (one_in(rng, 2))
		return;
	map_fresh(s, span, 0);
	note(s, "mmap", span.first, span.pages, 0, 0);
}

static void protect(struct slot *s, struct span run, long prot)
{
	const uint32_t flags = (prot & PROT_READ ? PG_READ : 0) |
			       (prot & PROT_WRITE ? PG_WRITE : 0);
	size_t i;

	if (mprotect(addr_of(s, run.first), run.pages * AF_PAGE, prot)) {
		fail_op(s, "mprotect", run.first, run.pages);
		return;
	}
	for (i = 0; i < run.pages; i++) {
		struct page *page = page_of(me, s, run.first + i);

		page->flags = (page->flags & ~(PG_READ | PG_WRITE)) | flags;
	}
}

static void op_protect(struct slot *s, struct rng *rng)
{
	static const int prots[] = { PROT_NONE, PROT_READ, PROT_READ,
				     PROT_READ | PROT_WRITE };
	int prot = prots[below(rng, 4)];
	struct span span = pick(s, rng);

	each_run(s, span, protect, prot);
	note(s, "mprotect", span.first, span.pages, prot, 0);
	if (one_in(rng, 2))
		return;
	each_run(s, span, protect, PROT_READ | PROT_WRITE);
	note(s, "mprotect", span.first, span.pages, PROT_READ | PROT_WRITE, 0);
}

/* Every other stretch of a few pages becomes a VMA of its own. */
static void op_shatter(struct slot *s, struct rng *rng)
{
	struct span span = pick(s, rng);
	size_t step = 1 + below(rng, 50), i;

	for (i = 0; i + step <= span.pages; i += 2 * step)
		each_run(s, (struct span){ span.first + i, step }, protect,
			 PROT_READ);
	note(s, "shatter", span.first, span.pages, step, 0);
}

/* Advice that changes what the model says. */
static const struct advice {
	int advice;
	bool drop;
	uint32_t set, clear;
} advices[] = {
	{ MADV_DONTNEED, .drop = true },
	{ MADV_DONTNEED_LOCKED, .drop = true },
	{ MADV_FREE, .set = PG_LAZY },
	{ MADV_WIPEONFORK, .set = PG_WIPE },
	{ MADV_KEEPONFORK, .clear = PG_WIPE },
	{ MADV_DONTFORK, .set = PG_NOFORK },
	{ MADV_DOFORK, .clear = PG_NOFORK },
};

static void advised(struct slot *s, struct span span, const struct advice *a)
{
	size_t i;

	for (i = 0; i < span.pages; i++) {
		struct page *page = page_of(me, s, span.first + i);

		page->flags = (page->flags & ~a->clear) | a->set;
		if (a->drop)
			page->value = 0;
		if (!page->value)
			page->flags &= ~PG_LAZY;
	}
}

/*
 * madvise() stops at the first VMA that refuses. Advice given twice is as good
 * as once: asked page by page, the kernel says exactly which took it.
 */
static void advise_run(struct slot *s, struct span run, long index)
{
	const struct advice *a = &advices[index];
	size_t i;

	if (!madvise(addr_of(s, run.first), run.pages * AF_PAGE, a->advice)) {
		advised(s, run, a);
		return;
	}
	for (i = 0; i < run.pages; i++)
		if (!madvise(addr_of(s, run.first + i), AF_PAGE, a->advice))
			advised(s, (struct span){ run.first + i, 1 }, a);
}

static void advise(struct slot *s, struct rng *rng, size_t index)
{
	struct span span = pick(s, rng);

	each_run(s, span, advise_run, index);
	note(s, "madvise", span.first, span.pages, advices[index].advice, 0);
}

/*
 * MADV_FREE trusts that whoever else maps the page has it dirty. Linux 6.12
 * breaks that, with plain fork() as well: a read-only pin of a shared page
 * (process_vm_readv()) gives the process a copy with a clean entry, and KSM
 * maps what it merges clean. Reclaim then drops the page for all who have it.
 * So a round has either MADV_FREE or these.
 */
static void op_drop(struct slot *s, struct rng *rng)
{
	bool free = !fz->plan.merge && fz->plan.pin_depth > FZ_DEPTH;

	advise(s, rng, below(rng, free ? 3 : 2));
}

static void op_fork_flag(struct slot *s, struct rng *rng)
{
	/* A child whose heap has holes could not move its break exactly. */
	advise(s, rng, 3 + below(rng, s->brk ? 2 : 4));
}

/* Advice that the contents survive, whether the kernel takes it or not. */
static void op_advise(struct slot *s, struct rng *rng)
{
	static const int harmless[] = {
		MADV_COLD, MADV_PAGEOUT, MADV_PAGEOUT, MADV_COLLAPSE,
		MADV_COLLAPSE, MADV_POPULATE_READ, MADV_POPULATE_WRITE,
		MADV_HUGEPAGE, MADV_NOHUGEPAGE, MADV_WILLNEED, MADV_DONTDUMP,
		MADV_DODUMP, MADV_MERGEABLE, MADV_UNMERGEABLE,
	};
	int advice = harmless[below(rng, sizeof(harmless) / sizeof(int))];
	struct span span = pick(s, rng);
	long ret;

	if (advice == MADV_MERGEABLE && !fz->plan.merge)
		return;
	ret = madvise(addr_of(s, span.first), span.pages * AF_PAGE, advice);
	note(s, "madvise", span.first, span.pages, advice, ret ? -errno : 0);
}

static void op_lock(struct slot *s, struct rng *rng)
{
	struct span span = pick(s, rng);
	char *p = addr_of(s, span.first);
	bool lock = one_in(rng, 2);
	int ret = lock ? mlock(p, span.pages * AF_PAGE) :
			 munlock(p, span.pages * AF_PAGE);

	note(s, lock ? "mlock" : "munlock", span.first, span.pages, 0,
	     ret ? -errno : 0);
}

/* mincore() says whether a page is mapped; residence is up to the kernel. */
static void op_mincore(struct slot *s, struct rng *rng)
{
	static __thread unsigned char map[FZ_PAGES];
	struct span span = pick(s, rng);
	bool whole = true;
	size_t i;
	int ret;

	for (i = 0; i < span.pages; i++)
		whole &= !!(page_of(me, s, span.first + i)->flags & PG_MAPPED);
	ret = mincore(addr_of(s, span.first), span.pages * AF_PAGE, map);
	if (!ret != whole)
		fail_op(s, "mincore", span.first, span.pages);
}

/* Some pages go to another NUMA node, where there is one. */
static void op_migrate(struct slot *s, struct rng *rng)
{
	struct span span = pick(s, rng);
	int nodes[16], status[16];
	void *pages[16];
	size_t i;
	long ret;

	for (i = 0; i < 16; i++) {
		pages[i] = addr_of(s, span.first + below(rng, span.pages));
		nodes[i] = below(rng, 2);
	}
	ret = syscall(SYS_move_pages, 0, 16UL, pages, nodes, status, 2);
	note(s, "move_pages", span.first, span.pages, 0, ret ? -errno : 0);
}

struct help {
	struct slot *slot;
	struct span span;
};

static int helper(void *arg)
{
	struct help *help = arg;
	size_t i;

	for (i = 0; i < help->span.pages && !failing(); i++) {
		verify(help->slot, help->span.first + i, BY_LOAD);
		write_page(help->slot, help->span.first + i, BY_LOAD);
	}
	return 0;
}

/* A process that shares this one's memory works on it, and goes. */
static void op_helper(struct slot *s, struct rng *rng)
{
	const size_t stack = 128 * 1024;
	struct help help = { s, pick(s, rng) };
	int status = -1;
	char *p;
	pid_t pid;

	p = mmap(NULL, stack, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (p == MAP_FAILED)
		return;
	if (help.span.pages > 200)
		help.span.pages = 200;
	pid = clone(helper, p + stack, CLONE_VM | SIGCHLD, &help);
	if (pid > 0 && (waitpid(pid, &status, 0) != pid || status))
		fail("a helper by clone(CLONE_VM) ended with %#x", status);
	note(s, "helper", help.span.first, help.span.pages, pid, status);
	munmap(p, stack);
}

/* Which slots an operation is for: the heap may get no holes, for one. */
enum where { ANYWHERE, NO_BRK, ONLY_BRK };

static const struct {
	void (*fn)(struct slot *s, struct rng *rng);
	unsigned int weight;
	enum where where;
} ops[] = {
	{ op_map, 3, NO_BRK },
	{ op_unmap, 5, NO_BRK },
	{ op_move, 6, NO_BRK },
	{ op_resize, 6, NO_BRK },
	{ op_brk, 20, ONLY_BRK },
	{ op_protect, 9, ANYWHERE },
	{ op_shatter, 1, ANYWHERE },
	{ op_drop, 8, ANYWHERE },
	{ op_fork_flag, 2, ANYWHERE },
	{ op_advise, 12, ANYWHERE },
	{ op_lock, 3, ANYWHERE },
	{ op_mincore, 2, ANYWHERE },
	{ op_uffd, 3, ANYWHERE },
	{ op_migrate, 2, ANYWHERE },
	{ op_helper, 2, ANYWHERE },
};

unsigned int nr_slot_ops(void)
{
	return sizeof(ops) / sizeof(*ops);
}

/* The operation that the round's plan and a random number agree on. */
static void pick_op(struct slot *s, struct rng *rng)
{
	unsigned int i, total = 0;
	size_t at;

	for (i = 0; i < nr_slot_ops(); i++)
		total += fz->plan.ops >> i & 1 ? ops[i].weight : 0;
	at = below(rng, total);
	for (i = 0; i < nr_slot_ops(); i++) {
		if (!(fz->plan.ops >> i & 1))
			continue;
		if (at < ops[i].weight)
			break;
		at -= ops[i].weight;
	}
	if (i < nr_slot_ops() && ops[i].where != (s->brk ? NO_BRK : ONLY_BRK))
		ops[i].fn(s, rng);
	else
		op_write(s, rng);
}

void slot_op(struct slot *s, struct rng *rng)
{
	size_t kind = below(rng, 10);

	slot_lock(s);
	if (kind < 3)
		op_write(s, rng);
	else if (kind < 5)
		op_verify(s, rng);
	else
		pick_op(s, rng);
	slot_unlock(s);
	atomic_fetch_add_explicit(&fz->nr_ops, 1, memory_order_relaxed);
}
