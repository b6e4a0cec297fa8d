"""Long work in child processes: its input, its output, and how it stops and resumes."""
