"""How many operations a piece of work needs: what the floors and rates of bench.py are made of.

A product of matrices with n numbers takes 2 n operations a token. Counted is what the answer or the gradient needs, whichever way it is made:
a way that computes something twice, or that lays out pairs of tokens which do not see each other, gets no credit for it. Left out are norms,
softmax, gates and sums. Shape letters as in in_place_ttt.py; Z is the width of a side stream, R the rank of P, K the numbers of a code.
"""
from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fast_weight import TTTConfig, code_sizes
from side_stream import HEAD, WIDER


def pairs(length: int, before: int = 0) -> float:
    """(token, token it sees) of a text of this length behind `before` others."""
    return length * before + length * (length + 1) / 2


@dataclass(frozen=True)
class BaseCost:
    """A decoder's products: numbers in the matrices of its layers (body) and of its head, width of its attention, layers."""

    body: int
    head: int
    attention: int
    layers: int

    @classmethod
    def of(cls, model) -> "BaseCost":
        config, decoder = model.get_decoder().config, model.get_decoder()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        body = sum(module.weight.numel() for module in decoder.modules() if isinstance(module, nn.Linear))
        return cls(body, model.get_output_embeddings().weight.numel(), config.num_attention_heads * head_dim, len(decoder.layers))

    def forward(self, length: int, before: int = 0, predicted: int = 1, layers: int | None = None) -> float:
        """Operations of reading `length` tokens behind `before` others and predicting behind `predicted` of them; of the first `layers` layers alone."""
        share = (self.layers if layers is None else layers) / self.layers
        return share * (2 * self.body * length + 4 * self.attention * self.layers * pairs(length, before)) + 2 * self.head * predicted

    def answer(self, prompt: int, new: int, before: int = 0) -> float:
        """A prompt and so many new tokens behind it; the last of them is not read."""
        return self.forward(prompt + new - 1, before, predicted=new)

    def backward(self, length: int, before: int = 0, predicted: int = 1, first: int = 0) -> float:
        """The gradient of the same to the layers' inputs, the base frozen: through the head and the layers above `first`; attention's backward
        pass takes twice its forward pass."""
        share = (self.layers - first) / self.layers
        return share * (2 * self.body * length + 8 * self.attention * self.layers * pairs(length, before)) + 2 * self.head * predicted


@dataclass(frozen=True)
class MemoryCost:
    """What an adapter adds to a base of width D and feed-forward size F."""

    config: TTTConfig
    hidden: int
    feed_forward: int

    def _stream(self, heads: int, length: int, seen: float) -> float:
        """A side stream's block over `length` tokens that see `seen` pairs."""
        width = heads * HEAD
        return 2 * length * (self.hidden * width + (3 + 2 * WIDER) * width ** 2) + 4 * width * seen

    def _code(self, heads: int) -> float:
        return 2 * (self.hidden + heads * HEAD) * (sum(code_sizes(self.feed_forward)) + 1)

    def _value(self) -> float:
        """t P, of both targets where there are two, and the conv before it."""
        rank, targets = self.config.value_rank, 2 if self.config.target == "both" else 1
        return targets * (4 * self.hidden * rank if rank else 2 * self.hidden ** 2) + targets * 2 * self.config.kernel * self.hidden

    def write(self, length: int, slots: float) -> float:
        """A text that leaves so many slots a layer. Of deep arms with codes: stream, codes, values of the slots, and the solve by Cholesky."""
        heads = self.config.write_attention
        solve = slots ** 2 * 2 * sum(code_sizes(self.feed_forward)) + slots ** 3 / 3 + 2 * slots ** 2 * self.hidden
        seen = length ** 2 - length * (length - 1) / 2 * (heads // 2) / heads  # every second head looks back alone
        layer = self._stream(heads, length, seen) + length * self._code(heads) + slots * self._value() + solve
        return len(self.config.layers) * layer + 2 * self.hidden * heads * HEAD * length

    def write_chunks(self, length: int) -> float:
        """A text of several chunks, keys h: values, and what earlier chunks add to each token, by slots or by the dense update, whichever is less."""
        seen = max(0, length - self.config.chunk) / 2  # slots, a token on average
        share = min(2 * seen * (self.feed_forward + self.hidden), 4 * self.feed_forward * self.hidden)
        return len(self.config.layers) * length * (self._value() + share)

    def read(self, length: int, slots: float, dense: bool = False, before: int = 0) -> float:
        """`length` tokens of questions, each of which asks a memory of so many slots. Of deep arms with codes."""
        heads = self.config.read_attention
        met = 2 * self.feed_forward * self.hidden if dense else 2 * slots * (sum(code_sizes(self.feed_forward)) + self.hidden)
        layer = self._stream(heads, length, pairs(length, before)) + length * (self._code(heads) + 2 * self.hidden + met)
        return len(self.config.layers) * layer + 2 * self.hidden * heads * HEAD * length
