// SPDX-License-Identifier: GPL-2.0
/* Third parties: a process that reads and changes the memory of others. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE	25
#endif

/* What it looks at: a page of a process, and what the model said of it. */
struct aim {
	struct node *n;
	struct slot *s;
	size_t page;
	unsigned int seq;
	struct page model;
	pid_t pid;
};

static bool aim_at(struct aim *aim, struct rng *rng)
{
	int n = atomic_load(&fz->nodes);

	aim->n = &fz->node[below(rng, n < FZ_NODES ? n : FZ_NODES)];
	aim->s = &aim->n->slot[below(rng, fz->plan.slots)];
	aim->page = below(rng, aim->s->pages);
	if (atomic_load(&aim->n->state) != ND_LIVE)
		return false;
	aim->pid = atomic_load(&aim->n->pid);
	return aim->pid > 0;
}

/*
 * Was nobody at work on the slot since? A process that ends says so first, so
 * what was read from one that is alive still was read from its memory.
 */
static bool still(const struct aim *aim)
{
	atomic_thread_fence(memory_order_seq_cst);
	return atomic_load(&aim->s->seq) == aim->seq &&
	       atomic_load(&aim->n->state) == ND_LIVE;
}

static bool note_model(struct aim *aim)
{
	const volatile struct page *page = page_of(aim->n, aim->s, aim->page);

	aim->seq = atomic_load(&aim->s->seq);
	if (aim->seq & 1)
		return false;
	aim->model.value = page->value;
	aim->model.flags = page->flags;
	return aim->model.flags & PG_MAPPED && still(aim);
}

/* process_vm_*() pins, and what was pinned is not forked lazily any more. */
static enum way remote_way(const struct aim *aim, struct rng *rng)
{
	if (aim->n->depth < fz->plan.pin_depth || one_in(rng, 2))
		return BY_MEM;
	return BY_VM;
}

static void look(struct aim *aim, struct rng *rng)
{
	enum way way = remote_way(aim, rng);
	uint64_t buf[FZ_WORDS];

	if (!note_model(aim) ||
	    (way == BY_VM && !(aim->model.flags & PG_READ)))
		return;
	if (page_read(aim->pid, addr_of(aim->s, aim->page), way, buf))
		return;
	if (!value_matches(buf, aim->model) && still(aim))
		fail_page(aim->n, aim->s, aim->page, way == BY_VM ?
			  "by process_vm_readv() of another" :
			  "by /proc/PID/mem of another", buf);
	atomic_fetch_add_explicit(&fz->nr_checks, 1, memory_order_relaxed);
}

/* A value whose number of writes is zero: of a third party. */
static void change(struct aim *aim, struct rng *rng)
{
	struct page *model = page_of(aim->n, aim->s, aim->page);
	enum way way = remote_way(aim, rng);
	uint32_t value;
	int ret;

	if (!slot_trylock(aim->s))
		return;
	if (atomic_load(&aim->n->state) != ND_LIVE ||
	    !(model->flags & PG_MAPPED) ||
	    (way == BY_VM && !(model->flags & PG_WRITE)))
		goto unlock;
	value = (uint32_t)aim->n->number << 26 | aim->s->number << 20 |
		(0x80000 | below(rng, 0x80000));
	ret = page_write(aim->pid, addr_of(aim->s, aim->page), way, value);
	if (!ret)
		*model = (struct page){ value, model->flags & ~PG_LAZY };
	me = aim->n;
	note(aim->s, "write by another", aim->page, 1, way, ret);
	me = NULL;
unlock:
	slot_unlock(aim->s);
}

/* A page that holds something is there or swapped out, whoever asks. */
static void pagemap(struct aim *aim)
{
	uint64_t entry = ~0ULL, buf[FZ_WORDS] = { 0 };
	char path[40];
	int fd;

	if (!note_model(aim))
		return;
	snprintf(path, sizeof(path), "/proc/%d/pagemap", aim->pid);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	if (pread(fd, &entry, 8, (off_t)addr_of(aim->s, aim->page) / AF_PAGE *
		  8) == 8 && aim->model.value &&
	    !(aim->model.flags & PG_LAZY) && !(entry >> 62) && still(aim))
		fail_page(aim->n, aim->s, aim->page, "a hole in pagemap", buf);
	close(fd);
}

static void read_all(const struct aim *aim, const char *name)
{
	char path[40], buf[4096];
	int fd;

	snprintf(path, sizeof(path), "/proc/%d/%s", aim->pid, name);
	fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return;
	while (read(fd, buf, sizeof(buf)) > 0 && !failing())
		;
	close(fd);
}

static void advise_other(const struct aim *aim, struct rng *rng)
{
	static const int advices[] = { MADV_COLD, MADV_PAGEOUT, MADV_PAGEOUT,
				       MADV_COLLAPSE, MADV_WILLNEED };
	struct iovec range = { aim->s->base, aim->s->pages * AF_PAGE };
	int fd = syscall(SYS_pidfd_open, aim->pid, 0);

	if (fd < 0)
		return;
	if (one_in(rng, 2))
		range = (struct iovec){ addr_of(aim->s, aim->page),
			(1 + below(rng, aim->s->pages - aim->page)) * AF_PAGE };
	syscall(SYS_process_madvise, fd, &range, 1,
		advices[below(rng, 5)], 0);
	close(fd);
}

/* From one NUMA node to the other, where there are two. */
static void migrate(struct rng *rng, pid_t pid)
{
	unsigned long from = 1, to = 2;

	if (one_in(rng, 2)) {
		from = 2;
		to = 1;
	}
	syscall(SYS_migrate_pages, pid, 3UL, &from, &to);
}

static void clear_refs(const struct aim *aim, struct rng *rng)
{
	char path[40];

	snprintf(path, sizeof(path), "/proc/%d/clear_refs", aim->pid);
	af_write_file(path, one_in(rng, 2) ? "4" : "1");
}

static void reclaim(struct rng *rng)
{
	char path[96], text[16];

	if (!fz->cgroup[0])
		return;
	snprintf(path, sizeof(path), "%s/memory.reclaim", fz->cgroup);
	snprintf(text, sizeof(text), "%zuK", 64 + below(rng, 6000));
	af_write_file(path, text);
}

static void observe_once(struct rng *rng)
{
	size_t what = below(rng, 40), i;
	struct aim aim;

	if (!aim_at(&aim, rng))
		return;
	if (what < 16)
		for (i = 0; i < 20 && aim_at(&aim, rng); i++)
			look(&aim, rng);
	else if (what < 26)
		change(&aim, rng);
	else if (what < 32)
		pagemap(&aim);
	else if (what == 32)
		read_all(&aim, one_in(rng, 2) ? "smaps" : "numa_maps");
	else if (what < 36)
		advise_other(&aim, rng);
	else if (what == 36 && one_in(rng, 4))
		migrate(rng, aim.pid);
	else if (what == 37)
		clear_refs(&aim, rng);
	else if (what == 38)
		hold_workers(one_in(rng, 3));
	else
		reclaim(rng);
}

void observe(uint64_t seed)
{
	struct rng rng = { mix(seed, 4) };

	me = NULL;
	while (!atomic_load(&fz->over) && !failing()) {
		struct timespec pause = { .tv_nsec = 1 + below(&rng, 4000000) };

		observe_once(&rng);
		nanosleep(&pause, NULL);
	}
	_exit(0);
}
