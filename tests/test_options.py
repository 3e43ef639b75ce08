"""papagaio/options.py and errors.py: where options come from, and the messages about wrong ones."""

import signal
from pathlib import Path
from typing import Self

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import model_validator

from papagaio.errors import STOP_SIGNALS, MachineError, UserError, catch_signals, leave, run
from papagaio.options import Options, option, parse, read_options
from papagaio.training.options import RunOptions


class Sample(Options):
    out_dir: Path = option(..., "a directory", group="Run", resume="ignored")
    max_steps: int = option(10, "steps", group="Run", resume="free", ge=1)
    learning_rate: float = option(0.5, "rate", gt=0)
    compile: bool = option(False, "whether")
    names: tuple[str, ...] = option((), "several")


class Bounded(Sample):
    floor: float = option(0.0, "lowest rate", group="More")

    @model_validator(mode="after")
    def _below(self) -> Self:
        if self.floor > self.learning_rate:
            raise ValueError(f"floor {self.floor} is above learning_rate {self.learning_rate}")
        return self


def test_flags_beat_the_file_and_the_file_beats_defaults(tmp_path: Path) -> None:
    toml = tmp_path / "a.toml"
    toml.write_text('out_dir = "x"\nmax-steps = 20\nlearning_rate = 1\n')
    config = read_options(Sample, [str(toml), "--max_steps=30"])
    assert (config.out_dir, config.max_steps, config.learning_rate) == (Path("x"), 30, 1.0)
    assert read_options(Sample, [str(toml)]).max_steps == 20
    assert read_options(Sample, ["--out_dir=x"]).max_steps == 10


@pytest.mark.parametrize(
    "argv",
    [["--out-dir", "x-y_z", "--max-steps", "3"], ["--out_dir=x-y_z", "--max_steps=3"], ["--max_steps=3", "--out-dir=x-y_z"]],
)
def test_dashes_and_underscores_are_one(argv: list[str]) -> None:
    config = read_options(Sample, argv)
    assert (config.out_dir, config.max_steps) == (Path("x-y_z"), 3)


def test_booleans_need_no_value_and_tuples_take_several() -> None:
    config = read_options(Sample, ["--out_dir=x", "--compile", "--names", "a", "b", "--names=c"])
    assert config.compile
    assert config.names == ("a", "b", "c")
    assert not read_options(Sample, ["--out_dir=x", "--compile=false"]).compile


