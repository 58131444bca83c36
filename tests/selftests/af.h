/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Common parts of the async-fork selftests: the kernel's switches and counters,
 * regions of memory that hold a known pattern, and children that obey commands.
 *
 * Nothing in here knows the test harness; harness.h joins the two.
 */
#ifndef AF_H
#define AF_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

#define AF_PAGE		4096UL
#define AF_PIECE	(2UL << 20)
#define AF_PIECE_PAGES	(AF_PIECE / AF_PAGE)
#define AF_MIB		(1UL << 20)

/* The counters of /proc/vmstat, in the order of af_counter_names[]. */
enum af_counter {
	AF_SESSION, AF_END, AF_PIECE_WORKER, AF_PIECE_PARENT, AF_PIECE_CHILD,
	AF_PIECE_LIFTED, AF_CANCEL, AF_POISON, AF_WAIT_MIGRATION,
	AF_FB_OFF, AF_FB_SMALL, AF_FB_NOTIFIER, AF_FB_PINNED, AF_FB_NOMEM,
	AF_FB_MODULE, AF_NR_COUNTERS
};

struct af_counters {
	long v[AF_NR_COUNTERS];
};

#define AF_ALLOW(counter)	(1U << (counter))

/* Flags of af_setup(). */
#define AF_RACE	0	/* the workers run: both sides race with them */
#define AF_HOLD	1	/* the workers are held where the kernel can do that */

/* One test's use of async fork: what it switched, and what it expects. */
struct af {
	bool async;		/* false: plain fork, the oracle */
	bool held;		/* the workers stand still until af_release() */
	long want;		/* sessions that must begin between setup and finish */
	long spare;		/* further sessions that may begin */
	unsigned int allow;	/* counters that may move, AF_ALLOW() */
	char saved_mode[32], saved_min[32];
	struct af_counters at;
};

int af_setup(struct af *af, int hold);
int af_finish(struct af *af);

/* Switches. Each returns 0 or -errno. */
#define AF_MODE_FILE	"/proc/sys/vm/async_fork"
#define AF_MIN_FILE	"/proc/sys/vm/async_fork_min_mb"
#define AF_HOLD_FILE	"/sys/kernel/debug/async_fork/hold"
int af_write_file(const char *path, const char *text);
int af_read_file(const char *path, char *buf, size_t size);
long af_number_in(const char *path, const char *key);
bool af_plain_mode(void);
bool af_can_hold(void);
int af_hold(struct af *af);
int af_release(struct af *af);

/* Counters. */
void af_counters(struct af_counters *c);
long af_delta(const struct af *af, enum af_counter which);
int af_settle(void);
int af_poll(bool (*until)(void *arg), void *arg, unsigned int seconds);

/* What a region's pages are made of. */
enum af_kind {
	AF_BASE,	/* base pages */
	AF_MIXED,	/* huge pages and base pages, 2 MiB by 2 MiB */
	AF_PTE_THP,	/* huge pages that are mapped page by page */
	AF_SWAPPED,	/* base pages, out on the swap device */
	AF_ZERO,	/* the zero page, but for one page in each 2 MiB */
};

/* Pages of a region before its first and after its last whole piece. */
#define AF_HEAD	64UL
#define AF_TAIL	32UL

/* Seeds with this bit: only pages whose index divides by 512 are not zero. */
#define AF_SPARSE	(1ULL << 63)
/* The seed of memory that holds nothing but zeroes. */
#define AF_ZEROES	(1ULL << 62)

/*
 * A private anonymous mapping with nothing mapped next to it. It has AF_HEAD
 * pages, then @pieces whole pieces, then AF_TAIL pages.
 */
struct af_region {
	char *base;
	size_t pages, pieces;
	uint64_t seed;
	enum af_kind kind;
	char *reserve;
	size_t reserve_len;
};

#define AF_SKIPPED	1	/* af_region_make(): cannot be had here */
int af_region_reserve(struct af_region *r, size_t pieces, uint64_t seed);
int af_region_make(struct af_region *r, size_t pieces, enum af_kind kind,
		   uint64_t seed);
