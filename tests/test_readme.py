"""What the README tells a reader to type works."""

import importlib
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from typer.main import get_command

from moeclip_hf.cli import app
from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()

LAUNCHER = r"(?:accelerate launch|torchrun|python3?)\b.*"
COMMAND = re.compile(
    rf"(?:\$ )?(?:\w+=\S+ )*(?:moeclip|{LAUNCHER} (?:-m moeclip_hf\.cli|examples/(?P<train>train)\.py)) (?P<rest>.+)"
)


def code_lines(text: str) -> Iterator[str]:
    """Lines of fenced and of indented code, those joined that a backslash goes on with."""
    fenced = False
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield line.strip()


def commands_of(file: Path) -> Iterator[list[str]]:
    """The arguments of each `moeclip` in a file's code; examples/train.py stands for `moeclip train`."""
    for line in code_lines(file.read_text()):
        for part in re.split(r"&&|[|;]", line):
            if found := COMMAND.fullmatch(part.strip()):
                rest = re.split(r"\s(?:&|\d?[<>])", found["rest"])[0]
                yield [*filter(None, [found["train"]]), *shlex.split(rest, comments=True)]


DOCUMENTED = [
    (file.name, arguments)
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for arguments in commands_of(file)
]


def parse(arguments: list[str]) -> None:
    """Have the command line read arguments, without running anything."""
    command, name, rest = get_command(app), "moeclip", list(arguments)
    while (commands := getattr(command, "commands", {})) and rest and not rest[0].startswith("-"):
        assert rest[0] in commands, f"{name} has no command {rest[0]}"
        name = rest.pop(0)
        command = commands[name]
    try:
        command.make_context(name, rest)
    except Exception as error:
        if "does not exist" not in str(error):  # examples name files that only a reader has
            raise


@pytest.fixture
def workplace(tmp_path):
    """A folder with what the README's examples name: a checkpoint, a picture, a folder of pictures."""
    shutil.copytree(EMBEDDED_CHECKPOINT, tmp_path / "moeclip")
    (tmp_path / "photos").mkdir()
    for path in (tmp_path / "part.png", tmp_path / "photos" / "one.png"):
        Image.linear_gradient("L").save(path)
    return tmp_path


def run(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_example_runs(workplace):
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    printed = run([sys.executable, "-c", code], workplace)
    assert re.match(r"0\.\d+ (True|False) \[", printed)


def test_the_command_line_example_runs(workplace, monkeypatch, command):
    arguments = re.findall(r"^moeclip (predict .*)$", README, flags=re.MULTILINE)[0]
    words = [word.strip('"') for word in re.findall(r'"[^"]+"|\S+', arguments)]
    monkeypatch.chdir(workplace)
    assert b"one.png" in command(*words)[1]
    assert (workplace / "results" / "one_overlay.png").exists()


def test_predict_prints_the_json_that_its_page_shows(workplace, monkeypatch, command):
    (shown,) = re.findall(r"```json\n(.*?)```", (ROOT / "docs" / "predict.md").read_text(), flags=re.DOTALL)
    monkeypatch.chdir(workplace)
    printed = json.loads(command("predict", "part.png", "--json", "--pixel-threshold", "0")[1])
    assert list(printed) == list(json.loads(shown))
    assert printed["regions"][0].keys() == json.loads(shown)["regions"][0].keys()


@pytest.mark.parametrize(("file", "arguments"), DOCUMENTED, ids=lambda value: str(value)[:60])
def test_the_command_line_takes_what_the_documents_type(file, arguments):
    parse(arguments)


def test_commands_are_found_in_the_documents_and_wrong_ones_are_refused():
    files = [file for file, _ in DOCUMENTED]
    named = {arguments[0] for _, arguments in DOCUMENTED}
    assert len(files) > 30 and files.count("README.md") >= 10 and len(set(files)) >= 8
    assert named == set(get_command(app).commands)
    assert ["evaluate", "--model", "MODEL", "--dataset", "brain", "--data-dir", "/data"] in list(
        commands_of(ROOT / "docs" / "evaluation.md")
    )
    for wrong in ("train --datasets x --output-dir o", "calibrates x", "convert release", "export --class-name x",
                  "calibrate x --false-alarm-rate 5", "train --recipe papers --output-dir o"):  # fmt: skip
        with pytest.raises(Exception, match=r"No such option|has no command|Missing|less than|range|not one of"):
            parse(wrong.split())


def test_every_file_and_make_target_it_names_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def test_the_page_of_public_names_has_all_of_them_and_no_others():
    page = (ROOT / "docs" / "api.md").read_text()
    for module, name in re.findall(r"`(moeclip_hf[\w.]*)\.(\w+)`", page):
        assert hasattr(importlib.import_module(module), name) or importlib.import_module(f"{module}.{name}"), name
    parts = ("app", "conversion", "data", "data.textures", "evaluation", "training", "tuner")
    for module in ("moeclip_hf", *(f"moeclip_hf.{part}" for part in parts)):
        public = set(importlib.import_module(module).__all__) - {"__version__", "DEFECTS", "FAMILIES", "TOLERANCE"}
        assert not {name for name in public if f"{name}`" not in page}, module


def test_the_predict_example_draws_an_overlay(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["predict.py", "part.png", "--class-name", "wood"])
    runpy.run_path(str(ROOT / "examples" / "predict.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("score 0.")
    assert Image.open(workplace / "part_overlay.png").size == (256, 256)