@given(st.integers(1, 10**9), st.floats(1e-9, 1e9))
def test_numbers_survive_the_command_line(steps: int, rate: float) -> None:
    config = read_options(Sample, ["--out_dir=x", f"--max_steps={steps}", f"--learning_rate={rate}"])
    assert (config.max_steps, config.learning_rate) == (steps, rate)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--out_dir=x", "--max_stepz=3"], r"--max_stepz=3: no such option; did you mean --max_steps\?"),
        (["--out_dir=x", "--max_steps=0"], "--max_steps=0: .*greater than or equal to 1"),
        (["--out_dir=x", "--max_steps=many"], "--max_steps=many: .*integer"),
        (["--out_dir=x", "--max_steps=1.5"], "--max_steps=1.5: .*integer"),
        (["--out_dir=x", "--learning_rate=nan"], "--learning_rate=nan"),
        (["--out_dir=x", "--learning_rate=inf"], "--learning_rate=inf: .*finite number"),
        (["--out_dir=x", "--compile=perhaps"], "--compile=perhaps"),
        (["--out_dir=x", "--max_steps"], "--max_steps: expected one argument"),
        ([], "--out_dir is required"),
        (["nowhere.toml"], "nowhere.toml: No such file"),
    ],
)
def test_wrong_flags_are_named(argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_options(Sample, argv)


@pytest.mark.parametrize(
    ("toml", "message"),
    [
        ('out_dir = "x"\n\nmax_step = 3\n', r"a\.toml:3: max_step = 3: no such option; did you mean max_steps\?"),
        ('out_dir = "x"\nmax_steps = "3"\n', r"a\.toml:2: max_steps = '3': .*integer"),
        ("out_dir = 3\n", r"a\.toml:1: out_dir = 3"),
        ("max_steps = true\n", r"a\.toml:1: max_steps = True: .*integer"),
        ("learning_rate = nan\n", r"a\.toml:1: learning_rate = nan"),
        ("max_steps = 0\n", r"a\.toml:1: max_steps = 0: .*greater"),
        ("[train]\nmax_steps = 3\n", r"a\.toml:1: train"),
        ("max_steps = \n", r"a\.toml: not TOML: .*line 1"),
        ("\udcff", r"a\.toml: not UTF-8 at byte 0"),
    ],
)
def test_wrong_files_are_named_with_their_line(toml: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(toml.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=message):
        read_options(Sample, [str(tmp_path / "a.toml"), "--out_dir=x"])


def test_options_that_exclude_each_other() -> None:
    for wrong in ("--micro_batch_size=5", "--resume --overwrite", "--min_learning_rate=1"):
        with pytest.raises(UserError, match=r"divide|exclude|above"):
            read_options(RunOptions, ["--out_dir=x", *wrong.split()])


def test_defaults_replace_only_what_the_user_has_not_set(tmp_path: Path) -> None:
    toml = tmp_path / "a.toml"
    toml.write_text("\nfloor = 0.25\n")
    config = read_options(Bounded, [str(toml), "--out_dir=x", "--max_steps=3"])
    changed = config.with_defaults({"max_steps": 7, "compile": True, "learning_rate": 0.3})
    assert (changed.max_steps, changed.compile, changed.learning_rate, changed.floor) == (3, True, 0.3, 0.25)
    assert (config.compile, config.learning_rate) == (False, 0.5), "a copy"
    assert changed.with_defaults({"names": ("a",)}).learning_rate == 0.3, "the first defaults stay"
    with pytest.raises(UserError, match=r"^[^ ]*a\.toml:2: floor 0\.25 is above learning_rate 0\.1$"):
        config.with_defaults({"learning_rate": 0.1})
    with pytest.raises(UserError, match=r"^floor 0\.75 is above learning_rate 0\.5$"):
        read_options(Bounded, ["--out_dir=x", "--floor=0.75"])


def test_a_file_may_be_completed_by_flags(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text('out_dir = "x"\nfloor = 0.75\n')
    assert read_options(Bounded, [str(tmp_path / "a.toml"), "--learning_rate=1"]).floor == 0.75
    with pytest.raises(UserError, match=r"a\.toml:2: floor 0\.75 is above learning_rate 0\.5$"):
        read_options(Bounded, [str(tmp_path / "a.toml")])


def test_options_are_grouped_in_the_help_and_by_resume(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_options(Bounded, ["--help"])
    out = capsys.readouterr().out
    shown = out[out.index("\nMore:") :]
    places = [
        shown.index(words) for words in ("More:", "--floor X", "Run:", "--out_dir X", "--max_steps X", "Options:", "--names X")
    ]
    assert places == sorted(places), "own options first, then inherited ones"
    assert Bounded.by_resume("free") == ["max_steps"]
    assert Bounded.by_resume("same", "free") == ["max_steps", "learning_rate", "compile", "names", "floor"]


def test_parse_ends_with_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse(Sample, ["--max_steps=3"])
    assert end.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (UserError("a\nb"), 2),
        (MachineError("no"), 1),
        (OSError(28, "No space left on device"), 1),
        (KeyboardInterrupt(), 130),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 1),
        (MemoryError(), 1),
    ],
)
def test_run_turns_errors_into_one_line_and_a_status(
    error: BaseException, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def main(_: Sample) -> None:
        raise error

    with pytest.raises(SystemExit) as end:
        run(main, Sample(out_dir=Path("x")))
    assert end.value.code == status
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_run_leaves_our_own_bugs_their_traceback() -> None:
    def main(_: Sample) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(main, Sample(out_dir=Path("x")))


def test_a_hangup_is_caught_unless_nohup_ignores_it() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    try:
        assert set(catch_signals(leave)) == set(STOP_SIGNALS) >= {signal.SIGHUP}
        with pytest.raises(SystemExit, match=str(128 + signal.SIGHUP)):
            signal.raise_signal(signal.SIGHUP)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert signal.SIGHUP not in catch_signals(leave)
        signal.raise_signal(signal.SIGHUP)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
