"""Clients as people install them, each in an environment of its own, through a gateway before a fake.

`python -m tests.clients NAME...` installs and runs some, without names all; `--list` shows them. `--write` puts what
came of it into results.json and into the table of gateway/README.md.
"""
