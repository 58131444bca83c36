// SPDX-License-Identifier: GPL-2.0
/* Where the slots of a round lie, and what their pages start with. */
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "fuzz.h"

/* Far from where the kernel puts mappings of its own choice. */
#define FZ_BASE		0x200000000000UL
#define FZ_GIB		(1UL << 30)
#define FZ_BRK_PAGES	1400

/* Sizes in pages that make a page table shared, whole, or one of many. */
static uint32_t slot_size(struct rng *rng)
{
	switch (below(rng, 8)) {
	case 0:
	case 1:
		return 1 + below(rng, 40);
	case 2:
	case 3:
		return 41 + below(rng, 660);
	case 4:
		return AF_PIECE_PAGES + below(rng, 3) - 1;
	case 5:
		return AF_PIECE_PAGES * (1 + below(rng, 4));
	case 6:
		return 700 + below(rng, 3000);
	default:
		return AF_PIECE_PAGES * (2 + below(rng, 6)) + below(rng, 400);
	}
}

/* Every node's slots are copies of the root's: lay them out there. */
static void plan_slots(struct plan *plan, struct rng *rng)
{
	uint32_t want = 1 + below(rng, one_in(rng, 3) ? FZ_SLOTS : 10);
	uint32_t limit = one_in(rng, 4) ? FZ_PAGES : FZ_PAGES / 3;
	struct slot *slots = fz->node[0].slot;
	char *at;

	at = (char *)FZ_BASE + FZ_GIB * (1 + below(rng, 600)) -
	     AF_PAGE * below(rng, 8000);
	if (one_in(rng, 3))
		at = (char *)((uintptr_t)at & ~(AF_PIECE - 1));
	while (plan->slots < want) {
		struct slot *s = &slots[plan->slots];
		uint32_t pages = slot_size(rng);

		s->brk = !plan->slots && one_in(rng, 3);
		if (s->brk)
			pages = FZ_BRK_PAGES;
		if (plan->pages + pages > limit)
			break;
		if (one_in(rng, 4))
			at += AF_PAGE * (1 + below(rng, 40));
		s->number = plan->slots++;
		s->base = at;
		s->pages = pages;
		s->at = plan->pages;
		plan->pages += pages;
		at += pages * AF_PAGE;
	}
	plan->ticket_base = at + AF_PAGE * (1 + below(rng, 2000));
}

static uint32_t gcd(uint32_t a, uint32_t b)
{
	return b ? gcd(b, a % b) : a;
}

static void plan_tickets(struct plan *plan, struct rng *rng)
{
	uint32_t n = 3 + below(rng, one_in(rng, 4) ? 700 : 4000);

	plan->writers = one_in(rng, 2) ? 0 : 1 + below(rng, 2);
	plan->ticket_pages = n;
	do {
		plan->ticket_stride = one_in(rng, 2) ? 1 :
				      one_in(rng, 3) ? n - 1 : 1 + below(rng, n);
	} while (gcd(plan->ticket_stride, n) != 1);
}

/* A round without most operations goes deeper into the others. */
static uint64_t plan_ops(struct rng *rng)
{
	unsigned int i, keep = 1 + below(rng, 4);
	uint64_t ops = 0;

	for (i = 0; i < nr_slot_ops(); i++)
		if (below(rng, 4) < keep)
			ops |= 1ULL << i;
	return ops;
}

void plan_round(struct plan *plan, uint64_t seed)
{
	struct rng rng = { mix(seed, 1) };

	memset(plan, 0, sizeof(*plan));
	memset(fz->node[0].slot, 0, sizeof(fz->node[0].slot));
	plan->seed = seed;
	plan->ops = plan_ops(&rng);
	plan->threads = 1 + below(&rng, FZ_THREADS);
	plan->forks = 1 + below(&rng, 5);
	plan->nr_ops = fz->ops ? fz->ops : 10 + below(&rng, 90);
	plan->pin_depth = one_in(&rng, 10) ? 0 :
			  one_in(&rng, 4) ? 1 : FZ_DEPTH + 1;
	plan->hold = one_in(&rng, 2);
	plan->merge = one_in(&rng, 3);
	plan_slots(plan, &rng);
	plan_tickets(plan, &rng);
}

/* Gives the heap of a slot the pages up to the middle of its window. */
static void build_brk(struct slot *s)
{
	/* So that malloc() needs no more of the heap, which it would share. */
	free(malloc(100000));
	s->base = (char *)(((uintptr_t)sbrk(0) + 2 * AF_PAGE - 1) &
			   ~(AF_PAGE - 1));
	s->base += 64 * AF_PAGE;
	if (brk(addr_of(s, s->pages / 2)))
		fail_op(s, "brk", 0, s->pages / 2);
	set_pages(s, 0, s->pages / 2, (struct page){ 0, PG_FRESH });
}

static void fill(struct slot *s, struct rng *rng)
{
	static const size_t steps[] = { 1, 1, 3, 17, 64, 511, 100000 };
	/* Page tables are what counts: few of the big ones are full. */
	size_t step = steps[s->pages > 2000 && !one_in(rng, 4) ?
			    2 + below(rng, 5) : below(rng, 7)], i;

	if (!one_in(rng, 3))
		madvise(s->base, s->pages * AF_PAGE, one_in(rng, 2) ?
			MADV_HUGEPAGE : MADV_NOHUGEPAGE);
	for (i = below(rng, step); i < s->pages; i += step)
		write_page(s, i, BY_LOAD);
	/* Neighbours differ in a flag that nobody minds: many small VMAs. */
	step = 1 + below(rng, 60);
	if (one_in(rng, 6))
		for (i = 0; i + step < s->pages; i += 2 * step)
			madvise(addr_of(s, i), step * AF_PAGE, MADV_DONTDUMP);
	if (one_in(rng, 6))
		madvise(s->base, s->pages * AF_PAGE, MADV_PAGEOUT);
}

/* Makes the memory of a round's first process. */
void build(struct node *n)
{
	struct rng rng = { mix(fz->plan.seed, 2) };
	unsigned int i;

	for (i = 0; i < fz->plan.slots && !failing(); i++) {
		struct slot *s = &n->slot[i];

		slot_lock(s);
		set_pages(s, 0, s->pages, (struct page){ 0 });
		if (s->brk)
			build_brk(s);
		else
			map_fresh(s, (struct span){ 0, s->pages }, 0);
		fill(s, &rng);
		slot_unlock(s);
	}
	tickets_build();
}
