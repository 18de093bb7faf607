"""The language model and the WebSocket frames of the chat workspace."""

import random
import struct
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "examples" / "chat"))

from ngram_chat import websocket
from ngram_chat.model import ModelFileError, NgramModel, sentences

TEXT = """# A heading is not learned

The node signs a receipt for every task. The bootstrap checks the receipt against what it saw. The node keeps the
receipt until the bootstrap has acknowledged it. A task runs on one node at a time.

| tables | are not learned |

```
code is not learned either.
```
"""


def answer(model: NgramModel, seed: int, *, prompt: str = "", pieces: int = 30, temperature: float = 1.0) -> str:
    rng = random.Random(seed)
    return "".join(model.pieces(prompt, max_pieces=pieces, temperature=temperature, rng=rng))


def test_only_prose_is_learned() -> None:
    found = [" ".join(sentence) for sentence in sentences(TEXT)]
    assert found[0] == "The node signs a receipt for every task ."
    assert len(found) == 4


def test_one_seed_always_gives_the_same_words() -> None:
    model = NgramModel.train([TEXT])
    assert answer(model, 7) == answer(model, 7)
    assert len({answer(model, seed) for seed in range(20)}) > 5


def test_a_saved_model_answers_as_the_trained_one(tmp_path: Path) -> None:
    model = NgramModel.train([TEXT])
    model.save(tmp_path / "model.json")
    loaded = NgramModel.load(tmp_path / "model.json")
    assert [answer(loaded, seed) for seed in range(5)] == [answer(model, seed) for seed in range(5)]


def test_a_model_file_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.json").write_text('{"format": 99, "counts": {}}')
    with pytest.raises(ModelFileError):
        NgramModel.load(tmp_path / "model.json")


def test_temperature_zero_needs_no_luck() -> None:
    model = NgramModel.train([TEXT])
    assert answer(model, 1, temperature=0, pieces=4) == answer(model, 2, temperature=0, pieces=4)


def test_an_answer_is_never_longer_than_asked_for() -> None:
    model = NgramModel.train([TEXT])
    for limit in (1, 2, 50):
        assert len(list(model.pieces("", max_pieces=limit, temperature=1.0, rng=random.Random(1)))) <= limit


def test_the_accept_value_is_that_of_the_standard() -> None:
    # RFC 6455, 1.3
    assert websocket.accept_value("dGhlIHNhbXBsZSBub25jZQ==") == "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="


def masked(opcode: int, payload: bytes, *, final: bool = True) -> bytes:
    mask = b"\x37\xfa\x21\x3d"
    body = bytes(value ^ mask[index % 4] for index, value in enumerate(payload))
    size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + struct.pack("!H", len(payload))
    return bytes([(0x80 if final else 0) | opcode]) + size + mask + body


def test_a_masked_hello_of_the_standard_is_read() -> None:
    # RFC 6455, 5.7
    frame = bytes.fromhex("818537fa213d7f9f4d5158")
    assert list(websocket.FrameReader().feed(frame)) == [websocket.Message(websocket.TEXT, b"Hello")]


def test_frames_may_arrive_byte_by_byte_and_in_fragments_with_a_ping_between() -> None:
    reader = websocket.FrameReader()
    wire = (
        masked(websocket.TEXT, b"Hel", final=False)
        + masked(websocket.PING, b"?")
        + masked(websocket.CONTINUATION, b"lo" * 100)
    )
    messages = [message for index in range(len(wire)) for message in reader.feed(wire[index : index + 1])]
    assert messages == [
        websocket.Message(websocket.PING, b"?"),
        websocket.Message(websocket.TEXT, b"Hel" + b"lo" * 100),
    ]


@pytest.mark.parametrize(
    ("wire", "code"),
    [
        (websocket.frame(websocket.TEXT, b"unmasked"), 1002),
        (b"\xf1" + masked(websocket.TEXT, b"x")[1:], 1002),
        (masked(0x3, b"x"), 1002),
        (masked(websocket.PING, b"x" * 130), 1002),
        (masked(websocket.CONTINUATION, b"x"), 1002),
        (b"\x81\xff" + struct.pack("!Q", 1 << 40), 1009),
    ],
)
def test_broken_frames_end_the_connection_with_the_standards_code(wire: bytes, code: int) -> None:
    with pytest.raises(websocket.WebSocketError) as caught:
        list(websocket.FrameReader().feed(wire))
    assert caught.value.code == code
