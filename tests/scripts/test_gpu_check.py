"""scripts/gpu_check.sh where there is no GPU: what it would run, that no step costs the others, what it writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

script = pytest.importorskip("gpu_check")

JUNIT = """<?xml version="1.0"?>
<testsuites><testsuite tests="4" failures="1" errors="1" skipped="1">
<testcase classname="tests.gpu.test_scale" name="test_a"/>
<testcase classname="tests.gpu.test_scale" name="test_b[fp32]"><failure message="x"/></testcase>
<testcase classname="tests.gpu.test_scale" name="test_c"><error message="x"/></testcase>
<testcase classname="tests.gpu.test_scale" name="test_d"><skipped/></testcase>
</testsuite></testsuites>
"""
MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at topk_kernel+0x90
========= ERROR SUMMARY: 1 error
"""


def step(name: str, part: str, code: str, seconds: int = 5, **settings: str) -> object:
    return script.Step(name, part, seconds, seconds, (sys.executable, "-c", code), **settings)


def test_all_parts_end_in_nine_minutes() -> None:
    assert sum(seconds + script.KILL_AFTER for _, seconds in script.plan(None)) <= script.TOTAL + 60
    assert sum(seconds for _, seconds in script.plan(None)) < script.TOTAL
    for part in script.PARTS:
        first, *others = script.plan(part)
        assert first[0].name == "build"
        assert {s.part for s, _ in others} == {part}
        assert all(seconds >= (s.limit or 0) for s, seconds in others)


def test_dry_run_shows_the_commands() -> None:
    root = Path(script.ROOT)
    shell = [str(root / "scripts" / "gpu_check.sh"), "--dry-run"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(shell, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("build ")
    assert "setup.py -q build_ext --inplace" in lines[0]
    assert any("--tool=racecheck" in line for line in lines)
    assert any("benchmarks floors" in line for line in lines)


def test_files_that_are_named_are_there() -> None:
    for s in script.steps():
        for word in s.command:
            if word.startswith("tests/") or word == "setup.py":
                assert (script.ROOT / word).exists(), word


def test_steps_are_run_and_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """One fails, one hangs, one needs what is not here; a test file, a sanitizer's log and figures are read."""

    def steps() -> list[object]:
        writes = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"
        return [
            step("build", "build", f"import os; assert os.environ['PYTHONPATH'].startswith({str(script.ROOT)!r})"),
            step(
                "hangs", "tests", "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)", 1
            ),
            script.Step("tests", "tests", 5, 5, (sys.executable, "-c", writes, "{out}/t.xml", JUNIT), "t.xml"),
            script.Step("memcheck", "sanitize", 5, 5, (sys.executable, "-c", writes, "{out}/m.log", MEMCHECK), "m.log"),
            script.Step(
                "figures", "bench", 5, 5, (sys.executable, "-c", writes, "{out}/clip.json", '{"op": 1}'), "*.json"
            ),
            step("fails", "bench", "raise SystemExit('no')"),
            step("needs", "sanitize", "", needs="a-program-that-is-not-there"),
        ]

    monkeypatch.setattr(script, "KILL_AFTER", 1)
    monkeypatch.setattr(script, "steps", steps)
    assert script.main(["--output", str(tmp_path)]) == 1
    (file,) = tmp_path.glob("*-gpu-check.json")
    found = json.loads(file.read_text())
    status = {o["name"]: o["status"] for o in found["outcomes"]}
    assert status["build"] == "ok", found["outcomes"][0]
    assert (status["hangs"], status["tests"], status["fails"], status["needs"]) == (
        *("timed out", "ok", "failed", "skipped"),
    )
    assert found["tests"]["tests"]["failures"] == ["test_scale::test_b[fp32]", "test_scale::test_c"]
    assert found["sanitizer"]["memcheck"] == {
        "summary": "1 error",
        "findings": ["Invalid __global__ write of size 4 bytes"],
    }
    assert found["benchmarks"] == [{"op": 1}]
    assert {"python", "torch", "triton"} <= set(found["versions"])
    assert found["commit"]
    assert all(place not in file.read_text() for place in (str(script.ROOT), sys.executable, sys.prefix))
    assert found["outcomes"][5]["command"].endswith("python -c raise SystemExit('no')")
    out = capfd.readouterr().out
    assert "1 passed, 2 failed, 1 skipped" in out
    assert out.splitlines()[-2] == "FAILED"


def test_nothing_is_tested_on_what_was_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        script, "steps", lambda: [step("build", "build", "raise SystemExit(1)"), step("t", "tests", "")]
    )
    report = script.check("tests", tmp_path)
    assert [outcome.name for outcome in report.outcomes] == ["build"]
    assert not report.passed


def test_a_gpu_that_the_sanitizer_does_not_know_is_no_failure(tmp_path: Path) -> None:
    (tmp_path / "m.log").write_text("========= Error: Device not supported\n")
    report = script.Report("2026", "unknown", {}, {}, [])
    outcome = script.Outcome("memcheck", "sanitize", "failed", 1.0)
    script.collect(
        step("memcheck", "sanitize", "", results="m.log", needs="compute-sanitizer"), outcome, tmp_path, report
    )
    assert (outcome.status, report.sanitizer["memcheck"]["summary"]) == ("skipped", "no summary")


def test_kernels_are_found_in_a_checkout_that_is_not_installed() -> None:
    import fastret.kernels

    assert str(script.ROOT / "kernels") in fastret.kernels.__path__


def test_commit_is_unknown_outside_of_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "ROOT", tmp_path)
    assert script.commit() == "unknown"
