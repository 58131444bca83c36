#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""Compares the output of tests/peers/run by mode; scripts/peers calls it.

  report.py again OUTPUT...       names of the tests that differ so far
  report.py unfinished OUTPUT...  "MODE NAME" of the test that the guest died in
  report.py table LIST SUITES ABSENT OUTPUT...

Each OUTPUT is one boot's. A test that ran more than once in a mode has several
rounds. A difference counts as one if no plain round had what an async round
had; whatever else differs is flaky, and its row says "repeated". The table ends
with "N passed, N failed". ABSENT holds "NAME REASON" lines of tests that were
not built.
"""

import collections
import re
import sys

Result = collections.namedtuple("Result", "status code sessions seconds subtests")

# What ends a line that tells a subtest's result, in the suites that print no
# TAP: Redis, userfaultfd, khugepaged.
WORDS = {"ok": "ok", "done": "ok", "pass": "ok", "fail": "fail", "failed": "fail",
         "skip": "skip", "skipped": "skip"}
TAP = re.compile(r"^(ok|not ok)\s+\d+\s*-?\s*(.*)$")
REDIS = re.compile(r"^\[(ok|err|skip|ignore|exception|timeout)\]:\s*(.*)$")
DOTS = re.compile(r"^(.*?)\.{3,}\s*(ok|done|pass|fail|failed|skip|skipped)\b", re.I)
STRESS = re.compile(r"^stress-ng: (fail|error):\s+\[\d+\]\s*(.*)$")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def plain_name(name):
    """What of a subtest's name is the same in every run."""
    name = re.sub(r"0x[0-9a-f]+", "N", name)
    name = re.sub(r"\d+ \(\d+\.\d+%\).*", "N", name)
    return re.sub(r"\d{4,}", "N", name).strip()


def subtest(line, group):
    """(name, result) if the line tells one, else None."""
    if match := TAP.match(line):
        name, _, directive = match[2].partition("#")
        word = directive.strip().upper()
        if word.startswith("SKIP"):
            return name, "skip"
        if word.startswith("XFAIL"):
            return name, "xfail"
        return name, "ok" if match[1] == "ok" else "fail"
    if match := REDIS.match(line):
        name = re.sub(r" \(\d+ ms\)$", "", match[2])
        name = re.sub(r" in tests/\S+$", "", name)
        # psync2 draws at random which server replicates from which, and goes
        # through as many cycles as it has time for.
        name = re.sub(r"(#|\(x = |CYCLE )\d+\b", r"\1N", name)
        result = {"ok": "ok", "skip": "skip", "ignore": "skip"}.get(match[1], "fail")
        return name, result
    if match := DOTS.match(line):
        return group + match[1], WORDS[match[2].lower()]
    if match := STRESS.match(line):
        return match[2], "fail"
    return None


def read_tests(paths):
    """{name: {mode: [Result of each round]}}, and the test that did not end."""
    tests = collections.defaultdict(lambda: {"plain": [], "async": []})
    unfinished = None
    for path in paths:
        open_test, unfinished = None, None
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                line = COLOUR.sub("", line.rstrip("\r\n"))
                if line.startswith("#:begin "):
                    *open_test, flags = line.split()[1:]
                    group, subtests = "", collections.defaultdict(list)
                    continue
                if open_test is None:
                    continue
                if line.startswith("#:end "):
                    mode, name, status, *numbers = line.split()[1:]
                    if "loop" in flags.split(","):
                        subtests = {k: set(each) for k, each in subtests.items()}
                    tests[name][mode].append(
                        Result(status, *map(int, numbers), subtests))
                    open_test = None
                    continue
                if line.startswith("Run test: "):
                    group = line[10:] + ": "
                    continue
                if found := subtest(line.removeprefix("# "), group):
                    subtests[plain_name(found[0])].append(found[1])
        if open_test:
            mode, name = open_test
            tests[name][mode].append(Result("died", -1, 0, 0, subtests))
            unfinished = open_test
    return tests, unfinished


def facts(result):
    """Everything about a run that must be the same: {what: how it ended}."""
    found = {name: " ".join(sorted(each)) for name, each in result.subtests.items()}
    found["exit"] = result.status if result.status != "fail" else f"fail {result.code}"
    return found


def ends(what, results):
    """How it ended in each; one that ran out of time says nothing of the rest."""
    return {facts(r).get(what, "absent") for r in results
            if what in facts(r) or r.status != "timeout"}


def differences(rounds):
    """(consistent, any): [(what, plain, async)] that differ always, and ever."""
    plain, other = rounds["plain"], rounds["async"]
    always, ever = [], []
    if not plain or not other:
        return always, ever
    for what in sorted(set().union(*map(facts, plain + other))):
        p, a = ends(what, plain), ends(what, other)
        if not p or not a:
            continue
        line = (what, "|".join(sorted(p)), "|".join(sorted(a)))
        if not p & a:
            always.append(line)
        if len(p | a) > 1:
            ever.append(line)
    return always, ever


