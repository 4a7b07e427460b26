"""MoECLIP for Hugging Face."""

from moeclip_hf._version import __version__

__all__ = ["__version__"]
