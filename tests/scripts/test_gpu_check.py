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


@pytest.fixture(autouse=True)
def keeps_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "remove_extension", lambda: None)


def step(name: str, part: str, code: str, seconds: int = 5, **settings: str) -> object:
    return script.Step(name, part, seconds, seconds, (sys.executable, "-c", code), **settings)


@pytest.mark.parametrize("part", [None, *script.PARTS])
def test_all_steps_end_in_nine_minutes(part: str | None) -> None:
    steps = script.plan(part)
    assert sum(seconds + script.KILL_AFTER for _, seconds in steps) < script.TOTAL
    (first, _), *others = steps
    assert first.name == "build"
    assert {s.part for s, _ in others} == ({part} if part else set(script.PARTS))
    assert all(seconds >= (s.limit or 0) for s, seconds in others)


def test_values_come_first_and_every_test_is_in_a_step() -> None:
    alone = [s.name for s, _ in script.plan("tests")]
    assert alone[1:3] == ["tests: values", "tests: other dtypes"]
    together = [s.name for s, _ in script.plan(None) if s.part == "tests"]
    assert together == ["tests: values", "tests: graphs, waits, streams", "tests: large sizes"]


def test_dry_run_shows_the_commands() -> None:
    root = Path(script.ROOT)
    shell = [str(root / "scripts" / "gpu_check.sh"), "--dry-run"]
    environment = {**os.environ, "PYTHON": sys.executable}
    done = subprocess.run(shell, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0].startswith("build ")
    assert " 70 s " in lines[0]
    assert "setup.py -q build_ext --inplace" in lines[0]
    assert any("--tool=racecheck" in line for line in lines)
    assert any("benchmarks floors" in line for line in lines)


def test_files_that_are_named_are_there() -> None:
    for s in script.steps():
        for word in s.command:
            if word.startswith("tests/") or word == "setup.py":
                assert (script.ROOT / word).exists(), word


def test_every_op_in_cuda_is_sanitized() -> None:
    """It has an entry of its own in the table of the GPU tests, which the steps select."""
    ops = {f.stem for f in (script.ROOT / "fastret/backends/cuda").glob("*.py")} - {"__init__", "launch"}
    table = (script.ROOT / "tests/gpu/gpu_cases.py").read_text()
    assert "topk" in ops
    for op in ops:
        assert f'    "{op}": Case(' in table, op
        assert any(word in op for word in script.SANITIZED.split(" or ")), op


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

    monkeypatch.setattr(script, "KILL_AFTER", 0.3)
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


def test_a_failing_build_is_tried_without_cuda_and_the_rest_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broken compiler must not cost Triton's kernels their time on a GPU."""
    builds = "import os; raise SystemExit(os.environ.get('FASTRET_CUDA') != '0')"
    monkeypatch.delenv("FASTRET_CUDA", raising=False)
    monkeypatch.setattr(script, "steps", lambda: [step("build", "build", builds), step("t", "tests", "")])
    report = script.check("tests", tmp_path)
    assert [(outcome.name, outcome.status) for outcome in report.outcomes] == [
        ("build", "failed"),
        ("build without CUDA C++", "ok"),
        ("t", "ok"),
    ]
    assert not report.passed


def test_time_that_is_left_over_is_the_next_steps() -> None:
    first, second = (script.Step(name, "tests", 40, 90, ()) for name in ("a", "b"))
    planned = [(first, 40), (second, 40)]
    kill = script.KILL_AFTER
    assert script.room(0, planned, 80 + 2 * kill) == 40
    assert script.room(0, planned, 100 + 2 * kill) == 60
    assert script.room(0, planned, 500) == 90
    assert script.room(1, planned, 70) == 65  # an earlier one was quick
    assert script.room(0, planned, 60) == 40  # an earlier one was slow: the last has less
    assert script.room(1, planned, 20) == 15


