"""Runs in an environment of its own: llama.cpp's HTTP server on a model with random weights, made on the spot.

PORT MODEL_FILE [--embeddings] [--prefix /PATH]. The model is a true GGUF file of a true architecture, of one layer and
a byte-level vocabulary, so that nothing has to be downloaded; what it says is gibberish, the same for the same seed.
"""

import argparse
import signal
from pathlib import Path

import gguf
import numpy as np
import xllamacpp

NAME = "tiny-random"
WIDTH, HEADS, HIDDEN = 32, 4, 64
SLOTS, CONTEXT = 4, 16_384  # room for an answer that takes seconds, for a client that leaves it


def alphabet() -> list[str]:
    """Return a character for each byte, as GPT-2's tokenizer has them."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return [chr(byte) for byte in plain] + [chr(256 + place) for place in range(len(others))]


def make_model(path: Path) -> None:
    """Write the model."""
    tokens = [*alphabet(), "<|end|>"]
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(NAME)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(256)
    writer.add_add_bos_token(False)
    random = np.random.default_rng(7)

    def weights(*shape: int) -> np.ndarray:
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    ones = np.ones(WIDTH, np.float32)
    writer.add_tensor("token_embd.weight", weights(len(tokens), WIDTH))
    writer.add_tensor("output.weight", weights(len(tokens), WIDTH))
    writer.add_tensor("output_norm.weight", ones)
    for name in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.0.{name}.weight", ones)
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        writer.add_tensor(f"blk.0.{name}.weight", weights(WIDTH, WIDTH))
    for name, shape in (("ffn_gate", (HIDDEN, WIDTH)), ("ffn_up", (HIDDEN, WIDTH)), ("ffn_down", (WIDTH, HIDDEN))):
        writer.add_tensor(f"blk.0.{name}.weight", weights(*shape))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("model", type=Path)
    parser.add_argument("--embeddings", action="store_true")
    parser.add_argument("--prefix", default="")
    arguments = parser.parse_args()
    if not arguments.model.exists():
        make_model(arguments.model)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(arguments.model)
    parameters.model_alias = {NAME}
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = arguments.port
    parameters.api_prefix = arguments.prefix
    parameters.n_ctx, parameters.n_parallel, parameters.warmup = SLOTS * CONTEXT, SLOTS, False
    parameters.cpuparams.n_threads = 1
    parameters.chat_template = "chatml"
    if arguments.embeddings:
        parameters.embedding = True
        parameters.pooling_type = xllamacpp.llama_pooling_type.LLAMA_POOLING_TYPE_MEAN
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    signal.pause()


if __name__ == "__main__":
    main()
