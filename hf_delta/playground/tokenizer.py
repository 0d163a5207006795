"""One token a character, as an ordinary fast tokenizer."""

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


MAX_LENGTH = 256
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>")

# Messages are joined without role markers, so a conversational prompt has the same tokens as the plain one.
CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- message['content'] }}"
    "{%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}{%- endfor %}"
)


def build_tokenizer(alphabet: str) -> PreTrainedTokenizerFast:
    """A tokenizer with the four special tokens first, then the characters of the alphabet in order.

    It pads on the left, as generation needs, and adds no special token by itself. A character outside the alphabet
    becomes `<unk>`.
    """
    vocabulary = {token: index for index, token in enumerate((*SPECIAL_TOKENS, *dict.fromkeys(alphabet)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    # `.` would leave a line break in one piece with its neighbours.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=MAX_LENGTH,
        chat_template=CHAT_TEMPLATE,
    )