def test_what_was_not_reached_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that the round of all leaves out, those that time ran out for, and what is left when it is interrupted."""
    stops = "import os, signal, time; os.kill(os.getppid(), signal.SIGINT); time.sleep(60)"

    def steps() -> list[object]:
        return [
            step("build", "build", ""),
            script.Step("rare", "tests", None, 5, ()),
            step("long", "tests", "import time; time.sleep(60)", 1),
            step("stopped", "bench", stops, 9),
            step("last", "sanitize", ""),
        ]

    monkeypatch.setattr(script, "steps", steps)
    report = script.check(None, tmp_path)
    assert [o.status for o in report.outcomes] == ["ok", "timed out", "interrupted"]
    assert report.not_reached == ["rare (only with --part tests)", "long (timed out)", "stopped (interrupted)", "last"]
    assert "not reached: rare (only with --part tests); long" in report.table()
    (file,) = tmp_path.glob("*.json")
    assert json.loads(file.read_text())["not_reached"] == report.not_reached
    monkeypatch.setattr(script, "TOTAL", 3)
    assert {o.status for o in script.check(None, tmp_path / "later").outcomes[1:]} == {"not reached"}


def test_nothing_is_written_outside_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    """Homes may be read-only and /tmp small: caches and temporary files have folders below build."""
    monkeypatch.setenv("TMPDIR", "/tmp")
    given = script.environment()
    for name in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TMPDIR"):
        assert Path(given[name]).is_relative_to(script.ROOT / "build"), name


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


def test_files_of_a_step_that_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half an XML, half a JSON and a progress report: each is said, and what follows is run."""
    shows = "import time; print('collected 5 items'); print('tests/a.py::b PASSED [ 20%]', flush=True); time.sleep(60)"
    half = "import sys; open(sys.argv[1], 'w').write(sys.argv[2])"

    def steps() -> list[object]:
        return [
            step("build", "build", ""),
            step("cut", "tests", "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); " + shows, 1),
            script.Step("xml", "tests", 5, 5, (sys.executable, "-c", half, "{out}/t.xml", JUNIT[:90]), "t.xml"),
            script.Step("json", "bench", 5, 5, (sys.executable, "-c", half, "{out}/a.json", '{"op"'), "*.json"),
            step("last", "bench", ""),
        ]

    monkeypatch.setattr(script, "steps", steps)
    monkeypatch.setattr(script, "nvcc", lambda: None)
    report = script.check(None, tmp_path)
    said = {o.name: (o.status, o.detail) for o in report.outcomes}
    assert said["build"] == ("ok", "no nvcc here: without the CUDA C++ kernels")
    assert said["cut"] == ("timed out", "1 of 5 tests ran")
    assert said["xml"][0] == said["json"][0] == "failed"
    assert said["xml"][1].startswith("t.xml cannot be read")
    assert said["json"][1].startswith("a.json cannot be read")
    assert said["last"][0] == "ok"


def test_tests_that_ran_are_counted_in_the_output_of_workers_too() -> None:
    workers = "8 workers [12 items]\n[gw0] [  8%] PASSED tests/gpu/a.py::b\n[gw1] [ 16%] FAILED tests/gpu/a.py::c\n"
    assert script.tests_that_ran(workers) == "2 of 12 tests ran"
    assert script.tests_that_ran("collected 9 items / 5 deselected / 4 selected\na::b SKIPPED (no) [ 25%]\n") == (
        "1 of 4 tests ran"
    )
    assert script.tests_that_ran("no test") == ""


def test_cuda_is_built_where_nvcc_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An extension of an earlier build is gone before."""
    monkeypatch.undo()
    (tmp_path / "fastret").mkdir()
    for name in ("_cuda.cpython-311.so", "_C.cpython-311.so"):
        (tmp_path / "fastret" / name).touch()
    monkeypatch.setattr(script, "ROOT", tmp_path)
    monkeypatch.delenv("FASTRET_CUDA", raising=False)
    script.remove_extension()
    assert [file.name for file in (tmp_path / "fastret").iterdir()] == ["_C.cpython-311.so"]
    monkeypatch.setattr(script, "nvcc", lambda: "/usr/bin/nvcc")
    assert script.environment()["FASTRET_CUDA"] == "1"
    monkeypatch.setenv("FASTRET_CUDA", "0")
    assert script.environment()["FASTRET_CUDA"] == "0"
    monkeypatch.setattr(script, "nvcc", lambda: None)
    monkeypatch.delenv("FASTRET_CUDA")
    assert "FASTRET_CUDA" not in script.environment()


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    file = tmp_path / "a-file"
    file.touch()
    assert script.main(["--output", str(file / "results")]) == 2
    assert f"gpu_check: {file / 'results'} cannot be written: " in capsys.readouterr().err
