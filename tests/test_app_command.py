"""`moeclip app`: what it needs, and whom it listens to."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from moeclip_hf.cli import app as cli
from moeclip_hf.errors import MoECLIPError

ROOT = Path(__file__).resolve().parent.parent


def test_without_gradio_the_command_says_what_to_install():
    code = (
        "import sys; sys.modules['gradio'] = None\n"
        "import importlib.util as util; found = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'gradio' else found(name, *rest)\n"
        "import moeclip_hf.cli as cli; sys.argv = ['moeclip', 'app']; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stderr.strip() == "moeclip: the page needs gradio: pip install 'moeclip-hf[app]'"


@pytest.mark.parametrize(
    ("arguments", "host", "choose_model"),
    [
        ([], "127.0.0.1", True),
        (["--host", "localhost"], "localhost", True),
        (["--host", "::1"], "::1", True),
        (["--host", "[::]"], "[::]", False),
        (["--host", "0.0.0.0"], "0.0.0.0", False),
        (["--host", "192.168.1.2", "--choose-model"], "192.168.1.2", True),
        (["--fixed-model"], "127.0.0.1", False),
    ],
)
def test_the_command_listens_to_this_machine_alone_unless_told_otherwise(monkeypatch, arguments, host, choose_model):
    built, launched = [], []
    monkeypatch.setattr("moeclip_hf.app.build_app", lambda *given: built.append(given))
    monkeypatch.setattr("moeclip_hf.app.launch_app", lambda *given: launched.append(given))
    assert CliRunner().invoke(cli, ["app", *arguments]).exit_code == 0
    assert built == [(None, None, choose_model, 64, None, None)]
    assert launched == [(None, host, None, 32)]


@pytest.mark.parametrize("host", ["nosuchhost.invalid", "203.0.113.7", "a" * 70, "[2001:db8::7]"])
def test_an_address_that_is_not_this_machines_is_refused_at_once(monkeypatch, host):
    page = SimpleNamespace(launch=lambda **_: pytest.fail("Gradio would walk its ports"))
    monkeypatch.setattr("moeclip_hf.app.build_app", lambda *_: page)
    failure = CliRunner().invoke(cli, ["app", "--host", host]).exception
    assert isinstance(failure, MoECLIPError)
    assert str(failure) == f"cannot listen at {host}: taken already, or not an address of this machine"


@pytest.mark.parametrize(
    ("option", "value"), [("--max-upload-mb", "inf"), ("--max-upload-mb", "nan"), ("--max-image-megapixels", "nan")]
)
def test_an_upload_without_bounds_is_wrong_usage(option, value):
    refused = CliRunner().invoke(cli, ["app", option, value])
    assert refused.exit_code == 2
    assert option in refused.stderr


def test_no_process_serves_files_past_the_guard(monkeypatch):
    import gradio as gr

    from moeclip_hf.app import launch_app

    monkeypatch.setenv("GRADIO_NUM_WORKERS", "1")
    with gr.Blocks(analytics_enabled=False) as page:
        gr.HTML("page")
    launch_app(page, block=False)
    try:
        assert getattr(page, "_static_worker_pool", None) is None
    finally:
        page.close()