int af_region_populate(struct af_region *r, enum af_kind kind);
int af_region_pageout(struct af_region *r);
void af_region_free(struct af_region *r);
const char *af_skip_reason(void);
long af_smaps_kb(const void *addr, const char *field);
bool af_two_nodes(void);
const char *af_swap_device(void);
bool af_have_swap(void);

static inline char *af_page(const struct af_region *r, size_t page)
{
	return r->base + page * AF_PAGE;
}

/* The index of the first page of the region's piece @piece. */
static inline size_t af_piece(size_t piece)
{
	return AF_HEAD + piece * AF_PIECE_PAGES;
}

/*
 * The pattern. Page number @first of seed @seed lies at @addr. af_check_at()
 * returns the number of wrong pages, and prints the first one.
 */
uint64_t af_value(uint64_t seed, size_t page);
void af_fill_at(void *addr, size_t first, size_t pages, uint64_t seed);
long af_check_at(const void *addr, size_t first, size_t pages, uint64_t seed);
long af_check_zero(const void *addr, size_t pages);
long af_check_lazy(const void *addr, size_t first, size_t pages, uint64_t seed);

static inline void af_fill(const struct af_region *r, size_t first,
			   size_t pages, uint64_t seed)
{
	af_fill_at(af_page(r, first), first, pages, seed);
}

static inline long af_check(const struct af_region *r, size_t first,
			    size_t pages, uint64_t seed)
{
	return af_check_at(af_page(r, first), first, pages, seed);
}

static inline long af_check_all(const struct af_region *r)
{
	return af_check(r, 0, r->pages, r->seed);
}

/* A call that a child makes on behalf of a test; pointers are the child's. */
struct af_job {
	long (*fn)(const struct af_job *job);
	char *addr;
	size_t first, pages;
	uint64_t seed;
};

struct af_child {
	pid_t pid;
	int cmd, reply;
};

#define AF_GONE		(-100000L)	/* af_call(): the child is no more */

int af_spawn(struct af *af, struct af_child *c);
int af_spawn_other(struct af_child *c);
int af_link(struct af_child *c, int theirs[2]);
void af_unlink(const int theirs[2]);
void af_serve(const int theirs[2]) __attribute__((noreturn));
int af_post(struct af_child *c, const struct af_job *job);
long af_wait(struct af_child *c);
long af_run(struct af_child *c, const struct af_job *job);
int af_end(struct af_child *c);		/* lets it exit; its wait status */
int af_kill(struct af_child *c);	/* its wait status */
int af_reap(struct af_child *c);	/* its wait status */

/* Calls @fn in child @c with the fields of a job, and returns its result. */
#define af_call(c, function, ...) \
	af_run((c), &(struct af_job){ .fn = (function), ##__VA_ARGS__ })

/*
 * Allocations that fail on demand; the debug kernel has what it takes.
 * af_fault_init() comes first, and returns false on a kernel that has not.
 */
#define AF_NO_FAULTS	"needs fault injection (debug kernel)"
bool af_fault_init(void);
int af_fault_arm(unsigned int nth);
bool af_fault_disarm(int fd);
int af_fault_arm_two(unsigned int nth);
bool af_fault_disarm_two(int fd);
int af_fault_tables(long times);
int af_fault_atomic(void);
void af_fault_pages_end(int fd);

/* Memory that parent, child and grandchild share, all zeroes; never fails. */
void *af_shared(size_t size);

/* Functions for af_call() that many tests want. */
long af_do_check(const struct af_job *job);	/* pages at addr are right */
long af_do_zero(const struct af_job *job);	/* pages at addr are zeroes */
long af_do_fill(const struct af_job *job);	/* write the pattern */

/* Shorthand: child @c checks or fills these pages of region @r. */
#define af_child_check(c, r, f, n, s) af_call((c), af_do_check, \
	.addr = af_page((r), (f)), .first = (f), .pages = (n), .seed = (s))
#define af_child_fill(c, r, f, n, s) af_call((c), af_do_fill, \
	.addr = af_page((r), (f)), .first = (f), .pages = (n), .seed = (s))
#define af_child_check_all(c, r) \
	af_child_check((c), (r), 0, (r)->pages, (r)->seed)

#endif
