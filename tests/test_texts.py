"""Evaluation texts and their chunks, against what llama-perplexity counted on the same texts."""

from pathlib import Path

import numpy as np
import pytest

from quant.quality.texts import BUNDLED, TextError, first_scored, model_input, n_scored, read_text, split_chunks


@pytest.mark.parametrize("name", BUNDLED)
def test_the_bundled_texts_are_found_by_name(name: str) -> None:
    text = read_text(name)
    assert text.name == name
    assert len(text.content) > 100_000


def test_one_trailing_newline_is_dropped_and_nothing_else_changed(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"one\r\ntwo\n\n")
    text = read_text(str(path))
    assert (text.name, text.content, text.n_bytes) == ("mine", "one\r\ntwo\n", 10)


def test_a_missing_text_names_the_bundled_ones() -> None:
    with pytest.raises(TextError, match=r"poetry: no such text; .*prose, code, definitions"):
        read_text("poetry")


def test_a_text_that_is_not_utf8_says_where(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("né".encode("latin-1"))
    with pytest.raises(TextError, match="not UTF-8: byte 1 of 2 is 0xe9"):
        read_text(str(path))


def test_a_folder_is_no_text(tmp_path: Path) -> None:
    with pytest.raises(TextError, match="Is a directory"):
        read_text(str(tmp_path))


def test_chunks_are_whole_and_the_rest_is_left() -> None:
    chunks = split_chunks(np.arange(29, dtype=np.int32), 8, "text")
    assert chunks.tolist() == [list(range(8)), list(range(8, 16)), list(range(16, 24))]
    assert split_chunks(np.arange(29, dtype=np.int32), 8, "text", max_chunks=2).tolist() == chunks[:2].tolist()
    assert len(split_chunks(np.arange(29, dtype=np.int32), 8, "text", max_chunks=99)) == 3


def test_a_short_text_is_refused_with_both_numbers() -> None:
    assert len(split_chunks(np.arange(16, dtype=np.int32), 8, "text")) == 2
    with pytest.raises(TextError, match="text has 15 tokens and a context of 8 needs at least 16"):
        split_chunks(np.arange(15, dtype=np.int32), 8, "text")


def test_the_first_token_of_a_chunk_gives_way_to_bos() -> None:
    chunks = np.arange(10, 26, dtype=np.int32).reshape(2, 8)
    read = model_input(chunks, bos=1, adds_bos=True)
    assert read[:, 0].tolist() == [1, 1]
    assert read[:, 1:].tolist() == chunks[:, 1:].tolist()
    assert chunks[0, 0] == 10, "the text itself is unchanged"
    assert model_input(chunks, bos=1, adds_bos=False).tolist() == chunks.tolist()


def test_the_second_half_of_a_chunk_is_scored() -> None:
    assert (first_scored(512), n_scored(512)) == (256, 255)  # 24,990 tokens in 98 chunks, says llama-perplexity
    assert (first_scored(9), n_scored(9)) == (4, 4)
