"""What `make demo` shows."""

import sys

from PIL import Image

from examples import demo


def test_the_demo_points_at_every_defect_and_lays_all_out_on_a_sheet(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--output-dir", str(tmp_path)])
    demo.main()
    printed = capsys.readouterr().out
    defects = sum(item[3] is not None for item in demo.PHOTOGRAPHS) + sum(
        item[1] is not None for item in demo.TEXTURES
    )
    assert f"on the defect in {defects} of {defects} pictures" in printed
    assert Image.open(tmp_path / "sheet.png").width > 1000
    assert len(list(tmp_path.glob("*_overlay.png"))) == len(demo.PHOTOGRAPHS) + len(demo.TEXTURES)


def test_most_classes_of_the_demo_were_never_adapted_to():
    classes = [item[0] for item in demo.PHOTOGRAPHS + demo.TEXTURES]
    assert sum(name not in demo.ADAPTED_ON for name in classes) > len(classes) / 2
