"""Reading compiled programs."""

import math
import re

COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def collectives_in_loops(program: str) -> list[str]:
    """Return the lines with a collective that some while loop's body leads to."""
    parts, name = {}, None
    for line in program.splitlines():
        if opened := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = opened[1]
        parts.setdefault(name, []).append(line)
    calls = r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    waiting = re.findall(r"(?:body|condition)=%?([\w.\-]+)", program)
    assert waiting, "the program has no while loop"
    seen, found = set(), []
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        for line in parts[name]:
            found += [line] if any(f" {word}" in line for word in COLLECTIVES) else []
            waiting += re.findall(calls, line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                waiting += [branch.strip().lstrip("%") for branch in group.split(",")]
    return found


def largest_collective(program: str) -> int:
    """Return the number of elements of the largest array that a collective returns."""
    result = re.compile(rf" = (.*?) (?:{'|'.join(COLLECTIVES)})(?:-start)?\(")
    shapes = [
        tuple(map(int, filter(None, dimensions.split(","))))
        for returned in result.findall(program)
        for dimensions in re.findall(r"\w\[([\d,]*)\]", returned)
    ]
    assert shapes, "the program has no collective"
    return max(map(math.prod, shapes))
