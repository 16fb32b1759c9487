"""The table of the compile gate is that of the kernels as they are, and shows no spill."""

import csv

import gate

ARCHITECTURES = {"sm_80", "sm_90", "sm_100", "gfx942"}


def test_the_table_is_of_these_sources() -> None:
    first = gate.TABLE.read_text().partition("\n")[0]
    assert first == f"# sources {gate.sources()}", "kernels or their list have changed: run make gate"


def test_nothing_spills() -> None:
    lines = gate.TABLE.read_text().splitlines()
    rows = list(csv.DictReader(lines[1:]))
    assert {(row["architecture"], row["dtype"]) for row in rows} == {(a, d) for a in ARCHITECTURES for d in gate.DTYPES}
    spilled = [name for name in rows[0] if name.startswith("spilled")]
    pinned = [line for line in (gate.ROOT / "constraints.txt").read_text().splitlines() if line.startswith("triton==")]
    assert {"spilled 3.6.0", *(line.replace("triton==", "spilled ") for line in pinned)} == set(spilled)
    for row in rows:
        assert all(int(row[name]) == 0 for name in spilled), row
        assert all(int(row[name]) > 0 for name in row if name.startswith("registers")), row
