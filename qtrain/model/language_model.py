"""What language models have in common: sizes, the way of tokens through blocks, generation.

Shapes: B batch, T tokens of one call, S tokens seen by attention (T and the cache's),
C = n_embd, H = n_head, D = C / H, V = vocab_size.
"""

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from qtrain.backend.torch_ao import DeQuantStub, QuantStub
from qtrain.common.validate import MANY, WIDE, refuse, whole
from qtrain.model.block import Call
from qtrain.model.kv_cache import KVCache
from qtrain.model.sampling import Sampling

MOST = {  # of each size
    "vocab_size": MANY,
    "n_positions": MANY,
    "n_layer": 1024,
    "n_head": 1024,
    "n_kv_head": 1024,
    "n_embd": WIDE,
    "n_inner": WIDE,
}


class LanguageModel(nn.Module):
    """Token embedding, blocks, a norm, a head; with a KV cache and generation.

    A subclass takes its sizes, makes the modules below and calls `finish`. Each
    Linear layer stands between its own stubs; all else stays in float.

    Attributes:
        wte: the embedding of tokens.
        h: the blocks; called with (x, slot, mask, *places).
        ln_f: the last norm.
        lm_head: the Linear layer to logits.
    """

    # Its state dict holds all tensors that it has, so that it can be made without
    # any, and filled.
    is_all_state = True

    vocab_size: int
    n_positions: int
    n_layer: int
    n_head: int
    n_kv_head: int
    n_embd: int
    n_inner: int
    wte: nn.Embedding
    h: nn.ModuleList
    ln_f: nn.LayerNorm | nn.RMSNorm
    lm_head: nn.Linear

    def take(self, sizes: Mapping[str, int], problems: Iterable[str] = ()) -> None:
        """Makes sizes attributes, where they and all else are in range.

        Raises:
            ValueError: a size is not, or there are other problems; tells all.
        """
        lines = [
            line
            for name, value in sizes.items()
            for line in whole(name, value, 1, MOST[name])
        ]
        refuse([*lines, *problems])
        defaults = {"n_kv_head": sizes["n_head"], "n_inner": 4 * sizes["n_embd"]}
        sizes = {**defaults, **sizes}
        refuse(
            f"{all_of}={sizes[all_of]}: must be a multiple of {part}={sizes[part]}"
            for all_of, part in (("n_embd", "n_head"), ("n_head", "n_kv_head"))
            if sizes[all_of] % sizes[part]
        )
        for name, value in sizes.items():
            setattr(self, name, value)

    def finish(self, tied: bool) -> None:
        """Makes the head, and marks what stays in float.

        Args:
            tied: whether the head's weight is the embedding's: the same Parameter. A
                conversion that packs the head leaves the embedding as it is.
        """
        self.quant_head, self.dequant_head = QuantStub(), DeQuantStub()
        self.lm_head = nn.Linear(self.n_embd, self.vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.wte.weight
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.LayerNorm | nn.RMSNorm):
                # Eager mode's mark of a layer that stays in float.
                module.__dict__["qconfig"] = None

    def fill(self, weights: Mapping[str, Tensor], pretrained: str) -> None:
        """Takes the weights of a checkpoint, of which all names are known to fit.

        Raises:
            ValueError: a shape is not that of the checkpoint's own sizes; tells all.
        """
        own = self.state_dict()
        refuse(
            f"pretrained={pretrained}: {name} has shape {tuple(weight.shape)}, "
            f"its sizes ask for {tuple(own[name].shape)}; use an undamaged checkpoint"
            for name, weight in weights.items()
            if weight.shape != own[name].shape
        )
        self.load_state_dict(weights)

    def fuse_model(self, is_qat: bool) -> None:
        """Does nothing: no layer follows a Linear directly that torch could fuse with it."""

    def embed(self, idx: Tensor, position: Tensor, *, cached: bool) -> Tensor:
        """Returns what enters the first block, (B, T, C).

        Args:
            idx: int64 (B, T).
            position: int64 (T,), of these tokens in the text.
            cached: whether a cache is used: no dropout then, whatever the mode.
        """
        return self.wte(idx)

    def places(self, position: Tensor) -> tuple[Tensor, ...]:
        """Returns what blocks must know of the positions (T,), besides the mask."""
        return ()

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
        _refuse_long(start + num_tokens, self.n_positions)
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
            places = self.places(position)
            x = self.embed(idx, position, cached=cache is not None)
            for block, slot in zip(blocks, slots, strict=True):
                x = block(x, slot, mask, *places)
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


def _refuse_long(context: int, n_positions: int) -> None:
    if context > n_positions:
        raise ValueError(
            f"context={context}: must be at most n_positions={n_positions}; "
            "shorten the input (data.context), "
            "or train with a larger model.n_positions"
        )


def _check_request(
    model: LanguageModel, length: int, new: int, sampling: Sampling
) -> None:
    room = max(model.n_positions - length, 0)
    lines = [] if length else ["idx: the prompt is empty; give at least one token"]
    if not 1 <= new <= room:
        lines.append(
            f"max_new_tokens={new}: must be at least 1, and a prompt of {length} "
            f"tokens leaves room for {room} in n_positions={model.n_positions}; "
            "ask for fewer, or shorten the prompt"
        )
    refuse(lines + sampling.mistakes(model.vocab_size))
