"""What a training step is made of, in shapes: parameters, activations, the head's tiles, rollouts, and their bytes."""

from dataclasses import dataclass, replace


# TRL's fused head computes the vocabulary in tiles of so many tokens and so many words.
HEAD_TOKENS, HEAD_WORDS = 4096, 32768
# Bytes that a CPU gives at a time.
PAGE = 4096


@dataclass(frozen=True)
class Weights:
    """
    Parameters of the model that is trained.

    Args:
        all (`int`): Values, those of adapters among them.
        trained (`int`): Values that are trained.
        frozen_bytes (`int`): Bytes of the others, as they are loaded.
        trained_bytes (`int`): Bytes of the trained ones.
        frozen_values (`int`): How many of the frozen values are not quantised.
        layers (`int`): Blocks.
        layer_values (`int`): Values of the largest block.
        root_values (`int`): Values outside of the blocks: embeddings, head.
        embedding_values (`int`): Values of the input embeddings.
        largest_trained (`int`): Values of the largest trained tensor.
        embedding_trained (`bool`): Whether the input embeddings are trained.
        head_trained (`bool`): Whether the head is trained.
        tied (`bool`): Whether the two are one.
        packed_bytes (`int`, *optional*, defaults to `0`): Bytes of quantised weights, out of `frozen_bytes`.
        buffer_bytes (`int`, *optional*, defaults to `0`): Bytes of tensors that are no parameters, such as EDoRA's factors.
    """

    all: int
    trained: int
    frozen_bytes: int
    trained_bytes: int
    frozen_values: int
    layers: int
    layer_values: int
    root_values: int
    embedding_values: int
    largest_trained: int
    embedding_trained: bool
    head_trained: bool
    tied: bool
    packed_bytes: int = 0
    buffer_bytes: int = 0

    @property
    def width(self) -> float:
        """Bytes of a trained value."""
        return self.trained_bytes / max(self.trained, 1)

    @property
    def bytes(self) -> int:
        return self.frozen_bytes + self.trained_bytes


@dataclass(frozen=True)
class Activations:
    """
    Bytes of the backbone's activations, the head not among them.

    Args:
        base (`int`): Kept for the backward pass outside of blocks.
        saved (`int`): Kept for the backward pass by one block; with gradient checkpointing its input.
        forward (`int`): More that there is for a moment of the forward pass.
        backward (`int`): More that there is for a moment of the backward pass, a recomputed block among it.
        derived (`int`, *optional*, defaults to `0`): What one block works out from its weights once and keeps.
        casts (`int`, *optional*, defaults to `0`): Copies of one block's weights that autocast holds until the forward pass
            ends, and that are not kept for the backward pass.
    """

    base: int
    saved: int
    forward: int
    backward: int
    derived: int = 0
    casts: int = 0

    def with_more(self, moment: int) -> "Activations":
        """With so many bytes more for a moment of each pass."""
        return replace(self, forward=self.forward + moment, backward=self.backward + moment)


