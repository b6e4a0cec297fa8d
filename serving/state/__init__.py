"""Where supervisors and gateways of different processes meet: a database that says who runs what, never how loaded."""
