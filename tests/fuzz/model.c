// SPDX-License-Identifier: GPL-2.0
/* The model of what each process must see, and the report of a mismatch. */
#include <errno.h>
#include <sched.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#include "fuzz.h"

struct arena *fz;
struct node *me;
__thread int thread_number;

uint64_t mix(uint64_t a, uint64_t b)
{
	uint64_t x = a + (b + 1) * 0x9e3779b97f4a7c15ULL;

	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return x ^ (x >> 31);
}

uint64_t rnd(struct rng *rng)
{
	rng->state += 0x9e3779b97f4a7c15ULL;
	return mix(rng->state, 0);
}

size_t below(struct rng *rng, size_t n)
{
	return n ? rnd(rng) % n : 0;
}

bool one_in(struct rng *rng, unsigned int n)
{
	return !below(rng, n);
}

bool slot_trylock(struct slot *s)
{
	unsigned int seq = atomic_load(&s->seq);

	return !(seq & 1) && atomic_compare_exchange_strong(&s->seq, &seq,
							    seq + 1);
}

void slot_lock(struct slot *s)
{
	while (!slot_trylock(s))
		sched_yield();
}

void slot_unlock(struct slot *s)
{
	atomic_fetch_add(&s->seq, 1);
}

void slots_lock(struct node *n)
{
	unsigned int i;

	for (i = 0; i < fz->plan.slots; i++)
		slot_lock(&n->slot[i]);
}

void slots_unlock(struct node *n)
{
	unsigned int i;

	for (i = 0; i < fz->plan.slots; i++)
		slot_unlock(&n->slot[i]);
}

void note(struct slot *s, const char *op, size_t first, size_t pages, long arg,
	  long result)
{
	s->done[s->nr_done++ % FZ_HISTORY] = (struct done){
		.op = op, .node = me->number, .thread = thread_number,
		.first = first, .pages = pages, .arg = arg, .result = result,
	};
}

/* A node for a process to be, or NULL if the round has had enough of them. */
struct node *node_new(const struct node *parent)
{
	int number = atomic_fetch_add(&fz->nodes, 1);
	struct node *n;

	if (number >= FZ_NODES) {
		atomic_store(&fz->nodes, FZ_NODES);
		return NULL;
	}
	n = &fz->node[number];
	memset(n, 0, offsetof(struct node, page));
	n->number = number;
	n->parent = parent ? parent->number : -1;
	n->depth = parent ? parent->depth + 1 : 0;
	return n;
}

/* What a child sees of a page. */
static struct page inherited(struct page page)
{
	if (page.flags & PG_NOFORK)
		return (struct page){ 0 };
	if (page.flags & PG_WIPE) {
		page.value = 0;
		page.flags &= ~PG_LAZY;
	}
	return page;
}

/* The caller holds the parent's slots; the child's are free afterwards. */
void node_inherit(struct node *child, struct node *parent)
{
	uint32_t i;

	memcpy(child->slot, parent->slot, sizeof(child->slot));
	for (i = 0; i < fz->plan.slots; i++)
		atomic_store(&child->slot[i].seq, 0);
	for (i = 0; i < fz->plan.pages; i++)
		child->page[i] = inherited(parent->page[i]);
}

void set_pages(struct slot *s, size_t first, size_t pages, struct page to)
{
	size_t i;

	for (i = 0; i < pages; i++)
		*page_of(me, s, first + i) = to;
}

/* A value that nobody else writes, and that tells who wrote it. */
uint32_t new_value(struct slot *s)
{
	s->writes = s->writes % 0xfffff + 1;
	return (uint32_t)me->number << 26 | s->number << 20 | s->writes;
}

/* The words of a page that are not zero, whatever its value is. */
static const size_t used_words[] = { 0, 129, 300, FZ_WORDS - 1 };

uint64_t value_word(uint32_t value, size_t word)
{
	if (!value)
		return 0;
	return word ? af_value(value, word) : (uint64_t)value << 32 | value;
}

/* The other words are zero in every page, and remain so. */
void value_store(void *page, uint32_t value)
{
	volatile uint64_t *to = page;
	size_t i;

	for (i = 0; i < 4; i++)
		to[used_words[i]] = value_word(value, used_words[i]);
}

/* The words that a pattern fills, and one that is always zero. */
bool value_glance(const void *page, uint32_t value)
{
	const volatile uint64_t *word = page;
	size_t i;

	for (i = 0; i < 4; i++)
		if (word[used_words[i]] != value_word(value, used_words[i]))
			return false;
	return !word[200];
}

