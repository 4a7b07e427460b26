"""`python -m moeclip_hf.cli` is the `moeclip` command."""

from moeclip_hf.cli import main

main()
