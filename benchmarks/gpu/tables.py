"""The table of what instructions.py has counted."""

from typing import Any

from benchmarks.markdown_table import table

TYPES = ("bfloat16", "float32")


def instructions_table(before: Any, now: Any) -> str:
    """Return a row for each kernel, size and type, with an earlier count beside."""
    earlier = {_key(row): row for row in before["rows"]}
    rows = []
    for row in now["rows"]:
        if row["op"] == "dynamic_fake_quant":  # the launch of fake_quant, after absmax
            continue
        op, size, dtype = _key(row)
        cells = [_counts(earlier[_key(row)]), _counts(row)]
        cells.append(f"{row['budget']:.1f}" if row["budget"] else "")
        cells += [str(row["registers"]), str(row["spills"]), f"{row['occupancy']:.0%}"]
        rows.append((op, f"{size}, {dtype}", *cells))
    heads = ("kernel", "size", "before", "now", "budget", "registers", "spills", "occupancy")
    return table(heads, rows)


def _key(row: Any) -> tuple[str, str, str]:
    return row["op"], row["size"], row["dtype"]


def _counts(row: Any) -> str:
    """Return the count of the loop, if there is one, and of a whole program."""
    loop = f"{row['loop']:.1f}, " if row["loop"] else ""
    return f"{loop}{row['whole']:.1f}"


def cpu_instructions_table(counted: Any) -> str:
    """Return a row for each C++ kernel, of what valgrind has counted."""
    found = {_key(row): row["instructions"] for row in counted["rows"]}
    cells = [(size, dtype) for size in counted["sizes"] for dtype in TYPES]
    rows = []
    for op in dict.fromkeys(row["op"] for row in counted["rows"]):
        rows.append((op, *(f"{found[op, size, dtype]:.1f}" for size, dtype in cells)))
    return table(("kernel", *(f"{size}, {dtype}" for size, dtype in cells)), rows)
