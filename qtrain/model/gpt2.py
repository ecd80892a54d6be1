"""GPT-2 whole, quantizable in eager mode: pre-norm blocks, tanh-GELU, tied head; a KV cache.

Each Linear layer stands between its own QuantStub and DeQuantStub. All else stays in
float: embeddings, LayerNorm, attention with its mask and softmax, GELU, residual
sums.

Shapes: B batch, T tokens of one call, S tokens seen by attention (T and the cache's),
C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from qtrain.backend.torch_ao import DeQuantStub, QuantStub
from qtrain.common.validate import MANY, WIDE, number, refuse, text, whole
from qtrain.model.gpt2_block import Block, Call
from qtrain.model.kv_cache import KVCache
from qtrain.model.pretrained import load_gpt2
from qtrain.model.sampling import Sampling


class GPT2(nn.Module):
    """GPT-2 as published; with the default sizes it has 124,439,808 parameters.

    The head is a Linear layer of its own, `lm_head`, without bias, and its weight is
    the same Parameter as `wte.weight`. A conversion that packs the head leaves the
    embedding as it is.

    Args:
        vocab_size: V.
        n_positions: tokens of the longest context.
        n_layer: number of blocks.
        n_head: heads of each block; divides n_embd.
        n_embd: width.
        dropout: of embeddings, attention weights and what each half of a block adds;
            in [0, 1).
        pretrained: a folder or hub name for `load_gpt2`. The checkpoint's sizes
            replace those given. None: weights are drawn from torch's global
            generator.

    Raises:
        ValueError: a parameter is out of range, or `load_gpt2` refuses the
            checkpoint.
    """

    # Its state dict holds all tensors that it has, so that it can be made without
    # any, and filled.
    is_all_state = True

    def __init__(
        self,
        *,
        vocab_size: int = 50257,
        n_positions: int = 1024,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        dropout: float = 0.0,
        pretrained: str | None = None,
    ) -> None:
        super().__init__()
        sizes = dict(
            vocab_size=vocab_size,
            n_positions=n_positions,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
        )
        refuse(text("pretrained", pretrained, null=True))
        if pretrained is not None:
            sizes, weights = load_gpt2(pretrained)
        most = {
            "vocab_size": MANY,
            "n_positions": MANY,
            "n_layer": 1024,
            "n_head": 1024,
            "n_embd": WIDE,
        }
        problems = [
            line
            for name, value in sizes.items()
            for line in whole(name, value, 1, most[name])
        ]
        refuse(problems + number("dropout", dropout, least=0, below=1))
        self.vocab_size, self.n_positions, self.n_layer, self.n_head, self.n_embd = (
            sizes.values()
        )
        if self.n_embd % self.n_head:
            refuse(
                [f"n_embd={self.n_embd}: must be a multiple of n_head={self.n_head}"]
            )
        self.wte = nn.Embedding(self.vocab_size, self.n_embd)
        self.wpe = nn.Embedding(self.n_positions, self.n_embd)
        self.dropout = nn.Dropout(dropout)
        self.h = nn.ModuleList(
            Block(self.n_embd, self.n_head, dropout) for _ in range(self.n_layer)
        )
        self.ln_f = nn.LayerNorm(self.n_embd)
        self.quant_head, self.dequant_head = QuantStub(), DeQuantStub()
        self.lm_head = nn.Linear(self.n_embd, self.vocab_size, bias=False)
        self.lm_head.weight = self.wte.weight
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.LayerNorm):
                # Eager mode's mark of a layer that stays in float.
                module.__dict__["qconfig"] = None
        if pretrained is None:
            self.init_weights()
        else:
            self.load_state_dict(weights)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws all as published: normal(0, 0.02), residual ones / sqrt(2 n_layer), no biases."""
        for name, parameter in self.named_parameters():  # the tied weight comes once
            if parameter.dim() == 2:
                depth = 2 * self.n_layer if name.endswith("c_proj.weight") else 1
                parameter.normal_(0.0, 0.02 / math.sqrt(depth))
            elif name.endswith("bias"):
                parameter.zero_()

    def fuse_model(self, is_qat: bool) -> None:
        """Does nothing: no layer follows a Linear directly that torch could fuse with it."""

    def forward(
        self, idx: Tensor, cache: KVCache | None = None, *, last_only: bool = False
    ) -> Tensor:
        """Returns the logits of each next token.

        Args:
            idx: int64 (B, T), tokens in 0..V-1.
            cache: holds the tokens before these, and these afterwards. No gradient
                flows then.
            last_only: compute the logits of the last position only.

        Returns:
            (B, T, V), or (B, 1, V) with last_only.

        Raises:
            ValueError: the context, cached tokens included, is longer than
                n_positions.
        """
        num_tokens = idx.shape[1]
        start = 0 if cache is None else cache.length
        if start + num_tokens > self.n_positions:
            problem = (
                f"context={start + num_tokens}: "
                f"must be at most n_positions={self.n_positions}"
            )
            raise ValueError(
                f"{problem}; shorten the input (data.context), "
                "or train with a larger model.n_positions"
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and cache is None):
            blocks: Iterable[Call] = self.h if cache is None else cache.blocks
            slots = (
                [None] * self.n_layer if cache is None else cache.slots(num_tokens)
            )
            mask = None
            if start and num_tokens > 1:
                mask = torch.ones(
                    num_tokens,
                    start + num_tokens,
                    dtype=torch.bool,
                    device=idx.device,
                ).tril(start)
            position = torch.arange(start, start + num_tokens, device=idx.device)
            x = self.wte(idx) + self.wpe(position)  # (B, T, C)
            x = self.dropout(x) if cache is None else x
            for block, slot in zip(blocks, slots, strict=True):
                x = block(x, slot, mask)
            if cache is not None:
                cache.length += num_tokens
            x = self.ln_f(x[:, -1:] if last_only else x)
            # (B, T or 1, V)
            return self.dequant_head(self.lm_head(self.quant_head(x)))

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        greedy: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop_token: int | None = None,
        cache: str = "float",
    ) -> Tensor:
        """Returns `idx` continued, token by token, in eval mode.

        Args:
            idx: int64 (B, T), prompts of one length.
            max_new_tokens: tokens to add; with the prompt at most n_positions.
            greedy, temperature, top_k, top_p, repetition_penalty: see `Sampling`.
            seed: of the generator that draws; torch's global one is left alone.
            stop_token: a row that has drawn it is filled up with it; once all rows
                have, it ends.
            cache: how keys and values are kept, see `KVCache`: "float" or "int8".

        Returns:
            int64 (B, T + n), n <= max_new_tokens.
        """
        sampling = Sampling(
            greedy=greedy,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            repetition_penalty=repetition_penalty,
        )
        new = self.stream(
            idx,
            max_new_tokens,
            sampling,
            seed=seed,
            stop_token=stop_token,
            cache=cache,
        )
        return torch.cat([idx, *new], dim=1)

    def stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        *,
        seed: int = 0,
        stop_token: int | None = None,
        cache: str = "float",
    ) -> Iterator[Tensor]:
        """Returns an iterator over the new tokens, int64 (B, 1), as they come; see `generate`."""
        _check_request(self, idx.shape[1], max_new_tokens, sampling)
        kept = KVCache(self, len(idx), idx.shape[1] + max_new_tokens, cache)
        return self._stream(idx, max_new_tokens, sampling, seed, stop_token, kept)

    @torch.no_grad()
    def _stream(
        self,
        idx: Tensor,
        max_new_tokens: int,
        sampling: Sampling,
        seed: int,
        stop_token: int | None,
        cache: KVCache,
    ) -> Iterator[Tensor]:
        batch_size = len(idx)
        generator = torch.Generator(idx.device).manual_seed(seed)
        tokens = [idx]
        done = torch.zeros(batch_size, 1, dtype=torch.bool, device=idx.device)
        was_training = self.training
        self.eval()
        try:
            for _ in range(max_new_tokens):
                logits = self(tokens[-1], cache, last_only=True)[:, -1]  # (B, V)
                new = sampling.choose(logits, tokens, generator)
                if stop_token is not None:
                    new = new.masked_fill(done, stop_token)
                    done |= new == stop_token
                tokens.append(new)
                yield new
                if stop_token is not None and done.all():
                    break
        finally:
            self.train(was_training)


def _check_request(model: GPT2, length: int, new: int, sampling: Sampling) -> None:
    room = max(model.n_positions - length, 0)
    lines = [] if length else ["idx: the prompt is empty; give at least one token"]
    if not 1 <= new <= room:
        lines.append(
            f"max_new_tokens={new}: must be at least 1, and a prompt of {length} "
            f"tokens leaves room for {room} in n_positions={model.n_positions}; "
            "ask for fewer, or shorten the prompt"
        )
    refuse(lines + sampling.mistakes(model.vocab_size))
