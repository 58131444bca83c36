# SPDX-License-Identifier: GPL-2.0
# Sums up what tests/selftests/run printed: one line a program, the lines that
# belong to each failed test, and the skips by reason. Writes
# "passed failed skipped" to the file named by the variable totals.
# Variables: kernel, totals.

function fail(name) {
	failed++
	failures = failures sprintf("FAILED %s %s %s: %s\n%s", kernel, mode, program, name, notes)
	notes = ""
}

function finish(status) {
	if (plan < 0)
		fail("printed no test plan, ended with status " status)
	else if (seen != plan)
		fail("only " seen " of " plan " tests ran, ended with status " status)
	printf "%-8s %-6s %-14s %3d passed, %d failed, %d skipped\n",
		kernel, mode, program, passed, failed, skipped
	all_passed += passed
	all_failed += failed
	all_skipped += skipped
	program = ""
}

$1 == "#:begin" {
	if (program != "")
		finish("unknown")
	mode = $2
	program = $3
	passed = failed = skipped = seen = 0
	plan = -1
	notes = ""
	next
}
$1 == "#:end" { finish($2); next }
/^1\.\.[0-9]+/ { plan = substr($0, 4) + 0; next }
/^# +RUN / { notes = ""; next }
/^not ok / { seen++; fail($4); next }
/^ok / {
	seen++
	if ($0 ~ /# SKIP/) {
		skipped++
		reason = $0
		sub(/.*# SKIP */, "", reason)
		skips[reason]++
	} else {
		passed++
	}
	next
}
/^# (Totals|FAILED|PASSED|Starting)/ || /^TAP version/ { next }
program != "" { notes = notes "    " $0 "\n" }

END {
	if (program != "")
		finish("unknown, the guest ended")
	printf "%s", failures
	for (reason in skips)
		printf "%-8s skipped %d: %s\n", kernel, skips[reason], reason
	print all_passed + 0, all_failed + 0, all_skipped + 0 >totals
}
