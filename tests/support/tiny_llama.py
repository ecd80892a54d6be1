"""Sizes of small Llama models: grouped queries, and a head for each; tied heads, and not."""

TINY = dict(
    vocab_size=61,
    n_positions=64,
    n_layer=2,
    n_head=4,
    n_kv_head=2,
    n_embd=32,
    n_inner=40,
    rope_theta=1e4,
)
SHAPES = {
    "grouped": TINY,
    "a head of keys for each": {**TINY, "n_kv_head": 4, "tied_head": False},
    "one head of keys": {**TINY, "n_head": 8, "n_kv_head": 1, "norm_eps": 1e-6},
    "untied, other angles": {**TINY, "rope_theta": 123.0, "tied_head": False},
}