/* By words: string instructions are slow where the CPU is emulated. */
bool value_matches(const uint64_t *buf, struct page expected)
{
	bool lazy = expected.flags & PG_LAZY;
	size_t i, next = 0;

	if (!value_glance(buf, expected.value) && !(lazy && value_glance(buf, 0)))
		return false;
	for (i = 0; i < FZ_WORDS; i++)
		if (i == used_words[next])
			next++;
		else if (buf[i])
			return false;
	return true;
}

bool failing(void)
{
	return atomic_load_explicit(&fz->failed, memory_order_relaxed);
}

/* Returns true to the first caller only: one report a round. */
static bool first_failure(void)
{
	int none = 0;

	return atomic_compare_exchange_strong(&fz->failed, &none, 1);
}

static void reported(void)
{
	atomic_store(&fz->failed, 2);
}

/* Lets the process that reports a failure finish, if there is one. */
void wait_for_report(void)
{
	const struct timespec pause = { .tv_nsec = 10000000 };
	int i;

	for (i = 0; i < 1000 && atomic_load(&fz->failed) == 1; i++)
		nanosleep(&pause, NULL);
}

static void print_node(const struct node *n)
{
	fprintf(stderr, "# FAILED in node %d (pid %d, parent node %d, depth %d, state %d), seen by pid %d\n",
		n->number, n->pid, n->parent, n->depth, n->state, getpid());
}

static void print_history(const struct slot *s, size_t page)
{
	uint32_t i = s->nr_done > FZ_HISTORY ? s->nr_done - FZ_HISTORY : 0;

	for (; i < s->nr_done; i++) {
		const struct done *d = &s->done[i % FZ_HISTORY];

		fprintf(stderr, "#   %s node %u thread %u: %s pages %u+%u arg %ld: %ld\n",
			page >= d->first && page < d->first + d->pages ?
			"*" : " ", d->node, d->thread, d->op, d->first,
			d->pages, d->arg, d->result);
	}
}

void fail(const char *format, ...)
{
	va_list args;

	if (!first_failure())
		return;
	va_start(args, format);
	fprintf(stderr, "# FAILED in node %d (pid %d): ", me ? me->number : -1,
		getpid());
	vfprintf(stderr, format, args);
	fprintf(stderr, "\n");
	va_end(args);
	reported();
}

static void print_words(const uint64_t *found)
{
	size_t i, shown = 0;

	for (i = 0; i < FZ_WORDS && shown < 8; i++)
		if (found[i] || !i) {
			fprintf(stderr, "#   word %zu: %016llx\n", i,
				(unsigned long long)found[i]);
			shown++;
		}
}

static void print_value(const char *what, uint32_t value)
{
	fprintf(stderr, "# %s %08x (node %u, slot %u, write %u)\n", what, value,
		value >> 26, value >> 20 & 0x3f, value & 0xfffff);
}

/* @found is the whole page, and differs from what the model says. */
void fail_page(struct node *n, struct slot *s, size_t page, const char *how,
	       const uint64_t *found)
{
	struct page want = *page_of(n, s, page);
	uint64_t again[FZ_WORDS];
	int ret;

	if (!first_failure())
		return;
	print_node(n);
	fprintf(stderr, "# slot %u (%u pages at %p), page %zu at %p, %s, flags %#x\n",
		s->number, s->pages, (void *)s->base, page,
		(void *)addr_of(s, page), how, want.flags);
	print_value("expected", want.value);
	print_value("found   ", found[0]);
	print_words(found);
	ret = page_read(n->pid, addr_of(s, page), BY_MEM, again);
	if (ret)
		fprintf(stderr, "# read again: %s\n", strerror(-ret));
	else
		fprintf(stderr, "# read again: %s\n", value_matches(again, want) ?
			"as expected" : memcmp(again, found, AF_PAGE) ?
			"different" : "the same");
	print_history(s, page);
	reported();
}

/* The system call of @op failed, and should not have; errno says how. */
void fail_op(struct slot *s, const char *op, size_t first, size_t pages)
{
	int error = errno;

	if (!first_failure())
		return;
	print_node(me);
	fprintf(stderr, "# slot %u: %s of pages %zu+%zu at %p: %s\n", s->number,
		op, first, pages, (void *)addr_of(s, first), strerror(error));
	print_history(s, first);
	reported();
}
