"""Commands of the gateway, one module each; quantgate.py has the table of all commands."""
