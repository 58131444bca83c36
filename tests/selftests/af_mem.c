// SPDX-License-Identifier: GPL-2.0
/* Regions of memory that hold a known pattern. */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include "af.h"

static const char *skip_reason = "";

const char *af_skip_reason(void)
{
	return skip_reason;
}

uint64_t af_value(uint64_t seed, size_t page)
{
	uint64_t x = seed + (page + 1) * 0x9e3779b97f4a7c15ULL;

	if ((seed & AF_ZEROES) || ((seed & AF_SPARSE) && page % AF_PIECE_PAGES))
		return 0;
	x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ULL;
	x = (x ^ (x >> 27)) * 0x94d049bb133111ebULL;
	return (x ^ (x >> 31)) | 1;
}

/* The first and the last word of a page. */
static uint64_t *word(const void *addr, size_t page, bool last)
{
	char *p = (char *)addr + page * AF_PAGE;

	return (uint64_t *)(last ? p + AF_PAGE - sizeof(uint64_t) : p);
}

/* Does not touch a page whose pattern is all zeroes. */
void af_fill_at(void *addr, size_t first, size_t pages, uint64_t seed)
{
	size_t i;

	for (i = 0; i < pages; i++) {
		uint64_t v = af_value(seed, first + i);

		if (!v)
			continue;
		*(volatile uint64_t *)word(addr, i, false) = v;
		*(volatile uint64_t *)word(addr, i, true) = v;
	}
}

long af_check_at(const void *addr, size_t first, size_t pages, uint64_t seed)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i < pages; i++) {
		uint64_t want = af_value(seed, first + i);
		uint64_t head = *(volatile uint64_t *)word(addr, i, false);
		uint64_t tail = *(volatile uint64_t *)word(addr, i, true);

		if (head == want && tail == want)
			continue;
		if (!wrong++)
			fprintf(stderr, "# pid %d: page %zu holds %016llx %016llx, not %016llx\n",
				getpid(), first + i, (unsigned long long)head,
				(unsigned long long)tail,
				(unsigned long long)want);
	}
	return wrong;
}

long af_check_zero(const void *addr, size_t pages)
{
	return af_check_at(addr, 0, pages, AF_ZEROES);
}

