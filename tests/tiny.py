"""Tiny random models of ten families, eleven stacks: the columns of the contract; and adapters on them."""

from pathlib import Path

import torch
import transformers as T
from datasets import Dataset
from peft import get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

ENCODER = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
    max_position_embeddings=70, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
DECODER = dict(
    vocab_size=64, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1,
    intermediate_size=32, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def t5() -> nn.Module:
    return T.T5ForConditionalGeneration(
        T.T5Config(
            vocab_size=64,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=4,
            num_heads=2,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
            eos_token_id=1,
        )  # fmt: skip
    )


BUILD = {
    "BERT": lambda: T.BertForSequenceClassification(T.BertConfig(**ENCODER)),
    "RoBERTa": lambda: T.RobertaForSequenceClassification(T.RobertaConfig(**ENCODER)),
    "DistilBERT": lambda: T.DistilBertForSequenceClassification(
        T.DistilBertConfig(
            vocab_size=64,
            dim=16,
            n_layers=4,
            n_heads=2,
            hidden_dim=32,
            max_position_embeddings=64,
            dropout=0.0,
            attention_dropout=0.0,
            seq_classif_dropout=0.0,
        )  # fmt: skip
    ),
    "DeBERTa-v2": lambda: T.DebertaV2ForSequenceClassification(
        T.DebertaV2Config(
            **ENCODER,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=8,
            conv_kernel_size=3,
            norm_rel_ebd="layer_norm",
        )  # fmt: skip
    ),
    "GPT-2": lambda: T.GPT2LMHeadModel(
        T.GPT2Config(
            vocab_size=64,
            n_embd=16,
            n_layer=4,
            n_head=2,
            n_positions=64,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )  # fmt: skip
    ),
    "Llama": lambda: T.LlamaForCausalLM(T.LlamaConfig(**DECODER)),
    "Qwen 3": lambda: T.Qwen3ForCausalLM(T.Qwen3Config(**DECODER, head_dim=8)),
    "Gemma 3": lambda: T.Gemma3ForCausalLM(T.Gemma3TextConfig(**DECODER, head_dim=8, sliding_window=8)),
    "T5 encoder": t5,
    "T5 decoder": t5,
    "ViT": lambda: T.ViTForImageClassification(
        T.ViTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=16,
            patch_size=4,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )  # fmt: skip
    ),
}
STACKS = list(BUILD)
CLASSIFIERS = {"BERT", "RoBERTa", "DistilBERT", "DeBERTa-v2"}


def build(stack: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The base of a stack: always the same weights, parameters frozen, in eval mode."""
    torch.manual_seed(0)
    return BUILD[stack]().to(dtype).requires_grad_(False).eval()


def layers_path(stack: str) -> str | None:
    """What `LoR2CConfig(layers=...)` needs: only an encoder-decoder has to name a stack."""
    return {"T5 encoder": "encoder.block", "T5 decoder": "decoder.block"}.get(stack)


def task_type(stack: str) -> str | None:
    if stack in CLASSIFIERS:
        return "SEQ_CLS"
    return {"ViT": None, "T5 encoder": "SEQ_2_SEQ_LM", "T5 decoder": "SEQ_2_SEQ_LM"}.get(stack, "CAUSAL_LM")


def batch(stack: str, seed: int = 1, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two rows with labels; the first row of a text batch is padded where the model takes padding."""
    g = torch.Generator().manual_seed(seed)
    if stack == "ViT":
        pixels = torch.randn(2, 3, 16, 16, generator=g).to(dtype)
        return dict(pixel_values=pixels, labels=torch.randint(0, 2, (2,), generator=g))
    ids = torch.randint(3, 64, (2, 12), generator=g)
    mask = torch.ones_like(ids)
    if stack in CLASSIFIERS:
        mask[0, -3:] = 0
        return dict(input_ids=ids, attention_mask=mask, labels=torch.randint(0, 2, (2,), generator=g))
    labels = torch.randint(3, 64, (2, 6), generator=g) if stack.startswith("T5") else ids.clone()
    return dict(input_ids=ids, attention_mask=mask, labels=labels)


def words_and_rows() -> tuple[T.PreTrainedTokenizerFast, Dataset]:
    """A tokenizer of sixty words for the decoders, and sixteen rows of text: what TRL's trainers take."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(60))]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    names = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    rows = Dataset.from_dict({"text": [" ".join(f"w{(7 * i + j) % 60}" for j in range(10)) for i in range(16)]})
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, **names), rows


def byte_tokenizer() -> T.PreTrainedTokenizerFast:
    """A tokenizer that knows every text: a token for each byte, and start, end and padding marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return T.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def decoder_folder(folder: Path) -> str:
    """A random Llama of four layers that reads bytes, on disk."""
    torch.manual_seed(0)
    config = T.LlamaConfig(**{**DECODER, "vocab_size": 259, "max_position_embeddings": 512, "initializer_range": 0.3})
    T.LlamaForCausalLM(config).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


SPANS = [[0, 0], [1, 3]]


def adapted(stack: str, dtype: torch.dtype = torch.float32, std: float = 0.2, **config):
    """The stack's base with residuals whose B is random (std=0: as created)."""
    settings = dict(r=2, alpha=4, dropout=0.0, spans=SPANS, layers=layers_path(stack), task_type=task_type(stack))
    if stack == "ViT":
        settings["modules_to_save"] = ["classifier"]
    import lor2c  # here, because a test loads what was folded without lor2c

    model = get_peft_model(build(stack, dtype), lor2c.LoR2CConfig(**settings | config)).eval()
    torch.manual_seed(1)
    if std:
        for name, p in model.named_parameters():
            if "lor2c_B" in name:
                torch.nn.init.normal_(p, std=std)
    return model


def with_values(model):
    """Made-up values in B and in trained heads, in place of training."""
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "_B." in name or "modules_to_save" in name:
            torch.nn.init.normal_(p, std=0.2)
    return model.eval()


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def written_out(h, layer, depth, residuals):
    """h[b+1] = Layer(h[b]) + scaling * B A h[a], with rows for vectors. Returns all hidden states."""
    states = [h]
    for t in range(depth):
        h = layer(t, h)
        for (start, end), (A, B, scaling) in residuals.items():
            if end == t:
                h = h + scaling * (states[start] @ A.transpose(0, 1)) @ B.transpose(0, 1)
        states.append(h)
    return states
