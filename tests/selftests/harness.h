/* SPDX-License-Identifier: GPL-2.0 */
/* The kernel's test harness, and the few macros that tie af.h to it. */
#ifndef AF_HARNESS_H
#define AF_HARNESS_H

#include <kselftest_harness.h>
#include "af.h"

/* Guests run under emulation, and the debug kernel is slow. */
#undef TEST_TIMEOUT_DEFAULT
#define TEST_TIMEOUT_DEFAULT 400

/* In a fixture's setup, before AF_SETUP(): a skip there runs no teardown. */
#define AF_REGION(region, pieces, kind, seed) do {			\
	int __made = af_region_make((region), (pieces), (kind), (seed));\
	if (__made == AF_SKIPPED)					\
		SKIP(return, "%s", af_skip_reason());			\
	ASSERT_EQ(0, __made);						\
} while (0)

#define AF_SETUP(hold)	ASSERT_EQ(0, af_setup(&self->af, (hold)))
#define AF_FINISH()	EXPECT_EQ(0, af_finish(&self->af))
#define AF_SPAWN(c)	ASSERT_EQ(0, af_spawn(&self->af, (c)))
#define AF_EXIT_OK(c)	EXPECT_EQ(0, af_end(c))

/* A fixture that has one region and holds the workers. */
#define AF_PLAIN_FIXTURE(name, pieces)					\
	FIXTURE(name) {							\
		struct af af;						\
		struct af_region r;					\
	};								\
	FIXTURE_SETUP(name)						\
	{								\
		AF_REGION(&self->r, (pieces), AF_BASE, 0x51d);		\
		AF_SETUP(AF_HOLD);					\
	}								\
	FIXTURE_TEARDOWN(name)						\
	{								\
		AF_FINISH();						\
	}

#endif
