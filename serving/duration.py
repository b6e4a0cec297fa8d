"""Durations for people."""


def duration(seconds: float) -> str:
    """Two units at most: 42s, 3m07s, 5h12m, 8d03h."""
    whole = int(seconds)
    for unit, size, smaller, part in (("d", 86400, "h", 3600), ("h", 3600, "m", 60), ("m", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size}{unit}{whole % size // part:02d}{smaller}"
    return f"{whole}s"
