/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The differential fuzzer of fork(): random operations on the memory of a tree
 * of processes, against a model of what each of them must see.
 *
 * A round is one tree. Each process is a node; a node's model lies in memory
 * that all share, so that it outlives what fork() does to private memory, and
 * so that third parties can compare as well. The memory under test is cut into
 * slots; who holds a slot's lock may change its pages and their model. fork()
 * happens while the forking thread holds the locks of all slots: the child's
 * model is a copy of the parent's. What never stops for a fork are the writers
 * of tickets.c.
 *
 *   model.c     the model, its locks, and the report of a mismatch
 *   access.c    the ways in which a page can be read and written
 *   layout.c    where the slots of a round lie, and what they start with
 *   ops.c       what the owner of a slot does to it
 *   move.c      operations that move or resize mappings
 *   tickets.c   writers that do not stop for fork()
 *   process.c   threads and processes: fork, exec, exit, kill
 *   observer.c  third parties
 *   main.c      options, rounds, totals
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#include "af.h"

#define FZ_SLOTS	40
#define FZ_PAGES	24576U		/* of all slots of one process: 96 MiB */
#define FZ_NODES	40
#define FZ_HISTORY	16
#define FZ_THREADS	4
#define FZ_DEPTH	3	/* of the tree of processes */
#define FZ_WORDS	512		/* of a page */

/* What the model says about a page. */
enum {
	PG_MAPPED = 1, PG_READ = 2, PG_WRITE = 4,
	PG_LAZY = 8,		/* MADV_FREE: holds its value or zeroes */
	PG_WIPE = 16,		/* MADV_WIPEONFORK */
	PG_NOFORK = 32,		/* MADV_DONTFORK */
};

#define PG_FRESH	(PG_MAPPED | PG_READ | PG_WRITE)

struct page {
	uint32_t value;		/* 0: all zeroes */
	uint32_t flags;
};

/* An operation that a slot went through; for the report of a mismatch. */
struct done {
	const char *op;
	uint16_t node, thread;
	uint32_t first, pages;
	long arg, result;
};

/*
 * A window of addresses. @seq is odd while somebody holds the slot: who only
 * reads takes no lock, and drops what he read if @seq moved meanwhile.
 */
struct slot {
	atomic_uint seq;
	bool brk;
	uint32_t number, at;	/* its first page is node->page[at] */
	uint32_t pages;
	uint32_t writes;
	uint32_t nr_done;
	char *base;
	struct done done[FZ_HISTORY];
};

enum state { ND_FREE, ND_LIVE, ND_GONE };

struct node {
	atomic_int state, pid;
	atomic_bool killed, reaped;
	int number, parent, depth;
	uint64_t seed;
	uint32_t forks;
	/* tickets.c: the last one taken, written; what fork() saw of them */
	atomic_ulong taken, written;
	atomic_flag ticket_lock;
	atomic_bool stop_tickets;
	uint64_t floor;
	atomic_ulong ceiling;
	struct slot slot[FZ_SLOTS];
	struct page page[FZ_PAGES];
};

/* One round, derived from its seed. */
struct plan {
	uint64_t seed;
	uint32_t slots, pages;
	uint64_t ops;		/* bit set of the operations in use */
	unsigned int threads, forks, nr_ops;
	int pin_depth;		/* process_vm_*() on nodes from this depth on */
	bool hold;		/* switch the workers off and on */
	bool merge;		/* use KSM */
	unsigned int writers;	/* of tickets */
	uint32_t ticket_pages, ticket_stride;
	char *ticket_base;
};

struct arena {
	/* options */
	unsigned int ops;
	bool async, verbose, poison;
	char cgroup[64];
	/* the round */
	atomic_int nodes, over;
	atomic_int failed;	/* 1: being reported, 2: reported */
	struct plan plan;
	/* totals */
	atomic_ulong nr_ops, nr_checks, nr_forks;
	struct node node[FZ_NODES];
};

extern struct arena *fz;
extern struct node *me;
extern __thread int thread_number;

/* model.c: random numbers */
struct rng {
	uint64_t state;
};

uint64_t mix(uint64_t a, uint64_t b);
uint64_t rnd(struct rng *rng);
size_t below(struct rng *rng, size_t n);
bool one_in(struct rng *rng, unsigned int n);

/* model.c: slots and pages */
static inline struct page *page_of(struct node *n, const struct slot *s,
				   size_t page)
{
	return &n->page[s->at + page];
}

static inline char *addr_of(const struct slot *s, size_t page)
{
	return s->base + page * AF_PAGE;
}

void slot_lock(struct slot *s);
bool slot_trylock(struct slot *s);
void slot_unlock(struct slot *s);
void slots_lock(struct node *n);
void slots_unlock(struct node *n);
void note(struct slot *s, const char *op, size_t first, size_t pages, long arg,
	  long result);
struct node *node_new(const struct node *parent);
void node_inherit(struct node *child, struct node *parent);
void set_pages(struct slot *s, size_t first, size_t pages, struct page to);
uint32_t new_value(struct slot *s);

/* What the pages of a value look like. */
uint64_t value_word(uint32_t value, size_t word);
void value_store(void *page, uint32_t value);
bool value_glance(const void *page, uint32_t value);
bool value_matches(const uint64_t *buf, struct page expected);

/* model.c: failures. Each of them ends the round. */
bool failing(void);
void wait_for_report(void);
void fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
void fail_page(struct node *n, struct slot *s, size_t page, const char *how,
	       const uint64_t *found);
void fail_op(struct slot *s, const char *op, size_t first, size_t pages);

/* access.c: each returns 0 or -errno. */
enum way { BY_LOAD, BY_PIPE, BY_SPLICE, BY_MEM, BY_VM };
int page_read(pid_t pid, const char *addr, enum way way, uint64_t *buf);
int page_write(pid_t pid, char *addr, enum way way, uint32_t value);
void verify(struct slot *s, size_t page, enum way way);
void verify_slot(struct slot *s, bool backwards, size_t step);
void verify_all(struct rng *rng);
void write_page(struct slot *s, size_t page, enum way way);

/* layout.c */
void plan_round(struct plan *plan, uint64_t seed);
void build(struct node *n);

/* ops.c */
struct span {
	size_t first, pages;
};

struct span pick(const struct slot *s, struct rng *rng);
void slot_op(struct slot *s, struct rng *rng);
unsigned int nr_slot_ops(void);
void each_run(struct slot *s, struct span span,
	      void (*fn)(struct slot *s, struct span run, long arg), long arg);
void map_fresh(struct slot *s, struct span span, int flags);

/* move.c */
void op_move(struct slot *s, struct rng *rng);
void op_resize(struct slot *s, struct rng *rng);
void op_brk(struct slot *s, struct rng *rng);
void op_uffd(struct slot *s, struct rng *rng);

/* tickets.c */
void *ticket_writer(void *unused);
bool tickets_check(uint64_t floor, uint64_t *last);
void tickets_build(void);
void tickets_resume(uint64_t last);

/* process.c */
void run_node(struct node *n) __attribute__((noreturn));
void reaped(pid_t pid, int status);
void hold_workers(bool on);

/* observer.c */
void observe(uint64_t seed) __attribute__((noreturn));

#endif
