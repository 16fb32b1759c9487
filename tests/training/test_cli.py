"""The command line: exit codes, one-line errors, what it prints."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastret
from fastret import cli
from fastret.training import TrainOptions
from fastret.training.losses import LOSSES
from fastret.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_memory_process")


@pytest.fixture(autouse=True)
def heap_of_the_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process measure memory: leave the C library's settings alone."""
    monkeypatch.setattr(cli, "keep_freed_memory", lambda: None)


def _flags(options: TrainOptions) -> list[str]:
    return [
        *("train", "--data", options.data, "--output", options.output),
        *("--iterations", str(options.iterations), "--batch-classes", str(options.batch_classes)),
    ]


def test_info_prints_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.strip() == fastret.env_report()


def test_train_prints_a_summary_and_resumes(
    options: Callable[..., TrainOptions], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def interrupted(self: Trainer) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return step(self)

    chosen = options()
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", interrupted)
        assert cli.main(_flags(chosen)) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    command = f"train --output {chosen.output} --resume"
    assert last == f"fastret: stopped after 1 of 4 iterations; go on with: fastret {command}"

    assert cli.main([*command.split(), "--loss", "patchmix"]) == 2
    error = capsys.readouterr().err
    assert "error: loss: expected 'smooth-ap' as in the run to be resumed, got 'patchmix'" in error

    assert cli.main(command.split()) == 0
    out = capsys.readouterr().out
    for part in ("resumed after 1 of 4 iterations", "untrained", "MAP@R", "16 classes x 4", "metrics.json, plot.png"):
        assert part in out


def test_ctrl_c_outside_training(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "train", interrupted)
    assert cli.main(["train"]) == 130
    assert capsys.readouterr().err == "fastret: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data", "nowhere"], "data: expected glyphs, glyphs-s, cjk, fashion, a directory"),
        (["train", "--data", "cjk", "--loss", "proxy-nca"], "python scripts/render_glyphs.py l renders it"),
        (["train", "--data", "fashion"], "install Debian's package, apt-get update && apt-get install dataset-fashion"),
        (["train", "--data", "glyphs-s"], "python scripts/render_glyphs.py s renders it"),
        (["train", "--lr", "0"], "lr: expected a positive"),
        (["train", "--iterations", "0"], "iterations: expected at least 1, got 0"),
        (["train", "--iterations", "many"], "argument --iterations: invalid int value: 'many'"),
        (["train", "--loss", "triplet"], "argument --loss: invalid choice: 'triplet'"),
        (["train", "--resume", "--output", "nowhere"], "no checkpoint.pt to resume from in nowhere"),
        (["train", "--itertions", "3"], "unknown arguments: --itertions 3"),
        (["nonsense"], "invalid choice: 'nonsense'"),
        ([], "the following arguments are required"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # where nothing has been rendered
    monkeypatch.setenv("FASTRET_DATA", str(tmp_path))
    try:
        code: int | str | None = cli.main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    error = capsys.readouterr().err
    assert code == 2
    assert error.startswith("fastret: error: ")
    assert message in error
    assert error.count("\n") == 1


def test_help_names_the_recipe_of_every_loss(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # argparse would break lines within the names
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    out = capsys.readouterr().out
    recipe = LOSSES["proxy-nca"].recipe
    assert f"batches to train on (default: 150; {recipe.iterations} with proxy-nca" in out
    spq = LOSSES["spq"].recipe
    others = f"0.1 with nt-xent, 0.1 with sup-con, {recipe.temperature} with proxy-nca, {spq.temperature} with spq"
    others += ", 0.1 with npid, 0.2 with patchmix"
    assert f"temperature of the loss (default: 0.01; {others})" in out
    assert f"its proxies or words (default: {recipe.proxy_lr} with proxy-nca, {spq.proxy_lr} with spq)" in out
    assert f"bits of an image's code (default: {spq.bits} with spq)" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is here")
def test_missing_cuda_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--device", "cuda"]) == 2
    assert "device: expected cpu" in capsys.readouterr().err


def test_bench_runs_the_benchmarks_of_a_checkout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, text in (
        ("benchmarks/__main__.py", "import sys; print(sys.argv[1:]); sys.exit(3)"),
        ("fastret/__init__.py", ""),
    ):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--help", "smooth_ap"]) == 3
    assert capfd.readouterr().out.strip() == "['--help', 'smooth_ap']"


def test_bench_without_a_checkout_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fastret, "__file__", str(tmp_path / "site-packages" / "fastret" / "__init__.py"))
    assert cli.main(["bench"]) == 2
    assert "the benchmarks are not installed with fastret" in capsys.readouterr().err