def show(result):
    """One cell of the table."""
    counts = collections.Counter(
        end for each in result.subtests.values() for end in each)
    cell = result.status
    if result.status == "fail":
        cell += f" {result.code}"
    if counts:
        cell += " (" + ", ".join(f"{counts[k]} {k}" for k in
                                 ("ok", "fail", "xfail", "skip") if counts[k]) + ")"
    return cell


def read_list(path):
    """([name], {name: why left out}, {name: why it fails}, {name: [(pattern, why)]})."""
    names, out, fails, known = [], {}, {}, collections.defaultdict(list)
    with open(path, encoding="utf-8") as file:
        for line in file:
            words = line.split()
            if not words or line.startswith("#"):
                continue
            if words[0] == "!out":
                out[words[1]] = " ".join(words[2:])
            elif words[0] == "!fails":
                fails[words[1]] = " ".join(words[2:])
            elif words[0] == "!known":
                known[words[1]].append((words[2], " ".join(words[3:])))
            else:
                names.append(words[0])
    return names, out, fails, known


def explain(always, known):
    """Splits what differs in (unknown, {reasons of the known})."""
    unknown, reasons = [], []
    for line in always:
        for pattern, reason in known:
            if re.search(pattern, line[0]):
                reasons.append(reason)
                break
        else:
            unknown.append(line)
    return unknown, sorted(set(reasons))


def judge(rounds, known):
    """(verdict, lines below the row, does it count as failed)."""
    if not rounds["plain"] or not rounds["async"]:
        return "NOT RUN", [], True
    always, ever = differences(rounds)
    unknown, reasons = explain(always, known)
    detail = [f"{w}: plain {p}, async {a}" for w, p, a in unknown or ever]
    if any(r.sessions for r in rounds["plain"]):
        return "NOT PLAIN", ["sessions began although async fork was off"], True
    if any(r.status == "died" for m in rounds.values() for r in m):
        return "GUEST DIED", detail, True
    if any(all(r.status == "timeout" for r in m) for m in rounds.values()):
        return "NO END", detail, True
    if unknown:
        return f"DIFFERS in {len(rounds['plain'])} of {len(rounds['plain'])}", detail, True
    if reasons:
        return "known: " + "; ".join(reasons), detail, False
    if ever:
        return f"repeated, the same in {len(rounds['plain'])} rounds", detail, False
    return "same", [], False


def table(list_path, suites, absent_path, outputs):
    """Prints the table and the totals; true if nothing failed."""
    names, out, fails, known = read_list(list_path)
    with open(absent_path, encoding="utf-8") as file:
        absent = dict(line.rstrip("\n").split(" ", 1) for line in file)
    tests, _ = read_tests(outputs)
    passed = failed = 0
    totals = collections.Counter()
    print(f"{'test':44} {'plain':28} {'async':28} sessions  result")
    for suite in suites:
        sessions = ran = seconds = 0
        for name in [n for n in names if n.startswith(suite + "/")]:
            if name in absent:
                print(f"{name:44} {absent[name]}")
                totals["not built"] += 1
                continue
            if name not in tests:
                continue
            rounds = tests[name]
            verdict, detail, bad = judge(rounds, known[name])
            cells = [show(rounds[m][0]) if rounds[m] else "-" for m in ("plain", "async")]
            began = sum(r.sessions for r in rounds["async"])
            sessions += began
            seconds += sum(r.seconds for m in rounds.values() for r in m)
            ran += 1
            print(f"{name:44} {cells[0]:28} {cells[1]:28} {began:8}  {verdict}")
            if all(r.status == "fail" for r in rounds["plain"] + rounds["async"]):
                print(f"    fails either way: {fails.get(name, 'no reason is listed')}")
                totals["fail either way"] += 1
            for line in detail[:20]:
                print(f"    {line}")
            failed += bad
            passed += not bad
            totals[verdict.split()[0].rstrip(":,")] += 1
            totals["with sessions"] += began > 0
        for name in [n for n in out if n.startswith(suite + "/")]:
            print(f"{name:44} left out: {out[name]}")
            totals["left out"] += 1
        if ran:
            print(f"{suite}: {ran} tests, {sessions} sessions, {seconds / 60:.0f} min")
        if ran and not sessions:
            print(f"FAILED {suite}: no async fork happened, so this proves nothing")
            failed += 1
    print(", ".join(f"{n} {what}" for what, n in sorted(totals.items())))
    print(f"{passed} passed, {failed} failed")
    return failed == 0


def main():
    """See the head of this file."""
    what, args = sys.argv[1], sys.argv[2:]
    if what == "table":
        sys.exit(not table(args[0], args[1].split(), args[2], args[3:]))
    tests, unfinished = read_tests(args)
    if what == "unfinished":
        if unfinished:
            print(*unfinished)
        return
    for name, rounds in tests.items():
        if differences(rounds)[0]:
            print(name)


if __name__ == "__main__":
    main()