/* Maps a region of base pages that nobody has touched yet. */
int af_region_reserve(struct af_region *r, size_t pieces, uint64_t seed)
{
	uintptr_t start;

	memset(r, 0, sizeof(*r));
	r->reserve_len = (pieces + 4) * AF_PIECE;
	r->reserve = mmap(NULL, r->reserve_len, PROT_NONE,
			  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (r->reserve == MAP_FAILED)
		return -1;
	start = ((uintptr_t)r->reserve + 2 * AF_PIECE - 1) & ~(AF_PIECE - 1);
	r->pieces = pieces;
	r->pages = AF_HEAD + pieces * AF_PIECE_PAGES + AF_TAIL;
	r->seed = seed;
	r->base = mmap((char *)start - AF_HEAD * AF_PAGE, r->pages * AF_PAGE,
		       PROT_READ | PROT_WRITE,
		       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
	if (r->base == MAP_FAILED)
		return -1;
	return madvise(r->base, r->pages * AF_PAGE, MADV_NOHUGEPAGE);
}

/* The number after @field in the part of smaps that @addr lies in, or -1. */
long af_smaps_kb(const void *addr, const char *field)
{
	unsigned long from, to, value;
	bool inside = false;
	char line[512];
	long kb = -1;
	FILE *f = fopen("/proc/self/smaps", "r");

	if (!f)
		return -1;
	while (kb < 0 && fgets(line, sizeof(line), f)) {
		if (sscanf(line, "%lx-%lx %*s", &from, &to) == 2)
			inside = (uintptr_t)addr >= from && (uintptr_t)addr < to;
		else if (inside && !strncmp(line, field, strlen(field)) &&
			 sscanf(line + strlen(field), ": %lu", &value) == 1)
			kb = value;
	}
	fclose(f);
	return kb;
}

/* Is there a second memory node (scripts/vm --numa)? */
bool af_two_nodes(void)
{
	return !access("/sys/devices/system/node/node1", F_OK);
}

/* The path of the first swap device, or NULL. */
const char *af_swap_device(void)
{
	static char text[4096];
	char *newline;

	if (af_read_file("/proc/swaps", text, sizeof(text)))
		return NULL;
	newline = strchr(text, '\n');
	if (!newline || !newline[1])
		return NULL;
	newline[1 + strcspn(newline + 1, " \t")] = '\0';
	return newline + 1;
}

bool af_have_swap(void)
{
	return af_swap_device();
}

/*
 * Fills piece @piece with one huge page. Nothing else may be made of huge pages
 * meanwhile: khugepaged is quick.
 */
static int populate_huge(struct af_region *r, size_t piece)
{
	char *p = af_page(r, af_piece(piece));

	if (madvise(p, AF_PIECE, MADV_HUGEPAGE))
		return -1;
	af_fill(r, af_piece(piece), AF_PIECE_PAGES, r->seed);
	return madvise(p, AF_PIECE, MADV_NOHUGEPAGE);
}

/*
 * Before the advice splits the VMA: with an anon_vma, which the parts then share
 * and without which they would not merge again.
 */
static void make_anon_vma(struct af_region *r)
{
	*(volatile char *)r->base = 1;
}

/* Makes one VMA of the region again. */
static int have_huge_pages(struct af_region *r)
{
	if (madvise(r->base, r->pages * AF_PAGE, MADV_NOHUGEPAGE))
		return -1;
	if (af_smaps_kb(af_page(r, af_piece(0)), "AnonHugePages") > 0)
		return 0;
	skip_reason = "no huge page could be had";
	return AF_SKIPPED;
}

/* Fills the even pieces with huge pages and all else with base pages. */
static int populate_mixed(struct af_region *r)
{
	size_t i;

	make_anon_vma(r);
	for (i = 0; i < r->pieces; i += 2)
		if (populate_huge(r, i))
			return -1;
	af_fill(r, 0, r->pages, r->seed);
	return have_huge_pages(r);
}

/*
 * Fills the pieces with huge pages and then has each mapped by a page table:
 * a change of the rights of one page splits the mapping, not the folio.
 */
static int populate_pte_thp(struct af_region *r)
{
	size_t i;
	int ret;

	make_anon_vma(r);
	for (i = 0; i < r->pieces; i++)
		if (populate_huge(r, i))
			return -1;
	af_fill(r, 0, r->pages, r->seed);
	ret = have_huge_pages(r);
	for (i = 0; !ret && i < r->pieces; i++) {
		char *p = af_page(r, af_piece(i) + 7);

		if (mprotect(p, AF_PAGE, PROT_READ) ||
		    mprotect(p, AF_PAGE, PROT_READ | PROT_WRITE))
			return -1;
	}
	return ret;
}

int af_region_pageout(struct af_region *r)
{
	if (!af_have_swap()) {
		skip_reason = "no swap device (scripts/vm --swap)";
		return AF_SKIPPED;
	}
	if (madvise(r->base, r->pages * AF_PAGE, MADV_PAGEOUT))
		return -1;
	if (af_smaps_kb(r->base, "Swap") * 1024UL >= r->pages * AF_PAGE / 2)
		return 0;
	fprintf(stderr, "# MADV_PAGEOUT swapped out %ld KiB only\n",
		af_smaps_kb(r->base, "Swap"));
	return -1;
}

/* The first page of each piece holds the pattern, the others the zero page. */
static int populate_zero(struct af_region *r)
{
	r->seed |= AF_SPARSE;
	af_fill(r, 0, r->pages, r->seed);
	return af_check_all(r) ? -1 : 0;
}

int af_region_populate(struct af_region *r, enum af_kind kind)
{
	r->kind = kind;
	switch (kind) {
	case AF_MIXED:
		return populate_mixed(r);
	case AF_PTE_THP:
		return populate_pte_thp(r);
	case AF_ZERO:
		return populate_zero(r);
	case AF_BASE:
		af_fill(r, 0, r->pages, r->seed);
		return 0;
	case AF_SWAPPED:
		af_fill(r, 0, r->pages, r->seed);
		return af_region_pageout(r);
	}
	return -1;
}

int af_region_make(struct af_region *r, size_t pieces, enum af_kind kind,
		   uint64_t seed)
{
	int ret = af_region_reserve(r, pieces, seed);

	return ret ? ret : af_region_populate(r, kind);
}

void af_region_free(struct af_region *r)
{
	munmap(r->reserve, r->reserve_len);
}

void *af_shared(size_t size)
{
	void *p = mmap(NULL, size, PROT_READ | PROT_WRITE,
		       MAP_SHARED | MAP_ANONYMOUS, -1, 0);

	if (p == MAP_FAILED) {
		perror("# mmap of shared memory");
		exit(1);
	}
	return p;
}

/* Pages that MADV_FREE gave up hold the pattern or zeroes. */
long af_check_lazy(const void *addr, size_t first, size_t pages, uint64_t seed)
{
	long wrong = 0;
	size_t i;

	for (i = 0; i < pages; i++) {
		const char *page = (const char *)addr + i * AF_PAGE;
		uint64_t v = *(const volatile uint64_t *)page;

		wrong += v && v != af_value(seed, first + i);
	}
	return wrong;
}
