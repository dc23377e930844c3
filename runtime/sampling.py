"""How the next token is drawn: settings, checked, and the chain of llama.cpp's samplers that they stand for.

Pure: `chain` names the samplers in the order they run, `describe` says the same to people, `setting` reads one value
from YAML. native_sampling.py builds the chain. Knows nothing of models or grammars.

Order and defaults that are off: llama.cpp 0c1e57098, common/common.h `common_params_sampling`, common/sampling.cpp
`common_sampler_init`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields

WHOLE_CONTEXT = -1
"""As a window: every token of the context."""

MAX_SEED = 2**32 - 2
"""llama.cpp takes 2**32 - 1 for "any seed"."""

_INFINITY = float("inf")
_MAX_INT = 2**31 - 1
_MAX_BREAKER_BYTES = 40  # llama.cpp cuts longer ones (src/llama-sampler.cpp, llama_sampler_init_dry)

_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 10.0),
    "dynamic_temperature": (0.0, 10.0),
    "dynamic_exponent": (0.01, 10.0),
    "top_n_sigma": (0.0, 100.0),
    "top_k": (0, _MAX_INT),
    "typical_p": (0.0, 1.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "xtc_probability": (0.0, 1.0),
    "xtc_threshold": (0.0, 0.5),
    "dry_multiplier": (0.0, 100.0),
    "dry_base": (1.0, 10.0),
    "dry_allowed_length": (1, _MAX_INT),
    "dry_window": (WHOLE_CONTEXT, _MAX_INT),
    "repeat_penalty": (0.01, 10.0),
    "frequency_penalty": (-10.0, 10.0),
    "presence_penalty": (-10.0, 10.0),
    "penalty_window": (WHOLE_CONTEXT, _MAX_INT),
    "mirostat": (0, 2),
    "mirostat_tau": (0.1, 100.0),
    "mirostat_eta": (0.0, 1.0),
    "seed": (0, MAX_SEED),
    "max_tokens": (1, _MAX_INT),
}

WHOLE = (
    "top_k",
    "dry_allowed_length",
    "dry_window",
    "penalty_window",
    "mirostat",
    "seed",
    "max_tokens",
)
"""The settings that are whole numbers."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Each cut is off by default, but for top-p."""

    temperature: float = 0.7
    """Divides the logits; 0 takes the likeliest token, whatever the cuts say."""
    top_k: int = 0
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 0.95
    """Keep the likeliest tokens that together have this probability; 1 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the likeliest; 0 keeps all."""
    repeat_penalty: float = 1.0
    """Divides the logits of tokens in the penalty window, or multiplies them below 0; 1 is off."""
    seed: int | None = None
    """None draws a fresh seed for each reply."""
    max_tokens: int | None = None
    """None: until the model ends or the context is full."""

    dynamic_temperature: float = 0.0
    """Moves the temperature up or down by as much, after the entropy of what is left; 0 is off."""
    dynamic_exponent: float = 1.0
    top_n_sigma: float = 0.0
    """Keep tokens whose logit is within as many standard deviations of the highest; 0 keeps all."""
    typical_p: float = 1.0
    """Keep the tokens nearest to the expected surprise that together have this probability; 1 keeps all."""
    xtc_probability: float = 0.0
    """How often, in place of drawing from all, every token above the threshold but the least likely is left out."""
    xtc_threshold: float = 0.1
    dry_multiplier: float = 0.0
    """Penalty of a token that would go on a repetition: multiplier · base^(length − allowed length); 0 is off."""
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_window: int = 64
    """Tokens searched for repetitions, of prompt and answer; -1 is the whole context."""
    dry_breakers: tuple[str, ...] = ("\n", ":", '"', "*")
    """Texts that no repetition reaches across."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it stands in the penalty window."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token in the penalty window."""
    penalty_window: int = 64
    """Last tokens of prompt and answer that the three penalties see; 0 is none, -1 the whole context."""
    mirostat: int = 0
    """1 or 2: hold the surprise of the tokens near `mirostat_tau` bits, in place of penalties and cuts."""
    mirostat_tau: float = 5.0
    mirostat_eta: float = 0.1
    """How fast it learns."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Token ids and what is added to their logits; -inf forbids one."""

    def __post_init__(self) -> None:
        """Raise ValueError for a setting outside its range."""
        for name, (low, high) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{name} is {value}; it must lie between {low} and {high}")
        for text in self.dry_breakers:
            if not 0 < len(text.encode("utf-8", "replace")) <= _MAX_BREAKER_BYTES or "\0" in text:
                raise ValueError(f"dry_breakers has {text!r}; each must have 1 to {_MAX_BREAKER_BYTES} bytes")
        seen = set()
        for token, bias in self.logit_bias:
            if not 0 <= token <= _MAX_INT:
                raise ValueError(f"logit_bias has token {token}; ids lie between 0 and {_MAX_INT}")
            if not -_INFINITY <= bias <= 1000.0:
                raise ValueError(f"logit_bias of token {token} is {bias}; it must be -inf or at most 1000")
            if token in seen:
                raise ValueError(f"logit_bias has token {token} twice")
            seen.add(token)


