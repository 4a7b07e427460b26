"""The page of moeclip-hf as a Space.

The variable MOECLIP_MODEL names the model, the embedded one by default, and MOECLIP_REVISION a commit of it.
"""

import os

from moeclip_hf.app import build_app, launch_app

page = build_app(os.environ.get("MOECLIP_MODEL"), revision=os.environ.get("MOECLIP_REVISION"))

if __name__ == "__main__":
    launch_app(page, host="0.0.0.0", port=7860)
