"""A range of whole numbers as GBNF: sequences, one of which every number of the range fits, and no other."""


def whole_numbers(low: int, high: int) -> list[str]:
    """Sequences for 0 ≤ low … high, without leading zeros: `whole_numbers(8, 12)` → `[8-9]`, `"1" [0-2]`."""
    found = []
    for n_digits in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (n_digits - 1) if n_digits > 1 else 0)
        found += _digits(str(first), str(min(high, 10**n_digits - 1)))
    return found


def _digits(low: str, high: str) -> list[str]:
    """Sequences for the numbers from low to high, which have equally many digits."""
    n_rest = len(low) - 1
    if low.strip("0") == "" and high.strip("9") == "":
        return [f"[0-9]{{{len(low)}}}"]
    if n_rest == 0:
        return [f"[{low}-{high}]"]
    if low[0] == high[0]:
        return [f'"{low[0]}" {rest}' for rest in _digits(low[1:], high[1:])]
    least, most = int(low[0]), int(high[0])
    found, upper = [], []
    if low[1:].strip("0"):
        found += [f'"{low[0]}" {rest}' for rest in _digits(low[1:], "9" * n_rest)]
        least += 1
    if high[1:].strip("9"):
        upper = [f'"{high[0]}" {rest}' for rest in _digits("0" * n_rest, high[1:])]
        most -= 1
    return [*found, *([f"[{least}-{most}] [0-9]{{{n_rest}}}"] if least <= most else []), *upper]
