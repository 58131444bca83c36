// SPDX-License-Identifier: GPL-2.0
/* The ways in which a page can be read and written, and what must be found. */
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/uio.h>
#include <unistd.h>

#include "fuzz.h"

static int result(ssize_t got)
{
	if (got < 0)
		return -errno;
	return got == AF_PAGE ? 0 : -EIO;
}

static void load(const char *addr, uint64_t *buf)
{
	const volatile uint64_t *from = (const volatile uint64_t *)addr;
	size_t i;

	for (i = 0; i < FZ_WORDS; i++)
		buf[i] = from[i];
}

/* Lets the kernel read the page on this process's behalf. */
static int read_by_pipe(const char *addr, bool splice, uint64_t *buf)
{
	struct iovec iov = { (void *)addr, AF_PAGE };
	int fd[2], ret;

	if (pipe2(fd, O_CLOEXEC))
		return -errno;
	if (splice)
		ret = result(vmsplice(fd[1], &iov, 1, 0));
	else
		ret = result(write(fd[1], addr, AF_PAGE));
	if (!ret)
		ret = result(read(fd[0], buf, AF_PAGE));
	close(fd[0]);
	close(fd[1]);
	return ret;
}

static int write_by_pipe(char *addr, const uint64_t *buf)
{
	int fd[2], ret;

	if (pipe2(fd, O_CLOEXEC))
		return -errno;
	ret = result(write(fd[1], buf, AF_PAGE));
	if (!ret)
		ret = result(read(fd[0], addr, AF_PAGE));
	close(fd[0]);
	close(fd[1]);
	return ret;
}

static int by_mem(pid_t pid, char *addr, uint64_t *buf, bool write)
{
	char path[32];
	int fd, ret;

	snprintf(path, sizeof(path), "/proc/%d/mem", pid);
	fd = open(path, O_RDWR | O_CLOEXEC);
	if (fd < 0)
		return -errno;
	ret = result(write ? pwrite(fd, buf, AF_PAGE, (off_t)addr) :
			     pread(fd, buf, AF_PAGE, (off_t)addr));
	close(fd);
	return ret;
}

int page_read(pid_t pid, const char *addr, enum way way, uint64_t *buf)
{
	struct iovec local = { buf, AF_PAGE };
	struct iovec remote = { (void *)addr, AF_PAGE };

	switch (way) {
	case BY_LOAD:
		load(addr, buf);
		return 0;
	case BY_PIPE:
	case BY_SPLICE:
		return read_by_pipe(addr, way == BY_SPLICE, buf);
	case BY_MEM:
		return by_mem(pid, (char *)addr, buf, false);
	case BY_VM:
		return result(process_vm_readv(pid, &local, 1, &remote, 1, 0));
	}
	return -EINVAL;
}

int page_write(pid_t pid, char *addr, enum way way, uint32_t value)
{
	uint64_t buf[FZ_WORDS];
	struct iovec local = { buf, AF_PAGE };
	struct iovec remote = { addr, AF_PAGE };

	if (way == BY_LOAD) {
		value_store(addr, value);
		return 0;
	}
	memset(buf, 0, sizeof(buf));
	value_store(buf, value);
	switch (way) {
	case BY_MEM:
		return by_mem(pid, addr, buf, true);
	case BY_VM:
		return result(process_vm_writev(pid, &local, 1, &remote, 1, 0));
	default:
		return write_by_pipe(addr, buf);
	}
}

static const char * const way_names[] = {
	[BY_LOAD] = "by a load", [BY_PIPE] = "by write()",
	[BY_SPLICE] = "by vmsplice()", [BY_MEM] = "by /proc/self/mem",
	[BY_VM] = "by process_vm_readv()",
};

/* Can the owner read it in this way? */
static bool may_read(struct page page, enum way way)
{
	if (!(page.flags & PG_MAPPED))
		return false;
	return way == BY_MEM || page.flags & PG_READ;
}

/*
 * Compares a page of this process with the model. The caller holds the slot.
 * A page that MADV_FREE'd may go while it is being read: the second look
 * decides, and what is gone remains so.
 */
void verify(struct slot *s, size_t page, enum way way)
{
	struct page *model = page_of(me, s, page);
	uint64_t buf[FZ_WORDS];
	int ret;

	if (!may_read(*model, way)) {
		if (way == BY_LOAD)
			return;
		ret = page_read(getpid(), addr_of(s, page), way, buf);
		if (!ret)
			fail_page(me, s, page, "readable though it should not be",
				  buf);
		return;
	}
	atomic_fetch_add_explicit(&fz->nr_checks, 1, memory_order_relaxed);
	/* Most pages are only looked at where their patterns lie. */
	if (way == BY_LOAD && page % 16 &&
	    value_glance(addr_of(s, page), model->value))
		return;
	ret = page_read(getpid(), addr_of(s, page), way, buf);
	if (!ret && model->flags & PG_LAZY && !value_matches(buf, *model))
		ret = page_read(getpid(), addr_of(s, page), way, buf);
	if (ret) {
		errno = -ret;
		fail_op(s, way_names[way], page, 1);
	} else if (!value_matches(buf, *model)) {
		fail_page(me, s, page, way_names[way], buf);
	} else if (!buf[0]) {
		*model = (struct page){ 0, model->flags & ~PG_LAZY };
	}
}

/*
 * Looks at every page, or at every @step'th. Takes the slot for a stretch of
 * pages at a time, so that others get a look in.
 */
void verify_slot(struct slot *s, bool backwards, size_t step)
{
	size_t i, end;

	for (i = 0; i < s->pages && !failing();) {
		slot_lock(s);
		for (end = i + 64 * step; i < end && i < s->pages; i += step)
			verify(s, backwards ? s->pages - 1 - i : i, BY_LOAD);
		slot_unlock(s);
	}
}

/* All of this process's slots, in an order that depends on @rng. */
void verify_all(struct rng *rng)
{
	size_t n = fz->plan.slots, start = below(rng, n), i;
	size_t step = one_in(rng, 3) ? 1 : 1 + below(rng, 200);
	bool backwards = one_in(rng, 2);

	for (i = 0; i < n && !failing(); i++) {
		size_t at = (start + (backwards ? n - i : i)) % n;

		verify_slot(&me->slot[at], backwards, step);
	}
}

/* Gives a page a value of its own. The caller holds the slot. */
void write_page(struct slot *s, size_t page, enum way way)
{
	struct page *model = page_of(me, s, page);
	uint32_t value = new_value(s);
	int ret;

	if (!(model->flags & PG_MAPPED) ||
	    (way != BY_MEM && !(model->flags & PG_WRITE)))
		return;
	ret = page_write(getpid(), addr_of(s, page), way, value);
	if (ret) {
		errno = -ret;
		if (model->flags & PG_WRITE)
			fail_op(s, "write", page, 1);
		return;
	}
	*model = (struct page){ value, model->flags & ~PG_LAZY };
}
