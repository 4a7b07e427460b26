"""What the README tells a reader to type works."""

import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


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


def test_every_file_and_make_target_it_names_is_there():
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert link.startswith("http") or (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, target


def test_the_predict_example_draws_an_overlay(workplace, monkeypatch, capsys):
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "argv", ["predict.py", "part.png", "--class-name", "wood"])
    runpy.run_path(str(ROOT / "examples" / "predict.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("score 0.")
    assert Image.open(workplace / "part_overlay.png").size == (256, 256)
