// SPDX-License-Identifier: GPL-2.0
/* Operations that move or resize mappings, and userfaultfd. */
#include <errno.h>
#include <fcntl.h>
#include <linux/userfaultfd.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "fuzz.h"

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP	4
#endif

/* The pages from @first on that are mapped alike; @most at most. */
static size_t alike(struct slot *s, size_t first, size_t most)
{
	uint32_t flags = page_of(me, s, first)->flags & ~PG_LAZY;
	size_t i;

	if (!(flags & PG_MAPPED))
		return 0;
	for (i = 0; i < most; i++)
		if ((page_of(me, s, first + i)->flags & ~PG_LAZY) != flags)
			break;
	return i;
}

/* Where @pages can go without meeting [@from, @from + @pages). */
static bool pick_target(const struct slot *s, struct rng *rng, size_t from,
			size_t pages, size_t *to)
{
	size_t after = from + pages;
	size_t room = s->pages - after;

	if (room >= pages && (from < pages || one_in(rng, 2)))
		*to = after + below(rng, room - pages + 1);
	else if (from >= pages)
		*to = below(rng, from - pages + 1);
	else
		return false;
	/* As it lay in its page table: whole tables are moved then. */
	if (one_in(rng, 2) && *to % AF_PIECE_PAGES != from % AF_PIECE_PAGES) {
		size_t other = *to / AF_PIECE_PAGES * AF_PIECE_PAGES +
			       from % AF_PIECE_PAGES;

		if (other + pages <= from ||
		    (other >= after && other + pages <= s->pages))
			*to = other;
	}
	return true;
}

/*
 * mremap() to a chosen address unmaps what is there before it finds out that
 * the source is more than one VMA: after a failure the target is mapped anew.
 */
void op_move(struct slot *s, struct rng *rng)
{
	struct span from = pick(s, rng);
	int flags = MREMAP_MAYMOVE | MREMAP_FIXED |
		    (one_in(rng, 3) ? MREMAP_DONTUNMAP : 0);
	size_t to, i;
	void *p;

	from.pages = alike(s, from.first, from.pages);
	if (from.pages > s->pages / 2)
		from.pages = s->pages / 2;
	if (!from.pages || !pick_target(s, rng, from.first, from.pages, &to))
		return;
	p = mremap(addr_of(s, from.first), from.pages * AF_PAGE,
		   from.pages * AF_PAGE, flags, addr_of(s, to));
	note(s, flags & MREMAP_DONTUNMAP ? "mremap dontunmap from" :
	     "mremap from", from.first, from.pages, to,
	     p == MAP_FAILED ? -errno : 0);
	note(s, "mremap to", to, from.pages, from.first, 0);
	if (p == MAP_FAILED) {
		map_fresh(s, (struct span){ to, from.pages }, 0);
		return;
	}
	for (i = 0; i < from.pages; i++) {
		struct page *page = page_of(me, s, from.first + i);

		*page_of(me, s, to + i) = *page;
		page->value = 0;
		page->flags &= flags & MREMAP_DONTUNMAP ? ~PG_LAZY : 0;
	}
}

/* In place: shrinks a mapping, or grows it into a hole behind it. */
void op_resize(struct slot *s, struct rng *rng)
{
	struct span old = pick(s, rng);
	size_t room = s->pages - old.first, pages, i;
	struct page last;
	void *p;

	old.pages = alike(s, old.first, room);
	if (!old.pages)
		return;
	for (i = old.pages; i < room; i++)
		if (page_of(me, s, old.first + i)->flags & PG_MAPPED)
			break;
	pages = 1 + below(rng, i);
	p = mremap(addr_of(s, old.first), old.pages * AF_PAGE, pages * AF_PAGE,
		   0);
	note(s, "mremap", old.first, old.pages, pages,
	     p == MAP_FAILED ? -errno : 0);
	if (p == MAP_FAILED)
		return;
	last = *page_of(me, s, old.first + old.pages - 1);
	last.value = 0;
	last.flags &= ~PG_LAZY;
	if (pages < old.pages)
		set_pages(s, old.first + pages, old.pages - pages,
			  (struct page){ 0 });
	else
		set_pages(s, old.first + old.pages, pages - old.pages, last);
}

/* Moves the end of the heap. What mprotect() changed there stays as it is. */
void op_brk(struct slot *s, struct rng *rng)
{
	size_t now = 0, pages = below(rng, s->pages);

	while (now < s->pages && page_of(me, s, now)->flags & PG_MAPPED)
		now++;
	if (brk(addr_of(s, pages))) {
		fail_op(s, "brk", 0, pages);
		return;
	}
	note(s, "brk", 0, pages, now, 0);
	if (pages < now)
		set_pages(s, pages, now - pages, (struct page){ 0 });
	else
		set_pages(s, now, pages - now, (struct page){ 0, PG_FRESH });
}

static int uffd_open(void)
{
	struct uffdio_api api = { .api = UFFD_API };
	int fd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);

	if (fd >= 0 && ioctl(fd, UFFDIO_API, &api)) {
		close(fd);
		fd = -1;
	}
	return fd;
}

/* UFFDIO_COPY may succeed only where there is nothing. */
static void uffd_copy(struct slot *s, int fd, size_t page)
{
	struct page *model = page_of(me, s, page);
	uint64_t buf[FZ_WORDS] __attribute__((aligned(4096))) = { 0 };
	uint32_t value = new_value(s);
	struct uffdio_copy copy = {
		.dst = (uintptr_t)addr_of(s, page),
		.src = (uintptr_t)buf,
		.len = AF_PAGE,
	};

	value_store(buf, value);
	if (ioctl(fd, UFFDIO_COPY, &copy) || copy.copy != AF_PAGE)
		return;
	if (model->value && !(model->flags & PG_LAZY))
		fail_page(me, s, page, "UFFDIO_COPY found a hole in it", buf);
	*model = (struct page){ value, model->flags & ~PG_LAZY };
}

/*
 * Registers pages, fills some of the holes, and unregisters. Nobody else looks
 * at them but third parties, whose faults wait for the end of it.
 */
static void uffd_run(struct slot *s, struct span run, long fd)
{
	struct uffdio_register reg = {
		.range = { (uintptr_t)addr_of(s, run.first),
			   run.pages * AF_PAGE },
		.mode = UFFDIO_REGISTER_MODE_MISSING,
	};
	size_t i;

	if (ioctl(fd, UFFDIO_REGISTER, &reg))
		return;
	for (i = 0; i < run.pages && i < 20; i++)
		uffd_copy(s, fd, run.first + i * 7 % run.pages);
	ioctl(fd, UFFDIO_UNREGISTER, &reg.range);
	note(s, "userfaultfd", run.first, run.pages, 0, 0);
}

void op_uffd(struct slot *s, struct rng *rng)
{
	int fd = uffd_open();

	if (fd < 0)
		return;
	each_run(s, pick(s, rng), uffd_run, fd);
	close(fd);
}
