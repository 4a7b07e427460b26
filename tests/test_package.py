"""The package: built, installed, imported and run as a user would."""

import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "transformers", "datasets", "numpy", "scipy", "PIL", "peft", "gradio")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


def test_wheel_and_sdist_hold_the_whole_package(distributions):
    with zipfile.ZipFile(distributions["wheel"]) as wheel:
        names = set(wheel.namelist())
    folders = {"moeclip_hf": "moeclip_hf", "modeling": "moeclip_hf/modeling", "conversion": "moeclip_hf/conversion"}
    for source, installed in folders.items():
        for file in (ROOT / source).rglob("*.py"):
            assert f"{installed}/{file.relative_to(ROOT / source).as_posix()}" in names
    assert "moeclip_hf/py.typed" in names
    assert any(name.startswith("moeclip_hf/checkpoints/") and name.endswith(".safetensors") for name in names)
    assert not any(name.startswith(("tests/", "modeling/", "conversion/")) for name in names)
    with tarfile.open(distributions["sdist"]) as sdist:
        names = {name.partition("/")[2] for name in sdist.getnames()}
    assert "modeling/modeling_moeclip.py" in names
    assert not any(name.startswith("tests") for name in names), "tests without all that they need"


def test_the_wheel_works_in_a_fresh_environment_and_another_folder(distributions, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    bin_folder = tmp_path / "env" / ("Scripts" if sys.platform == "win32" else "bin")
    run(bin_folder / "python", "-m", "pip", "install", "--quiet", "--no-deps", distributions["wheel"])
    # The dependencies are this environment's: a path alone, which does not bring along what is installed editable.
    site_packages = run(bin_folder / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(site_packages) / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    location = run(bin_folder / "python", "-c", "import moeclip_hf; print(moeclip_hf.__file__)", cwd=elsewhere)
    assert Path(location.strip()).is_relative_to(tmp_path / "env")
    assert "predict" in run(bin_folder / "moeclip", "--help", cwd=elsewhere)
    run(
        bin_folder / "python",
        "-c",
        "from PIL import Image; Image.new('RGB', (64, 48), 'grey').save('part.png')",
        cwd=elsewhere,
    )
    assert "part.png" in run(bin_folder / "moeclip", "predict", "part.png", cwd=elsewhere)
    assert (elsewhere / "moeclip-output" / "part_overlay.png").exists()


def test_importing_the_package_and_asking_for_help_load_nothing_heavy():
    code = f"import sys, moeclip_hf; print([name for name in {HEAVY} if name in sys.modules])"
    assert run(sys.executable, "-c", code).strip() == "[]"
    code = (
        "import sys, contextlib, moeclip_hf.cli as cli\n"
        "sys.argv = ['moeclip', '--help']\n"
        "with contextlib.suppress(SystemExit):\n"
        "    cli.main()\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert run(sys.executable, "-c", code).strip().endswith("[]")


def test_packages_that_are_registered_with_keep_their_files():
    code = (
        "import moeclip_hf, importlib.resources, pkgutil\n"
        "print(b'class Pipeline' in pkgutil.get_data('transformers.pipelines', 'base.py'))\n"
        "print(importlib.resources.files('peft').joinpath('py.typed').is_file(), pkgutil.get_data('peft', 'py.typed'))"
    )
    assert run(sys.executable, "-c", code).split() == ["True", "True", "b''"]


def test_wrong_usage_is_told_before_anything_heavy_is_loaded(tmp_path):
    (tmp_path / "file").touch()
    code = (
        "import sys, moeclip_hf.cli as cli\n"
        "for arguments in sys.stdin.read().splitlines():\n"
        "    sys.argv = ['moeclip', *arguments.split()]\n"
        "    try:\n"
        "        cli.main()\n"
        "    except SystemExit as end:\n"
        f"        print(end.code, [name for name in {HEAVY} if name in sys.modules])\n"
    )
    mistakes = (
        "convert released",
        "convert released --adapter a --clip c --output file",
        "convert released --adapter a --clip c --output out --moe-layers few",
        "convert released --adapter a --clip c --output out --moe-layers 6,,12",
        "convert openai --clip c --output file/below",
        "convert openai --clip c --output out --vision-heads 0",
        "convert export --model m --output .",
        "predict x.png --tile-overlap 0.5",
        "calibrate x.png --best-f1 --output out",
        "push folder ann/it --dry-run out --private",
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(mistakes), cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["2 []"] * len(mistakes), done.stderr


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("import moeclip_hf", "from transformers import AutoModel"),
        ("import moeclip_hf", "from transformers import CLIPConfig"),
        ("import moeclip_hf", "from transformers import CLIPModel"),
        ("from transformers import AutoProcessor", "import moeclip_hf"),
    ],
)
def test_the_auto_classes_know_moeclip_whatever_is_imported_first(first, second):
    code = (
        f"{first}\n{second}\n"
        "from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoProcessor\n"
        "from moeclip_hf.pretrained import EMBEDDED_CHECKPOINT as folder\n"
        "classes = (AutoConfig, AutoModel, AutoProcessor, AutoImageProcessor)\n"
        "print(*(type(auto.from_pretrained(folder)).__name__ for auto in classes))"
    )
    expected = "MoECLIPConfig MoECLIPModel MoECLIPProcessor MoECLIPImageProcessor"
    assert run(sys.executable, "-c", code).strip() == expected


@pytest.mark.parametrize(
    "imports",
    ["import transformers.pipelines, moeclip_hf", "import moeclip_hf.modeling.pipeline_moeclip"],
)
def test_transformers_knows_the_pipeline_whatever_is_imported_first(imports):
    code = (
        f"{imports}\nfrom transformers.pipelines import check_task\n"
        "print(check_task('zero-shot-anomaly-detection')[1]['impl'].__name__)"
    )
    assert run(sys.executable, "-c", code).strip() == "ZeroShotAnomalyDetectionPipeline"


@pytest.mark.parametrize(
    "imports", ["import moeclip_hf, peft", "import peft, moeclip_hf", "import moeclip_hf\nimport transformers, peft"]
)
def test_peft_knows_the_tuner_whatever_is_imported_first(imports):
    code = f"{imports}\nfrom peft import PeftType\nprint(PeftType('MOE_LORA').value)"
    assert run(sys.executable, "-c", code).strip() == "MOE_LORA"


def test_every_public_name_is_there_and_the_version_stands_in_one_place():
    import moeclip_hf

    for name in moeclip_hf.__all__:
        assert getattr(moeclip_hf, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'MoECLIPModle'"):
        _ = moeclip_hf.MoECLIPModle
    assert run(sys.executable, "-m", "moeclip_hf.cli", "--version").strip() == f"moeclip-hf {moeclip_hf.__version__}"
