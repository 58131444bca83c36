// SPDX-License-Identifier: GPL-2.0
/*
 * Core dumps of either side while the session is open. The kernel reads the
 * memory without a fault, and writes a hole where it finds none.
 *
 * Guards follow_page_mask() with FOLL_DUMP; the parent's needs no hook.
 */
#include <elf.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include "pair.h"

#define PIECES	3
#define SEED	0x111UL
#define LATER	0x112UL

#define PATTERN_FILE	"/proc/sys/kernel/core_pattern"
#define CORE_FILE	"/dev/shm/af-core"

FIXTURE(coredump) {
	struct af af;
	struct pair pair;
	char saved[256];
};

FIXTURE_VARIANT(coredump) {
	enum af_kind kind;
	int hold;
};

FIXTURE_VARIANT_ADD(coredump, base) { .kind = AF_BASE, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(coredump, race) { .kind = AF_BASE, .hold = AF_RACE };
FIXTURE_VARIANT_ADD(coredump, pte_thp) {
	.kind = AF_PTE_THP, .hold = AF_HOLD };
FIXTURE_VARIANT_ADD(coredump, swapped) {
	.kind = AF_SWAPPED, .hold = AF_HOLD };

FIXTURE_SETUP(coredump)
{
	if (af_read_file(PATTERN_FILE, self->saved, sizeof(self->saved)))
		SKIP(return, "no core dumps");
	PAIR_MAKE(&self->pair, PIECES, variant->kind, SEED);
	ASSERT_EQ(0, af_write_file(PATTERN_FILE, CORE_FILE));
	AF_SETUP(variant->hold);
	ASSERT_EQ(0, pair_fork(&self->pair, &self->af));
}

FIXTURE_TEARDOWN(coredump)
{
	AF_FINISH();
	unlink(CORE_FILE);
	EXPECT_EQ(0, af_write_file(PATTERN_FILE, self->saved));
}

/* Ends the process that obeys, with a core. */
static long do_dump(const struct af_job *job)
{
	const struct rlimit all = { RLIM_INFINITY, RLIM_INFINITY };

	(void)job;
	if (setrlimit(RLIMIT_CORE, &all))
		return -errno;
	signal(SIGQUIT, SIG_DFL);
	raise(SIGQUIT);
	return -1;
}

#define DUMPED	(SIGQUIT | 0x80)

/* The offset in the core at which @addr's memory lies, or -1. */
static off_t offset_of(const char *core, uintptr_t addr)
{
	const Elf64_Ehdr *head = (const Elf64_Ehdr *)core;
	const Elf64_Phdr *load = (const Elf64_Phdr *)(core + head->e_phoff);
	size_t i;

	for (i = 0; i < head->e_phnum; i++)
		if (load[i].p_type == PT_LOAD && addr >= load[i].p_vaddr &&
		    addr - load[i].p_vaddr < load[i].p_filesz)
			return load[i].p_offset + (addr - load[i].p_vaddr);
	return -1;
}

/* The number of the region's pages that are wrong in the core. */
static long check_core(const struct af_region *r)
{
	int fd = open(CORE_FILE, O_RDONLY | O_CLOEXEC);
	struct stat st;
	long wrong = 0;
	char *core;
	size_t i;

	if (fd < 0 || fstat(fd, &st))
		return -errno;
	core = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
	close(fd);
	if (core == MAP_FAILED)
		return -errno;
	/* Page by page: it may lie in several VMAs. */
	for (i = 0; i < r->pages; i++) {
		off_t at = offset_of(core, (uintptr_t)af_page(r, i));

		if (at < 0 || at + (off_t)AF_PAGE > st.st_size)
			wrong += 1000000;
		else
			wrong += af_check_at(core + at, i, 1, r->seed);
	}
	munmap(core, st.st_size);
	return wrong;
}

TEST_F(coredump, of_child)
{
	struct pair *pair = &self->pair;

	af_post(&pair->c, &(struct af_job){ .fn = do_dump });
	EXPECT_EQ(DUMPED, pair_reap_child(pair));
	EXPECT_EQ(0, check_core(pair->r));
	if (self->af.held)
		EXPECT_EQ(PIECES, af_delta(&self->af, AF_PIECE_CHILD));
	PAIR_PARENT_IS_RIGHT(pair, LATER);
}

/* While the child dumps, the parent writes. */
TEST_F(coredump, of_child_under_writes)
{
	struct pair *pair = &self->pair;

	af_post(&pair->c, &(struct af_job){ .fn = do_dump });
	af_child_fill(&pair->p, pair->r, 0, pair->r->pages, LATER);
	EXPECT_EQ(DUMPED, pair_reap_child(pair));
	EXPECT_EQ(0, check_core(pair->r));
	EXPECT_EQ(0, af_child_check(&pair->p, pair->r, 0, pair->r->pages,
				    LATER));
	EXPECT_EQ(0, af_end(&pair->p));
}

/* The parent dumps what it has, and its child is whole. */
TEST_F(coredump, of_parent)
{
	struct pair *pair = &self->pair;

	af_post(&pair->p, &(struct af_job){ .fn = do_dump });
	EXPECT_EQ(DUMPED, af_reap(&pair->p));
	EXPECT_EQ(0, check_core(pair->r));
	PAIR_CHILD_IS_RIGHT(pair, LATER);
}

TEST_HARNESS_MAIN