NAMES = tuple(field.name for field in fields(Sampling))


def setting(name: str, value: object) -> object:
    """One of `NAMES` as YAML or JSON has it, as `Sampling` takes it. Raises ValueError that says what it must be."""
    if name == "dry_breakers":
        if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
            raise ValueError(f"must be a list of texts, not {value!r}")
        return tuple(value)
    if name == "logit_bias":
        if not isinstance(value, dict) or not all(_is_whole(t) and _is_number(b) for t, b in value.items()):
            raise ValueError(f"must be a mapping of token ids to numbers, not {value!r}")
        return tuple(value.items())
    if not _is_number(value):
        raise ValueError(f"must be a number, not {value!r}")
    if name in WHOLE and not _is_whole(value):
        raise ValueError(f"must be a whole number, not {value!r}")
    return value


def chain(sampling: Sampling) -> tuple[str, ...]:
    """The samplers that run, in order, by llama.cpp's names for them. What changes nothing is left out.

    `zeros` is ours: it drops tokens of probability 0 before samplers that take their logarithm.
    """
    s = sampling
    bias = ("logit-bias",) if s.logit_bias else ()
    if s.mirostat and s.temperature > 0:
        return (*bias, "temp", *(("zeros", "mirostat") if s.mirostat == 1 else ("mirostat-v2",)))
    penalizes = s.penalty_window != 0 and (s.repeat_penalty != 1 or s.frequency_penalty != 0 or s.presence_penalty != 0)
    wanted = {
        "penalties": penalizes,
        "dry": s.dry_multiplier > 0 and s.dry_window != 0,
    }
    if s.temperature > 0:
        wanted |= {
            "top-n-sigma": s.top_n_sigma > 0,
            "top-k": s.top_k > 0,
            "zeros": s.typical_p < 1,
            "typical": s.typical_p < 1,
            "top-p": s.top_p < 1,
            "min-p": s.min_p > 0,
            "xtc": s.xtc_probability > 0,
            "temp-ext": s.temperature != 1 or s.dynamic_temperature > 0,
        }
    last = "dist" if s.temperature > 0 else "greedy"
    return (*bias, *(name for name, runs in wanted.items() if runs), last)


def describe(sampling: Sampling, seed: int | None = None) -> str:
    """The chain in one line, such as `top-k 40 → temperature 0.7 → draw, seed 3`."""
    s = sampling
    drawn = "any seed" if seed is None else f"seed {seed}"
    dynamic = f" ± {s.dynamic_temperature:g} by entropy^{s.dynamic_exponent:g}" if s.dynamic_temperature else ""
    window = "the whole context" if s.penalty_window == WHOLE_CONTEXT else f"the last {s.penalty_window} tokens"
    penalties = [(s.repeat_penalty, 1, "repeat"), (s.frequency_penalty, 0, "frequency")]
    penalties.append((s.presence_penalty, 0, "presence"))
    words = {
        "logit-bias": "logit bias of " + ", ".join(f"{token}: {bias:+g}" for token, bias in s.logit_bias),
        "penalties": f"penalties ({', '.join(f'{n} {v:g}' for v, off, n in penalties if v != off)}; {window})",
        "dry": f"DRY {s.dry_multiplier:g} · {s.dry_base:g}^(length − {s.dry_allowed_length}) over "
        + ("the whole context" if s.dry_window == WHOLE_CONTEXT else f"the last {s.dry_window} tokens"),
        "top-n-sigma": f"top-n-sigma {s.top_n_sigma:g}",
        "top-k": f"top-k {s.top_k}",
        "zeros": "without zeros",
        "typical": f"typical {s.typical_p:g}",
        "top-p": f"top-p {s.top_p:g}",
        "min-p": f"min-p {s.min_p:g}",
        "xtc": f"XTC {s.xtc_probability:g} above {s.xtc_threshold:g}, {drawn}",
        "temp": f"temperature {s.temperature:g}",
        "temp-ext": f"temperature {s.temperature:g}{dynamic}",
        "mirostat": f"mirostat, {s.mirostat_tau:g} bits, rate {s.mirostat_eta:g}, {drawn}",
        "mirostat-v2": f"mirostat 2, {s.mirostat_tau:g} bits, rate {s.mirostat_eta:g}, {drawn}",
        "dist": f"draw, {drawn}",
        "greedy": "the likeliest",
    }
    return " → ".join(words[name] for name in chain(sampling))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
