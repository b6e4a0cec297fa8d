"""Schemas and readers of configuration files and variant directories. Imports no other package of quantgate."""
