"""Bytes and seconds as people read them."""


def gib(n_bytes: float) -> str:
    """Binary units, as graphics cards are sold: 79.6 GiB, 512 MiB."""
    return _scaled(n_bytes, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))


def gigabytes(n_bytes: float) -> str:
    """Decimal units, as files are listed: 73.2 GB, 6.0 MB."""
    return _scaled(n_bytes, 1000, ("B", "kB", "MB", "GB", "TB"))


def duration(seconds: float) -> str:
    """0:07, 12:34, 3:05:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _scaled(number: float, step: int, units: tuple[str, ...]) -> str:
    for unit in units[:-1]:
        if abs(number) < step:
            return f"{number:.0f} {unit}" if unit == units[0] else f"{number:.1f} {unit}"
        number /= step
    return f"{number:.1f} {units[-1]}"
