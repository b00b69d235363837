"""The closed-vocabulary tokenizer and the small UMT5 encoder of the bundled model."""

from __future__ import annotations

from scenes import vocabulary
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

MAX_SEQUENCE_LENGTH = 32
TEXT_DIM = 128


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word; case and punctuation do not count; unknown words become <unk>."""
    words = ["<pad>", "</s>", "<unk>", *vocabulary()]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Lowercase(), normalizers.Replace(r"-", " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation(behavior="removed")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=MAX_SEQUENCE_LENGTH,
    )  # fmt: skip


def build_text_encoder(vocab_size: int) -> UMT5EncoderModel:
    config = UMT5Config(
        vocab_size=vocab_size, d_model=TEXT_DIM, d_kv=32, d_ff=256, num_layers=2, num_heads=4, dropout_rate=0.0,
        relative_attention_num_buckets=16, relative_attention_max_distance=32, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    )  # fmt: skip
    return UMT5EncoderModel(config)


def embed(tokenizer, encoder, texts: list[str], device):
    """(B, 32, 128) embeddings, zero past each text's end, as WanPipeline makes them."""
    batch = tokenizer(texts, padding="max_length", max_length=MAX_SEQUENCE_LENGTH, truncation=True, return_tensors="pt")
    mask = batch.attention_mask.to(device)
    states = encoder(batch.input_ids.to(device), mask).last_hidden_state
    return states * mask[..., None]
