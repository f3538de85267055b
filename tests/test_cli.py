"""The command line: quick help, one line for a mistake, and what it prints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from duo import cli, plugins
from duo.cli import main
from duo.errors import UserError

RECIPE = """
concept = "toybox-fire"
model = "toybox"
[method]
name = "duo"
[[attacks]]
row = "prompts"
name = "prompts"
prompts = "plain"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(RECIPE)
    return path


def test_help_is_quick_for_it_imports_no_torch() -> None:
    verbs = ("run", "pairs", "erase", "attack", "score", "report", "check", "leaderboard", "merge", "export")
    verbs += ("bench", "app", "toybox", "list")
    code = (
        "import sys\nfrom duo.cli import main\n"
        f"for verb in ([], *([v] for v in {verbs!r})):\n"
        "    try:\n        main([*verb, '--help'])\n"
        "    except SystemExit as stop:\n        assert stop.code == 0\n"
        "    assert not {'torch', 'diffusers', 'numpy', 'matplotlib'} & set(sys.modules), verb\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("usage: duo") == 1 + len(verbs)


@pytest.mark.parametrize("name", ["duo", "recipe"])
def test_erase_tells_the_flags_of_the_method(name: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["erase", str(recipe) if name == "recipe" else name, "--help"])
    out = capsys.readouterr().out
    assert "--learning-rate NUMBER" in out
    assert "--pair-timesteps shared|independent" in out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["erase", "RECIPE"], ["--beta NUMBER the recipe's: 25.0", "--rank INTEGER default: "]),
        (["erase", "duo"], ["--beta NUMBER default: 500.0"]),
        (["pairs", "RECIPE"], ["--n INTEGER the recipe's: 7"]),
        (["score", "RECIPE"], ["--unrelated INTEGER the recipe's: 9"]),
        (["pairs", "check"], ["usage: duo pairs check [-h] (FOLDER_OR_CSV | --unsafe FOLDER --safe FOLDER)"]),
    ],
)
def test_help_tells_what_the_flags_replace(
    arguments: list[str], told: list[str], recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = RECIPE.replace('name = "duo"', 'name = "duo"\nbeta = 25.0')
    recipe.write_text(f"{text}\n[pairs]\nn = 7\n[score]\nunrelated = 9\n")
    with pytest.raises(SystemExit):
        main([str(recipe) if part == "RECIPE" else part for part in arguments] + ["--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert all(one in out for one in told)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: VERB (see `duo --help`)"),
        (["rnu"], "no verb is called 'rnu' (did you mean 'run'?)"),
        (["run", "no-such", "--out", "x"], "no recipe is called 'no-such'"),
        (["run", "RECIPE"], "the following arguments are required: --out"),
        (["run"], "the following arguments are required: --out"),
        (["run", "--out", "OUT", "--set", "pears.n=3"], "recipe toybox-fire has no field 'pears'"),
        (["erase", "--out", "OUT"], "the following arguments are required: RECIPE"),
        (["run", "RECIPE", "--out", "OUT", "--sed", "3"], "unrecognized arguments: --sed 3"),
        (["run", "RECIPE", "--out", "OUT", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["run", "RECIPE", "--out", "OUT", "--seed", "-1"], "seed is -1, expected at least 0"),
        (["run", "RECIPE", "--out", "OUT", "--set", "pears.n=3"], "has no field 'pears' (did you mean 'pairs'?)"),
        (["run", "RECIPE", "--out", "OUT", "--set", "concept=toybox-fir"], "(did you mean 'toybox-fire'?)"),
        (
            ["run", "RECIPE", "--out", "OUT", "--set", "method.bta=3"],
            "method has no field 'bta' (did you mean 'beta'?)",
        ),
        (
            ["run", "RECIPE", "--out", "OUT", "--set", "method.name=dou"],
            "no method is called 'dou' (did you mean 'duo'?)",
        ),
        (["run", "RECIPE", "--out", "OUT", "--set", "attacks.prompts.prompts=plan"], "(did you mean 'plain'?)"),
        (["run", "RECIPE", "--out", "OUT", "--set", "score.unsafe_row=prompt"], "(did you mean 'prompts'?)"),
        (["run", "RECIPE", "--out", "OUT", "--device", "gpu"], "--device gpu:"),
        (["run", "RECIPE", "--out", "OUT", "--set", "model=no-such-model"], "no model is called 'no-such-model'"),
        (["pairs", "RECIPE", "--out", "OUT", "--n", "many"], "--n is 'many', expected an integer"),
        (["erase", "RECIPE", "--out", "OUT"], "pairs is not finished; run `duo pairs` first"),
        (["attack", "RECIPE", "--out", "OUT"], "erase is not finished; run `duo erase` first"),
        (["score", "RECIPE", "--out", "OUT"], "erase is not finished; run `duo erase` first"),
        (["run", "RECIPE", "--out", ""], "argument --out: the path is empty; name one"),
        (["report", ""], "argument RUN: the path is empty; name one"),
        (["report", "OUT"], "OUT"),
        (["merge", "OUT", "--out", "x", "--weights", "1,a"], "--weights: '1,a' is not a list of numbers"),
        (["merge", "OUT", "--out", "x", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["merge", "OUT", "--out", "no-such-folder"], "is neither a run folder nor a delta file"),
        (["export", "RECIPE", "--out", "no-such.safetensors"], "cannot be read as safetensors"),
        (["report", "FOLDER"], "is not a run folder: it has no run.json; give the --out of a `duo run`"),
        (["run", "FOLDER", "--out", "OUT"], "`duo run RECIPE --out FOLDER --resume`"),
        (["run", "CONCEPT", "--out", "OUT"], "is a concept, and no recipe; name it in a recipe: concept = 'snow.toml'"),
        (["list", "attack"], "nothing to list is called 'attack' (did you mean 'attacks'?)"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(
    arguments: list[str], message: str, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RECIPE": str(recipe), "OUT": str(tmp_path / "run"), "FOLDER": str(tmp_path / "mine")}
    places["CONCEPT"] = str(tmp_path / "snow.toml")
    (tmp_path / "mine").mkdir()
    (tmp_path / "snow.toml").write_text("words = ['snow']\nanchor = 'meadow'\n")
    assert main([places.get(part, part) for part in arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("duo: ")
    assert told.err.count("\n") == 1
    assert places.get(message, message).replace("FOLDER", places["FOLDER"]) in told.err
    assert not any((tmp_path / "mine").iterdir())
    assert not (tmp_path / "run").exists()


def test_a_report_of_a_folder_that_is_no_run_leaves_nothing_in_it(tmp_path: Path) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert not list(tmp_path.iterdir())


def test_an_existing_run_is_left_alone(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "run.json").write_text("{}")
    assert main(["run", str(recipe), "--out", str(out)]) == 2
    assert "holds a run that was begun; add --resume to go on with it" in capsys.readouterr().err
    (out / "report.html").write_text("")
    assert main(["run", str(recipe), "--out", str(out)]) == 2
    assert "holds a finished run; add --resume" in capsys.readouterr().err
    assert (out / "run.json").read_text() == "{}"


def test_an_interruption_says_how_to_go_on(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from duo import stages

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stages, "run", stop)
    monkeypatch.setattr(stages, "plan", stop)
    monkeypatch.setattr(stages, "Session", lambda *_, **__: None)
    for flag, again in ((), "--resume"), (("--dry-run",), "--dry-run"):
        assert main(["run", str(recipe), "--out", str(tmp_path / "run"), *flag]) == 130
        assert f"go on with `duo run {recipe} --out {tmp_path / 'run'} {again}`" in capsys.readouterr().err


def test_a_full_disk_is_told_in_one_line(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from duo import stages

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "image.png")

    monkeypatch.setattr(stages, "Session", full)
    assert main(["run", str(recipe), "--out", str(tmp_path / "run")]) == 2
    assert "duo: image.png: No space left on device; nothing is lost: go on with" in capsys.readouterr().err


def test_memory_that_does_not_suffice_is_told_and_other_errors_are_not_hidden(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from duo import stages

    def fail(error: Exception) -> None:
        def session(*_: object, **__: object) -> None:
            raise error

        monkeypatch.setattr(stages, "Session", session)

    fail(RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert main(["run", str(recipe), "--out", str(tmp_path / "a b")]) == 2
    told = capsys.readouterr().err
    assert "duo: out of memory; lower block" in told
    assert "each in a new --out, as a run keeps its settings" in told
    assert f"--out '{tmp_path / 'a b'}' --resume`" in told
    fail(RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        main(["run", str(recipe), "--out", str(tmp_path / "run")])


@pytest.mark.parametrize("kind", [*plugins.KINDS, "concepts", "recipes"])
def test_list_prints_a_name_a_line(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind]) == 0
    names = capsys.readouterr().out.splitlines()
    assert names == sorted(names)
    assert names


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"duo {version('duo-unlearning')}\n"


def test_pairs_check_lists_every_problem_and_exits_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from PIL import Image

    for side, colour in (("unsafe", 1), ("safe", 2)):
        (tmp_path / side).mkdir()
        for name in ("a", "b"):
            Image.new("RGB", (8, 8), (colour, 0, 0)).save(tmp_path / side / f"{name}.png")
    assert main(["pairs", "check", str(tmp_path)]) == 0
    assert capsys.readouterr().out == f"{tmp_path}: 2 pairs, nothing wrong\n"
    for name, told in (("none", "does not exist"), ("safe/a.png", "is a file, and no .csv")):
        assert main(["pairs", "check", str(tmp_path / name)]) == 2
        assert capsys.readouterr().out == f"{tmp_path / name} {told}: it has no folder unsafe/ and safe/\n"
    two = ["pairs", "check", "--unsafe", str(tmp_path / "unsafe"), "--safe", str(tmp_path / "safe")]
    assert main(two) == 0
    (tmp_path / "safe" / "a.png").unlink()
    (tmp_path / "unsafe" / "b.png").write_bytes(b"")
    for arguments in (["pairs", "check", str(tmp_path)], two):
        capsys.readouterr()
        assert main(arguments) == 2
        out, error = capsys.readouterr()
        assert "a.png is in only one of unsafe/ and safe/" in out and "b.png cannot be read" in out
        assert error.endswith(": 2 problems, listed above\n")


@pytest.mark.parametrize(
    "arguments", [[], ["x", "--unsafe", "a", "--safe", "b"], ["--unsafe", "a"], ["--safe", "b"], ["x", "--safe", "b"]]
)
def test_pairs_check_takes_one_kind_of_source(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pairs", "check", *arguments]) == 2
    assert "give `duo pairs check` a folder or a CSV, or both --unsafe and --safe" in capsys.readouterr().err


def test_the_sources_of_pairs_in_a_recipe_are_from_its_folder(recipe: Path) -> None:
    from duo.recipe import load_recipe

    recipe.write_text(f"{RECIPE}\n[pairs]\nsource = 'mine'\n")
    assert load_recipe(recipe).pairs.source == str(recipe.parent / "mine")
    assert load_recipe(recipe, overrides=["pairs.source=other"]).pairs.source == "other"
    with pytest.raises(UserError, match="give source, or unsafe and safe"):
        load_recipe(recipe, overrides=["pairs.unsafe=a", "pairs.safe=b"])
    with pytest.raises(UserError, match="unsafe and safe are two folders"):
        load_recipe(recipe, overrides=["pairs.unsafe=a"])


BUFFERED = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
UNBUFFERED = {**BUFFERED, "PYTHONUNBUFFERED": "1"}


@pytest.mark.parametrize("environment", [BUFFERED, UNBUFFERED], ids=["buffered", "unbuffered"])
@pytest.mark.parametrize("asked", [["list", "recipes"], ["--help"]], ids=" ".join)
def test_what_nobody_reads_any_more_ends_without_a_word(asked: list[str], environment: dict[str, str]) -> None:
    """As in `duo list recipes | head -1`."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "duo", *asked]
    done = subprocess.run(command, env=environment, stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    # What argparse prints by itself it does not look after: where nothing is held back, the help ends as ever.
    helped = asked == ["--help"] and environment is UNBUFFERED
    assert (done.returncode, done.stderr) == (0 if helped else 141, b"")


@pytest.mark.parametrize("environment", [BUFFERED, UNBUFFERED], ids=["buffered", "unbuffered"])
def test_a_full_disk_that_takes_what_is_printed_is_one_line(environment: dict[str, str]) -> None:
    with Path("/dev/full").open("w") as full:
        command = [sys.executable, "-m", "duo", "list", "recipes"]
        done = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("duo: the disk: No space left on device") and done.stderr.count("\n") == 1


def test_with_its_output_closed_a_command_does_its_work() -> None:
    command = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-m", "duo", "list", "recipes"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_broken_pipe_that_is_not_the_output_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def verb(_: object) -> None:
        raise BrokenPipeError("to a worker")

    parser = SimpleNamespace(parse_args=lambda _: SimpleNamespace(verb=verb))
    monkeypatch.setattr(cli, "parser_for", lambda _: parser)
    with pytest.raises(BrokenPipeError, match="to a worker"):
        cli.main(["list", "recipes"])
