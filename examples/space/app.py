"""The page of moeclip-hf as a Space; the variable MOECLIP_MODEL names the model, the embedded one by default."""

import os

from moeclip_hf.app import build_app, launch_app

page = build_app(os.environ.get("MOECLIP_MODEL"))

if __name__ == "__main__":
    launch_app(page, host="0.0.0.0", port=7860)
