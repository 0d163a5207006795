"""A real transformers model that is a Markov chain over characters, so that every probability is known."""

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789 :"
SPECIAL = ["<pad>", "<eos>", "<unk>"]


def chain_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def chain_model(tokenizer: PreTrainedTokenizerFast, transitions: dict[str, dict[str, float]]) -> LlamaForCausalLM:
    """`transitions[a][b]` is the probability of the token `b` after `a`; a token that is not listed ends the text."""
    size = len(tokenizer)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size + size % 2,
        intermediate_size=4,
        num_hidden_layers=1,
        num_attention_heads=1,
        rms_norm_eps=1e-12,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        # The layer adds nothing, so the last hidden state is the scaled one-hot vector of the current token.
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size, config.hidden_size))
        logits = torch.full((size, config.hidden_size), -100.0)
        for index in range(size):
            after = transitions.get(tokenizer.convert_ids_to_tokens(index), {"<eos>": 1.0})
            for token, probability in after.items():
                logits[tokenizer.convert_tokens_to_ids(token), index] = torch.tensor(probability).log()
        model.lm_head.weight.copy_(logits / config.hidden_size**0.5)
    return model
