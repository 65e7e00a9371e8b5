"""Reads what sanitizers reported: sanitizer_reports.py DIRECTORY MODULE.

Prints each error, and each leak whose memory was taken in the shared library MODULE (a part of its name); exits with 1
if there was one. Leaks elsewhere - Python and torch keep what they have until the process ends - are counted.
"""

import pathlib
import re
import sys

# The allocator, what calls it, and the library's own functions up to where Python called them.
NEAREST_FRAMES = 8
FRAME = re.compile(r"^\s+#\d+ .*$", re.M)


def leaks(report):
    """The paragraphs of a report that each tell of one leak."""
    return [part for part in report.split("\n\n") if re.match(r"\s*(Direct|Indirect) leak of", part)]


def is_taken_in(module, leak):
    return any(module in frame for frame in FRAME.findall(leak)[:NEAREST_FRAMES])


def main(directory, module):
    reports = {path: path.read_text(errors="replace") for path in sorted(pathlib.Path(directory).iterdir())}
    errors = [text for text in reports.values() if "ERROR: AddressSanitizer" in text or "runtime error:" in text]
    found = [leak for text in reports.values() for leak in leaks(text)]
    ours = [leak for leak in found if is_taken_in(module, leak)]
    for text in [*errors, *ours]:
        print(text[:20_000], "\n")
    print(f"sanitizers: {len(errors)} errors, {len(ours)} leaks in {module}, {len(found) - len(ours)} elsewhere")
    return int(bool(errors or ours))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
