#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0
"""House rules for the module's Rust sources; called by scripts/lint with the files to check."""

import re
import sys
from pathlib import Path

UNSAFE_HOMES = {"mm.rs", "mm_hooks.rs", "pgtable_copy.rs"}
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60
PANICS = re.compile(r"\.unwrap\(\)|\.expect\(|\b(panic|todo|unimplemented|unreachable)!")
TOKENS = re.compile(
    r'//[^\n]*|/\*.*?\*/|b?r(#*)".*?"\1|b?"(?:\\.|[^"\\])*"|b?\'(?:\\[^\']+|[^\'\\\n])\'', re.S
)


def blank(text):
    """The same text with comments and literals blanked out; lines stay where they are."""
    return TOKENS.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), text)


def comment_above(lines, code, at):
    """The comment right above the statement that line `at` belongs to; attributes may stand between."""
    row = at - 1
    while row >= 0:
        here, bare = lines[row].strip(), code[row].strip()
        if here.startswith("//"):
            break
        continued = bare and not bare.endswith((";", "{", "}", ","))
        if not bare.startswith("#") and not continued:
            return ""
        row -= 1
    block = []
    while row >= 0 and lines[row].strip().startswith("//"):
        block.append(lines[row].strip())
        row -= 1
    return "\n".join(block)


def function_length(code, start):
    """Lines from the `fn` on line `start` to its closing brace; 0 for a declaration without a body."""
    depth = 0
    for row in range(start, len(code)):
        for char in code[row]:
            if char == ";" and depth == 0:
                return 0
            depth += (char == "{") - (char == "}")
            if char == "}" and depth == 0:
                return row - start + 1
    return 0


def in_trait_impl(code, row):
    """Whether the function on this line implements a trait, whose documentation holds the contract."""
    indent = len(code[row]) - len(code[row].lstrip())
    for line in reversed(code[:row]):
        header = re.match(r"( *)(pub(\(.*?\))? )?(unsafe )?(impl|trait|mod)\b(.*)", line)
        if header and len(header.group(1)) < indent:
            return header.group(5) == "impl" and bool(re.search(r"\bfor\b", header.group(6)))
    return False


def check(path):
    text = path.read_text()
    lines, code = text.split("\n"), blank(text).split("\n")
    found = []

    def report(row, message):
        found.append(f"{path.name}:{row + 1}: {message}")

    if len(lines) - 1 > MAX_FILE_LINES:
        report(0, f"{len(lines) - 1} lines, at most {MAX_FILE_LINES} are allowed")
    home = path.name in UNSAFE_HOMES
    # module!() expands to unsafe code, so the crate's root cannot deny it.
    crate_root = any(re.match(r"\s*module!\s*\{", line) for line in code)
    if not home and not crate_root and not re.search(r"#!\[(deny|forbid)\(unsafe_code\)\]", text):
        report(0, "lacks #![deny(unsafe_code)]")
    for row, line in enumerate(code):
        if PANICS.search(line):
            report(row, "may panic: " + lines[row].strip())
        if re.search(r"\bfn\s+\w+", line):
            length = function_length(code, row)
            if length > MAX_FUNCTION_LINES:
                report(row, f"function of {length} lines, at most {MAX_FUNCTION_LINES} are allowed")
        if not re.search(r"\bunsafe\b", line):
            continue
        if not home:
            report(row, f"unsafe outside of {', '.join(sorted(UNSAFE_HOMES))}")
        if re.search(r"\bunsafe\s+(extern\s+)?(fn\s+\w+|trait\b)", line):
            if "# Safety" not in comment_above(lines, code, row) and not in_trait_impl(code, row):
                report(row, "unsafe fn or trait without '# Safety' in its documentation")
        elif re.search(r"\bunsafe\s*(\{|impl\b|$)", line):
            if "SAFETY:" not in comment_above(lines, code, row):
                report(row, "unsafe without a '// SAFETY:' comment right above")
    return found


def main():
    found = [message for name in sys.argv[1:] for message in check(Path(name))]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
