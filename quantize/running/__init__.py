"""Long work in child processes: what it is told, what it tells, and how it stops and goes on."""
