"""The page: one image inspected, its experts looked at, many images scored. Needs `pip install 'moeclip-hf[app]'`."""

from moeclip_hf.app.page import build_app
from moeclip_hf.app.serving import launch_app

__all__ = ["build_app", "launch_app"]
