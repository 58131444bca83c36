// SPDX-License-Identifier: GPL-2.0
/*
 * Writers that do not stop for fork(). Each ticket 1, 2, 3... is written to one
 * page, one after the other, in an order of pages that repeats. What a child
 * sees must be a prefix: no ticket without all tickets before it.
 *
 * The same holds for plain fork(). A writer that still has a writable
 * translation goes on, and both sides see what it writes; the first page that
 * it faults on makes it wait until fork() is over.
 */
#include <sched.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"

/* A ticket is written to these words, in this order. */
#define EARLY	64
#define LATE	450

static volatile uint64_t *ticket_word(uint64_t page, size_t word)
{
	return (volatile uint64_t *)(fz->plan.ticket_base + page * AF_PAGE) +
	       word;
}

static uint64_t page_of_ticket(uint64_t ticket)
{
	return ticket * fz->plan.ticket_stride % fz->plan.ticket_pages;
}

void tickets_build(void)
{
	size_t size = fz->plan.ticket_pages * AF_PAGE;

	if (!fz->plan.writers)
		return;
	if (mmap(fz->plan.ticket_base, size, PROT_READ | PROT_WRITE,
		 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED)
		fail("no memory for the tickets");
	if (fz->plan.seed % 4 == 0)
		madvise(fz->plan.ticket_base, size, MADV_HUGEPAGE);
}

static void write_ticket(uint64_t ticket)
{
	uint64_t page = page_of_ticket(ticket);

	*ticket_word(page, EARLY) = ticket;
	atomic_signal_fence(memory_order_seq_cst);
	*ticket_word(page, LATE) = ticket;
	atomic_store(&me->written, ticket);
}

/* Two writers take turns: the order of their writes is that of the tickets. */
void *ticket_writer(void *unused)
{
	/* So that the others get some work done on few CPUs. */
	const struct timespec pause = { .tv_nsec = 300000 };

	(void)unused;
	while (!atomic_load(&me->stop_tickets) && !failing()) {
		int i;

		while (atomic_flag_test_and_set(&me->ticket_lock))
			sched_yield();
		for (i = 0; i < 50; i++)
			write_ticket(++me->taken);
		atomic_flag_clear(&me->ticket_lock);
		nanosleep(&pause, NULL);
	}
	return NULL;
}

/* The last ticket up to @limit that was written to @page; 0 if there is none. */
static uint64_t last_ticket(const uint32_t *order, uint64_t page,
			    uint64_t limit)
{
	uint64_t n = fz->plan.ticket_pages, t = order[page];

	return limit < t ? 0 : limit - (limit - t) % n;
}

/* @order[page] becomes the first ticket of @page. */
static void order_pages(uint32_t *order)
{
	uint32_t t;

	for (t = 1; t <= fz->plan.ticket_pages; t++)
		order[page_of_ticket(t)] = t;
}

static uint64_t newest(void)
{
	uint64_t page, max = 0;

	for (page = 0; page < fz->plan.ticket_pages; page++)
		if (*ticket_word(page, EARLY) > max)
			max = *ticket_word(page, EARLY);
	return max;
}

static bool page_is_prefix(const uint32_t *order, uint64_t page, uint64_t max)
{
	uint64_t early = *ticket_word(page, EARLY);
	uint64_t late = *ticket_word(page, LATE);
	uint64_t want = last_ticket(order, page, max);
	/* The newest ticket may be half written. */
	uint64_t before = want == max && max ?
			  last_ticket(order, page, max - 1) : want;

	if (early == want && (late == want || late == before))
		return true;
	fail("tickets: page %llu of %u at %p holds %llu and %llu, not %llu; the newest of all is %llu",
	     (unsigned long long)page, fz->plan.ticket_pages,
	     (void *)ticket_word(page, 0), (unsigned long long)early,
	     (unsigned long long)late, (unsigned long long)want,
	     (unsigned long long)max);
	return false;
}

/*
 * For a process in which nobody writes tickets: is what is there a prefix that
 * ends at or after @floor, and, unless it is UINT64_MAX, at *@last?
 */
bool tickets_check(uint64_t floor, uint64_t *last)
{
	uint32_t order[FZ_PAGES];
	uint64_t page, max = newest();

	order_pages(order);
	if (max < floor) {
		fail("tickets: %llu is the newest, %llu was written before fork()",
		     (unsigned long long)max, (unsigned long long)floor);
		return false;
	}
	if (*last != UINT64_MAX && *last != max) {
		fail("tickets: the newest was %llu, and is %llu now",
		     (unsigned long long)*last, (unsigned long long)max);
		return false;
	}
	for (page = 0; page < fz->plan.ticket_pages; page++)
		if (!page_is_prefix(order, page, max))
			return false;
	*last = max;
	return true;
}

/* Goes on after a check, with the ticket that may be half written. */
void tickets_resume(uint64_t last)
{
	if (last)
		write_ticket(last);
	atomic_store(&me->taken, last);
	atomic_store(&me->written, last);
}
