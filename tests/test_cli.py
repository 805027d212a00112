"""Promises of the command line: it starts fast, prints one line for an error, and exits with the right code."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import ndtrain
from ndtrain import cli
from ndtrain.errors import DamagedError, NdtrainError, PlanError, RecipeError, Reported, Stopped
from ndtrain.runs import launcher, versions
from ndtrain.runs.environment import RUN_ID
from ndtrain.runs.stop_signals import STOP_SIGNALS

QUICKSTART = str(Path(__file__).parent.parent / "recipes" / "quickstart.toml")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run `ndtrain ARGUMENTS` in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["ndtrain", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert isinstance(caught.value.code, int)
    return caught.value.code


def as_worker(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Set what torchrun sets for a worker."""
    variables = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "LEAVE_AFTER_S", 0.0)
    monkeypatch.setattr(cli, "STOPPED_AFTER_S", 0.0)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)


@pytest.fixture
def bad(tmp_path: Path) -> str:
    path = tmp_path / "bad.toml"
    path.write_text('[train]\nstpes = 3\n[model]\nname = "x"\n')
    return str(path)


@pytest.fixture(autouse=True)
def outside_torchrun(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANK", raising=False)
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Replace the modules that `run` imports; return the list of the recipes that were run."""
    ran: list[Any] = []
    monkeypatch.setitem(sys.modules, "ndtrain.train", SimpleNamespace(run=lambda recipe, *_: ran.append(recipe)))
    monkeypatch.setitem(sys.modules, "ndtrain.console", SimpleNamespace(Reporter=object))
    monkeypatch.setattr(ndtrain, "train", sys.modules["ndtrain.train"], raising=False)
    monkeypatch.setattr(ndtrain, "console", sys.modules["ndtrain.console"], raising=False)
    return ran


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys, ndtrain.cli; print([m for m in ('torch', 'transformers', 'rich', 'pydantic') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--suggest"], "--suggest needs --world-size and --device"),
        (["--suggest", "--world-size", "4", "--device", "h100", "--rank", "1"], "--suggest allows only --world-size,"),
        (["--suggest", "--world-size", "4", "--device", "h100", "--layer", "*"], "--suggest allows only --world-size,"),
        (["--diff", QUICKSTART, "--dry-run"], "--diff compares plans; leave out --dry-run, --device"),
        (["--html", "p.html", "--layer", "*.0"], "--html shows the whole plan; leave out --layer"),
        (["--svg", "p", "--html", "p"], "p is named twice; give each file a name of its own"),
        (["--svg", QUICKSTART], "quickstart.toml is named twice"),
        (["--svg", "no/such/p.svg"], "no/such/p.svg cannot be written: no/such is not a directory"),
    ],
)
def test_inspect_refuses_options_that_do_not_go_together(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: list[str], words: str
) -> None:
    assert call(monkeypatch, "inspect", QUICKSTART, *options) == 2
    assert words in capsys.readouterr().err


def test_a_bad_recipe_is_refused_before_torch_is_imported(bad: str) -> None:
    code = (
        "import sys, ndtrain.cli\n"
        f"sys.argv = ['ndtrain', 'run', {bad!r}]\n"
        "try: ndtrain.cli.main()\n"
        "except SystemExit as e:\n"
        "    print(e.code, [m for m in ('torch', 'transformers', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"
    assert 'ndtrain: error: [train] has no key "stpes"; did you mean "steps"?' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["run", "inspect"])
def test_a_bad_recipe_exits_2(monkeypatch: pytest.MonkeyPatch, capsys: Any, bad: str, verb: str) -> None:
    assert call(monkeypatch, verb, bad) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert all(line.startswith("ndtrain: error: ") for line in err.splitlines())


@pytest.mark.parametrize(
    "arguments",
    [
        ["nope"],
        ["run"],
        ["run", "a", "b"],
        ["run", "a", "--nope"],
        ["inspect", "a", "--world-size", "0"],
        ["convert", "a"],
    ],
)
def test_usage_errors_exit_2(monkeypatch: pytest.MonkeyPatch, capsys: Any, arguments: list[str]) -> None:
    assert call(monkeypatch, *arguments) == 2
    err = capsys.readouterr().err
    assert "Usage: ndtrain" in err
    as_worker(monkeypatch, 1)
    assert call(monkeypatch, *arguments) == 2
    assert capsys.readouterr().err == ""


def test_only_rank_0_prints_the_error_and_every_rank_exits_with_its_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, bad: str
) -> None:
    for rank in (0, 1):
        as_worker(monkeypatch, rank)
        assert call(monkeypatch, "run", bad) == 2
        assert ("error" in capsys.readouterr().err) == (rank == 0)


@pytest.mark.parametrize(
    ("error", "printed"),
    [
        (DamagedError("a file of this node is damaged"), "ndtrain: error: rank 1: a file of this node is damaged\n"),
        (PlanError("every rank meets this"), ""),
        (Reported(4), ""),
    ],
)
def test_an_error_that_rank_0_need_not_meet_is_printed_by_the_rank_that_met_it(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, train: list[Any], error: NdtrainError, printed: str
) -> None:
    def fail(*_: Any) -> None:
        raise error

    as_worker(monkeypatch, 1)
    monkeypatch.setattr(sys.modules["ndtrain.train"], "run", fail)
    assert call(monkeypatch, "run", QUICKSTART) == error.exit_code
    assert capsys.readouterr().err == printed


@pytest.mark.parametrize("verb", ["convert", "run", "inspect"])
def test_a_rank_that_no_launcher_gave_silences_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, verb: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("RANK", "3")  # as some schedulers set it, without the rest
    assert call(monkeypatch, verb, str(tmp_path / "no" / "such"), *["x"] * (verb == "convert")) == 2
    assert "ndtrain: error: " in capsys.readouterr().err


@pytest.mark.parametrize("where", ["recipe", "--set", "convert"])
def test_a_secret_in_a_url_is_refused_and_never_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, where: str, tmp_path: Path
) -> None:
    url = "s3://AKIAKEY:SECRETSECRET@bucket/run"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[run]\ndir = "{url if where == "recipe" else "x"}"\n')
    arguments = {
        "recipe": ["run", str(recipe)],
        "--set": ["run", str(recipe), "--set", f"run.dir={url}"],
        "convert": ["convert", url, str(tmp_path / "out")],
    }
    assert call(monkeypatch, *arguments[where]) == 2
    err = capsys.readouterr().err
    assert "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY" in err and "SECRETSECRET" not in err and "AKIAKEY" not in err


def test_paths_of_the_command_line_are_expanded(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path, bad: str
) -> None:
    monkeypatch.setenv("HOME", str(Path(bad).parent))
    monkeypatch.setenv("HERE", str(Path(bad).parent))
    monkeypatch.delenv("NOWHERE", raising=False)
    for given in ("~/bad.toml", "$HERE/bad.toml"):
        assert call(monkeypatch, "run", given) == 2
        assert f'no key "stpes"; did you mean "steps"? ({bad}' in capsys.readouterr().err
    assert call(monkeypatch, "inspect", bad, "--html=$NOWHERE/x.html") == 2
    assert "needs the environment variable NOWHERE" in capsys.readouterr().err


def test_an_older_python_is_told_which_one_is_needed(tmp_path: Path) -> None:
    code = (
        "import sys, runpy; sys.version_info = (3, 10, 12, 'final', 0); sys.argv = ['ndtrain']\n"
        "runpy.run_module('ndtrain', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(cli.__file__).parents[1]
    )
    assert done.returncode == 2
    assert done.stderr == f"ndtrain: error: needs Python 3.11 or later; this is 3.10.12 ({sys.executable})\n"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NdtrainError("x"), 1),
        (RecipeError("x"), 2),
        (PlanError("x"), 3),
        (DamagedError("x"), 4),
        (Stopped("x"), 75),
    ],
)
def test_each_error_has_its_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, train: list[Any], error: NdtrainError, code: int
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(sys.modules["ndtrain.train"], "run", fail)
    assert call(monkeypatch, "run", QUICKSTART, "--set", "mesh.dp_shard=1", "--set", "mesh.tp=1") == code
    assert capsys.readouterr().err == ("ndtrain: x\n" if code == 75 else "ndtrain: error: x\n")


def test_interrupt_exits_130(monkeypatch: pytest.MonkeyPatch, train: list[Any]) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["ndtrain.train"], "run", interrupt)
    assert call(monkeypatch, "run", QUICKSTART, "--set", "mesh={dp_shard=1, tp=1}") == 130


def test_a_mesh_of_one_rank_runs_in_this_process_and_prints_notes_once(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, train: list[Any]
) -> None:
    assert call(monkeypatch, "run", QUICKSTART, "--set", "mesh.fsdp_size=1", "--set", "mesh.tp=1") == 0
    assert train[0].mesh.dp_shard == 1
    assert capsys.readouterr().err == "ndtrain: note: mesh.fsdp_size is read as mesh.dp_shard = 1\n"


def test_a_larger_mesh_starts_its_workers(monkeypatch: pytest.MonkeyPatch, train: list[Any]) -> None:
    launched: list[Any] = []

    def launch(ranks: int, arguments: list[str]) -> int:
        launched.append((ranks, arguments))
        return 4

    monkeypatch.setattr(cli, "launch_workers", launch)
    assert call(monkeypatch, "run", QUICKSTART, "--set", "run.dir=x") == 4
    assert launched == [(4, ["run", "--set", "run.dir=x", "--", QUICKSTART])]
    assert train == []


def test_the_launcher_ends_with_its_workers_exit_code(tmp_path: Path) -> None:
    (tmp_path / "ndtrain").mkdir()
    (tmp_path / "ndtrain" / "__init__.py").write_text("")
    # The launcher ends the other worker as soon as one has failed, so print the line first.
    worker = (
        "import os, pathlib, sys, time\n"
        "printed = pathlib.Path('printed')\n"
        "if os.environ['RANK'] == '0':\n"
        "    print('one line', file=sys.stderr, flush=True)\n"
        "    printed.touch()\n"
        "while not printed.exists():\n"
        "    time.sleep(0.01)\n"
        "sys.exit({})"
    )
    code = (
        f"import sys; sys.path.insert(0, {str(Path(cli.__file__).parent.parent)!r})\n"
        "from ndtrain.runs import launcher; sys.exit(launcher.launch_workers(2, ['run', 'x']))"
    )
    for status in (0, 3):
        (tmp_path / "printed").unlink(missing_ok=True)
        (tmp_path / "ndtrain" / "__main__.py").write_text(worker.format(status))
        done = subprocess.run([sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (status, "one line\n")


def test_the_exit_code_of_an_error_wins_over_a_crash_of_other_workers() -> None:
    assert launcher.exit_code_of([(1, 1), (2, 4)]) == 4
    assert launcher.exit_code_of([(2, 5), (1, 1)]) == 1
    assert launcher.exit_code_of([(1, -9)]) == 137
    assert launcher.exit_code_of([(1, 75), (2, -15)]) == 75
    assert launcher.exit_code_of([(2, 75), (1, 1)]) == 1  # stopped because another worker failed


def test_version_and_help(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert call(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"ndtrain {ndtrain.__version__}\n"
    assert call(monkeypatch, "--help") == 0
    text = capsys.readouterr().out
    assert all(verb in text for verb in ("run", "inspect", "convert"))


def test_a_closed_pipe_prints_no_traceback() -> None:
    command = f"set -o pipefail; {sys.executable} -m ndtrain --version | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 141  # as a program that SIGPIPE ends
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("arguments", ["--help", "--version", f"inspect {QUICKSTART}"])
def test_output_on_a_full_disk_is_one_line(arguments: str) -> None:
    command = f"{sys.executable} -m ndtrain {arguments} > /dev/full"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "ndtrain: error: the output cannot be written: No space left on device\n"


@pytest.fixture
def of_a_later_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "version", lambda name: {"torch": "2.99.0", "transformers": "5.24.0"}[name])
    monkeypatch.setattr(versions, "requires", lambda name: ["torch<2.15,>=2.11", "transformers<5.25,>=5.23", "numpy"])


def test_a_version_outside_the_bounds_is_the_first_line(
    of_a_later_torch: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(monkeypatch, "convert", str(tmp_path / "no"), str(tmp_path / "out")) == 2
    first = capsys.readouterr().err.splitlines()[0]
    assert first.startswith("ndtrain: note: torch 2.99.0 is outside the versions") and "<2.15,>=2.11" in first


def test_a_launch_says_it_once_before_it_starts_workers(
    of_a_later_torch: None, train: list[Any], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def launch(ranks: int, arguments: list[str]) -> int:
        said = capfd.readouterr()
        assert said.err.startswith("ndtrain: note: torch 2.99.0 is outside") and "starting 2 workers" in said.out
        return 0

    recipe = ["run", QUICKSTART, "--set", "mesh.dp_shard=2", "--set", "mesh.tp=1"]
    monkeypatch.setattr(cli, "launch_workers", launch)
    assert call(monkeypatch, *recipe) == 0 and not train
    as_worker(monkeypatch, 0)
    assert call(monkeypatch, *recipe) == 0 and "outside the versions" in capfd.readouterr().err
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", f"{RUN_ID}1")
    assert call(monkeypatch, *recipe) == 0 and "outside the versions" not in capfd.readouterr().err
    assert len(train) == 2


def test_the_bounds_are_those_of_the_package() -> None:
    found = {requirement.split("<")[0].split(">")[0] for requirement in versions.requires("ndtrain") or ()}
    assert set(versions.LIBRARIES) <= found and versions.outside_bounds() == []


def test_ctrl_c_ends_a_command_with_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", lambda **settings: signal.raise_signal(signal.SIGINT))
    before = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130 and capsys.readouterr().err == "ndtrain: stopped by Ctrl-C\n"