@dataclass(frozen=True)
class Head:
    """
    The head of TRL, which never has all logits at once.

    Args:
        tokens (`int`): Positions that are scored.
        vocabulary (`int`): Words.
        width (`int`): Size of a hidden state.
        compute (`int`): Bytes of a value where it computes: 2 under autocast or with 16-bit weights.
        weight (`int`): Bytes of a value of its weight.
        hidden (`int`): Bytes of a value of the hidden states.
        trained (`bool`): Whether its weight has a gradient.
        fused (`bool`): Whether a kernel computes on the tile in place (Triton, on a GPU), or torch with temporaries.
        entropy (`bool`): Whether the entropy has a gradient.
    """

    tokens: int
    vocabulary: int
    width: int
    compute: int
    weight: int
    hidden: int
    trained: bool
    fused: bool
    entropy: bool = False

    @property
    def _tile(self) -> int:
        return min(self.tokens, HEAD_TOKENS) * min(self.vocabulary, HEAD_WORDS)

    @property
    def _whole_buffer(self) -> int:
        return min(self.tokens, HEAD_TOKENS) * HEAD_WORDS * self.compute

    @property
    def _buffer(self) -> int:
        if self.fused:
            return self._whole_buffer
        # A CPU gives memory page by page when it is first written, and of a row only the words that there are.
        row = -(-min(self.vocabulary, HEAD_WORDS) * self.compute // PAGE) * PAGE
        return min(min(self.tokens, HEAD_TOKENS) * row, self._whole_buffer)

    @property
    def reserved(self) -> int:
        """Bytes of the tile that are allocated and never written, which is counted on a GPU only."""
        return self._whole_buffer - self._buffer

    @property
    def _weight_cast(self) -> int:
        return self.compute * (self.weight != self.compute) * min(self.vocabulary, HEAD_WORDS) * self.width

    @property
    def _hidden_cast(self) -> int:
        return self.compute * (self.hidden != self.compute) * min(self.tokens, HEAD_TOKENS) * self.width

    @property
    def forward(self) -> int:
        """Three temporaries of four bytes and a mask for each logit of a tile, where no kernel spares them."""
        # The cast weight is gone when the tile is looked at.
        return self._buffer + self._hidden_cast + max(self._weight_cast, 0 if self.fused else 13 * self._tile)

    @property
    def backward(self) -> int:
        """Gradients in float32 besides, and on a CPU seven temporaries and a mask."""
        gradients = 4 * self.tokens * self.width + 4 * self.trained * self.vocabulary * self.width
        temporaries = 0
        if not self.fused:
            folded = (33 if self.entropy else 29) * self._tile
            multiplied = 0
            if self.compute != 4:
                multiplied = 4 * (self._tile + min(self.vocabulary, HEAD_WORDS) * self.width)
            temporaries = max(folded, multiplied)
        # At its end the gradients are there once more, in the dtype of what they are for.
        returned = self.hidden * self.tokens * self.width * (self.hidden != 4)
        returned += self.weight * self.trained * self.vocabulary * self.width * (self.weight != 4)
        return gradients + max(self._buffer + self._weight_cast + self._hidden_cast + temporaries, returned)


@dataclass(frozen=True)
class Rollouts:
    """
    Rollouts that the process makes with transformers.

    Args:
        sequences (`int`): At a time.
        tokens (`int`): Of one, prompt and completion.
        prompt (`int`): Of its prompt.
        kv_values (`int`): Values of keys and values that one token has in one block.
        width (`int`): Bytes of one of them.
        vocabulary (`int`): Words.
        merged_bytes (`int`): Copies of weights with the adapter merged.
    """

    sequences: int
    tokens: int
    prompt: int
    kv_values: int
    width: int
    vocabulary: int
    merged_bytes: int = 0

    def bytes(self, layers: int, forward_per_token: float) -> int:
        """Cache, one block of it twice while it grows, and the larger of the prompts' forward pass and sampling."""
        cache = self.sequences * self.tokens * self.kv_values * self.width
        sampling = 5 * 4 * self.sequences * self.vocabulary
        prefill = round(forward_per_token * self.sequences * self.prompt)
        return cache * (layers + 1) + max(sampling, prefill) + self.merged_bytes


@dataclass(frozen=True)
class Step:
    """
    A training step as one process takes it.

    Args:
        weights ([`Weights`]): Parameters.
        activations ([`Activations`]): Of one micro-batch.
        head ([`Head`]): Of one micro-batch.
        optimizer (`str`): Name, as in `optim`.
        accumulates (`bool`): Whether gradients of an earlier micro-batch are there already.
        tokens (`int`): Of one micro-batch.
        reference (`bool`): Whether a second model is loaded, as a reference.
        second_pass (`bool`): Whether a reference is computed while the activations of the policy wait.
        extra (`int`): Bytes that wait besides, such as hidden states for masks of tokens.
        rollouts ([`Rollouts`], *optional*): Made by this process.
        autocast (`bool`): Whether it computes in 16 bits whatever the weights are.
    """

    weights: Weights
    activations: Activations
    head: Head
    optimizer: str
    accumulates: bool
    tokens: int
    reference: bool = False
    second_pass: bool = False
    extra: int = 0
    rollouts: Rollouts | None = None
    autocast: bool = False
